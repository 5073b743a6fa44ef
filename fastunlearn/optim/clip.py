"""Norm and clipping of gradients over the entries that may move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn.ops import _masked_step as engine
from fastunlearn.ops._slots import Batch, Slot, check_param, local
from fastunlearn.ops.adamw import Mask
from fastunlearn.optim.masks import local_mask


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """fp32 scalar: torch.nn.utils.clip_grad_norm_'s factor, min(1, max_norm / (norm + 1e-6))."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _shard_groups(param: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """(mesh, mesh dimensions over which the parameter is cut), None for a tensor that is whole."""
    if not hasattr(param, "to_local"):
        return None
    sharded: Any = param
    cut = tuple(i for i, placement in enumerate(sharded.placements) if placement.is_shard())
    return (sharded.device_mesh, cut) if cut else None


def sum_over_shards(batch: Batch, params: Sequence[Tensor], tables: engine.Tables | None = None) -> Tensor:
    """Sum of squares over the entries of a batch that may move, summed over the processes that hold the other shards.

    Args:
        params: the parameters of the batch's tensors, DTensors or not.
    """
    groups = [_shard_groups(param) for param in params]
    if not any(groups):
        return engine.sumsq_batch(batch, tables)
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    for group in dict.fromkeys(groups):
        squares = engine.sumsq_batch(batch.part([i for i, other in enumerate(groups) if other == group]))
        if group is not None:
            mesh, dims = group
            for dim in dims:
                torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
        total = total + squares
    return total


@torch.no_grad()
def clip_masked_grad_norm_(
    params: Sequence[Tensor], masks: Sequence[Mask], max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ with the norm taken over the entries that may move; scales whole gradients.

    `max_grad_norm` of the masked optimisers does the same inside the step, without scaling the gradients in a pass of its own
    and without synchronising; this function synchronises with the device once a mask, to count it.

    Args:
        params: tensors on one device (DTensors count all shards); those without a gradient are skipped.
        masks: for each a BitMask, a bool tensor, or None (every entry may move).
        error_if_nonfinite: raise where the norm is NaN or infinite (synchronises with the device).

    Returns:
        The norm before clipping, fp32 scalar on the device.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: see error_if_nonfinite.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: want a number > 0, got {max_norm}")
    params, masks = list(params), list(masks)
    if len(params) != len(masks):
        raise ValueError(f"masks: want {len(params)} entries, one for each parameter, got {len(masks)}")
    batch, members, grads = Batch(), [], []
    for i, (param, mask) in enumerate(zip(params, masks)):
        check_param(param, f"params[{i}]")
        if param.grad is None:
            continue
        here, grad = local(param.detach()), local(param.grad)
        cut = local_mask(mask, param) if mask is not None and not isinstance(mask, Tensor) else mask
        grads.append(grad)
        slot = Slot(cut, here, f"masks[{i}]", of=f"params[{i}]", alias=True)
        if batch.add(slot, here, grad, what=f"gradient of params[{i}]"):
            members.append(param)
    if len({grad.device for grad in grads}) > 1:
        raise ValueError("params: want all of them on one device")
    if not len(batch):
        return torch.zeros(())
    norm = sum_over_shards(batch, members).sqrt().float()
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(f"the norm of the gradients that may move is {float(norm)}; nothing was clipped")
    torch._foreach_mul_(grads, clip_coefficient(norm, max_norm))
    return norm
