"""Masked AdamW and SGD steps and the masked gradient norm, on lists of tensors: public signatures and checks.

Only entries whose bit is set move, and only they have moments; the others stay equal bit for bit, and their gradients are
not read into any result. The maths: fastunlearn/reference/adamw.py. `fastunlearn.optim` holds the optimisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn import _backend
from fastunlearn.ops._masked_step import Options, adamw_batch, sgd_batch, sumsq_batch
from fastunlearn.ops._slots import Batch, Slot, check_param, local
from fastunlearn.ops.mask import BitMask

Mask = BitMask | Tensor | None


def _listed(tensors: Any, name: str, count: int | None = None) -> list[Any]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: want a list, got {type(tensors).__name__}")
    if count is not None and len(tensors) != count:
        raise ValueError(f"{name}: want {count} entries, one for each parameter, got {len(tensors)}")
    return list(tensors)


def _state(tensor: Tensor, slot: Slot, name: str, like: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: want float32, got {tensor.dtype}")
    if tuple(tensor.shape) != (slot.count,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: want a contiguous tensor of shape ({slot.count},), one entry for each that may move, "
            f"got shape {tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name}: is on {tensor.device}, its parameter on {like.device}")
    return tensor


def _one_device(params: Sequence[Tensor]) -> None:
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise ValueError(f"params: want all of them on one device, got {', '.join(sorted(map(str, devices)))}")


def _checked_scale(grad_scale: Tensor | None, device: torch.device) -> Tensor | None:
    if grad_scale is None:
        return None
    if grad_scale.dtype != torch.float32 or grad_scale.numel() != 1 or grad_scale.device != device:
        raise ValueError(
            f"grad_scale: want one float32 number on {device}, got {grad_scale.dtype} of shape {tuple(grad_scale.shape)} "
            f"on {grad_scale.device}"
        )
    return grad_scale.resolve_neg()


def _batch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Mask],
    firsts: Sequence[Tensor | None],
    seconds: Sequence[Tensor | None],
    names: tuple[str, str],
    masters: Sequence[Tensor | None] | None,
    lr_scales: Sequence[Tensor | None] | None,
) -> tuple[Batch, list[int]]:
    """(the batch, which of the tensors it holds: those of which something may move)."""
    params = _listed(params, "params")
    n = len(params)
    grads, masks = _listed(grads, "grads", n), _listed(masks, "masks", n)
    firsts, seconds = _listed(firsts, names[0], n), _listed(seconds, names[1], n)
    masters = [None] * n if masters is None else _listed(masters, "masters", n)
    lr_scales = [None] * n if lr_scales is None else _listed(lr_scales, "lr_scales", n)
    for i, param in enumerate(params):
        check_param(param, f"params[{i}]")
    _one_device(params)
    batch, taken = Batch(), []
    for i in range(n):
        param, grad = local(params[i]), local(grads[i])
        slot = Slot(masks[i], param, f"masks[{i}]", of=f"params[{i}]", alias=True)
        first, second, master, scale = firsts[i], seconds[i], masters[i], lr_scales[i]
        if first is not None:
            first = _state(first, slot, f"{names[0]}[{i}]", param)
        if second is not None:
            second = _state(second, slot, f"{names[1]}[{i}]", param)
        if master is not None:
            master = _state(master, slot, f"masters[{i}]", param)
        if scale is not None:
            scale = slot.compact(scale.to(param.device), f"lr_scales[{i}]")
        if batch.add(slot, param, grad, first, second, master, scale, i, f"grads[{i}]"):
            taken.append(i)
    return batch, taken


def _steps(steps: Sequence[int] | Tensor, n: int) -> list[int]:
    values = [int(s) for s in (steps.tolist() if isinstance(steps, Tensor) else steps)]
    if len(values) != n:
        raise ValueError(f"steps: want {n} numbers, one for each parameter, got {len(values)}")
    if any(s < 1 for s in values):
        raise ValueError(f"steps: count from 1, got {min(values)}")
    return values


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Mask],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int] | Tensor,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    lr_scales: Sequence[Tensor | None] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> None:
    """One step of AdamW, in place, on the entries that may move, with compact moments.

    Every mask is counted anew, which synchronises with the device once a mask: in a training loop use
    `fastunlearn.optim.MaskedAdamW`, which counts once, when it is made.

    Args:
        params: float32, float16 or bfloat16, on one device. grads: of their shapes; float32, float16 or bfloat16.
        masks: for each a BitMask, a bool tensor of its shape, or None (every entry may move).
        exp_avgs, exp_avg_sqs: fp32, contiguous, [entries that may move], in the order in which they lie in the tensor.
        steps: the number of this step for each tensor, from 1 (bias correction; random numbers).
        lr_scales: for each None or factors on the learning rate of every entry, [entries that may move] in row-major order (as
            `redistribution` gives them) or the tensor's shape.
        masters: for each None or fp32 [entries that may move], the parameter in full precision; the parameter is then its
            rounding to nearest.
        grad_scale: one fp32 number on the device, times every gradient (clipping without synchronisation).
        stochastic_rounding: of bfloat16 parameters without a master, by (seed, step, number in the list, entry).

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    if _backend.traced(params, grads):
        torch.ops.fastunlearn.masked_adamw_(
            params, grads, _bits(masks), exp_avgs, exp_avg_sqs, torch.as_tensor(steps), lr, betas[0], betas[1], eps,
            weight_decay, maximize, _filled(lr_scales, params), _filled(masters, params), grad_scale, stochastic_rounding,
            seed,
        )  # fmt: skip
        return
    with torch.no_grad():
        batch, taken = _batch(
            params, grads, masks, exp_avgs, exp_avg_sqs, ("exp_avgs", "exp_avg_sqs"), masters, lr_scales
        )
        numbers = _steps(steps, len(params))
        options = [
            Options(
                lr=float(lr),
                beta1=betas[0],
                beta2=betas[1],
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
                step=numbers[i],
                seed=seed,
                stochastic=stochastic_rounding,
            )
            for i in taken
        ]
        if len(batch):
            adamw_batch(batch, options, _checked_scale(grad_scale, batch.device))


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Mask],
    momentum_buffers: Sequence[Tensor | None],
    steps: Sequence[int] | Tensor,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    lr_scales: Sequence[Tensor | None] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> None:
    """One step of SGD, in place, on the entries that may move, with compact momentum.

    Synchronises with the device once a mask, as `masked_adamw_` does; `fastunlearn.optim.MaskedSGD` does not.

    Args:
        momentum_buffers: for each fp32 [entries that may move] (its content does not matter at step 1), or None where
            momentum is 0. The others: as in `masked_adamw_`.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    if _backend.traced(params, grads):
        torch.ops.fastunlearn.masked_sgd_(
            params, grads, _bits(masks), _filled(momentum_buffers, params), torch.as_tensor(steps), lr, momentum, dampening,
            weight_decay, nesterov, maximize, _filled(lr_scales, params), _filled(masters, params), grad_scale,
            stochastic_rounding, seed,
        )  # fmt: skip
        return
    with torch.no_grad():
        seconds: list[Tensor | None] = [None] * len(params)
        names = ("momentum_buffers", "momentum_buffers")
        batch, taken = _batch(params, grads, masks, momentum_buffers, seconds, names, masters, lr_scales)
        numbers = _steps(steps, len(params))
        if momentum and any(buffer is None for buffer in momentum_buffers):
            raise ValueError("momentum_buffers: None, but momentum is not 0")
        options = [
            Options(
                lr=float(lr),
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                first=numbers[i] == 1 or momentum_buffers[i] is None,
                maximize=maximize,
                step=numbers[i],
                seed=seed,
                stochastic=stochastic_rounding,
            )
            for i in taken
        ]
        if len(batch):
            sgd_batch(batch, options, _checked_scale(grad_scale, batch.device))


def masked_grad_norm(grads: Sequence[Tensor], masks: Sequence[Mask]) -> Tensor:
    """Euclidean norm of the entries of all gradients that may move: float32 scalar on their device.

    Synchronises with the device once a mask, to count it; `max_grad_norm` of the masked optimisers does not.

    Args:
        grads: float32, float16 or bfloat16, on one device. masks: as in `masked_adamw_`.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    grads = _listed(grads, "grads")
    masks = _listed(masks, "masks", len(grads))
    for i, grad in enumerate(grads):
        check_param(grad, f"grads[{i}]")
    _one_device(grads)
    if _backend.traced(grads):
        return torch.ops.fastunlearn.masked_grad_norm(grads, _bits(masks))
    with torch.no_grad():
        batch = Batch()
        for i, grad in enumerate(map(local, grads)):
            batch.add(Slot(masks[i], grad, f"masks[{i}]", of=f"grads[{i}]", alias=True), grad, grad)
        if not len(batch):
            return torch.zeros((), device=grads[0].device if grads else None)
        return sumsq_batch(batch).sqrt().float()


