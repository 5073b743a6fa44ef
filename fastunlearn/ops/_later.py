"""What a call on a GPU finds out after it has returned: it waits for nothing, so the warning comes with a later call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (copied, what was found in pinned memory, who says it in words).
_pending: list[tuple[torch.cuda.Event, Tensor, Callable[[Tensor], None]]] = []


def say_later(found: Tensor, say: Callable[[Tensor], None]) -> None:
    """Has `say` called with the contents of `found` (a tensor on a GPU) once they are there."""
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    host.copy_(found, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(found.device))
    _pending.append((copied, host, say))
    check_nan(wait=False)


def check_nan(wait: bool = True) -> None:
    """Warns of NaN and the like in the inputs of earlier calls on a GPU, which wait for nothing and so cannot warn themselves.

    Every later call of `topk_mask`, `nm_mask` or `redistribution` on a GPU does the same without waiting.

    Args:
        wait: for the calls that the device has not finished yet.
    """
    for entry in list(_pending):
        copied, found, say = entry
        if wait:
            copied.synchronize()
        elif not copied.query():
            continue
        _pending.remove(entry)
        say(found)
