"""Checks of what `spectral_solve`, `polar` and `informax` are given: lists of matrices of one width, numbers and rows for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def matrices(weights: Any) -> tuple[list[Tensor], bool]:
    """The list of matrices of one width and device, and whether it was given as one tensor."""
    single = isinstance(weights, Tensor)
    listed: list[Any] = [weights] if single else list(weights)
    for i, w in enumerate(listed):
        if not isinstance(w, Tensor) or not w.is_floating_point() or w.dim() != 2 or w.layout != torch.strided:
            got = f"{w.dtype} {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"weights[{i}]: want a dense floating matrix [rows, d], got {got}")
        if hasattr(w, "to_local"):
            raise TypeError(f"weights[{i}]: a DTensor; gather it first (full_tensor())")
        first = listed[0]
        if w.shape[1] != first.shape[1] or w.device != first.device:
            raise ValueError(
                f"weights[{i}]: {tuple(w.shape)} on {w.device}, the first is {tuple(first.shape)} on {first.device}; "
                "want one width and one device (call once for each)"
            )
    return listed, single


def square(name: str, value: Any, num: int, d: int, device: torch.device) -> Tensor:
    """float64 [d, d] or [num, d, d]."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: want a floating tensor, got {type(value).__name__}")
    if value.shape not in ((d, d), (num, d, d)):
        raise ValueError(f"{name}: want [{d}, {d}], or one for each weight [{num}, {d}, {d}]; got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: on {value.device}, the weights are on {device}")
    value = value.detach().double()
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: want finite numbers, got NaN or infinite ones")
    return value


def symmetric(name: str, value: Tensor) -> Tensor:
    gap = (value - value.mT).abs().max() if value.numel() else 0.0
    if float(gap) > 1e-5 * float(value.abs().max() if value.numel() else 0.0):
        raise ValueError(f"{name}: want a symmetric matrix, got entries that differ by up to {float(gap):.3g}")
    return (value + value.mT) / 2


def numbers(name: str, value: Any, num: int, *, above: bool) -> list[float]:
    """One number for each weight: `value` itself, or a list of them."""
    each = [value] * num if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(each, Tensor):
        each = each.tolist()
    if not isinstance(each, list | tuple) or len(each) != num:
        raise ValueError(f"{name}: want a number, or one for each of the {num} weights; got {value!r}")
    for x in each:
        if not math.isfinite(x) or x < 0 or (above and x == 0):
            raise ValueError(f"{name}: want finite numbers {'above 0' if above else 'of at least 0'}, got {x}")
    return [float(x) for x in each]


def flat_rows(relevance: Any, heights: Sequence[int]) -> Tensor | None:
    """[rows] of all weights together as they were given, or None where all are 1."""
    if relevance is None:
        return None
    if isinstance(relevance, int | float) and not isinstance(relevance, bool):
        out = torch.full((sum(heights),), float(relevance))
    elif isinstance(relevance, Tensor):
        out = relevance.detach().flatten()
    elif isinstance(relevance, list | tuple) and all(isinstance(r, Tensor) for r in relevance):
        for i, (r, height) in enumerate(zip(relevance, heights)):
            if r.numel() != height:
                raise ValueError(f"relevance[{i}]: want one number a row, {height}; got {r.numel()}")
        out = torch.cat([r.detach().flatten() for r in relevance]) if relevance else torch.zeros(0)
    else:
        raise TypeError(f"relevance: want a number, a tensor or a list of tensors, got {type(relevance).__name__}")
    if out.numel() != sum(heights):
        raise ValueError(f"relevance: want one number for each of the {sum(heights)} rows, got {out.numel()}")
    return out


def rows_of(relevance: Any, heights: Sequence[int], like: Tensor) -> Tensor | None:
    """The same in the type and on the device of `like`, once the values are seen to be in order."""
    out = flat_rows(relevance, heights)
    if out is None:
        return None
    out = out.to(like)
    if not bool((out >= 0).all()) or not bool(out.isfinite().all()):
        raise ValueError("relevance: want finite numbers of at least 0")
    return out


def concept_rows(per_concept: Any, rows: int, d: int) -> tuple[Tensor, ...]:
    try:
        mask, anchors, features = per_concept
    except (TypeError, ValueError):
        raise TypeError("per_concept: want (mask [rows, m], anchors [m, T, d], features [m, T, d])") from None
    m = mask.shape[-1]
    if mask.shape != (rows, m) or anchors.dim() != 3 or anchors.shape != features.shape or anchors.shape[::2] != (m, d):
        raise ValueError(
            f"per_concept: want mask [{rows}, m], anchors and features [m, T, {d}]; got {list(mask.shape)}, "
            f"{list(anchors.shape)}, {list(features.shape)}"
        )
    return mask.detach(), anchors.detach(), features.detach()
