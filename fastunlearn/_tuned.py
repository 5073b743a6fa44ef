"""Launch options of the Triton kernels that were measured on a GPU: fastunlearn/tuned.json, by the GPU's name.

    {"NVIDIA H200": {"triton": "3.6.0", "torch": ..., "commit": ..., "date": ...,
                     "kernels": {"polar.symmetric": {"768": {"options": {"BLOCK": 128, ...}, "ms": ..., "default_ms": ...}}}}}

`python -m benchmarks tune` writes it, from runs on that GPU. A kernel asks by its own name and a key, its bucket of shapes and types;
where the GPU is another, its key is not there, or Triton is another one (what fitted may not fit any more), the kernel's own defaults
hold. A kernel never depends on what stands here for its results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

import torch

FILE = "tuned.json"
#: what a candidate that is tried says, by kernel; and, where someone listens, the keys that were asked for
_trying: dict[str, Mapping[str, int]] = {}
_asked: list[set[tuple[str, str]]] = []


@cache
def table() -> dict[str, Any]:
    """The shipped table; empty where there is none."""
    try:
        return json.loads(resources.files("fastunlearn").joinpath(FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


@cache
def _kernels(index: int) -> dict[str, Any]:
    """The entries of a GPU, kernel -> key -> entry."""
    import triton

    found = table().get(torch.cuda.get_device_name(index), {})
    return found.get("kernels", {}) if _minor(found.get("triton", "")) == _minor(triton.__version__) else {}


def tuned(kernel: str, key: str, device: torch.device, **defaults: int) -> dict[str, int]:
    """The options to launch a kernel with.

    Args:
        kernel: file and function, "polar.symmetric". key: bucket of shapes and types.
        defaults: all options, as they are where nothing was measured.

    Returns:
        The options; always those of `defaults` by name.
    """
    for heard in _asked:
        heard.add((kernel, key))
    if kernel in _trying:
        return {**defaults, **_trying[kernel]}
    if device.type != "cuda":
        return defaults
    entry = _kernels(torch.cuda.current_device() if device.index is None else device.index).get(kernel, {}).get(key)
    return defaults if entry is None else {**defaults, **entry["options"]}


@contextmanager
def trying(kernel: str, options: Mapping[str, int]) -> Iterator[None]:
    """Inside, the kernel takes these options whatever its key (a tuner's trial)."""
    before = _trying.get(kernel)
    _trying[kernel] = options
    try:
        yield
    finally:
        if before is None:
            del _trying[kernel]
        else:
            _trying[kernel] = before


@contextmanager
def asked() -> Iterator[set[tuple[str, str]]]:
    """The (kernel, key) that are asked for inside."""
    heard: set[tuple[str, str]] = set()
    _asked.append(heard)
    try:
        yield heard
    finally:
        _asked[:] = [other for other in _asked if other is not heard]
