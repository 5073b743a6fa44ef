"""Loads the C++ and CUDA module `fastunlearn._C` and says why when it cannot.

A missing or broken module never fails `import fastunlearn`: the reason is kept and shown where native code is asked for
(`fastunlearn.backend("native")`) and by `fastunlearn doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch  # before _C: both then share the OpenMP runtime (and so the threads) that torch brings

_C: ModuleType | None
_why_missing: str | None
try:
    from fastunlearn import _C  # type: ignore[attr-defined, no-redef]

    _why_missing = None
except ImportError as error:
    _C = None
    _why_missing = (
        "fastunlearn._C is not built"
        if "cannot import name" in str(error)
        else f"fastunlearn._C does not load ({error})"
    )

#: Element types that the native code takes, and their numbers in csrc/common.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

# The module whose cuda_* functions run on CPU tensors, while `host_cuda` is active.
_host_cuda: ModuleType | None = None


def library() -> ModuleType:
    """The module; only after `unusable(device)` was None."""
    module = _host_cuda or _C
    assert module is not None, _why_missing
    return module


def is_cuda(device: torch.device) -> bool:
    """Whether calls for `device` go to the cuda_* functions."""
    return device.type == "cuda" or _host_cuda is not None


def suffix(device: torch.device) -> str:
    return "cuda" if is_cuda(device) else "cpu"


def unusable(device: torch.device) -> str | None:
    """None, or why native code cannot serve `device` and how to get it."""
    if _host_cuda is not None:
        return None
    if _C is None:
        return f"{_why_missing}: install g++ and run `pip install --no-build-isolation -e .` (or reinstall the package)"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no native code for {device.type} tensors"
    if not _C.build_info()["cuda"]:
        return "built without CUDA: put nvcc on PATH (or set CUDA_HOME) and reinstall the package"
    count, why = _C.cuda_devices()
    return None if count else f"the CUDA runtime finds no device ({why})"


def stream(device: torch.device) -> tuple[int, int]:
    """(device index, address of the current stream), the last two arguments of every cuda_* function."""
    if device.type != "cuda":
        return 0, 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream


@contextmanager
def host_cuda(module: ModuleType) -> Iterator[None]:
    """Tests: run the CUDA kernel bodies, compiled for the host, on CPU tensors (see csrc/simt.h)."""
    global _host_cuda
    before, _host_cuda = _host_cuda, module
    try:
        yield
    finally:
        _host_cuda = before
