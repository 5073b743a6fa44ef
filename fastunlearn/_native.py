"""Loads the C++ and CUDA module `fastunlearn._C` and says why when it cannot.

A missing or broken module never fails `import fastunlearn`: the reason is kept and shown where native code is asked for
(`fastunlearn.backend("native")`) and by `fastunlearn doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch  # before _C: both then share the OpenMP runtime (and so the threads) that torch brings
from torch import Tensor

#: The interface of csrc/bindings.cpp (kAbi there) that this Python calls: both go up when a signature changes.
ABI = 4


def _stale(module: ModuleType) -> str | None:
    """None, or why a module that loads is not the one these sources call."""
    abi = module.build_info().get("abi")
    if abi == ABI:
        return None
    return f"fastunlearn._C was built from other sources: rebuild (its interface is {abi}, this one is {ABI})"


_C: ModuleType | None
_why_missing: str | None
try:
    from fastunlearn import _C  # type: ignore[no-redef]

    assert _C is not None
    _why_missing = _stale(_C)
    if _why_missing:
        _C = None
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


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory does not hold its entries row-major and as they are: what data_ptr() may be taken of.

    `x._neg_view()` and the imaginary part of a conjugated tensor share memory that holds the opposite of what they are.
    """
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.contiguous().resolve_neg()


#: bytes from which on a tensor's new memory is asked for in huge pages
_HUGE = 1 << 22


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty row-major tensor whose every entry is about to be written: a large one on a CPU in huge pages, where there are any.

    Memory that was never touched comes page by page: of 4 KiB that takes longer than all that most passes do with it.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= _HUGE and _C is not None:
        _C.huge_pages(out.data_ptr(), out.nbytes)
    return out


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
    info = _C.build_info()
    if not info["cuda"]:
        return "built without CUDA: put nvcc on PATH (or set CUDA_HOME) and reinstall the package"
    count, why = _C.cuda_devices()
    if not count:
        return f"the CUDA runtime finds no device ({why})"
    return _no_code_for(info["cuda_archs"], device.index if device.index is not None else torch.cuda.current_device())


@cache
def _no_code_for(archs: str, index: int) -> str | None:
    return no_code_for(archs, torch.cuda.get_device_capability(index))


def no_code_for(archs: str, capability: tuple[int, int]) -> str | None:
    """None, or why a build for `archs` ("80,86,90a") does not run on a GPU of this compute capability.

    Machine code of an architecture with a letter runs on exactly that one. Of the others there is PTX, too (setup.py: arch_flags):
    of the oldest, which every later GPU's driver can compile.
    """
    major, minor = capability
    built = [a.strip() for a in archs.split(",") if a.strip()]
    portable = [divmod(int(a), 10) for a in built if a.isdigit()]
    tied = [divmod(int(a[:-1]), 10) for a in built if not a.isdigit()]
    if capability in tied or any(capability >= x for x in portable):
        return None
    name = f"sm_{major}{minor}"
    lacks = (
        "is older than all of them" if capability < min(portable + tied, default=(0, 0)) else "has no code among them"
    )
    return (
        f"built for sm_{', sm_'.join(built)}, and this GPU ({name}) {lacks}: "
        f"reinstall the package with FASTUNLEARN_CUDA_ARCHS={major}{minor}"
    )


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
