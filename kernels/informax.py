"""Mutual information of rows and concepts, and entropies of rows (maths: reference/informax.py).

Activations are the vendor's product, WORKSPACE bytes of them at a time, of concepts' samples and their negatives in one: equal samples
have equal activations. A program takes a tile of rows through a run of concepts; a thread has all samples of its rows in registers,
and counts how many of them each exceeds. That a sample exceeds the lower median of n is to exceed more than (n - 1) // 2 of
them, so nothing is sorted; the counts of the samples above give the mutual information by look-up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.reference.informax import ROUNDING as UNITS
from fastunlearn.reference.informax import information_table

#: activations of one concept that a thread has in registers
HELD = 64
#: bytes of activations in memory at once
WORKSPACE = 2**28
ROUNDING = tl.constexpr(UNITS * 2.0**-23)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _informax(
    activations, table, out, rows, m, n1, n0, own, run, BINARY: tl.constexpr, REDUCE: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """activations [samples, rows]: n1 samples of each of m concepts, then n0 others of each, or of all (own: n0, or 0).
    REDUCE 0: out [m, rows]; 1 the largest, 2 the sum of each run of `run` concepts: out [runs, rows]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = row < rows
    first = tl.program_id(1) * run
    slot = tl.arange(0, SLOTS)[:, None]
    n = n1 + n0
    one = slot < n1
    other = (slot >= n1) & (slot < n)
    total = tl.zeros([BLOCK_M], tl.float32)
    zero = tl.full([], 0, tl.int64)
    for concept in range(first, tl.minimum(first + run, m)):
        others = m * n1 + concept * own - n1
        place = slot + tl.where(one, concept * n1, others)
        # What is no sample is exceeded by none.
        filler = float("inf") if BINARY else 0.0
        inside = (slot < n) & here[None, :]
        act = tl.load(activations + place.to(tl.int64) * rows + row[None, :], mask=inside, other=filler)
        if BINARY:
            ones = tl.zeros([BLOCK_M], tl.int32)
            zeros = tl.zeros([BLOCK_M], tl.int32)
            for i in range(n):
                at = (i + tl.where(i < n1, concept * n1, others)).to(tl.int64)
                a = tl.load(activations + at * rows + row, mask=here, other=0.0)
                above = (tl.sum((a[None, :] > act).to(tl.int32), 0) > (n - 1) // 2).to(tl.int32)
                ones += tl.where(i < n1, above, 0)
                zeros += tl.where(i < n1, 0, above)
            mi = tl.load(table + ones * (n0 + 1) + zeros)
        else:
            p = (n1 * 1.0) / n
            mean1 = tl.sum(tl.where(one, act, 0.0), 0) / n1
            mean0 = tl.sum(tl.where(other, act, 0.0), 0) / n0
            off1 = tl.where(one, act - mean1[None, :], 0.0)
            off0 = tl.where(other, act - mean0[None, :], 0.0)
            spread = (tl.sum(off1 * off1, 0) + tl.sum(off0 * off0, 0)) / n
            gap = tl.abs(mean1 - mean0)
            scale = tl.max(tl.abs(act), 0)
            gap = tl.where(gap > ROUNDING * scale, gap, 0.0)
            signal = p * (1 - p) * gap * gap
            ratio = tl.where(signal > 0, signal / tl.maximum(spread, 1.1754943508222875e-38), 0.0)
            ratio = tl.minimum(ratio, LARGEST)
            # log1p, to float32's precision for small ratios
            y = 1.0 + ratio
            log = tl.where(y == 1.0, ratio, tl.log(y) * (ratio / tl.where(y == 1.0, 1.0, y - 1.0)))
            mi = 0.5 * log
        if REDUCE == 0:
            tl.store(out + (zero + concept) * rows + row, mi, mask=here)
        elif REDUCE == 1:
            total = tl.maximum(total, mi)
        else:
            total += mi
    if REDUCE != 0:
        tl.store(out + tl.program_id(1).to(tl.int64) * rows + row, total, mask=here)


def informax(weights: Tensor, positives: Tensor, negatives: Tensor, estimator: str, reduce: str) -> Tensor:
    """As `fastunlearn.reference.informax.informax`; all float32, at most 64 samples a concept."""
    (rows, d), (m, n1, _), n0 = weights.shape, positives.shape, negatives.shape[1]
    device = weights.device
    shared = len(negatives) == 1
    each = n1 if shared else n1 + n0
    at_once = min(m, max(1, WORKSPACE // (4 * max(1, rows) * each)))
    slots = max(16, triton.next_power_of_2(n1 + n0))
    block = 128 * HELD // slots
    tiles = triton.cdiv(rows, block)
    # Runs of concepts, as many as fill the device.
    run = triton.cdiv(at_once, max(1, min(at_once, triton.cdiv(2048, max(1, tiles)))))
    starts = range(0, m, at_once)
    runs = [triton.cdiv(min(at_once, m - start), run) for start in starts]
    kind = {"none": 0, "max": 1, "mean": 2}[reduce]
    out = torch.empty(m if kind == 0 else sum(runs), rows, dtype=torch.float32, device=device)
    table = information_table(n1, n0).float().to(device)
    memory = torch.empty(rows * (at_once * each + (n0 if shared else 0)), dtype=torch.float32, device=device)
    at = 0
    for start, parts in zip(starts, runs if rows else ()):
        own = slice(start, min(start + at_once, m))
        rest = negatives[0] if shared else negatives[own].reshape(-1, d)
        samples = torch.cat([positives[own].reshape(-1, d), rest])
        activations = memory[: rows * len(samples)].view(len(samples), rows)
        torch.mm(samples, weights.T, out=activations)
        with torch.cuda.device_of(weights):
            _informax[(tiles, parts)](
                activations, table, out[start if kind == 0 else at :], rows, own.stop - start, n1, n0, 0 if shared else n0, run,
                estimator == "binary", kind, slots, block, num_warps=4,
            )  # fmt: skip
        at += parts
    return out.T.contiguous() if kind == 0 else out.amax(0) if kind == 1 else out.sum(0) / m


#: bins that the kernel counts in registers
MAX_BINS = 64


@triton.jit
def _activations(weights, samples, row, here, start, n, d, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile of W samples^T: [BLOCK_M, BLOCK_S] from sample `start` on."""
    sample = start + tl.arange(0, BLOCK_S)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    for begin in range(0, d, BLOCK_K):
        inside = begin + k < d
        a = tl.load(weights + row[:, None] * d + (begin + k)[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        x = tl.load(
            samples + sample.to(tl.int64)[None, :] * d + (begin + k)[:, None],
            mask=(sample < n)[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(a, x, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _entropy(
    weights, samples, out, rows, n, d, bins, BINS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Rows' smallest and largest activation in a first pass, their histogram in a second; activations are never written."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = row < rows
    column = tl.arange(0, BLOCK_S)
    low = tl.full([BLOCK_M], float("inf"), tl.float32)
    high = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for start in range(0, n, BLOCK_S):
        act = _activations(weights, samples, row, here, start, n, d, BLOCK_M, BLOCK_S, BLOCK_K)
        there = (start + column < n)[None, :]
        low = tl.minimum(low, tl.min(tl.where(there, act, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(there, act, -float("inf")), 1))
    size = tl.maximum(high - low, 1e-30)
    bin = tl.arange(0, BINS)
    counts = tl.zeros([BLOCK_M, BINS], tl.int32)
    for start in range(0, n, BLOCK_S):
        act = _activations(weights, samples, row, here, start, n, d, BLOCK_M, BLOCK_S, BLOCK_K)
        place = tl.minimum(((act - low[:, None]) / size[:, None] * bins).to(tl.int32), bins - 1)
        place = tl.where((start + column < n)[None, :], place, BINS)
        counts += tl.sum((place[:, :, None] == bin[None, None, :]).to(tl.int32), 1)
    p = counts.to(tl.float32) / n
    terms = tl.where(counts > 0, p * tl.log(tl.where(counts > 0, p, 1.0)), 0.0)
    tl.store(out + row, -tl.sum(terms, 1) / tl.log(bins.to(tl.float32)), mask=here)


def row_entropy(weights: Tensor, samples: Tensor, bins: int) -> Tensor:
    """As `fastunlearn.reference.informax.row_entropy`; float32, at most 64 bins."""
    (rows, d), n = weights.shape, samples.shape[0]
    out = torch.empty(rows, dtype=torch.float32, device=weights.device)
    if rows:
        with torch.cuda.device_of(weights):
            _entropy[(triton.cdiv(rows, 32),)](
                weights, samples.contiguous(), out, rows, n, d, bins, max(16, triton.next_power_of_2(bins)), 32, 32, 32,
                num_warps=4, num_stages=2,
            )  # fmt: skip
    return out
