"""N:M masks in plain PyTorch: two stable sorts say which columns of a group come first."""

from __future__ import annotations

import torch
from torch import Tensor


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Floating [rows, cols] -> bool [rows, cols]: the n first of every m consecutive columns.

    Order of a group: higher score first, -0.0 equal to 0.0, NaN last (after -inf), ties by the lowest column.
    """
    groups = (scores + 0.0).view(scores.shape[0], scores.shape[1] // m, m)  # -0.0 + 0.0 is 0.0
    nan = groups.isnan()
    order = groups.masked_fill(nan, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, nan.gather(-1, order).byte().sort(dim=-1, stable=True).indices)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return kept.view(scores.shape)
