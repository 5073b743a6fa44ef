"""Negative log-likelihood of tokens from their logits, in plain PyTorch, over the logits themselves.

With x the logits, z = softcap * tanh(scale * x / softcap) (z = scale * x without a cap), y the label and p = softmax(z):

    nll = logsumexp(z) - z_y,    d nll / d x_v = (p_v - [v = y]) dz_v / dx_v

All in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: numbers a token that `block_` needs of `rows_`: the largest z and the log of sum exp(z - largest); apart, as their sum rounds
STATS = 2


def buffers(spec: Any, like: Tensor) -> int:
    """Tensors of the logits' size, in their type, that `rows_` and `block_` take at once, the logits among them."""
    wide = 2 if like.element_size() == 2 else 0
    return 1 + wide + (max(wide, 1) if spec.softcap else 0)


def capped(logits: Tensor, spec: Any) -> tuple[Tensor, Tensor | float]:
    """(z, dz / dx) in fp32; z in the logits' memory where they are fp32."""
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if spec.scale != 1:
        z.mul_(spec.scale)
    if not spec.softcap:
        return z, spec.scale
    z.div_(spec.softcap).tanh_()
    slope = (z * z).neg_().add_(1).mul_(spec.scale)
    return z.mul_(spec.softcap), slope


def finish_(logits: Tensor, gradient: Tensor, slope: Tensor | float) -> None:
    """logits = gradient * slope"""
    if isinstance(slope, Tensor) or slope != 1:
        gradient.mul_(slope)
    if gradient is not logits:
        logits.copy_(gradient)


def rows_(
    logits: Tensor, reference: None, labels: Tensor, value: Tensor, stats: Tensor, spec: Any, gradient: bool
) -> None:
    """Writes nll [n] to `value` and `stats` [n, 2]; the logits [n, V] become their gradient, or are lost."""
    z, slope = capped(logits, spec)
    at = labels[:, None]
    top = z.amax(1, keepdim=True)
    label = z.sub_(top).gather(1, at)
    total = z.exp_().sum(1, keepdim=True)
    value.copy_((total.log() - label)[:, 0])
    stats.copy_(torch.cat([top, total.log()], 1))
    if gradient:
        z.div_(total).scatter_add_(1, at, torch.full_like(label, -1))
        finish_(logits, z, slope)


def block_(logits: Tensor, reference: None, labels: Tensor, stats: Tensor, start: int, total: int, spec: Any) -> None:
    """Logits of the vocabulary's entries start, start + 1, ... become their gradient."""
    z, slope = capped(logits, spec)
    z.sub_(stats[:, :1]).sub_(stats[:, 1:]).exp_()
    here = ((labels >= start) & (labels < start + z.shape[1])).to(z.dtype)[:, None]
    z.scatter_add_(1, (labels - start).clamp(0, z.shape[1] - 1)[:, None], -here)
    finish_(logits, z, slope)
