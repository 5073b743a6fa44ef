"""A step that is a combination of gradients, on the entries that may move, in plain PyTorch: the definition.

The factors come from the Gram matrices (fastunlearn/ops/_hamu_solve.py: HAMU, arXiv 2606.02119).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn.reference import stochastic


@torch.no_grad()
def combine_(
    param: Tensor,
    grads: Sequence[Tensor | None],
    factors: Sequence[float],
    may: Tensor | None,
    key: Sequence[int] | None = None,
    first: int = 0,
) -> None:
    """param += sum_g factors[g] * grads[g], in fp32, rounded once.

    Args:
        param: 1-D. grads: as long; None counts as zeros. may: bool, None: all.
        key: of stochastic rounding to bf16 (None: to nearest). first: number of this part's first entry, for that.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    change = torch.zeros(param.shape, dtype=wide, device=param.device)
    for grad, factor in zip(grads, factors):
        if grad is not None and factor:
            change.add_(grad.to(wide), alpha=factor)
    after = param.to(wide) + change
    if key is not None:
        index = torch.arange(first, first + param.numel(), device=param.device)
        rounded = stochastic.to_bfloat16(after, stochastic.counter_random(index, key))
    else:
        rounded = after.to(param.dtype)
    param.copy_(rounded if may is None else torch.where(may, rounded, param))
