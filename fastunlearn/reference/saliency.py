"""Accumulation of saliency scores in plain PyTorch, in fp32 whatever the gradients are.

abs: SPARE's sum of |g| over batches; signed: SalUn's sum of g (its modulus is taken at selection); square: the diagonal of
the empirical Fisher information; weight_grad: SNIP's |w g|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def saliency_accumulate_(
    scores: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[Tensor], kind: str
) -> None:
    """scores[i] += |g|, g^2, g or |w g|; `weights` is empty but for kind "weight_grad"."""
    for i, (score, grad) in enumerate(zip(scores, grads)):
        g = grad.to(score.dtype)
        if kind == "abs":
            score.add_(g.abs())
        elif kind == "square":
            score.addcmul_(g, g)
        elif kind == "signed":
            score.add_(g)
        else:
            score.add_((weights[i].to(score.dtype) * g).abs())
