"""Losses between a model's and a target's distribution over their logits, in place (the maths:
fastunlearn/reference/linear_divergence.py).

`rows`: a program a token, once through both rows of logits for maxima, sums and the target's mean of what the loss adds up, and
where the gradient is wanted once more to write it over the model's logits. `block`: a tile of a part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.linear_nll import LOWEST, last, tile, width
from fastunlearn.reference.linear_divergence import STATS as STATS

KINDS = {"kl": 0, "undial": 1, "ce_u": 2, "pdu": 3}
KL = tl.constexpr(0)
UNDIAL = tl.constexpr(1)
CE_U = tl.constexpr(2)
PDU = tl.constexpr(3)
TILE = 2048
WARPS = 8


def buffers(spec: Any, like: Tensor) -> int:
    """The model's logits, and the reference's where there is one."""
    return 2 if spec.kind in ("kl", "undial") else 1


@triton.jit
def targets(
    z, reference, offs, cols, edge, label, strength, scale, softcap, KIND: tl.constexpr, CAP: tl.constexpr
):  # fmt: skip
    """Logits of the target, -inf outside."""
    if KIND == CE_U:
        r = tl.where(offs == label, float("-inf"), z)
    else:
        r, _slope = tile(reference, offs, cols, edge, scale, softcap, CAP)
        if KIND == UNDIAL:
            r -= tl.where(offs == label, strength, 0.0)
    return r


@triton.jit
def gradients(z, r, top, rest, ref_top, ref_rest, offs, label, KIND: tl.constexpr):
    """p - t"""
    t = tl.exp((r - ref_top) - ref_rest)
    if KIND == CE_U:
        # 1 - p_y: the sum of the others over the whole
        p = 1.0 - tl.exp((ref_top - top) + (ref_rest - rest))
        return tl.where(offs == label, p, -t * p)
    return tl.exp((z - top) - rest) - t


@triton.jit
def rows(
    logits, reference, labels, value, stats, cols, edge, stride, ref_stride, strength, scale, softcap,
    GRADIENT: tl.constexpr, KIND: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [n]. logits, reference [n, cols], of whose rows' memory `edge` entries may be touched; labels int64 [n]; value fp32 [n]; stats fp32 [n, 4]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    reference += row * ref_stride
    label = tl.load(labels + row)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if KIND == PDU:
        best = tl.full([], 0, tl.int32)
        for start in range(0, cols, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
            here = tl.max(z, 0)
            first = tl.min(tl.where(z == here, offs, 2147483647), 0)
            best = tl.where(here > top, first, best)
            top = tl.maximum(top, here)
            total += tl.where(offs < cols, z, 0.0)
        gap = top - tl.sum(total, 0) / cols
        tl.store(value + row, gap * gap)
        tl.store(stats + 4 * row, 2.0 * gap)
        tl.store(stats + 4 * row + 1, best.to(tl.float32))
        if GRADIENT:
            for start in range(0, cols, BLOCK):
                offs = start + tl.arange(0, BLOCK)
                z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
                g = 2.0 * gap * (tl.where(offs == best, 1.0, 0.0) - 1.0 / cols) * slope
                tl.store(logits + offs, g.to(logits.dtype.element_ty), mask=offs < edge)
    else:
        ref_top = tl.full([], LOWEST, tl.float32)
        ref_total = tl.zeros([BLOCK], tl.float32)
        mean = tl.zeros([BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
            r = targets(z, reference, offs, cols, edge, label, strength, scale, softcap, KIND, CAP)
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - higher) + tl.exp(z - higher)
            top = higher
            higher = tl.maximum(ref_top, tl.max(r, 0))
            less = tl.exp(ref_top - higher)
            t = tl.exp(r - higher)
            if KIND == KL:
                x = r - z
            else:
                x = -z
            ref_total = ref_total * less + t
            # Where t is 0 the difference may be no number.
            mean = mean * less + tl.where(t > 0, t * x, 0.0)
            ref_top = higher
        rest = tl.log(tl.sum(total, 0))
        weight = tl.sum(ref_total, 0)
        ref_rest = tl.log(weight)
        loss = tl.sum(mean, 0) / weight
        if KIND == KL:
            loss += (top - ref_top) + (rest - ref_rest)
        else:
            loss += top + rest
        tl.store(value + row, loss)
        tl.store(stats + 4 * row, top)
        tl.store(stats + 4 * row + 1, rest)
        tl.store(stats + 4 * row + 2, ref_top)
        tl.store(stats + 4 * row + 3, ref_rest)
        if GRADIENT:
            for start in range(0, cols, BLOCK):
                offs = start + tl.arange(0, BLOCK)
                z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
                r = targets(z, reference, offs, cols, edge, label, strength, scale, softcap, KIND, CAP)
                g = gradients(z, r, top, rest, ref_top, ref_rest, offs, label, KIND) * slope
                tl.store(logits + offs, g.to(logits.dtype.element_ty), mask=offs < edge)


@triton.jit
def block(
    logits, reference, labels, stats, cols, edge, stride, ref_stride, start, share, strength, scale, softcap,
    KIND: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [n, tiles]. logits and reference of the vocabulary's entries start, start + 1, ..., cols of them; share: 1 / V."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride
    z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
    first = tl.load(stats + 4 * row)
    second = tl.load(stats + 4 * row + 1)
    if KIND == PDU:
        g = first * (tl.where(offs == second.to(tl.int64) - start, 1.0, 0.0) - share)
    else:
        label = tl.load(labels + row) - start
        r = targets(z, reference + row * ref_stride, offs, cols, edge, label, strength, scale, softcap, KIND, CAP)
        ref_top = tl.load(stats + 4 * row + 2)
        ref_rest = tl.load(stats + 4 * row + 3)
        g = gradients(z, r, first, second, ref_top, ref_rest, offs, label, KIND)
    tl.store(logits + offs, (g * slope).to(logits.dtype.element_ty), mask=offs < edge)


def rows_(
    logits: Tensor, reference: Tensor | None, labels: Tensor, value: Tensor, stats: Tensor, spec: Any, gradient: bool
) -> None:
    """As in the reference."""
    n, cols = logits.shape
    if not n:
        return
    other = logits if reference is None else reference
    with torch.cuda.device_of(logits):
        rows[(n,)](
            logits, other, labels, value, stats, cols, last(logits, other), logits.stride(0), other.stride(0), spec.strength, spec.scale,
            spec.softcap, gradient, KINDS[spec.kind], bool(spec.softcap), width(cols, TILE), num_warps=WARPS,
        )  # fmt: skip


def block_(
    logits: Tensor, reference: Tensor | None, labels: Tensor, stats: Tensor, start: int, total: int, spec: Any
) -> None:
    """As in the reference."""
    n, cols = logits.shape
    if not n:
        return
    other, tiles = logits if reference is None else reference, width(cols, TILE)
    with torch.cuda.device_of(logits):
        block[(n, triton.cdiv(cols, tiles))](
            logits, other, labels, stats, cols, last(logits, other), logits.stride(0), other.stride(0), start, 1 / total, spec.strength,
            spec.scale, spec.softcap, KINDS[spec.kind], bool(spec.softcap), tiles, num_warps=4,
        )  # fmt: skip
