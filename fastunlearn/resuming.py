"""Checkpoints that a run goes on from: which are whole, which is the last, whose they are."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from fastunlearn._stored import read_json

#: the last file of a checkpoint that is written
STATE_FILE = "trainer_state.json"


def complete_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end: its last file is there and whole."""
    try:
        read_json(Path(folder) / STATE_FILE)
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(folder: str | os.PathLike[str], *, remove_incomplete: bool = False) -> str | None:
    """The complete checkpoint of the highest step in `folder`, None where there is none.

    Args:
        remove_incomplete: deletes checkpoints that a kill left half written, with a warning.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not (path.is_dir() and step.isdigit()):
            continue
        if complete_checkpoint(path):
            found.append((int(step), str(path)))
        elif remove_incomplete:
            warnings.warn(f"{path} was not written to its end and is removed", RuntimeWarning, stacklevel=3)
            shutil.rmtree(path)
    return max(found)[1] if found else None


def resumes_in(output: str | os.PathLike[str], checkpoint: str | bool | None) -> bool:
    """Whether a run that resumes from `checkpoint` goes on in its own output folder: another's content is not its to overwrite."""
    return bool(checkpoint) and (checkpoint is True or Path(str(checkpoint)).resolve().parent == Path(output).resolve())


def check_resume(output: str | os.PathLike[str], checkpoint: str | bool) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: `checkpoint`, or with True `output`, holds nothing to go on from.
    """
    if checkpoint is True:
        if last_checkpoint(output) is None:
            raise ValueError(f"resume_from_checkpoint: {output} holds no complete checkpoint; run without it")
    elif not complete_checkpoint(str(checkpoint)):
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is no complete checkpoint ({STATE_FILE} is missing)")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written.

    Raises:
        ValueError: its file says none.
    """
    step = read_json(checkpoint / STATE_FILE).get("global_step")
    if not isinstance(step, int):
        raise ValueError(f"{checkpoint / STATE_FILE}: want a whole number as global_step, got {step!r}")
    return step
