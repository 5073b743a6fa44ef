"""Negative log-likelihood of tokens over their logits, in place (the maths: fastunlearn/reference/linear_nll.py).

`rows`: a program a token. It runs through the token's logits once for the running maximum and sum of the softmax, and where the
gradient is wanted once more (from the cache, as far as it holds them) to write it over them. `block`: a tile of the logits of a
part of the vocabulary, with the maximum and the sum known.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.reference.linear_nll import STATS as STATS

BLOCK = 4096
WARPS = 8
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and a number: differences of two of it are none


def buffers(spec: Any, like: Tensor) -> int:
    """As in the reference: all happens in the logits' memory."""
    return 1


@triton.jit
def capped(x, scale, softcap, CAP: tl.constexpr):
    """(z, dz / dx) of logits x"""
    z = x * scale
    slope = tl.zeros_like(z) + scale
    if CAP:
        t = 1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0)
        z = softcap * t
        slope = scale * (1.0 - t * t)
    return z, slope


@triton.jit
def tile(logits, offs, cols, edge, scale, softcap, CAP: tl.constexpr):
    """(z, dz / dx), z = -inf from `cols` on"""
    x = tl.load(logits + offs, mask=offs < edge, other=0.0).to(tl.float32)
    z, slope = capped(x, scale, softcap, CAP)
    return tl.where(offs < cols, z, float("-inf")), slope


@triton.jit
def rows(
    logits, labels, value, stats, cols, edge, stride, scale, softcap,
    GRADIENT: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [n]. logits [n, cols], rows `stride` apart, memory of which `edge` entries may be touched; labels int64 [n]; value fp32 [n]; stats fp32 [n, 2]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    at, _slope_at = capped(tl.load(logits + label).to(tl.float32), scale, softcap, CAP)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    rest = tl.log(tl.sum(total, 0))
    tl.store(value + row, (top - at) + rest)
    tl.store(stats + 2 * row, top)
    tl.store(stats + 2 * row + 1, rest)
    if GRADIENT:
        for start in range(0, cols, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
            g = (tl.exp((z - top) - rest) - tl.where(offs == label, 1.0, 0.0)) * slope
            tl.store(logits + offs, g.to(logits.dtype.element_ty), mask=offs < edge)


@triton.jit
def block(
    logits, labels, stats, cols, edge, stride, start, scale, softcap,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [n, tiles]. logits of the vocabulary's entries start, start + 1, ..., cols of them."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride
    z, slope = tile(logits, offs, cols, edge, scale, softcap, CAP)
    top = tl.load(stats + 2 * row)
    rest = tl.load(stats + 2 * row + 1)
    g = tl.exp((z - top) - rest) - tl.where(offs == tl.load(labels + row) - start, 1.0, 0.0)
    tl.store(logits + offs, (g * slope).to(logits.dtype.element_ty), mask=offs < edge)


def last(*logits: Tensor) -> int:
    """Entries of a row that may be read and written: up to a multiple of 16, so that vocabularies like 50,257 take whole vectors, too.

    Where the rows' memory does not reach so far: the row's own.
    """
    edges = []
    for rows_of in logits:
        (n, cols), stride, offset = rows_of.shape, rows_of.stride(0), rows_of.storage_offset()
        edge = -(-cols // 16) * 16
        within = offset % stride + edge <= stride  # a row as the memory was made in, not the next one's
        there = (offset + (n - 1) * stride + edge) * rows_of.element_size() <= rows_of.untyped_storage().nbytes()
        edges.append(edge if within and there else cols)
    return min(edges)


def width(cols: int, most: int = BLOCK) -> int:
    """Of a tile for rows of `cols` logits."""
    return min(most, max(16, triton.next_power_of_2(cols)))


def rows_(
    logits: Tensor, reference: None, labels: Tensor, value: Tensor, stats: Tensor, spec: Any, gradient: bool
) -> None:
    """As in the reference."""
    n, cols = logits.shape
    if not n:
        return
    with torch.cuda.device_of(logits):
        rows[(n,)](
            logits, labels, value, stats, cols, last(logits), logits.stride(0), spec.scale, spec.softcap,
            gradient, bool(spec.softcap), width(cols), num_warps=WARPS,
        )  # fmt: skip


def block_(logits: Tensor, reference: None, labels: Tensor, stats: Tensor, start: int, total: int, spec: Any) -> None:
    """As in the reference."""
    n, cols = logits.shape
    if not n:
        return
    tiles = width(cols, 2048)
    with torch.cuda.device_of(logits):
        block[(n, triton.cdiv(cols, tiles))](
            logits, labels, stats, cols, last(logits), logits.stride(0), start, spec.scale, spec.softcap,
            bool(spec.softcap), tiles, num_warps=4,
        )  # fmt: skip
