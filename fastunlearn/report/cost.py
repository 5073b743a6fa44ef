"""What a method costs: seconds and peak memory of one call.

On a GPU memory is that of torch's allocator; on a CPU the high-water mark of the resident set (Linux counts it; writing 5 to
/proc/self/clear_refs resets it), which sees scratch of C++ code too and is good to a few MiB. Freed pages are handed back first,
or scratch that lands in memory which the allocator had kept would not be seen.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Attributes: seconds; peak_mib: above what was allocated before the call, None where the system does not count it."""

    seconds: float
    peak_mib: float | None


def process_bytes(field: str) -> int | None:
    """VmRSS or VmHWM of this process; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated there; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def trim_heap() -> None:
    """Hands freed pages back to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_high_water() -> bool:
    """Starts VmHWM anew; whether the system lets one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def clock(device: torch.device) -> Callable[[], float]:
    """What to time work on a device with: on a CPU with one thread the processor's seconds, which other work does not lengthen (much:
    caches and memory are shared); else those of the wall, which is right only where nothing else runs."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def measured(run: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """Calls `run` and says what it took."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        trim_heap()
        before = process_bytes("VmRSS") if reset_high_water() else None
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_bytes("VmHWM")
    known = peak is not None and before is not None
    return result, Cost(seconds, max(0.0, (peak - before) / MIB) if known else None)  # type: ignore[operator]
