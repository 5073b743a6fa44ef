"""What a two-term run does at the turns of the Trainer's loop: the order of an epoch, HAMU's stop, the progress bar."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import tqdm
from transformers.trainer_callback import TrainerCallback

from fastunlearn.updates.hamu import Hamu


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch, also after a resume in the middle of one."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))


class StopOnFlag(TrainerCallback):
    """Ends training where HAMU says so; the model stays as the last step left it."""

    def __init__(self, update: Hamu):
        self.update = update

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.update.stop is not None:
            warnings.warn(f"training ends: {self.update.stop}", stacklevel=2)
            control.should_training_stop = True


class Progress(TrainerCallback):
    """One bar with the two losses; where standard error is no terminal, a short line for each line of the log."""

    bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="  unlearning", unit="step", disable=None
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        names = {"forget_loss": "forget", "retain_loss": "retain", "capacity": "capacity"}
        shown = {short: f"{logs[name]:.3g}" for name, short in names.items() if name in (logs or {})}
        if self.bar is None or not shown:
            return
        if not self.bar.disable:
            self.bar.set_postfix(shown)
            return
        numbers = ", ".join(f"{name} {value}" for name, value in shown.items())
        print(f"  step {state.global_step} of {state.max_steps}: {numbers}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
