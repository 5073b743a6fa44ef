"""Losses between a model's next-token distribution and a target, in plain PyTorch, over the logits themselves.

With z the model's logits (after scale and cap, see reference/linear_nll.py), p = softmax(z), r the reference's, y the label:

    kl      sum_v q_v (log q_v - log p_v), q = softmax(r)                               gradient over z: p - q
    undial  -sum_v t_v log p_v, t = softmax(r - strength [v = y])                       p - t         (Dong et al. 2024, eq. 3-4)
    ce_u    -sum_v t_v log p_v, t = softmax(z with z_y = -inf), a constant              p - t         (Yang 2025, eq. 5)
    pdu     (max_v z_v - mean_v z_v)^2                                                  2 (max - mean) ([v = argmax] - 1 / V)
                                                                                        (Entesari et al. 2025, eq. 9)

For ce_u, p - t is p_y at the label and -t_v p_y elsewhere. The first of several largest logits is the argmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastunlearn.reference.linear_nll import capped, finish_

#: numbers a token that `block_` needs of `rows_`: of z and of the target's logits the largest and the log of sum exp(. - largest);
#: pdu: twice the gap, and the argmax
STATS = 4


def buffers(spec: Any, like: Tensor) -> int:
    """Tensors of the logits' size, in their type, that `rows_` and `block_` take at once."""
    wide = 2 if like.element_size() == 2 else 1
    return 6 * wide


def target(z: Tensor, reference: Tensor | None, labels: Tensor, start: int, spec: Any) -> Tensor:
    """Logits of the target, of the vocabulary's entries start, start + 1, ..."""
    if spec.kind == "ce_u":
        r, amount = z.clone(), float("-inf")
    else:
        assert reference is not None
        r, amount = capped(reference, spec)[0], -spec.strength
    if spec.kind == "kl":
        return r
    here = (labels >= start) & (labels < start + z.shape[1])
    at = (labels - start).clamp(0, z.shape[1] - 1)[:, None]
    # 0 * -inf is no number.
    return r.scatter_add_(1, at, torch.zeros_like(r[:, :1]).masked_fill_(here[:, None], amount))


def rows_(
    logits: Tensor, reference: Tensor | None, labels: Tensor, value: Tensor, stats: Tensor, spec: Any, gradient: bool
) -> None:
    """Writes the loss [n] and `stats` [n, 4]; the logits [n, V] become their gradient, or are lost, as the reference's are."""
    z, slope = capped(logits, spec)
    if spec.kind == "pdu":
        top, index = z.max(1)
        gap = top - z.mean(1)
        value.copy_(gap * gap)
        stats.zero_()
        stats[:, 0], stats[:, 1] = 2 * gap, index.to(gap.dtype)
        if gradient:
            _pdu_gradient_(z, stats, 0, z.shape[1])
            finish_(logits, z, slope)
        return
    r = target(z, reference, labels, 0, spec)
    for x, at in ((z, 0), (r, 2)):
        top = x.amax(1, keepdim=True)
        total = x.sub_(top).exp().sum(1, keepdim=True).log_()
        x.sub_(total)
        stats[:, at : at + 2] = torch.cat([top, total], 1)
    t = r.exp()
    value.copy_((t * (r - z if spec.kind == "kl" else -z)).sum(1))
    if gradient:
        _gradient_(z, t, labels, 0, stats, spec)
        finish_(logits, z, slope)


def block_(
    logits: Tensor, reference: Tensor | None, labels: Tensor, stats: Tensor, start: int, total: int, spec: Any
) -> None:
    """Logits of the vocabulary's entries start, start + 1, ..., of `total`, become their gradient."""
    z, slope = capped(logits, spec)
    if spec.kind == "pdu":
        _pdu_gradient_(z, stats, start, total)
    else:
        t = target(z, reference, labels, start, spec).sub_(stats[:, 2:3]).sub_(stats[:, 3:]).exp_()
        _gradient_(z.sub_(stats[:, :1]).sub_(stats[:, 1:2]), t, labels, start, stats, spec)
    finish_(logits, z, slope)


def _gradient_(logp: Tensor, t: Tensor, labels: Tensor, start: int, stats: Tensor, spec: Any) -> None:
    """log p of a part of the vocabulary becomes p - t."""
    if spec.kind != "ce_u":
        logp.exp_().sub_(t)
        return
    # 1 - p_y: the sum of the others over the whole
    label = -torch.expm1((stats[:, 2] - stats[:, 0]) + (stats[:, 3] - stats[:, 1]))[:, None]
    here = ((labels >= start) & (labels < start + t.shape[1]))[:, None]
    at = (labels - start).clamp(0, t.shape[1] - 1)[:, None]
    logp.copy_(t).mul_(-label)
    logp.scatter_(1, at, torch.where(here, label, logp.gather(1, at)))


def _pdu_gradient_(z: Tensor, stats: Tensor, start: int, total: int) -> None:
    """z becomes the gradient of (max - mean)^2 over it."""
    index = stats[:, 1].long()
    here = ((index >= start) & (index < start + z.shape[1])).to(z.dtype)
    z.copy_((-stats[:, :1] / total).expand_as(z))
    at = (index - start).clamp(0, z.shape[1] - 1)[:, None]
    z.scatter_add_(1, at, (stats[:, 0] * here)[:, None])
