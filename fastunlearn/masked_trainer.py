"""MaskedTrainer: which weights of a model move. Masks beside their parameters, the optimiser that obeys them, the norm that it clips by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastunlearn import optim
from fastunlearn._modes import evaluating
from fastunlearn.certified import CertifiedTrainer
from fastunlearn.foreign import check_optimizer
from fastunlearn.localize.choose import saliency_masks
from fastunlearn.ops.mask import BitMask
from fastunlearn.processes import masks_of_first
from fastunlearn.sharded import gathered_masks
from fastunlearn.updates.hamu import Hamu

_ADAMW = {"adamw_torch", "adamw_torch_fused"}


class MaskedTrainer(CertifiedTrainer):
    """What `TwoTermTrainer` adds to its step where masks say which entries of the weights may move; clipping too is the optimiser's."""

    args: Any
    model: Any
    train_dataset: Any
    optimizer: Any
    #: whether parameters without a mask train too, where there are masks
    train_unmasked = False
    #: how localize=saliency sums gradients (`ops.saliency_accumulate_`)
    saliency_kind = "abs"

    def start_masks(self, args: Any, masks: Mapping[str, BitMask] | None) -> None:
        """Before the Trainer is made. masks: parameter name -> BitMask of the entries that may move."""
        self.masks: dict[str, BitMask] | None = dict(masks) if masks is not None else None
        #: what the optimiser moves: the masks, or with localize="saliency" a part of them
        self.movable = self.masks
        self._chosen = False
        #: name -> (mask of the whole parameter, what the optimiser takes)
        self._placed: dict[str, tuple[BitMask, BitMask | None]] = {}
        self._grad_norm = torch.zeros(())
        self._max_grad_norm = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None

    def saliency_loss(self, rows: range) -> Tensor:
        """The loss of some forget rows whose gradient localize=saliency looks at."""
        raise NotImplementedError

    def _localize(self) -> None:
        """Before the first step of a run that is not resumed: masks that need a pass over the forget set."""
        if self._chosen or self.args.localize != "saliency":
            return
        self._chosen = True
        forget = self.train_dataset.forget
        # Processes that hold parts of one model each take their rows of a batch, as in a step: the scores depend on its size.
        size = self.args.per_device_train_batch_size * (self.args.world_size if self.sharded else 1)
        batches = [range(i, min(i + size, len(forget))) for i in range(0, len(forget), size)]
        with self.by_itself(), evaluating(self.model):
            masks = saliency_masks(
                self.model, map(self.saliency_loss, batches), self.args.saliency_density, within=self._within(),
                kind=self.saliency_kind, total=len(batches), process_group=torch.distributed.group.WORLD if self.sharded else None,
            )  # fmt: skip
        masks = gathered_masks(masks) if self.sharded else masks_of_first(masks, self.args.device)
        self.movable = {name: self._expand_mask(name, mask) for name, mask in masks.items()}

    def _within(self) -> Mapping[str, BitMask] | None:
        """The masks, in the shapes of the parameters that are here."""
        if self.masks is None or not self.sharded:
            return self.masks
        own = dict(self.model.named_parameters())
        return {n: self.part_of_mask(m, own[n]) for n, m in self.masks.items() if tuple(m.shape) == tuple(own[n].shape)}

    def lr_scale(self) -> dict[str, Tensor] | None:
        """Factors on the learning rate of single entries, by parameter name; None: none. For methods to override."""
        return None

    def create_optimizer(self, model: Any = None) -> Any:
        """MaskedAdamW or MaskedSGD over what may move; another `optim` only where nothing is masked."""
        if self.optimizer is not None:
            self._check_optimizer(self._masked_optimizer())
            return self.optimizer
        args, model = self.args, self.model if model is None else model
        name = str(getattr(args.optim, "value", args.optim))
        if not self._own_optimizer():
            trained = [p for p in model.parameters() if p.requires_grad]
            check_optimizer(name, self._masks_of(model), self.lr_scale() or {}, args, trained)
            return super().create_optimizer(model)
        scales = self.lr_scale() or {}
        if isinstance(self.update, Hamu) and self.update.takes_step:
            if scales:
                raise ValueError(
                    f"update: {self.args.update} cannot take factors on single entries: they void its guarantee"
                )
            trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            self.optimizer = self.update.make_optimizer(trained, self._masks_of(model), args)
            self.optimizer.register_step_pre_hook(self.before_step)
            self.optimizer.register_step_post_hook(self.after_step)
            return self.optimizer
        decay = set(self.get_decay_parameter_names(model))
        groups: list[dict[str, Any]] = []
        for weight_decay, inside in ((args.weight_decay, True), (0.0, False)):
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (n in decay) == inside]
            if not named:
                continue
            group: dict[str, Any] = {"params": named, "weight_decay": weight_decay}
            if self.movable:
                group["masks"] = [self._mask_of(n, p) for n, p in named]
            if scales:
                group["lr_scale"] = [self._scale_of(scales, n, p) for n, p in named]
            groups.append(group)
        common: dict[str, Any] = {
            "lr": args.learning_rate,
            "max_grad_norm": self._max_grad_norm,
            "stochastic_rounding": args.stochastic_rounding,
            "master_weights": args.master_weights,
            "seed": args.seed,
        }
        if name == "sgd":
            self.optimizer = optim.MaskedSGD(groups, **common)
        else:
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = optim.MaskedAdamW(groups, betas=betas, eps=args.adam_epsilon, **common)
        self.optimizer.register_step_post_hook(self._note_grad_norm)
        return self.optimizer

    def _masks_of(self, model: Any) -> list[BitMask | None]:
        """For each parameter that trains the entries that may move."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return [self._mask_of(n, p) if self.movable else None for n, p in named]

    def _mask_of(self, name: str, parameter: Tensor) -> BitMask | None:
        """A parameter's mask beside it; None: it has none and may move as a whole."""
        assert self.movable is not None
        mask = self.movable.get(plain_name(name))
        if mask is None and not self.train_unmasked and self.masks is not None:
            raise ValueError(
                f"masks: none is of {name}, and what has no mask is frozen; names of a wrapped model differ?"
            )
        if mask is None:
            return None
        kept = self._placed.get(name)
        if kept is None or kept[0] is not mask:
            compact = self._compact_mask(plain_name(name), mask)
            kept = self._placed[name] = (mask, None if compact is None else self.part_of_mask(compact, parameter))
        return kept[1]

    def _compact_mask(self, name: str, mask: BitMask) -> BitMask | None:
        """A mask in the shape that its parameter has now; None: everything may move."""
        return mask

    def _expand_mask(self, name: str, mask: BitMask) -> BitMask:
        """The opposite of `_compact_mask`."""
        return mask

    def _compact_scale(self, name: str, scale: Tensor) -> Tensor:
        """Factors in the shape that their parameter has now."""
        return scale

    def _scale_of(self, scales: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
        scale = scales.get(plain_name(name))
        if scale is None:
            return None
        scale = self._compact_scale(plain_name(name), scale)
        if self.sharded and scale.shape != parameter.shape:
            # One factor for each entry that may move: by rows only in the full shape.
            kept = (self.masks or {})[plain_name(name)].unpack().to(scale.device)
            scale = torch.ones(kept.shape, device=scale.device).masked_scatter_(kept, scale)
        return self.part_of_scale(scale, parameter) if self.sharded else scale

    def _check_optimizer(self, own: Any) -> None:
        """A user's optimiser must freeze what the masks freeze."""
        if not self.movable or not any(mask is not None for mask in self._masks_of(self.model)):
            return
        named = {plain_name(n): p for n, p in self.model.named_parameters()}
        wrong = own is None or any(
            p in own._entries and own._entries[p].slot.count != int(self.movable[n].count())
            for n, p in named.items()
            if n in self.movable
        )
        if wrong:
            raise ValueError(
                "optimizers: would move weights that the masks freeze; want optim.MaskedAdamW or MaskedSGD with these masks, or "
                "leave the optimiser to the trainer"
            )

    def _place_masks(self) -> None:
        """Masks beside their parameters: the Trainer has moved the model since they were read."""
        devices = {plain_name(name): parameter.device for name, parameter in self.model.named_parameters()}
        if self.masks is not None:
            same = self.movable is self.masks
            if self.will_shard():
                # Whole masks stay on the CPU; the optimiser gets its own rows.
                devices = dict.fromkeys(devices, torch.device("cpu"))
            self.masks = {name: mask.to(devices.get(name, mask.device)) for name, mask in self.masks.items()}
            self.movable = self.masks if same else self.movable

    def mask_density(self) -> float | None:
        """Share of the masked weights (of the adapted ones under masks) that may move; None where nothing is masked."""
        masks = list((self.movable or {}).values())
        adapted = [m for m in self.accelerator.unwrap_model(self.model).modules() if hasattr(m, "lora_mask_bits")]
        masks += [mask for layer in adapted if (mask := layer.mask("default")) is not None]
        total = sum(mask.numel() for mask in masks)
        return sum(int(mask.count()) for mask in masks) / total if total else None

    def _own_optimizer(self) -> bool:
        """Whether the optimiser will be one of ours, that clips by itself."""
        return self.update.takes_step or str(getattr(self.args.optim, "value", self.args.optim)) in _ADAMW | {"sgd"}

    # ---- clipping is the optimiser's: the norm of what moves, not of what is frozen ----------------------------------

    def _masked_optimizer(self) -> optim.MaskedAdamW | optim.MaskedSGD | None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, (optim.MaskedAdamW, optim.MaskedSGD)) else None

    def _clips_itself(self) -> bool:
        return self.update.takes_step or self._masked_optimizer() is not None

    def _note_grad_norm(self, optimizer: Any, *_: Any) -> None:
        if optimizer.grad_norm is not None:
            self._grad_norm = optimizer.grad_norm.detach()

    def _clip_grad_norm(self, model: Any) -> Any:
        return None if self._clips_itself() else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return None if self._clips_itself() else super()._get_grad_norm(model, grad_norm)


def plain_name(name: str) -> str:
    """A parameter's name without what DDP and torch.compile put before it."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
