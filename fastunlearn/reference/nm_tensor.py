"""Compressed N:M tensors in plain PyTorch: the entries whose bit is set, row by row, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastunlearn.reference.mask import mask_unpack


def nm_gather(dense: Tensor, bits: Tensor, n: int, m: int) -> Tensor:
    """dense [rows, cols], bits of an n:m mask -> values [rows, cols / m * n], columns in order."""
    rows, cols = dense.shape
    return dense.masked_select(mask_unpack(bits, cols)).view(rows, cols // m * n)


def nm_expand(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    """values -> dense [rows, cols], 0 where the bit is not set. Differentiable."""
    kept = mask_unpack(bits, cols)
    return torch.zeros(kept.shape, dtype=values.dtype, device=values.device).masked_scatter(kept, values)


def first_wrong_row(bits: Tensor, cols: int, n: int, m: int) -> int | None:
    """The first row with a group of m columns that has not n set bits; None where there is none."""
    counts = mask_unpack(bits, cols).view(bits.shape[0], cols // m, m).sum(-1)
    wrong = (counts != n).any(-1).nonzero()
    return int(wrong[0]) if len(wrong) else None
