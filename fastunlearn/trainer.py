"""UnlearnTrainer: machine unlearning of language models on transformers' Trainer.

A run is four independent choices, each a folder: which parameters may move (`localize`), what is optimised (`objectives`), how
two gradients become one (`updates`), what a step writes to (`parametrize`). The step itself is `fastunlearn.two_terms`'; here is
what makes it one of language models: rows of tokens, references, adapters, the sparsity pattern of a pruned model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastunlearn._modes import evaluating, in_fp32
from fastunlearn._stored import read_json
from fastunlearn.arguments import TwoTermConfig
from fastunlearn.checkpoint import (
    MASKS,
    PRUNING,
    check_masks,
    check_pattern,
    load_checkpoint,
    pattern_of,
    save_checkpoint,
)
from fastunlearn.data.pairs import PairedCollator, PairedSet, check_context, group_rows, row_limit
from fastunlearn.data.refusals import spread_alternates, with_refusals
from fastunlearn.data.text import DATE, TextSet, check_disjoint, encode_rows, load_rows
from fastunlearn.objectives import RMU, Objective, answer_logprobs, make_objective, token_nll
from fastunlearn.objectives.cached_logprobs import adapter_off, model_digest, rows_digest
from fastunlearn.objectives.distribution import PDU, Dual
from fastunlearn.objectives.logprobs import LiveReference
from fastunlearn.objectives.make_references import load_references, make_references, save_references
from fastunlearn.objectives.references import References
from fastunlearn.objectives.rmu import steered_module
from fastunlearn.ops.mask import BitMask, save_masks
from fastunlearn.parametrize import CompressedNM, full_weights, lora
from fastunlearn.parametrize.compressed_nm import dense_state_dict
from fastunlearn.processes import agreed, anywhere, combined, summed
from fastunlearn.quantised import check_training, keep_differentiable, prepare
from fastunlearn.resuming import STATE_FILE, complete_checkpoint, last_checkpoint, resumes_in
from fastunlearn.sharded import check_processes, check_shards
from fastunlearn.two_terms import DivergenceError, TwoTermTrainer

__all__ = [
    "STATE_FILE",
    "DivergenceError",
    "PatternError",
    "UnlearnConfig",
    "UnlearnTrainer",
    "complete_checkpoint",
    "last_checkpoint",
    "resumes_in",
]

#: what PDU keeps from step to step, in a checkpoint to resume from
DUAL_FILE = "dual.json"
#: arguments that are the objective's; None: its default
OBJECTIVE_OPTIONS = (
    "gamma", "alpha", "beta", "delta", "beta1", "beta2", "ignore_first_n_answer_tokens", "steering_coeff", "module_regex",
    "retain_loss_eps", "primal_dual", "dual_step_size", "dual_update_upon", "dual_warmup_epochs", "parity", "retain_loss_type",
)  # fmt: skip


class PatternError(ArithmeticError):
    """A weight that pruning removed is no longer zero; nothing was saved."""


@dataclass
class UnlearnConfig(TwoTermConfig):
    """Arguments of `UnlearnTrainer`: transformers' TrainingArguments and the choices of unlearning.

    Names and defaults of objectives, learning rate, weight decay, epochs and warm-up are open-unlearning's. An epoch is one pass
    over the forget set; per_device_train_batch_size counts forget rows.
    """

    objective: str = field(
        default="NPO",
        metadata={
            "help": "What is optimised: GradAscent, GradDiff, KL, NPO, SimNPO, IdkDPO, AltPO, RMU, UNDIAL, WGA, SatImp, CEU or PDU."
        },
    )
    gamma: float | None = field(default=None, metadata={"help": "Factor of the forget term (the objective's default)."})
    alpha: float | None = field(default=None, metadata={"help": "Factor of the retain term (the objective's default)."})
    beta: float | None = field(
        default=None, metadata={"help": "Of NPO, SimNPO, IdkDPO, AltPO, UNDIAL, WGA (its default)."}
    )
    delta: float | None = field(default=None, metadata={"help": "Margin of SimNPO, nats a token (0)."})
    beta1: float | None = field(default=None, metadata={"help": "Of SatImp: exponent of p (5)."})
    beta2: float | None = field(default=None, metadata={"help": "Of SatImp: exponent of 1 - p (1)."})
    ignore_first_n_answer_tokens: int | None = field(default=None, metadata={"help": "Of CEU (1)."})
    steering_coeff: float | None = field(default=None, metadata={"help": "Of RMU: length of the random direction (2)."})
    module_regex: str | None = field(default=None, metadata={"help": "Of RMU: the steered block (model\\.layers\\.7)."})
    retain_loss_eps: float | None = field(
        default=None, metadata={"help": "Of PDU: the retain loss that is allowed (0.3)."}
    )
    primal_dual: bool | None = field(
        default=None, metadata={"help": "Of PDU: alpha is a multiplier that moves (true)."}
    )
    dual_step_size: float | None = field(default=None, metadata={"help": "Of PDU (5)."})
    dual_update_upon: str | None = field(default=None, metadata={"help": "Of PDU: when alpha moves: step, epoch."})
    dual_warmup_epochs: float | None = field(default=None, metadata={"help": "Of PDU: epochs before alpha moves (5)."})
    parity: bool | None = field(
        default=None,
        metadata={"help": "As open-unlearning counts: KL, UNDIAL over padding too, PDU late, RMU's lengths mixed."},
    )
    retain_loss_type: str | None = field(
        default=None, metadata={"help": "Retain term: NLL, KL to the reference, or (RMU) EMBED_DIFF."}
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Name or folder of the reference; the model itself by default. KL, UNDIAL: held in memory, no states on disk."
        },
    )
    compressed: bool = field(
        default=False,
        metadata={"help": "Hold the survivors of an n:m model only: weights, gradients, optimiser state."},
    )
    max_length: int | None = field(default=1024, metadata={"help": "Tokens of a row; longer prompts lose their start."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message of the chat template."})
    date_string: str | None = field(
        default=DATE,
        metadata={
            "help": "Today's date for chat templates that write one (Llama 3's); null: the template's own choice."
        },
    )
    reference_cache_dir: str | None = field(
        default=None, metadata={"help": "Where reference log-probs are kept (~/.cache/fastunlearn)."}
    )

    def __post_init__(self) -> None:
        # Raises for a name it does not know: before a model is loaded.
        self.make_objective()
        if self.reference_model is not None:
            self.check_compares()
        super().__post_init__()

    def check_compares(self) -> None:
        """Where a reference model is given.

        Raises:
            ValueError: the objective asks none.
        """
        if not self.make_objective().compares:
            raise ValueError(
                f"reference_model: {self.objective} compares with no reference as it is set; leave it out (retain_loss_type=KL, with an "
                "alpha, makes a retain term that does)"
            )

    def missing_retain_term(self) -> str | None:
        return None if self.make_objective().alpha else f"{self.objective} has none (alpha=1 gives it one)"

    def make_objective(self) -> Objective:
        """The objective these arguments describe."""
        return make_objective(self.objective, **{name: getattr(self, name) for name in OBJECTIVE_OPTIONS})


class UnlearnTrainer(TwoTermTrainer):
    """Makes a causal language model forget.

    Args:
        model: a model of transformers, or its name or folder (masks beside it are read too).
        args: an `UnlearnConfig`.
        forget_dataset, retain_dataset: what must go and what must stay: a `TextSet`, rows (dicts with question/answer,
            prompt/completion, messages or text), a path (JSON lines, CSV) or a hub name. retain_dataset may be None where
            the objective has no retain term.
        processing_class: the tokenizer; None: the one beside the model.
        peft_config: a PEFT configuration: only the adapter trains, and the reference is the model with the adapter off. On a pruned
            model a `MaskedLoraConfig`, which is kept to what pruning left.
        quantization_config: of transformers, for a model given by name: its linear layers are held in fewer bits and an adapter
            trains (QLoRA). No masks go with it.
        callbacks, optimizers: as in Trainer.
        masks: parameter name -> BitMask of the entries that may move. Everything else is frozen, unless `train_unmasked` says
            otherwise.
        pruning: how the model was pruned, as in pruning.json: the masks are then what pruning left. That all else is zero, and
            an n:m "pattern", is asserted at every save, and both are saved beside the model.
        reference_model: what the objective compares with, or its name or folder; None: the model as it is before training. KL and UNDIAL
            ask it in every batch, instead of last hidden states kept on disk; `parity` needs it for them, or an adapter. What other
            objectives ask is computed before training, and the model let go. Never made by a copy of its own accord.

    Raises:
        ValueError: an empty set, rows that are in both sets, missing columns, masks that do not fit, no retain set where one is
            wanted, a reference model where none is asked. All before any work.
    """

    args: UnlearnConfig
    can_shard = True

    def __init__(
        self,
        model: nn.Module | str,
        args: UnlearnConfig,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        masks: Mapping[str, BitMask] | None = None,
        pruning: Mapping[str, Any] | None = None,
        reference_model: nn.Module | str | None = None,
    ):
        if not isinstance(args, UnlearnConfig):
            raise TypeError(f"args: want an UnlearnConfig, got {type(args).__name__}")
        self.objective: Objective = args.make_objective()
        if isinstance(model, str):
            options = {} if quantization_config is None else {"quantization_config": quantization_config}
            loaded = load_checkpoint(model, **options)
            module, masks = cast(nn.Module, loaded.model), loaded.masks if masks is None else masks
            processing_class = processing_class or loaded.tokenizer
            if pruning is None and masks is not None:
                # Masks beside a model say what pruning left, also where nobody wrote down how.
                pruning = loaded.pruning or {}
        elif quantization_config is not None:
            raise ValueError("quantization_config: is for a model given by name; this one is loaded already")
        else:
            module = model
        if processing_class is None:
            raise ValueError("processing_class: want the model's tokenizer, got None")
        check_processes(args)
        reference_model = args.reference_model if reference_model is None else reference_model
        other = reference_model is not None
        if other:
            args.check_compares()
        self._check_retain_gradient(args, other=other or hasattr(module, "disable_adapter"))
        adapter = peft_config is not None or hasattr(module, "disable_adapter")
        check_training(module, masks=masks is not None, adapter=adapter)
        keep_differentiable(module)
        if any(p.dtype == torch.float16 for p in module.parameters()) and (not args.master_weights or args.fp16):
            raise ValueError(
                "dtype: float16 weights lose most small updates; load them as float32 (with fp16=true for speed) or bfloat16, or "
                "set master_weights=true (without fp16=true)"
            )
        self.pruning = None if pruning is None else dict(pruning)
        if pruning is not None and masks is None:
            raise ValueError("pruning: given without masks; they say what pruning left")
        if pruning is not None and masks is not None:
            with agreed():
                check_masks(module, masks)
        self.compressed: CompressedNM | None = None
        if args.compressed:
            if peft_config is not None or hasattr(module, "disable_adapter"):
                raise ValueError(
                    "compressed: with an adapter the pruned weights do not move, and nothing is to be saved"
                )
            with agreed():
                self._check_compressible(module, masks, optimizers)
        if peft_config is not None:
            if masks is not None:
                from fastunlearn.parametrize.masked_lora import within_survivors

                peft_config = within_survivors(peft_config, masks)
                if args.localize != "all":
                    raise ValueError(
                        "localize: chooses weights, and an adapter trains; give its own masks (peft_config)"
                    )
            if args.trainable_params_regex is not None:
                raise ValueError(
                    "trainable_params_regex: with an adapter only the adapter trains; choose target_modules there"
                )
            kept = args.gradient_checkpointing_kwargs
            module = prepare(
                module,
                peft_config,
                checkpointing=bool(args.gradient_checkpointing),
                options=kept if isinstance(kept, dict) else None,
            )
            module = lora(module, peft_config)
        elif adapter and not other and (self.objective.needs_reference or self.objective.needs_states):
            warnings.warn(
                "model: it carries an adapter, and the reference model is the one with the adapter off; if the adapter holds "
                "what must be forgotten, merge it first (merge_and_unload)",
                stacklevel=2,
            )
        if isinstance(self.objective, RMU):
            steered_module(module, self.objective.module_regex)
        if (
            self._asks_in_every_batch()
            and self.objective.parity
            and not other
            and not hasattr(module, "disable_adapter")
        ):
            raise ValueError(
                "parity: the reference's states at prompts and padding are not kept: give reference_model, or train a LoRA adapter "
                "(peft_config)"
            )
        self.reference_model = self._load_reference(module, reference_model, args)
        pair = self._make_sets(module, forget_dataset, retain_dataset, processing_class, args)
        self.trained = None if hasattr(module, "disable_adapter") else self._select(module, masks, args)
        self._references = References()
        self.dual: Dual | None = self.objective.make_dual() if isinstance(self.objective, PDU) else None
        pad_id = getattr(processing_class, "pad_token_id", None)
        self.pad_id = int(pad_id if pad_id is not None else processing_class.eos_token_id)
        settings: Any = getattr(module, "config", None)
        caches = getattr(settings, "use_cache", None)
        super().__init__(
            module,
            args,
            pair,
            PairedCollator(self.pad_id),
            masks=masks,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if caches is not None:
            # The Trainer turned it off, and would save it so; the passes of training ask for none by themselves.
            settings.use_cache = caches
        if peft_config is not None:
            # The masks are the adapter's; its factors move as a whole.
            self.movable = None
        if self.dual is not None:
            self.add_callback(_DualUpdates(self.dual))

    def _check_retain_gradient(self, args: UnlearnConfig, *, other: bool) -> None:
        """HAMU's steps are as long as the retain gradient, and keep as much as it promises: it must not be zero at the start.

        Args:
            other: whether the model does not start as its own reference.
        """
        kind = self.objective.retain_loss_type
        if args.update.startswith("hamu") and kind != "NLL" and (kind == "EMBED_DIFF" or not other):
            raise ValueError(
                f"update: {args.update} has no gradient to keep by with {type(self.objective).__name__}'s retain term ({kind}): it is zero where "
                "the model is its own reference; set retain_loss_type=NLL (objective=KL: take GradDiff)"
            )

    def _asks_in_every_batch(self) -> bool:
        """Whether a reference model that is given is asked again and again, not once before training."""
        return self.objective.needs_states or self.objective.needs_retain_states

    def _load_reference(
        self, model: nn.Module, reference: nn.Module | str | None, args: UnlearnConfig
    ) -> nn.Module | None:
        """The reference model that is given, frozen, on the device; None: the model is its own."""
        if isinstance(reference, str):
            dtype = next(model.parameters()).dtype
            reference = cast(nn.Module, load_checkpoint(reference, dtype=dtype, masks="ignore").model)
        if reference is None:
            return None
        if hasattr(reference, "disable_adapter") and (
            self.objective.needs_reference or self.objective.needs_layer_states
        ):
            raise ValueError(
                f"reference_model: {type(self.objective).__name__} would ask it with its adapter off; merge the adapter first "
                "(merge_and_unload)"
            )
        if self.objective.needs_layer_states and isinstance(self.objective, RMU):
            steered_module(reference, self.objective.module_regex)
        return reference.to(args.device).requires_grad_(False)

    # ---- compressed weights ------------------------------------------------------------------------------------------

    def _check_compressible(self, model: nn.Module, masks: Mapping[str, BitMask] | None, optimizers: Any) -> None:
        pattern = pattern_of(self.pruning)
        if masks is None or pattern is None:
            raise ValueError(
                "compressed: wants a model pruned n:m, with its masks and its pattern (`fastunlearn prune ... pattern=2:4` writes "
                "both); for any other leave compressed out"
            )
        if optimizers[0] is not None:
            raise ValueError(
                "optimizers: with compressed=true the optimiser is of other tensors: leave it to the trainer"
            )
        CompressedNM.check(model, masks, *pattern)

    def before_steps(self) -> None:
        """The pruned layers hold survivors only from here on; what looks at dense weights has done so."""
        if self.args.compressed and self.compressed is None:
            assert self.masks is not None
            pattern = pattern_of(self.pruning)
            assert pattern is not None
            self.compressed = CompressedNM(self.model, self.masks, *pattern)
            same = self.movable is self.masks
            # The layers' own bits: a second copy is of no use.
            self.masks = self.masks | {name: layer.mask for name, layer in self.compressed.layers.items()}
            self.movable = self.masks if same else self.movable
        super().before_steps()

    def _compact_mask(self, name: str, mask: BitMask) -> BitMask | None:
        if self.compressed is None:
            return mask
        whole = self.movable is self.masks and name in self.compressed.layers
        return None if whole else self.compressed.compact_mask(name, mask)

    def _expand_mask(self, name: str, mask: BitMask) -> BitMask:
        return mask if self.compressed is None else self.compressed.expand_mask(name, mask)

    def _compact_scale(self, name: str, scale: Tensor) -> Tensor:
        return scale if self.compressed is None else self.compressed.compact(name, scale)

    # ---- data -------------------------------------------------------------------------------------------------------

    def _make_sets(self, model: Any, forget: Any, retain: Any, tokenizer: Any, args: UnlearnConfig) -> PairedSet:
        limit = row_limit(args.max_length, model)
        how: dict[str, Any] = {"system": args.system_prompt, "date_string": args.date_string, "max_length": limit}

        def encode(source: Any, what: str) -> TextSet:
            if isinstance(source, TextSet):
                check_context(source, model)
                return source
            return encode_rows(load_rows(source), tokenizer, what=what, **how)

        if forget is None:
            raise ValueError("forget_dataset: want what must be forgotten, got None")
        if retain is None and self.objective.alpha:
            raise ValueError(
                f"retain_dataset: {type(self.objective).__name__} has a retain term; give a retain set, or alpha=0"
            )
        forget = encode(forget, "forget set")
        retain = None if retain is None else encode(retain, "retain set")
        if retain is not None:
            check_disjoint(forget, retain)
        elif not len(forget):
            raise ValueError("forget_dataset: empty")
        if args.retain_groups is not None and retain is not None:
            self.group_names, self._group_of = group_rows(retain, args)
        alternates = None
        if self.objective.needs_alternates == "alternates":
            forget, alternates = spread_alternates(forget, tokenizer, args)
        elif self.objective.needs_alternates:
            options = forget.options or how
            alternates = encode_rows(with_refusals(forget.rows, seed=args.seed), tokenizer, what="refusals", **options)
        return PairedSet(forget, retain if self.objective.alpha else None, alternates)

    def retain_batch(self, rows: Any) -> dict[str, Any]:
        retain = self.train_dataset.retain
        return {"retain": self._on_device(PairedCollator(self.pad_id)([{"forget": retain[i]} for i in rows])["forget"])}

    def data_digests(self) -> dict[str, str]:
        sets = {"forget": self.train_dataset.forget, "retain": self.train_dataset.retain}
        return {name: rows_digest(rows, self.processing_class) for name, rows in sets.items() if rows is not None}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return sum(super(UnlearnTrainer, self).floating_point_ops(part) for part in inputs.values())

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for part in inputs.values():
            super()._track_num_input_tokens(part)

    # ---- which weights move -----------------------------------------------------------------------------------------

    def _select(self, model: nn.Module, masks: Mapping[str, BitMask] | None, args: UnlearnConfig) -> list[str]:
        """Freezes what may not move, by name."""
        patterns = args.trainable_params_regex
        if patterns is None and isinstance(self.objective, RMU):
            patterns = list(self.objective.trained)
        return full_weights(model, masks, patterns=patterns, others=masks is None or self.train_unmasked)

    def saliency_loss(self, rows: range) -> Tensor:
        forget = self.train_dataset.forget
        own = rows[self.args.process_index :: self.args.world_size] if self.sharded else rows
        # A process with no row left helps to put the blocks together, with one that does not count.
        batch = [{"forget": forget[i]} for i in own or rows[:1]]
        with self.accelerator.autocast():
            answers = answer_logprobs(self.model, self._on_device(PairedCollator(self.pad_id)(batch)["forget"]))
        if not self.sharded:
            return token_nll(answers)
        # The mean over the tokens of all processes; FSDP takes the mean of their gradients.
        counts = float(bool(own))
        tokens = summed(answers.length.sum() * counts, self.args.device)
        return -answers.total.sum() * (counts * self.args.world_size / float(tokens))

    # ---- the terms --------------------------------------------------------------------------------------------------

    def forget_term(self, model: Any, inputs: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        return self.objective.forget(model, inputs, self._references)

    def retain_term(self, model: Any, inputs: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        # Where losses are measured, in fp32, nothing is differentiated.
        cast = self._references.live is not None and torch.is_grad_enabled()
        with self.accelerator.autocast() if cast else nullcontext():
            loss = self.objective.retain(model, inputs, self._references)
        if self.dual is not None and model.training and torch.is_grad_enabled():
            everywhere = self.accelerator.reduce(loss.detach().float(), reduction="mean")
            self.dual.observe(float(everywhere), self.state.epoch or 0.0)
        return loss

    @contextmanager
    def measuring(self) -> Iterator[None]:
        config = getattr(self.model, "config", None)
        flash = "flash" in str(getattr(config, "_attn_implementation", ""))
        if self.sharded or flash or getattr(config, "quantization_config", None) is not None:
            # What cannot be widened is measured as it is.
            with super().measuring():
                yield
            return
        with evaluating(self.model), in_fp32(self.model):
            yield

    @property
    def forget_factor(self) -> float:
        return self.objective.gamma

    @property
    def retain_factor(self) -> float:
        """Of the retain term: alpha, or what PDU has made of it."""
        return self.objective.alpha if self.dual is None else self.dual.value

    # ---- the run ----------------------------------------------------------------------------------------------------

    def before_training(self, checkpoint: str | None) -> None:
        self._set_references(checkpoint)

    def _set_references(self, checkpoint: str | None) -> None:
        """What the objective asks of the model before the first step; of a resumed run what it asked then."""
        pair, objective = self.train_dataset, self.objective
        parts = {"forget": pair.forget, "alternate": pair.alternates, "retain": pair.retain}
        parts = {name: rows for name, rows in parts.items() if rows is not None}
        given = self.reference_model
        if given is not None and self._asks_in_every_batch():
            self._references.live = LiveReference(given)
        elif objective.parity:
            self._references.live = LiveReference(lambda: adapter_off(self.model))
        if not (checkpoint and load_references(Path(checkpoint), self._references, parts)):
            self._make_references(self.model if given is None else given, parts)
        if not self._asks_in_every_batch():
            self.reference_model = None

    def _make_references(self, model: Any, parts: Mapping[str, Any]) -> None:
        # All processes make up a sharded model, and all ask it; one that was given each holds whole.
        together = self.sharded and model is self.model
        shards: dict[str, Any] = {}
        if together:
            shards = {"digest": combined(model_digest(model)), "everywhere": self._found_by_all}
        with nullcontext() if together else self.accelerator.main_process_first():
            make_references(
                self.objective,
                self._references,
                model,
                parts,
                self.processing_class,
                self.pad_id,
                folder=self.args.reference_cache_dir,
                precision=f"{self.accelerator.mixed_precision} {next(model.parameters()).dtype}",
                batch_size=self.args.per_device_train_batch_size,
                autocast=self.accelerator.autocast,
                device=self.args.device,
                progress=False if self.args.disable_tqdm else None,
                **shards,
            )

    def _found_by_all(self, found: bool) -> bool:
        return not anywhere(not found, self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.compressed is not None:
            # Every checkpoint is an ordinary model: dense, with its zeros.
            state_dict = dense_state_dict(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.masks is not None and self.pruning is not None:
            folder = Path(output_dir or self.output)
            save_masks(self.masks, folder / MASKS)
            (folder / PRUNING).write_text(json.dumps(self.pruning, indent=2) + "\n", encoding="utf-8")

    def save_extra(self, folder: Path) -> None:
        super().save_extra(folder)
        save_references(folder, self._references)
        if self.dual is not None:
            (folder / DUAL_FILE).write_text(json.dumps({"value": self.dual.value, "losses": self.dual.losses}))

    def load_extra(self, checkpoint: Path) -> None:
        super().load_extra(checkpoint)
        if self.dual is not None and (checkpoint / DUAL_FILE).exists():
            kept = read_json(checkpoint / DUAL_FILE)
            if not {"value", "losses"} <= kept.keys():
                raise ValueError(f"{checkpoint / DUAL_FILE}: want value and losses, got {', '.join(kept) or 'nothing'}")
            self.dual.value, self.dual.losses = kept["value"], kept["losses"]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, with masks.safetensors and pruning.json; whole or not at all (`fastunlearn.checkpoint.save_checkpoint`)."""
        if self.sharded and _internal_call and output_dir is not None:
            self.save_sharded(Path(output_dir))
            if self.args.should_save:
                self.save_extra(Path(output_dir))
            return
        if _internal_call and not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        self.assert_sound()
        folder = Path(output_dir or self.output)
        if self.pruning is None and (folder / MASKS).exists():
            raise ValueError(
                f"output_dir: {folder} holds the masks of a pruned model, and this run has none to put in their place (pruning=); "
                "choose another folder"
            )
        model = self.whole_model() if self.sharded else self.accelerator.unwrap_model(self.model)
        if self.args.should_save:
            save_checkpoint(
                output_dir or self.output,
                model,
                self.processing_class,
                masks=None if self.pruning is None else self.masks,
                pruning=self.pruning,
                overwrite=True,
            )
        # push_to_hub itself comes here, for the model as it is published.
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @torch.no_grad()
    def assert_sound(self) -> None:
        """
        Raises:
            DivergenceError: a weight that trains is not finite.
            PatternError: a weight outside its mask is not zero (an adapter's: would not be, merged), or an n:m pattern does not hold.
        """
        super().assert_sound()
        if self.masks is None or self.pruning is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        with agreed():
            try:
                if self.sharded:
                    check_shards(model, self.masks)
                else:
                    check_masks(model, self.masks)
                    check_pattern(model, self.masks, self.pruning)
                if hasattr(model, "peft_config"):
                    from fastunlearn.parametrize.masked_lora import check_merged

                    check_merged(model, self.masks)
            except ValueError as error:
                raise PatternError(f"the sparsity pattern broke in training, nothing is saved: {error}") from error


class _DualUpdates(TrainerCallback):
    """Tells PDU's multiplier when a step or an epoch has ended."""

    def __init__(self, dual: Dual):
        self.dual = dual

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dual.end(state.epoch or 0.0, "step")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dual.end(state.epoch or 0.0, "epoch")
