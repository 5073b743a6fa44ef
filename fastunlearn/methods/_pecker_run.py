"""What a PECKER run leaves on disk: a checkpoint that a run goes on from exactly, and the finished generator."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.trainer_callback import TrainerCallback

from fastunlearn._stored import read_json, read_pickled, read_tensors
from fastunlearn.checkpoint import MASKS
from fastunlearn.ops.mask import load_masks, save_masks
from fastunlearn.report.files import write_json
from fastunlearn.resuming import complete_checkpoint

#: in a checkpoint: masks of what moves; psi, averages and soft factors; psi's optimiser; what the run is of
MOVABLE, STATE, OPTIMIZER, RUN = "movable.safetensors", "pecker.safetensors", "pseudo_optimizer.pt", "pecker_run.json"
#: beside a finished generator: how to sample it, and what it forgot
ABOUT = "pecker.json"
_SAME = (
    "method", "stages", "density", "granularity", "block", "saliency_loss", "saliency_reduce", "mask_values", "mask_networks",
    "mask_terms", "refresh_every", "seed", "per_device_train_batch_size", "forget_batch_size", "k_retain", "saliency_batches",
    "freeze_below", "clip_value", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type",
)  # fmt: skip


def about(trainer: Any) -> dict[str, Any]:
    """What a run is of, as JSON."""
    setup, args = trainer.setup, trainer.args

    def plain(value: Any) -> Any:
        return getattr(value, "value", value)

    def shown(conditions: Any) -> Any:
        return None if conditions is None else list(conditions.names)

    return {
        **{name: plain(getattr(args, name)) for name in _SAME},
        **{name: getattr(setup, name) for name in (
            "t_min", "t_init", "t_max", "k_forget", "alpha", "kappa", "learning_rate", "pseudo_learning_rate", "ema_decay")},
        "forget": shown(trainer.forget), "override": shown(trainer.override), "retain": shown(trainer.retain),
    }  # fmt: skip


def save_state(trainer: Any, folder: Path) -> None:
    """Beside the Trainer's files, before the one that says a checkpoint is whole (so in `_save`, not in a callback after it)."""
    state = {f"ema.{name}": value for name, value in trainer.ema.state_dict().items()}
    state |= {f"soft.{name}": value for name, value in trainer.soft.items()}
    if trainer.pseudo_optimizer is not None:
        state |= {f"pseudo.{name}": value for name, value in trainer.pseudo.state_dict().items()}
        torch.save(trainer.pseudo_optimizer.state_dict(), folder / OPTIMIZER)
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, folder / STATE)
    if trainer.masks is not None:
        save_masks(trainer.masks, folder / MOVABLE)
    write_json(folder / RUN, about(trainer))


def check_resumable(trainer: Any, checkpoint: Path) -> None:
    """
    Raises:
        ValueError: no complete checkpoint of a PECKER run with these settings.
    """
    absent = [name for name in (STATE, RUN, "optimizer.pt", "scheduler.pt") if not (checkpoint / name).exists()]
    if not complete_checkpoint(checkpoint) or absent:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is no complete checkpoint of this method ({', '.join(absent) or 'cut off'})"
        )
    before, now = read_json(checkpoint / RUN), json.loads(json.dumps(about(trainer)))
    other = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]]
    if other:
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is of another run: {'; '.join(other[:3])}")


def load_state(trainer: Any, checkpoint: Path) -> None:
    """What `save_state` wrote; the generator's weights and optimiser are the Trainer's to load."""
    device = trainer.args.device
    state, _ = read_tensors(checkpoint / STATE, device)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}

    trainer.ema.load_state_dict(part("ema."))
    trainer.soft = part("soft.")
    pseudo = part("pseudo.")
    if pseudo:
        trainer.pseudo.load_state_dict(pseudo)
        trainer._pseudo_state = read_pickled(checkpoint / OPTIMIZER)
    if (checkpoint / MOVABLE).exists():
        trainer.put_masks(load_masks(checkpoint / MOVABLE, device=device))


def write_generator(trainer: Any, folder: Path) -> None:
    """unet/, scheduler/, masks and pecker.json, each under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    one_step = trainer.args.method != "gradient_ascent"
    for name, part in (("unet", trainer.generator), ("scheduler", trainer.setup.scheduler)):
        temporary = folder / f".{name}.new.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        part.save_pretrained(temporary)
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
    if trainer.masks is not None:
        save_masks(trainer.masks, folder / MASKS)
    facts = {**about(trainer), "one_step": one_step, "iterations": trainer.state.global_step}
    if trainer.masked_model is not None:
        facts["gradient_products"] = trainer.masked_model.share
        facts["frozen"] = len(trainer.masked_model.frozen)
    write_json(folder / ABOUT, facts)


class Progress(TrainerCallback):
    """A bar with the losses; where standard error is no terminal, a short line for each line of the log."""

    def __init__(self, what: str):
        self.what = what
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=f"  {self.what}", unit="it", disable=None
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = {
            n.removesuffix("_loss"): f"{v:.4g}"
            for n, v in (logs or {}).items()
            if n.endswith("_loss") and n != "train_loss"
        }
        if self.bar is None or not shown:
            return
        if self.bar.disable:
            losses = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"  iteration {state.global_step} of {state.max_steps}: {losses}", file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
