"""The arguments of `linear_nll` and `linear_divergence`: shapes, types, devices, numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_tensor(name: str, value: Any, dims: Callable[[int], bool], wanted: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: want a tensor, got {type(value).__name__}")
    if hasattr(value, "to_local"):
        raise TypeError(
            f"{name}: a DTensor; gather it first (full_tensor()): the softmax runs over the whole vocabulary"
        )
    if value.dtype not in _DTYPES or value.layout != torch.strided:
        raise TypeError(f"{name}: want a dense tensor of float32, float16, bfloat16 or float64, got {value.dtype}, {value.layout}")  # fmt: skip
    if not dims(value.dim()):
        raise ValueError(f"{name}: want {wanted}, got {tuple(value.shape)}")


def number(name: str, value: Any, wanted: str, ok: Callable[[float], bool]) -> float:
    """A finite float; else an error that says what is wanted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: want {wanted}, got {type(value).__name__}")
    if not math.isfinite(value) or not ok(value):
        raise ValueError(f"{name}: want {wanted}, got {value}")
    return float(value)


def check(prefix: str, hidden: Any, weight: Any, bias: Any, labels: Any) -> None:
    """Shapes, types and devices of one head.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_tensor(f"{prefix}hidden", hidden, lambda d: d >= 2, "[..., tokens, width]")
    _check_tensor(f"{prefix}weight", weight, lambda d: d == 2, "[vocabulary, width]")
    if weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight: want [vocabulary, {hidden.shape[-1]}] for {prefix}hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        _check_tensor(f"{prefix}bias", bias, lambda d: d == 1, "[vocabulary]")
        if len(bias) != len(weight):
            raise ValueError(f"{prefix}bias: want [{len(weight)}], as {prefix}weight has rows, got {tuple(bias.shape)}")
    for name, other in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if other is not None and other.dtype != hidden.dtype:
            raise TypeError(f"{name}: {other.dtype}, but {prefix}hidden is {hidden.dtype}; want one of them for both")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: want an int64 tensor, got {got}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: want {tuple(hidden.shape[:-1])}, one for each hidden state of {prefix}hidden, got {tuple(labels.shape)}"
        )
    for name, other in ((f"{prefix}weight", weight), (f"{prefix}bias", bias), ("labels", labels)):
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name}: on {other.device}, but {prefix}hidden is on {hidden.device}")


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In autocast's type, as F.linear would have them."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
