"""What the machine can do: name, copy bandwidth, matmul rate, empty launch, caches, and the peak memory of a call.

Peak memory on a CPU is the high-water mark of the resident set, so scratch of C++ code counts like torch's own tensors
(fastunlearn/report/cost.py says how). On a GPU it is torch's allocator statistics; the kernels' workspace comes from torch.empty
and is therefore in it.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastunlearn.report.cost import process_bytes, reset_high_water, trim_heap

MIB = 2**20


def _cpuinfo(field: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    except OSError:
        pass
    return ""


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """What the device calls itself; a CPU whose model carries no number gets its family, which tells the generation."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.sub(r"\((R|TM|r|tm)\)|\bProcessor\b|\bCPU\b|@.*$|\b\d+-Core\b", " ", cpu_model())
    model = " ".join(model.split())
    family = _cpuinfo("cpu family")
    if family and not re.search(r"\d", model):
        model += f" family {family}"
    return f"{model}, {cores()} cores"


def slug(device: torch.device) -> str:
    """The device's name as a file name: amd-epyc-family26-2c, nvidia-h200."""
    name = re.sub(r", (\d+) cores$", r" \1c", device_name(device)).replace("family ", "family")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def last_cache_bytes() -> int:
    """Bytes of the CPU's last-level cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.match(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]])
    return max(sizes, default=32 * MIB)


def line_bytes(device: torch.device) -> int:
    """Unit of scattered access: a 32-byte sector on a GPU, a 64-byte line on a CPU."""
    return 32 if device.type == "cuda" else 64


class Flusher:
    """Puts something else into the last-level cache: between two timed runs nothing of an input is left in it."""

    def __init__(self, device: torch.device):
        size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else last_cache_bytes()
        self.device = device
        self.buffer = torch.zeros(2 * max(size, 4 * MIB) // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        # Read on a CPU (dirty lines would be written back inside the next timed run), written on a GPU.
        if self.device.type == "cuda":
            self.buffer.zero_()
        else:
            self.buffer.sum(dtype=torch.int32)


@dataclass
class Ahead:
    """How long the GPU is kept busy before a timed call, so that the call is queued whole before it starts to run.

    A training loop runs so: the host is ahead of the device. What is timed is then the device's work; the host's own time is
    kept beside it. A call that waits for the device is not helped by this, and its waiting counts.
    """

    ms: float = 0.0
    host_ms: float = 0.0


_CYCLES_PER_MS = 1_900_000  # of torch.cuda._sleep; it need not be exact
_LONGEST_AHEAD_MS = 40.0


def timed(
    call: Callable[[], Any],
    device: torch.device,
    flush: Callable[[], None] | None = None,
    ahead: Ahead | None = None,
) -> float:
    """Milliseconds of one call; its result is freed after the clock has stopped."""
    if flush is not None:
        flush()
    if device.type != "cuda":
        start = time.perf_counter()
        kept = call()
        ms = (time.perf_counter() - start) * 1e3
        del kept
        return ms
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if ahead is not None and ahead.ms:
        torch.cuda._sleep(int(ahead.ms * _CYCLES_PER_MS))
    begin.record()
    start = time.perf_counter()
    kept = call()
    host_ms = (time.perf_counter() - start) * 1e3
    overtaken = begin.query()
    end.record()
    end.synchronize()
    del kept
    if ahead is not None:
        wanted = min(1.5 * host_ms + 0.2, _LONGEST_AHEAD_MS)
        if overtaken and wanted > ahead.ms:
            # The device was idle before everything was queued: once more, with more work before it.
            ahead.ms = wanted
            return timed(call, device, flush, ahead)
        ahead.host_ms = host_ms
    return begin.elapsed_time(end)


class Bandwidth:
    """Copy bandwidth, measured anew beside every case: one interference then shifts the limit as little as the times."""

    def __init__(self, device: torch.device, nbytes: int | None = None):
        self.device = device
        nbytes = nbytes or (2**30 if device.type == "cuda" else 2**28)
        self.source = torch.ones(nbytes // 4, device=device)
        self.target = torch.zeros_like(self.source)
        self.samples: list[float] = []
        self.ahead = Ahead()

    def sample(self, times: int = 7) -> None:
        """GB/s, read and written bytes counted."""
        both = 2 * self.source.numel() * 4
        timed(self._copy, self.device, ahead=self.ahead)
        self.samples += [both / timed(self._copy, self.device, ahead=self.ahead) / 1e6 for _ in range(times)]

    def _copy(self) -> None:
        self.target.copy_(self.source)

    def gbps(self) -> float:
        return median(self.samples)


def median(values: list[float]) -> float:
    return percentile(values, 50)


def percentile(values: list[float], q: float) -> float:
    """Linear between neighbours."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def matmul_tflops(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """Rate of a square product; without `dtype`: bf16 on a GPU, fp32 on a CPU.

    Of float32 on a GPU the better of its own units and a third of TF32: three such products make one of float32's precision.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)

    def rate() -> float:
        for _ in range(2):
            timed(lambda: a @ b, device)
        return 2 * n**3 / median([timed(lambda: a @ b, device) for _ in range(7)]) / 1e9

    plain = rate()
    if device.type != "cuda" or dtype != torch.float32:
        return plain
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return max(plain, rate() / 3)
    finally:
        torch.set_float32_matmul_precision(before)