# As torch.library ops: what torch.compile sees. Lists have one entry for each parameter; an empty tensor stands for None.
_NOTHING = 0


def _bits(masks: Sequence[Mask]) -> list[Tensor]:
    packed = [BitMask.pack(mask) if isinstance(mask, Tensor) else mask for mask in masks]
    return [torch.empty(_NOTHING, dtype=torch.uint8) if mask is None else mask.bits for mask in packed]


def _filled(tensors: Sequence[Tensor | None] | None, params: Sequence[Tensor]) -> list[Tensor]:
    listed: Sequence[Tensor | None] = [None] * len(params) if tensors is None else tensors
    return [torch.empty(_NOTHING, device=p.device) if t is None else t for t, p in zip(listed, params)]


def _masks(bits: Sequence[Tensor], like: Sequence[Tensor]) -> list[Mask]:
    return [None if b.numel() == _NOTHING else BitMask(b, t.shape) for b, t in zip(bits, like)]


def _or_none(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if t.numel() == _NOTHING else t for t in tensors]


_library = torch.library.Library("fastunlearn", "FRAGMENT")
_library.define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] bits, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor steps, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor[] lr_scales, "
    "Tensor(d!)[] masters, Tensor? grad_scale, bool stochastic_rounding, int seed) -> ()",
    tags=_backend.NOT_CAPTURED,
)
_library.define(
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor[] bits, Tensor(b!)[] momentum_buffers, Tensor steps, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, Tensor[] lr_scales, "
    "Tensor(c!)[] masters, Tensor? grad_scale, bool stochastic_rounding, int seed) -> ()",
    tags=_backend.NOT_CAPTURED,
)
_library.define("masked_grad_norm(Tensor[] grads, Tensor[] bits) -> Tensor", tags=_backend.NOT_CAPTURED)


