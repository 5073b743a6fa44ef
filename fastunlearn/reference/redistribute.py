"""SAU's importance-aware redistribution in plain PyTorch: factors on the updates of the entries that survive pruning.

A reconstruction of "Sparsity-Aware Unlearning for LLMs via Gradient Masking and Importance Redistribution" (arXiv
2602.00577), whose equations are not public. With importance I >= 0, survivors M and for each output row i

    lost_i = sum of I_ij over pruned j,  kept_i = sum over survivors,  mean_i = kept_i / number of survivors
    r_ij = (lost_i / kept_i) (I_ij / mean_i)
    f_ij = min(1 + beta r_ij, clip) for the survivors, divided by its root mean square over those of the whole tensor

(of each row it would cancel lost_i / kept_i). A row whose survivors have no importance has r = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def valid_importance(importance: Tensor) -> Tensor:
    """bool scalar: neither negative nor infinite nor NaN, and no row whose sum is beyond fp32."""
    fits = importance.sum(1, dtype=torch.float64) <= LARGEST
    return ((importance >= 0) & (importance <= LARGEST)).all() & fits.all()


def redistribution(importance: Tensor, may: Tensor, beta: float, clip: float) -> Tensor:
    """importance [rows, cols] (float64, or computed in fp32), bool [rows, cols] -> [survivors], row-major."""
    x = importance if importance.dtype == torch.float64 else importance.float()
    kept = x.where(may, 0).sum(1, dtype=torch.float64)
    lost = x.where(~may, 0).sum(1, dtype=torch.float64)
    # 1e290: infinite times 0 would be NaN; the product with what can stand beside it is clipped all the same.
    ratio = (beta * lost / kept).where(kept > 0, 0).clamp(max=1e290)
    scale = (ratio * (may.sum(1) / kept)).where(ratio > 0, 0)
    if bool((scale > LARGEST).any()):
        # A row whose survivors are near the smallest numbers: r is in range, only its factors are not.
        r = (ratio * may.sum(1))[:, None] * (x / kept.where(kept > 0, 1)[:, None])
    else:
        r = scale.to(x.dtype)[:, None] * x
    factors = (1 + r).clamp(max=clip)[may]
    return (factors / factors.double().square().mean().sqrt()).to(x.dtype)
