"""Inner products of lists of gradients, tensor by tensor, in plain PyTorch: the definition.

Products are rounded to fp32 at most, sums are fp64: bf16 or fp32 sums over the 1e7 entries of a tensor are not usable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gram(groups: Sequence[Sequence[Tensor | None]], may: Sequence[Tensor | None]) -> Tensor:
    """out[t, i, j] = sum over the entries that may move of groups[i][t] * groups[j][t].

    Args:
        groups: lists of equal length; None counts as zeros. may: bool tensors (or None: all) of the tensors' shapes.

    Returns:
        float64 [tensors, groups, groups], on the device of the first tensor there is.
    """
    device = next((x.device for group in groups for x in group if x is not None), None)
    out = torch.zeros(len(may), len(groups), len(groups), dtype=torch.float64, device=device)
    for t, moves in enumerate(may):
        column = [
            None if x is None else (x if moves is None else x[moves]).to(torch.promote_types(x.dtype, torch.float32))
            for x in (group[t] for group in groups)
        ]
        for i, x in enumerate(column):
            for j, y in enumerate(column[: i + 1]):
                if x is not None and y is not None:
                    out[t, i, j] = out[t, j, i] = (x * y).sum(dtype=torch.float64)
    return out
