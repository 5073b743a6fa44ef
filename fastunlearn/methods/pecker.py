"""PECKER: score distillation forgets a class or a concept by the weights that matter for it (arXiv 2604.05634, ICPR 2026).

A reconstruction: of the paper its abstract is known (a saliency mask within a distillation framework with a pseudo-score network), no
code and no table. What is built here is SFD (`fastunlearn.objectives.score_distillation`) with SalUn's mask of its forget term, taken
once at the start; every choice that the abstract leaves open is an option:

    theta <- theta - lr Adam(m .* grad(k_r L_r + k_f L_f)),  m = the share `density` of highest |sum of grad L_f| at theta_0

`granularity` other than weight makes a mask save arithmetic too (`fastunlearn.parametrize.mask_model`). Baselines by the same code:
method=sfd (no mask), gradient_ascent (the teacher unlearns to predict the noise of what is forgotten), sid (distillation alone: makes
the one-step generator that the second stage starts from).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from fastunlearn import optim
from fastunlearn._modes import checkpoint_blocks
from fastunlearn.localize.granularity import Granularity, structured_masks
from fastunlearn.methods._pecker_config import PECKERConfig as PECKERConfig
from fastunlearn.methods._pecker_run import Progress, check_resumable, load_state, save_state, write_generator
from fastunlearn.methods._pecker_setup import Setup, conditions_of, copy_of, make_setup
from fastunlearn.objectives.score_distillation import (
    Distillation,
    Draw,
    Timesteps,
    forget_saliency,
)
from fastunlearn.ops.mask import BitMask
from fastunlearn.optim.ema import EMA
from fastunlearn.output_folder import claim_output
from fastunlearn.parametrize.masked_layers import MaskedModel, mask_model, plain_model
from fastunlearn.resuming import check_resume, last_checkpoint, resumes_in
from fastunlearn.sharded import check_processes
from fastunlearn.two_terms import DivergenceError


class PECKERTrainer(Trainer):
    """Makes a diffusion model's one-step generator forget, data-free.

    Args:
        model: the teacher: a text-to-image pipeline (U-Net and one text encoder), a pipeline of UNet2DModel with class embeddings, or
            such a UNet2DModel itself with its scheduler as `processing_class`. Left as it is.
        args: a `PECKERConfig`.
        forget_dataset: what must go: a label or labels, a prompt or prompts.
        retain_dataset: what must stay; None: all other labels (of text it has to be said).
        processing_class: scheduler of a bare U-Net.
        peft_config, quantization_config: refused; the arguments stand here for the order's sake.
        callbacks, optimizers: as in Trainer; optimizers is refused where the trainer masks.
        override: what is drawn instead, one or as many as forget_dataset.
        generator: a one-step generator of the same architecture (a U-Net, a pipeline with one, or a folder of `save_model`), where
            stages="two" starts from. method="sid" makes one.

    Attributes:
        generator: theta, in `model`. pseudo: psi. teacher: phi, frozen.
        masks: parameter name -> BitMask of what may move; None before the first step and without a mask.
        masked_model: what `mask_model` left of the arithmetic.

    Raises:
        ValueError: a pipeline of more than a U-Net and one text encoder (SDXL, SD 3, FLUX), a label the model does not have, override
            equal to forget, a retain set with what is forgotten, schedules or architectures that differ, several processes, DeepSpeed,
            a mask that selects nothing. All but the last before any work.
    """

    args: PECKERConfig
    model: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: PECKERConfig,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        override: Any = None,
        generator: Any = None,
    ):
        if not isinstance(args, PECKERConfig):
            raise TypeError(f"args: want a PECKERConfig, got {type(args).__name__}")
        for name, given in (("peft_config", peft_config), ("quantization_config", quantization_config)):
            if given is not None:
                raise ValueError(f"{name}: the generator's own weights move under a mask; leave it out")
        if optimizers != (None, None):
            raise ValueError("optimizers: two networks take turns under one mask; the trainer makes both optimisers")
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError("PECKERTrainer runs in one process on one device; CUDA_VISIBLE_DEVICES=0 shows it one")
        check_processes(args)
        self.setup: Setup = make_setup(model, processing_class, args, generator)
        self.forget, self.override, self.retain = conditions_of(
            self.setup,
            forget_dataset,
            override,
            retain_dataset,
            needs_forget=args.method != "sid",
            k_retain=args.k_retain,
        )
        setup = self.setup
        first = setup.generator if setup.generator is not None else setup.unet
        theta = copy_of(setup.unet if args.method == "gradient_ascent" else first)
        self.teacher, self.pseudo = copy_of(setup.unet).requires_grad_(False), copy_of(setup.unet)
        self.masks: dict[str, BitMask] | None = None
        self.soft: dict[str, Tensor] = {}
        self.masked_model: MaskedModel | None = None
        self.pseudo_optimizer: Any = None
        self._pseudo_state: Any = None
        self._pseudo_trains: list[nn.Parameter] = []
        self._sums: dict[str, Tensor] = {}
        self._noted = 0
        checkpoint_blocks(args, theta, self.pseudo, self.teacher)
        super().__init__(
            model=cast(Any, theta), args=args, data_collator=lambda items: {"iteration": torch.tensor(items)},
            train_dataset=cast(Any, range(args.max_steps)), callbacks=callbacks,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False
        device = args.device
        self.teacher.to(device)
        self.pseudo.to(device)
        self.start: Any = copy_of(first).to(device).requires_grad_(False) if args.method == "gradient_ascent" else None
        self.forget, self.override, self.retain = (
            None if c is None else c.to(device) for c in (self.forget, self.override, self.retain)
        )
        empty = None if setup.empty is None else setup.empty.to(device)
        self.distillation = Distillation(
            self.teacher, self.pseudo, setup.schedule, setup.shape, Timesteps(setup.t_min, setup.t_init, setup.t_max),
            setup.alpha, setup.kappa, setup.kappa, setup.kappa, empty,
        )  # fmt: skip
        start_share = setup.ema_decay**args.max_steps
        if start_share > 0.1:
            warnings.warn(
                f"ema_decay: after {args.max_steps:,} iterations {start_share:.0%} of the average that is saved is still the start "
                f"({setup.ema_decay} ** {args.max_steps}); want a smaller ema_decay (0: the last weights) or more iterations",
                stacklevel=2,
            )
        self.ema = EMA(self.model, setup.ema_decay)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Average(self))
        if not args.disable_tqdm:
            self.add_callback(Progress(args.method))

    @property
    def generator(self) -> nn.Module:
        """theta."""
        return cast(nn.Module, self.accelerator.unwrap_model(self.model))

    @property
    def output(self) -> Path:
        return Path(str(self.args.output_dir))

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=1, collate_fn=self.data_collator)  # type: ignore[arg-type]

    # ---- draws ----------------------------------------------------------------------------------------------------------

    def _random(self, iteration: int, purpose: int) -> torch.Generator:
        """The random numbers of one purpose in one iteration: the same ones in a run that was resumed."""
        return torch.Generator().manual_seed((self.args.seed * 1_000_003 + iteration) * 8 + purpose)

    def _draw(self, which: Any, iteration: int, purpose: int) -> Draw:
        size = self.args.per_device_train_batch_size
        if which is self.forget:
            size = self.args.forget_batch_size or size
        whole = self.args.method == "gradient_ascent"
        return self.distillation.draw(which, size, self._random(iteration, purpose), whole=whole)

    def _forget_loss(self, draw: Draw) -> Tensor:
        assert self.override is not None
        return self.distillation.generator_loss(self.model, draw, self.override.values[draw.index.to(draw.z.device)])

    # ---- the mask -------------------------------------------------------------------------------------------------------

    def _saliency(self, iteration: int) -> dict[str, Tensor]:
        def loss(number: int) -> Tensor:
            assert self.forget is not None
            draw = self.distillation.draw(
                self.forget, self.args.forget_batch_size or self.args.per_device_train_batch_size,
                self._random(-1 - iteration * self.args.saliency_batches - number, 7), whole=self.args.saliency_loss == "denoising",
            )  # fmt: skip
            with self.accelerator.autocast():
                if self.args.saliency_loss == "sid":
                    return self._forget_loss(draw)
                with torch.no_grad():
                    images = self.distillation.generate(self.model, draw.z, draw.condition)
                return self.distillation.denoising(self.model, images, draw)

        self.pseudo.requires_grad_(False)
        salun = self.args.saliency_loss == "denoising"
        return forget_saliency(
            self.generator,
            loss,
            self.args.saliency_batches,
            reduce=self.args.saliency_reduce,
            max_norm=1.0 if salun else None,
        )

    def localize(self, iteration: int = 0) -> None:
        """Takes the mask from the forget term of the generator as it is now, and puts it on."""
        # Masked layers make no gradient off the mask before: nothing could come into this one.
        plain_model(self.generator).requires_grad_(True)
        scores = self._saliency(iteration)
        args = self.args
        unit = cast(Granularity, args.granularity)
        masks = structured_masks(scores, args.density, granularity=unit, block=args.block)
        for name, mask in masks.items():
            if mask.numel() and float(mask.density) < args.freeze_below:
                masks[name] = BitMask.zeros(mask.shape, mask.bits.device)
        if not any(int(mask.count()) for mask in masks.values()):
            raise ValueError(
                f"density: {args.density} of the {args.granularity}s is none of them; the mask selects nothing, want a larger share"
            )
        if args.mask_values == "soft":
            # Over all tensors: the most salient weight moves at the whole learning rate.
            most = max(float(s.max()) for s in scores.values() if s.numel()) or 1.0
            self.soft = {name: s / most for name, s in scores.items()}
        self.put_masks(masks)

    def put_masks(self, masks: dict[str, BitMask]) -> None:
        """Puts a mask on: layers that make the gradient of what may move, and what has no set bit frozen."""
        self.masks = masks
        if self.args.mask_terms == "all":
            self.masked_model = mask_model(self.generator, masks)
        if self.args.mask_networks == "both":
            mask_model(self.pseudo, masks)
            # Which of its parameters take steps is settled with its optimiser.
            self.pseudo.requires_grad_(False)
        if self.args.refresh_every:
            # An entry may come into the mask later.
            self.generator.requires_grad_(True)

    def _cut(self, parameters: Any) -> None:
        if self.args.clip_value is not None:
            grads = [p.grad for p in parameters if p.grad is not None]
            if grads:
                torch._foreach_clamp_min_(grads, -self.args.clip_value)
                torch._foreach_clamp_max_(grads, self.args.clip_value)

    # ---- optimisers -----------------------------------------------------------------------------------------------------

    def _adam(self, network: nn.Module, rate: float, masks: dict[str, BitMask] | None, soft: dict[str, Tensor]) -> Any:
        args = self.args
        named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        return optim.MaskedAdamW(
            named, None if masks is None else [masks[n].to(p.device) for n, p in named], lr=rate,
            betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, weight_decay=args.weight_decay,
            lr_scale=[soft[n].to(p.device) for n, p in named] if soft else None,
            stochastic_rounding=args.stochastic_rounding, seed=args.seed,
        )  # fmt: skip

    def create_optimizer(self, model: Any = None) -> Any:
        """Two, of what may move; the Trainer steps the generator's, `training_step` the pseudo-score's."""
        if self.optimizer is None:
            args, setup = self.args, self.setup
            fixed = args.masked and args.mask_terms == "all" and not args.refresh_every
            masks = self.masks if fixed else None
            self.optimizer = self._adam(self.generator, setup.learning_rate, masks, self.soft if fixed else {})
            if args.method != "gradient_ascent":
                both = args.masked and args.mask_networks == "both" and not args.refresh_every
                self.pseudo.requires_grad_(True)
                if both and self.masks is not None:
                    mask_model(self.pseudo, self.masks)
                self._pseudo_trains = [p for p in self.pseudo.parameters() if p.requires_grad]
                self.pseudo_optimizer = self._adam(
                    self.pseudo, setup.pseudo_learning_rate, self.masks if both else None, {}
                )
                if self._pseudo_state is not None:
                    self.pseudo_optimizer.load_state_dict(self._pseudo_state)
        return self.optimizer

    # ---- the step -------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        iteration, args = self.state.global_step, self.args
        model.eval()
        if args.masked and args.refresh_every and iteration and iteration % args.refresh_every == 0:
            self.localize(iteration)
        if self.pseudo_optimizer is not None:
            self._pseudo_step(iteration)
        params = [p for p in model.parameters() if p.requires_grad]
        total = torch.zeros((), device=args.device)
        masked_alone = args.masked and args.mask_terms == "forget"
        retained: list[Tensor | None] = []
        for name, factor, which, purpose in (
            ("retain", args.k_retain, self.retain, 2), ("forget", self.setup.k_forget, self.forget, 3),
        ):  # fmt: skip
            if which is None or not factor:
                continue
            if name == "forget" and masked_alone:
                retained = [p.grad for p in params]
                for p in params:
                    p.grad = None
            draw = self._draw(which, iteration, purpose)
            # Of all three networks: what the Trainer wraps is the generator alone.
            with self.accelerator.autocast():
                loss = self._term(name, draw)
            self._check_finite(name, loss)
            self.accelerator.backward(loss * factor)
            total += loss.detach() * factor
            self._note(f"{name}_loss", loss)
        if args.masked and (masked_alone or args.refresh_every):
            self._mask_gradients()
        for p, kept in zip(params, retained):
            p.grad = kept if p.grad is None else p.grad if kept is None else p.grad + kept
        self._cut(params)
        self._noted += 1
        return total

    def _term(self, name: str, draw: Draw) -> Tensor:
        if self.args.method == "gradient_ascent":
            assert self.start is not None
            with torch.no_grad():
                images = self.distillation.generate(self.start, draw.z, draw.condition)
            loss = self.distillation.denoising(self.model, images, draw)
            return loss if name == "retain" else -loss
        return self._forget_loss(draw) if name == "forget" else self.distillation.generator_loss(self.model, draw)

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        """Where the optimiser does not: its mask would hold still what another term, or another mask, may move."""
        assert self.masks is not None
        for name, p in self.generator.named_parameters():
            if p.grad is None:
                continue
            if self.soft:
                p.grad *= self.soft[name].to(p.device)
            p.grad.masked_fill_(~self.masks[name].unpack().to(p.device), 0)

    def _pseudo_step(self, iteration: int) -> None:
        for p in self._pseudo_trains:
            p.requires_grad_(True)
        rate = self.setup.pseudo_learning_rate
        now = self.optimizer.param_groups[0]["lr"] / self.setup.learning_rate if self.setup.learning_rate else 1.0
        for group in self.pseudo_optimizer.param_groups:
            group["lr"] = rate * now
        for factor, which, purpose in (
            (self.args.k_retain, self.retain, 0), (self.setup.k_forget, self.forget, 1)
        ):  # fmt: skip
            if which is None or not factor:
                continue
            draw = self._draw(which, iteration, purpose)
            with self.accelerator.autocast():
                loss = self.distillation.pseudo_loss(self.model, draw)
            self._check_finite("pseudo-score", loss)
            self.accelerator.backward(loss * factor)
            self._note("pseudo_loss", loss * factor)
        if self.args.masked and self.args.mask_networks == "both" and self.args.refresh_every:
            assert self.masks is not None
            for name, p in self.pseudo.named_parameters():
                if p.grad is not None:
                    p.grad.masked_fill_(~self.masks[name].unpack().to(p.device), 0)
        self._cut(self._pseudo_trains)
        self.pseudo_optimizer.step()
        self.pseudo_optimizer.zero_grad(set_to_none=True)
        for p in self._pseudo_trains:
            p.requires_grad_(False)

    def _check_finite(self, name: str, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss.detach())):
            raise DivergenceError(
                f"the {name} loss is {float(loss.detach())} in iteration {self.state.global_step + 1}; training stopped before its step. "
                f"The last good checkpoint is {last_checkpoint(self.output)}. A lower learning rate helps."
            )

    def _note(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._noted:
            logs |= {name: float(value) / self._noted for name, value in self._sums.items()}
            self._sums, self._noted = {}, 0
        super().log(logs, start_time)

    # ---- the run --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As Trainer.train; the output folder is locked meanwhile, and refused where it holds something (overwrite_output_dir)."""
        resume = resumes_in(self.output, resume_from_checkpoint)
        with claim_output(self.output, overwrite=self.args.overwrite_output_dir, resume=resume):
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(self.output, remove_incomplete=True)
                if resume_from_checkpoint is None:
                    check_resume(self.output, True)
            if resume_from_checkpoint:
                check_resumable(self, Path(str(resume_from_checkpoint)))
                load_state(self, Path(str(resume_from_checkpoint)))
            elif self.args.masked:
                self.localize()
            return super().train(resume_from_checkpoint or None, *args, **options)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_state(self, Path(output_dir or self.output))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The averaged generator as diffusers has it (unet, scheduler), masks.safetensors and pecker.json; whole or not at all."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with self.ema.applied(self.generator):
            write_generator(self, Path(output_dir or self.output))

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None: what was measured is in metrics.json."""


class _Average(TrainerCallback):
    """The average, after every step."""

    def __init__(self, trainer: PECKERTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.ema.update(self.trainer.generator)
