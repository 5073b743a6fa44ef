"""A trainer whose loss has two terms, one for what is forgotten and one for what is kept; it knows nothing of what the data are.

A step runs forward and backward on the forget part of a batch, then on its retain part: only one of the two graphs is ever in memory.
How the two gradients become one step is the update's (`fastunlearn.updates`), which weights may move is the masks' (`fastunlearn.localize`).
Logging, accumulation, resuming, mixed precision and distribution are those of transformers' Trainer.

`fastunlearn.trainer` makes of it the trainer of language models, `fastunlearn.diffusion_trainer` that of text-to-image models.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from fastunlearn import ops
from fastunlearn._stored import read_json
from fastunlearn.arguments import TwoTermConfig
from fastunlearn.callbacks import EpochOrder, Progress, StopOnFlag
from fastunlearn.data.pairs import PairedSampler, PairedSet
from fastunlearn.masked_trainer import MaskedTrainer
from fastunlearn.ops.mask import BitMask, load_masks, save_masks
from fastunlearn.optim._base import MaskedOptimizer
from fastunlearn.output_folder import claim_output, disk_full
from fastunlearn.processes import Watch, agreed, anywhere, check_same, check_same_masks, fingerprints, several
from fastunlearn.resuming import STATE_FILE, check_resume, complete_checkpoint, last_checkpoint, resumes_in, step_of
from fastunlearn.sharded import check_processes
from fastunlearn.sharded_checkpoints import FOLDER, OTHERS
from fastunlearn.sharded_trainer import SCHEDULER
from fastunlearn.updates import Update, make_update
from fastunlearn.updates.hamu import Hamu

#: masks of what the optimiser moves, in a checkpoint to resume from
MOVABLE = "movable.safetensors"
#: hashes of the data of a run, in a checkpoint to resume from
DATA_FILE = "data.json"
#: what an update keeps from step to step, in a checkpoint to resume from
UPDATE_FILE = "update.safetensors"


class DivergenceError(ArithmeticError):
    """The loss, a gradient or a weight is no longer finite; the message names the step and the rows."""


@contextmanager
def _replaced(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        object.__setattr__(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(target, name, value)


class TwoTermTrainer(MaskedTrainer):
    """Minimises forget_factor * forget_term + retain_factor * retain_term, or what an update makes of their gradients.

    Args:
        model: what trains; parameters that may not move are frozen already.
        args: a `TwoTermConfig`.
        pair: the forget set, the retain set (or None) and what belongs to them.
        collator: items of `pair` -> {"forget": batch, "retain": batch, ...}, every batch with its rows' numbers in "index".
        masks: parameter name -> BitMask of the entries that may move.
        processing_class, callbacks, optimizers: as in Trainer.

    A subclass says what the terms are (`forget_term`, `retain_term`, their factors), what a run's data are by hash
    (`data_digests`) and how the model is written (`save_model`).
    """

    args: TwoTermConfig
    model: Any
    train_dataset: Any
    processing_class: Any
    optimizer: Any
    _group_of: list[int] | None = None
    #: whether a folder that holds something is taken without being asked; nothing in it is removed then
    takes_folder = False

    def __init__(
        self,
        model: nn.Module,
        args: TwoTermConfig,
        pair: PairedSet,
        collator: Any,
        *,
        masks: Mapping[str, BitMask] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        check_processes(args)
        self.check_shardable(model)
        self.update: Update = make_update(args.update, args)
        if self.update.takes_step and optimizers[0] is not None:
            raise ValueError(
                f"optimizers: update={args.update} takes its steps itself; leave the optimiser out (hamu_base=adamw passes them on to one)"
            )
        self.start_masks(args, masks)
        self._sums: dict[str, Tensor] = {}
        self._terms = 0
        #: share of the masked weights that may move, until a line of the log has told it
        self._density: float | None = None
        self._rows: dict[str, list[int]] = {}
        self._sampler: PairedSampler | None = None
        super().__init__(
            model=cast(Any, model), args=args, data_collator=collator, train_dataset=pair, processing_class=processing_class,
            callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        if args.device.type == "cpu":
            # torch would warn of it in every epoch.
            args.dataloader_pin_memory = False
        # Our losses are means over a batch; the Trainer must not expect a sum over the tokens of a whole step.
        self.model_accepts_loss_kwargs = False
        self.add_callback(EpochOrder(self))
        self.start_certificates()
        if isinstance(self.update, Hamu):
            self.add_callback(StopOnFlag(self.update))
        # transformers' bar does not ask whether it writes to a terminal, and prints every line of the log as a dict.
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(Progress())

    # ---- what a subclass says ----------------------------------------------------------------------------------------

    @property
    def forget_factor(self) -> float:
        """Of the forget term."""
        raise NotImplementedError

    @property
    def retain_factor(self) -> float:
        """Of the retain term."""
        raise NotImplementedError

    def forget_term(self, model: Any, inputs: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The forget term of one batch, without its factor."""
        raise NotImplementedError

    def retain_term(self, model: Any, inputs: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The retain term of one batch, without its factor."""
        raise NotImplementedError

    def data_digests(self) -> dict[str, str]:
        """Hashes of the data of this run, by name."""
        raise NotImplementedError

    def retain_batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """{"retain": those rows of the retain set}, as a batch has them."""
        raise NotImplementedError

    def before_training(self, checkpoint: str | None) -> None:
        """When the output folder is ours, before anything of a checkpoint is read; for methods to override."""

    def set_mode(self, model: Any) -> None:
        """Before a step: what drops out and what does not."""
        model.train()

    # ---- data -------------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(str(self.args.output_dir))

    def _get_train_sampler(self, train_dataset: Any = None) -> PairedSampler:
        pair = self.train_dataset if train_dataset is None else train_dataset
        retain = 0 if pair.retain is None else len(pair.retain)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = PairedSampler(len(pair), retain, self.args.retain_per_forget, seed, self._group_of)
        return self._sampler

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and not self.args.warmup_steps and self.args.warmup_epochs:
            rows = len(self.train_dataset) / max(1, self.args.train_batch_size * self.args.world_size)
            batches = math.floor(rows) if self.args.dataloader_drop_last else math.ceil(rows)
            per_epoch = math.ceil(batches / max(1, self.args.gradient_accumulation_steps))
            # The rate starts at zero: a run no longer than its warm-up still takes one step at the whole of it.
            steps = max(0, min(math.ceil(self.args.warmup_epochs * per_epoch), num_training_steps - 1))
            with _replaced(self.args, warmup_steps=steps):
                return super().create_scheduler(num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def evaluation_loop(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "evaluate, predict: the Trainer's passes are for batches with labels, and there are none here; ask the model itself, or "
            "`fastunlearn evaluate`"
        )

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.set_mode(model)
        inputs = self._prepare_inputs(inputs)
        params = [p for p in model.parameters() if p.requires_grad]
        first = all(p.grad is None for p in params) and not self.update.lists()
        share = 1 / self.current_gradient_accumulation_steps
        total = torch.zeros((), device=self.args.device)
        self.note_batch(inputs)
        for name, number, factor, term, part in self._parts(inputs):
            with self.compute_loss_context_manager():
                loss = term(model, part)
            self._check_finite(loss, name, part[name]["index"])
            self.reduce_every_backward(model)
            with self.update.term(params, number):
                self.accelerator.backward(loss * (factor * share))
                if name == "forget" and first:
                    self.after_forget(model)
            groups = len(self.group_names) or 1
            shown = loss.detach() / (groups if name == "retain" else 1)
            total += shown * (factor * share)
            self._note(f"{name}_loss", shown)
            self._rows.setdefault(name, []).extend(part[name]["index"].tolist())
        self._terms += 1
        if self.accelerator.sync_gradients:
            self.update.combine(params, self._masks_of(model))
            self._check_gradients(params)
            self._rows.clear()
        return total

    def _parts(self, inputs: Mapping[str, Any]) -> Iterator[tuple[str, int, float, Any, Mapping[str, Any]]]:
        """(name, number of the term, its factor, what computes it, its part of the batch): forget, then each retain group."""
        yield "forget", 0, self.forget_factor, self.forget_term, inputs
        if "retain" not in inputs:
            return
        if self._group_of is None:
            yield "retain", 1, self.retain_factor, self.retain_term, inputs
            return
        batch = inputs["retain"]
        groups = torch.tensor([self._group_of[i] for i in batch["index"].tolist()])
        for group in range(len(self.group_names)):
            rows = (groups == group).nonzero().squeeze(1).to(batch["index"].device)
            if len(rows):
                own = {name: tensor[rows] for name, tensor in batch.items()}
                yield "retain", 1 + group, self.retain_factor, self.retain_term, {**inputs, "retain": own}

    def _check_gradients(self, params: Sequence[Tensor]) -> None:
        # With a scaler gradients may overflow: the scaler sees it and leaves the step out.
        if getattr(self.accelerator, "scaler", None) is not None:
            return
        by_device: dict[Any, list[Tensor]] = {}
        kept = (grad for grads in self.update.lists() for grad in grads)
        for grad in (*(p.grad for p in params), *kept):
            if grad is not None:
                by_device.setdefault(grad.device, []).append(_local(grad))
        # A gradient of a frozen entry does no harm by itself, but it comes from the same broken pass.
        norms = [ops.masked_grad_norm(grads, [None] * len(grads)) for grads in by_device.values()]
        # Of a sharded model a gradient is not finite in one process only; all must know.
        if not anywhere(not all(bool(torch.isfinite(norm)) for norm in norms), self.args.device):
            return
        rows = "; ".join(f"{name} rows {', '.join(map(str, index[:16]))}" for name, index in self._rows.items())
        raise DivergenceError(
            f"a gradient is not finite in step {self.state.global_step + 1}, in the batch of {rows}. Training stopped before "
            f"that step. {self.last_good()} A lower learning rate, max_grad_norm or a larger alpha help."
        )

    def after_forget(self, model: Any) -> None:
        """When `.grad` holds the gradient of the forget term alone; for methods to override."""

    def _note(self, name: str, value: Tensor) -> None:
        value = value.float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def _check_finite(self, loss: Tensor, name: str, index: Tensor) -> None:
        fine = bool(torch.isfinite(loss.detach()))
        if not anywhere(not fine, self.args.device):
            return
        if fine:
            raise DivergenceError(
                f"the {name} loss of another process is not finite in step {self.state.global_step + 1}; it says in which rows. Training "
                f"stopped before that step. {self.last_good()}"
            )
        rows = ", ".join(map(str, index.tolist()[:16]))
        raise DivergenceError(
            f"the {name} loss is {float(loss.detach())} in step {self.state.global_step + 1}, in the batch of {name} rows {rows}. "
            f"Training stopped before that step. {self.last_good()} A lower learning rate, max_grad_norm or a larger alpha help."
        )

    def last_good(self) -> str:
        """Which checkpoint a run can go on from, in a sentence."""
        good = last_checkpoint(self.output)
        return f"The last good checkpoint is {good}." if good else "No checkpoint was saved before (save_strategy)."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._terms:
            for name, value in self._sums.items():
                logs[name] = float(value) / self._terms
            self._sums, self._terms = {}, 0
            if self._masked_optimizer() is not None and self._max_grad_norm:
                logs["grad_norm"] = float(self._grad_norm)
            logs |= self.certificates.means() | self.extra_logs()
            if self._density is not None:
                logs["mask_density"], self._density = self._density, None
        super().log(logs, start_time)

    def extra_logs(self) -> dict[str, float]:
        """More numbers for a line of the log; for methods to override."""
        return {}

    # ---- the run ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As Trainer.train. The output folder is locked meanwhile, and refused where it holds something (overwrite_output_dir).

        resume_from_checkpoint=True takes the last complete checkpoint; one that a kill left half written is removed.
        """
        resuming = bool(resume_from_checkpoint)
        with (
            claim_output(
                self.output,
                overwrite=self.args.overwrite_output_dir,
                resume=resumes_in(self.output, resume_from_checkpoint),
                keep=self.takes_folder,
            ),
            Watch(),
        ):
            if resume_from_checkpoint is True:
                first = self.is_world_process_zero()
                resume_from_checkpoint = last_checkpoint(self.output, remove_incomplete=first)
                self.accelerator.wait_for_everyone()
                if resume_from_checkpoint is None:
                    check_resume(self.output, True)
            with agreed():
                if resuming:
                    self._check_resumable(str(resume_from_checkpoint))
            self.join_processes()
            self.before_training(str(resume_from_checkpoint) if resuming else None)
            self.reshard()
            if resuming:
                self.load_extra(Path(str(resume_from_checkpoint)))
                self.certificates.start(step_of(Path(str(resume_from_checkpoint))))
            else:
                self.certificates.start(0)
                self._localize()
                self.prepare_weights()
                self.reshard()
            self.before_steps()
            self._density = self.mask_density()
            # In early versions of transformers 5 clipping stands in the loop itself, where it cannot be overridden.
            inline = not hasattr(Trainer, "_clip_grad_norm") and self._own_optimizer()
            with _replaced(self.args, max_grad_norm=0.0) if inline else nullcontext():
                return super().train(resume_from_checkpoint or None, *args, **options)

    def free_steps(self) -> None:
        """Gives back the memory of gradients and of the optimiser's states, when nothing is trained any more."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(inner, torch.optim.Optimizer):
            inner.state.clear()
        if isinstance(inner, MaskedOptimizer):
            inner.forget_works()
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def join_processes(self) -> None:
        """Compares what the processes have read, and cuts a model that is to be cut; every process comes here.

        Before anything asks the model: no process holds it whole on its device.

        Raises:
            ValueError: masks, rows or weights differ between processes. In all of them.
        """
        check_same_masks(self.masks)
        if several() and self.can_shard:
            # Of language models: a text-to-image model may draw its images itself, every process its own.
            check_same("forget_dataset, retain_dataset", self._digests())
        self._place_masks()
        if self.will_shard():
            if not self.sharded:
                check_same("model", fingerprints(self.model))
            self.before_steps()

    def before_steps(self) -> None:
        """When masks, factors and weights are what the first step finds; for methods to change what they are held in.

        Of a model that is to be sharded: before anything is computed with it.
        """
        self.shard()

    def prepare_weights(self) -> None:
        """Before the first step of a run that is not resumed; for methods to override."""

    def _check_resumable(self, checkpoint: str) -> None:
        check_resume(self.output, checkpoint)
        needed = ("optimizer.pt", SCHEDULER)
        if (Path(checkpoint) / FOLDER).is_dir():
            needed = (f"{FOLDER}/{OTHERS}", SCHEDULER)
        absent = [name for name in needed if not (Path(checkpoint) / name).exists()]
        if absent:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} has no {' and no '.join(absent)} (save_only_model?); going on without would "
                "not give the weights of a run that was not interrupted"
            )
        record = Path(checkpoint) / DATA_FILE
        if record.exists():
            saved = read_json(record)
            rows = saved.pop("rows_of_a_step", None)
            if saved != self._digests():
                written = [name for name in ("system_prompt", "date_string", "max_length") if hasattr(self.args, name)]
                hint = f"; the same files are other rows under another {' or '.join(written)}" if written else ""
                raise ValueError(
                    f"resume_from_checkpoint: {checkpoint} is of other rows (or another localize) than this run's{hint}"
                )
            if rows not in (None, self._rows_of_a_step()):
                warnings.warn(
                    f"resume_from_checkpoint: a step was of {rows} forget rows and is of {self._rows_of_a_step()} now "
                    "(per_device_train_batch_size x gradient_accumulation_steps x processes): this is not the run that was interrupted",
                    stacklevel=3,
                )
        path = Path(checkpoint) / MOVABLE
        saved = load_masks(path, device=self.args.device) if path.exists() else None
        if self.args.localize == "saliency":
            if saved is None:
                raise ValueError(f"resume_from_checkpoint: {checkpoint} is of a run without localize=saliency")
            self.movable, self._chosen = saved, True
            return
        mine = self.movable or {}
        if set(saved or {}) != set(mine) or any(
            not mask.equal(mine[name].to(mask.device)) for name, mask in (saved or {}).items()
        ):
            raise ValueError(f"resume_from_checkpoint: {path} holds other masks than this run's")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.assert_sound()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # Of an earlier run in the same folder: half of each must not be taken for a whole one.
            (folder / STATE_FILE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            # What is half written must not be taken for a checkpoint, nor fill a disk that is full.
            if not complete_checkpoint(folder):
                shutil.rmtree(folder, ignore_errors=True)
            if disk_full(error):
                free = shutil.disk_usage(folder.parent).free
                raise OSError(
                    errno.ENOSPC,
                    f"no room for {folder.name}: {free:,} bytes free. {self.last_good()} Free some, then go on with "
                    "resume_from_checkpoint=true (save_total_limit=1 keeps one checkpoint only)",
                    str(folder),
                ) from error
            raise

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.save_extra(Path(output_dir or self.output))

    def save_extra(self, folder: Path) -> None:
        """Files that a resumed run needs beside the Trainer's; for methods to extend."""
        state = self.update.state_dict()
        if state and not self.sharded:
            save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / UPDATE_FILE)
        if self.movable is not None:
            save_masks(self.movable, folder / MOVABLE)
        record = {**self._digests(), "rows_of_a_step": self._rows_of_a_step()}
        (folder / DATA_FILE).write_text(json.dumps(record), encoding="utf-8")

    def _digests(self) -> dict[str, str]:
        """Hashes of the rows this run sees, and of where its movable weights come from."""
        return {**self.data_digests(), "localize": self.args.localize}

    def _rows_of_a_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def load_extra(self, checkpoint: Path) -> None:
        """Reads what `save_extra` wrote, before training goes on from `checkpoint`; for methods to extend."""
        kept = self.load_update(checkpoint, UPDATE_FILE)
        if kept:
            self.update.load_state_dict(kept)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """As in Trainer, where there is no card yet: the commands write one with what was measured."""
        if not (self.output / "README.md").exists():
            super().create_model_card(*args, **options)

    @torch.no_grad()
    def assert_sound(self) -> None:
        """
        Raises:
            DivergenceError: a weight that trains is not finite.
        """
        with agreed():
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
                if parameter.requires_grad and not bool(torch.isfinite(_local(parameter)).all()):
                    raise DivergenceError(
                        f"{name} holds NaN or infinity after step {self.state.global_step}. {self.last_good()}"
                    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
