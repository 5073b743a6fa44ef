"""What a call on a GPU finds out after it has returned: it waits for nothing, so the warning comes with a later call."""

from __future__ import annotations

import atexit
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Packages whose frames lie between a call and the user's line.
_INNER = frozenset({"fastunlearn", "torch"})


@dataclass(frozen=True)
class _Caller:
    """The line that called an op, as `warnings.warn_explicit` takes it."""

    filename: str
    lineno: int
    module: str
    registry: dict[Any, Any]


@dataclass(frozen=True, eq=False)
class _Entry:
    copied: torch.cuda.Event
    found: Tensor  #: in pinned memory
    words: Callable[[Tensor], Iterable[str]]
    category: type[Warning]
    caller: _Caller

    def say(self) -> None:
        where = self.caller
        for text in self.words(self.found):
            warnings.warn_explicit(
                text, self.category, where.filename, where.lineno, where.module, registry=where.registry
            )


_pending: list[_Entry] = []
_lock = threading.Lock()


def _caller() -> _Caller:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        frame = frame.f_back
    names = frame.f_globals
    # The registry by which Python says a text once a line: that of the module, as `warnings.warn` uses it.
    registry = names.setdefault("__warningregistry__", {})
    return _Caller(frame.f_code.co_filename, frame.f_lineno, names.get("__name__") or "<unknown>", registry)


def say_later(found: Tensor, words: Callable[[Tensor], Iterable[str]], category: type[Warning]) -> None:
    """Warns of `words(contents of found)` (a tensor on a GPU) once they are there, as if at the line that called the op."""
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    host.copy_(found, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(found.device))
    entry = _Entry(copied, host, words, category, _caller())
    with _lock:
        _pending.append(entry)
    check_nan(wait=False)


def check_nan(wait: bool = True) -> None:
    """Warns of NaN and the like in the inputs of earlier calls on a GPU, which wait for nothing and so cannot warn themselves.

    Every later call of `topk_mask`, `nm_mask` or `redistribution` on a GPU does the same without waiting, and so does the end of
    the process. The warning names the line of the earlier call. May be called from several threads: each warning is given once.

    Args:
        wait: for the calls that the device has not finished yet.
    """
    with _lock:
        done = [wait or entry.copied.query() for entry in _pending]
        taken = [entry for entry, is_done in zip(_pending, done) if is_done]
        _pending[:] = [entry for entry, is_done in zip(_pending, done) if not is_done]
    # Outside the lock: a device is waited for, and what shows warnings may call an op.
    while taken:
        entry = taken[0]
        try:
            if wait:
                entry.copied.synchronize()
            del taken[0]
            entry.say()
        except BaseException:
            # A warning that is made an error, an interrupt: those that have not been said yet stay.
            with _lock:
                _pending[:0] = taken
            raise


def _flush() -> None:
    # A device that has failed has told why already.
    with suppress(RuntimeError):
        check_nan()


atexit.register(_flush)
