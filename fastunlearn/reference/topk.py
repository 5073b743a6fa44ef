"""topk_mask in plain PyTorch: a stable sort, and the pieces of the distributed selection.

The k largest entries; among equal ones the first in the order of the list, then row-major; -0.0 equals 0.0; NaN never.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn.reference.mask import mask_pack


def select_rows(values: Tensor, k: Sequence[int]) -> list[Tensor]:
    """For every k the mask (bool) of the k largest entries in each row of `values` [rows, cols]."""
    nan = values.isnan()
    values = values.masked_fill(nan, -torch.inf)
    order = values.sort(dim=1, descending=True, stable=True).indices
    # A second stable sort puts NaN behind -inf and keeps the rest in order.
    order = order.gather(1, nan.gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices)
    out = []
    for kept in k:
        mask = torch.zeros_like(nan)
        mask.scatter_(1, order[:, :kept], True)
        out.append(mask & ~nan)
    return out


def _comparable(t: Tensor, absolute: bool) -> Tensor:
    # Adding 0.0 turns -0.0 into 0.0 and changes nothing else.
    wide = t if t.dtype == torch.float64 else t.float()
    return (wide.abs() if absolute else wide) + 0.0


def topk_mask(
    scores: Sequence[Tensor], counts: Sequence[Sequence[int]], scope: str, absolute: bool
) -> tuple[list[list[Tensor]], Tensor]:
    """The definition.

    Args:
        scores: tensors [rows, cols].
        counts: for every density the entries to keep: one number (global), or one for each tensor (in all of it or in
            each of its rows).

    Returns:
        bits for every density and tensor, and the number of NaN (int64 scalar tensor).
    """
    values = [_comparable(t, absolute) for t in scores]
    nan = torch.stack([v.isnan().sum() for v in values]).sum()
    if scope == "global":
        flat = torch.cat([v.flatten() for v in values]).unsqueeze(0)
        masks = [m.split([v.numel() for v in values], dim=1) for m in select_rows(flat, [c[0] for c in counts])]
        by_density = [[m.view(v.shape) for m, v in zip(row, values)] for row in masks]
    else:
        by_tensor = []
        for i, v in enumerate(values):
            rows = v.reshape(1, -1) if scope == "tensor" else v
            by_tensor.append([m.view(v.shape) for m in select_rows(rows, [c[i] for c in counts])])
        by_density = [[masks[d] for masks in by_tensor] for d in range(len(counts))]
    return [[mask_pack(m) for m in masks] for masks in by_density], nan


# ---- pieces of the distributed selection ----------------------------------------------------------------------------


def keys(t: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    """(int64 keys whose order is the order of the values, which entries are NaN). 32 bits, for float64 64 bits (signed)."""
    values = _comparable(t, absolute).flatten()
    if values.dtype == torch.float64:
        u = values.view(torch.int64)
        return u ^ (u >> 63 & torch.iinfo(torch.int64).max), values.isnan()
    u = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if absolute:
        return u + 1, values.isnan()
    return torch.where(u >= 1 << 31, u ^ 0xFFFFFFFF, u | 1 << 31), values.isnan()


def topk_histogram(
    scores: Sequence[Tensor], absolute: bool, lo: Sequence[int], shift: Sequence[int], bins: int
) -> Tensor:
    """int64 [tensors, bins]: entries of tensor i, NaN left out, with (key - lo[i]) >> shift[i] == bin."""
    out = []
    for t, first, by in zip(scores, lo, shift):
        key, nan = keys(t, absolute)
        place = (key >> by) - (first >> by)
        out.append(torch.bincount(place[(place >= 0) & (place < bins) & ~nan], minlength=bins))
    return torch.stack(out)


def topk_write(scores: Sequence[Tensor], absolute: bool, key: Sequence[int], take: Sequence[int]) -> list[Tensor]:
    """Bits of the entries above key[i], and of the first take[i] entries equal to it, for tensors [rows, cols]."""
    out = []
    for t, threshold, ties in zip(scores, key, take):
        values, nan = keys(t, absolute)
        equal = (values == threshold) & ~nan
        mask = ((values > threshold) & ~nan) | (equal & (equal.cumsum(0) <= ties))
        out.append(mask_pack(mask.view(t.shape)))
    return out
