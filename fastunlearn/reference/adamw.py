"""AdamW and SGD for tensors of which only some entries may move, in plain PyTorch: the definition.

AdamW: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019); the order of operations is torch.optim's.
Moments are compact: the entries that may move, in the order in which they lie in the tensor. All tensors are 1-D here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastunlearn.reference import stochastic


def _read(param: Tensor, grad: Tensor, may: Tensor | None, master: Tensor | None, factor: Tensor | float) -> tuple:
    """(places that may move, parameter and gradient there in fp32)."""
    at = torch.arange(param.numel(), device=param.device) if may is None else may.nonzero().squeeze(1)
    p = param[at].float() if master is None else master.clone()
    return at, p, grad[at].float() * factor


def _write(param: Tensor, at: Tensor, p: Tensor, master: Tensor | None, key: Sequence[int] | None) -> None:
    if master is not None:
        master.copy_(p)
    if key is not None and master is None and param.dtype == torch.bfloat16:
        param[at] = stochastic.to_bfloat16(p, stochastic.counter_random(at, key))
    else:
        param[at] = p.to(param.dtype)


def masked_adamw_(
    param: Tensor,
    grad: Tensor,
    may: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factor: Tensor | float = 1.0,
    scale: Tensor | None = None,
    master: Tensor | None = None,
    key: Sequence[int] | None = None,
) -> None:
    """One step of one tensor.

    Args:
        param, grad: [n], fp32, fp16 or bf16. may: bool [n], None: all. exp_avg, exp_avg_sq: fp32 [c], c entries may move.
        step: number of this step, from 1.
        factor: on the gradient (clipping; -1 to maximise).
        scale: fp32 [c], the learning rate of an entry in units of `lr` (or None).
        master: fp32 [c], the parameter in full precision (or None). key: of stochastic rounding (None: to nearest).
    """
    at, p, g = _read(param, grad, may, master, factor)
    s: Tensor | float = 1.0 if scale is None else scale
    p.sub_(lr * weight_decay * s * p)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    p.sub_(lr / (1 - beta1**step) * s * (exp_avg / denominator))
    _write(param, at, p, master, key)


def masked_sgd_(
    param: Tensor,
    grad: Tensor,
    may: Tensor | None,
    momentum_buffer: Tensor | None,
    first: bool,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    factor: Tensor | float = 1.0,
    scale: Tensor | None = None,
    master: Tensor | None = None,
    key: Sequence[int] | None = None,
) -> None:
    """One step of one tensor; arguments as `masked_adamw_`. `first`: the buffer holds nothing yet and becomes the gradient."""
    at, p, g = _read(param, grad, may, master, factor)
    g = g + weight_decay * p
    update = g
    if momentum_buffer is not None:
        if first:
            momentum_buffer.copy_(g)
        else:
            momentum_buffer.mul_(momentum).add_(g, alpha=1 - dampening)
        update = g + momentum * momentum_buffer if nesterov else momentum_buffer
    p.sub_(lr * (1.0 if scale is None else scale) * update)
    _write(param, at, p, master, key)


def masked_sumsq(grad: Tensor, may: Tensor | None) -> Tensor:
    """Sum of squares of the entries that may move, float64 scalar."""
    g = grad if may is None else grad[may]
    return g.double().square().sum()