def empty_launch_us(device: torch.device) -> float:
    """Microseconds of an operation on one element: the floor under every time."""
    one = torch.zeros(1, device=device)
    for _ in range(10):
        timed(one.zero_, device)
    return median([timed(one.zero_, device) for _ in range(100)]) * 1e3


def free_bytes(device: torch.device) -> int:
    """Memory that a case may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**62


def lost(device: torch.device) -> str | None:
    """None, or what a kernel that went astray left behind: after it this process cannot use the GPU any more."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def tensors(value: Any, grads: bool = False) -> Iterator[Tensor]:
    """Every tensor in nested lists, dicts, namespaces, BitMasks and N:M tensors; with `grads` also the tensors' gradients."""
    if isinstance(value, Tensor):
        yield value
        if grads and value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, SimpleNamespace):
        yield from tensors(vars(value), grads)
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors(v, grads)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v, grads)
    else:
        for name in ("bits", "values", "mask"):
            part = getattr(value, name, None)
            if isinstance(part, Tensor) or hasattr(part, "bits"):
                yield from tensors(part, grads)


def _storages(value: Any) -> dict[int, int]:
    found = {}
    for t in tensors(value, grads=True):
        if t.layout == torch.strided and t.device.type != "meta":
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def peak_memory(
    run: Callable[[], tuple[Any, Any]], inputs: Any, device: torch.device
) -> tuple[tuple[Any, Any], float | None, int]:
    """Runs `run() -> (what must stay alive, output)`.

    Returns:
        What `run` gave; the peak in MiB above the inputs and the output's new tensors, None where the system does not count
        it; bytes of those new tensors.
    """
    gc.collect()  # what is freed between the two readings below would be counted as the call's
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        peak: int | None = torch.cuda.max_memory_allocated(device)
    else:
        trim_heap()
        counted = reset_high_water()
        before = process_bytes("VmRSS") or 0
        result = run()
        peak = process_bytes("VmHWM") if counted else None
    mine = _storages(inputs)
    fresh = sum(size for at, size in _storages(result[1]).items() if at not in mine)
    return result, None if peak is None else max(0.0, (peak - before - fresh) / MIB), fresh


def touch(nbytes: int) -> None:
    """Uses so much memory and frees it.

    A virtual machine's unused memory goes back to its host after seconds; the first use then costs eight times a page fault,
    and would be charged to whoever allocates most.
    """
    torch.ones(nbytes, dtype=torch.uint8)


class OtherLoad:
    """Processor time that others, the hypervisor included, took inside `with` blocks, as a share of the machine."""

    def __init__(self) -> None:
        self.taken = self.wall = 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        mine = os.times()
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # neither idle nor waiting for a disk
        return busy, sum(mine[:4]), time.perf_counter()

    def __enter__(self) -> OtherLoad:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if self._start is not None and end is not None:
            busy, mine, wall = (b - a for a, b in zip(self._start, end))
            self.taken += max(0.0, busy - mine)
            self.wall += wall * (os.cpu_count() or 1)

    def share(self) -> float | None:
        """None where the system does not say."""
        return self.taken / self.wall if self.wall else None


def _git(*args: str) -> str:
    try:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """Of this checkout, "+changes" where it has some; of a copy without git what FASTUNLEARN_COMMIT says."""
    found = _git("rev-parse", "--short=12", "HEAD")
    if found and _git("status", "--porcelain", "--untracked-files=no"):
        found += "+changes"
    return found or os.environ.get("FASTUNLEARN_COMMIT", "")


def meta(device: torch.device) -> dict[str, Any]:
    """Facts of the run; the rates are added by the harness, which measures them beside the cases."""
    import fastunlearn

    driver = ""
    if device.type == "cuda":
        try:
            driver = subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": triton_version,
        "fastunlearn": fastunlearn.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "backends": {
            e.op: e.backend if e.backend != "reference" else e.reason for e in fastunlearn.explain(device=device)
        },
    }
