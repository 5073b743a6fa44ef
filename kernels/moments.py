"""Second moments of tokens in float64, from features as they are (maths: reference/moments.py): no copy of them in float64.

A program takes a tile of the matrix through a run of tokens, in whatever dtype they have, and multiplies in float64. Without
anchors the matrix is symmetric: tiles below the diagonal are computed and written twice. Runs are summed in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels._common import TRITON

BLOCK, BLOCK_K = 64, 16
#: programs that fill a device
PROGRAMS = 1024
#: Triton from which 16-bit entries can be widened to float64 in front of a product: before it the compiler fails
WIDENS = (3, 9)
#: bytes of the sums of all runs
WORKSPACE = 2**28


@triton.jit
def _moments(
    left, right, weights, out, tokens, d, run,
    SYMMETRIC: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out fp64 [runs, d, d]: sum over the run's tokens of weight left^T right."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    if not SYMMETRIC or tile_n <= tile_m:
        m = tile_m * BLOCK + tl.arange(0, BLOCK)
        n = tile_n * BLOCK + tl.arange(0, BLOCK)
        k = tl.arange(0, BLOCK_K)
        first = tl.program_id(2).to(tl.int64) * run
        last = tl.minimum(first + run, tokens)
        acc = tl.zeros([BLOCK, BLOCK], tl.float64)
        for start in range(first, last, BLOCK_K):
            token = start + k
            there = token < last
            a = tl.load(left + token[:, None] * d + m[None, :], mask=there[:, None] & (m < d)[None, :], other=0.0)
            c = tl.load(right + token[:, None] * d + n[None, :], mask=there[:, None] & (n < d)[None, :], other=0.0)
            a = a.to(tl.float64)
            if WEIGHTED:
                w = tl.load(weights + token, mask=there, other=0.0)
                a = a * w.to(tl.float64)[:, None]
            acc += tl.dot(tl.trans(a), c.to(tl.float64), out_dtype=tl.float64)
        base = out + tl.program_id(2).to(tl.int64) * d * d
        inside = (m < d)[:, None] & (n < d)[None, :]
        tl.store(base + m[:, None].to(tl.int64) * d + n[None, :], acc, mask=inside)
        if SYMMETRIC and tile_n < tile_m:
            tl.store(base + n[None, :].to(tl.int64) * d + m[:, None], acc, mask=inside)


def token_moments(left: Tensor, right: Tensor, weights: Tensor | None, out: Tensor) -> Tensor:
    """As `fastunlearn.reference.moments.token_moments`; `left is right` without anchors."""
    tokens, d = right.shape
    if not tokens or not d:
        return out
    symmetric = left is right
    if TRITON < WIDENS:
        right = right.float() if right.itemsize == 2 else right
        left = right if symmetric else left.float() if left.itemsize == 2 else left
    left, right = left.contiguous(), right.contiguous()
    side = triton.cdiv(d, BLOCK)
    tiles = side * (side + 1) // 2 if symmetric else side * side
    runs = max(1, min(PROGRAMS // tiles, WORKSPACE // (8 * d * d), triton.cdiv(tokens, 8 * BLOCK_K)))
    run = triton.cdiv(triton.cdiv(tokens, runs), BLOCK_K) * BLOCK_K
    runs = triton.cdiv(tokens, run)
    parts = torch.empty(runs, d, d, dtype=torch.float64, device=right.device)
    with torch.cuda.device_of(right):
        _moments[(side, side, runs)](
            left, right, right if weights is None else weights.contiguous(), parts, tokens, d, run,
            symmetric, weights is not None, BLOCK, BLOCK_K, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out.add_(parts.sum(0))