def _adamw_op(
    params: list[Tensor], grads: list[Tensor], bits: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, maximize: bool,
    lr_scales: list[Tensor], masters: list[Tensor], grad_scale: Tensor | None, stochastic_rounding: bool, seed: int,
) -> None:  # fmt: skip
    masked_adamw_(
        params, grads, _masks(bits, params), exp_avgs, exp_avg_sqs, steps, lr=lr, betas=(beta1, beta2), eps=eps,
        weight_decay=weight_decay, maximize=maximize, lr_scales=_or_none(lr_scales), masters=_or_none(masters),
        grad_scale=grad_scale, stochastic_rounding=stochastic_rounding, seed=seed,
    )  # fmt: skip


def _sgd_op(
    params: list[Tensor], grads: list[Tensor], bits: list[Tensor], momentum_buffers: list[Tensor], steps: Tensor, lr: float,
    momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, lr_scales: list[Tensor],
    masters: list[Tensor], grad_scale: Tensor | None, stochastic_rounding: bool, seed: int,
) -> None:  # fmt: skip
    # An empty buffer means "no momentum" only where there is none: a tensor of which nothing may move has an empty one too.
    buffers = momentum_buffers if momentum else [None] * len(params)
    masked_sgd_(
        params, grads, _masks(bits, params), buffers, steps, lr=lr, momentum=momentum, dampening=dampening,
        weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, lr_scales=_or_none(lr_scales),
        masters=_or_none(masters), grad_scale=grad_scale, stochastic_rounding=stochastic_rounding, seed=seed,
    )  # fmt: skip


def _norm_op(grads: list[Tensor], bits: list[Tensor]) -> Tensor:
    return masked_grad_norm(grads, _masks(bits, grads))


_library.impl("masked_adamw_", _adamw_op, "CompositeExplicitAutograd")
_library.impl("masked_sgd_", _sgd_op, "CompositeExplicitAutograd")
_library.impl("masked_grad_norm", _norm_op, "CompositeExplicitAutograd")


@torch.library.register_fake("fastunlearn::masked_adamw_", lib=_library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("fastunlearn::masked_sgd_", lib=_library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("fastunlearn::masked_grad_norm", lib=_library)
def _(grads: list[Tensor], bits: list[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=grads[0].device if grads else None)
