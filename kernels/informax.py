"""Mutual information of rows and concepts, and entropies of rows (maths: reference/informax.py): no activation is written to memory.

A program takes a tile of rows through a run of concepts, GROUP at a time: one product, then, within registers, how many samples
of its concept an activation exceeds. That it exceeds the lower median of n is to exceed more than (n - 1) // 2 of them, so
nothing is sorted; the counts of the samples above give the mutual information by look-up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.reference.informax import ROUNDING as UNITS
from fastunlearn.reference.informax import information_table

#: entries of one comparison of all samples with all, in registers
COMPARED = 32768
ROUNDING = tl.constexpr(UNITS * 2.0**-23)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _informax(
    weights, positives, negatives, table, out, rows, d, m, n1, n0, own,
    run, BINARY: tl.constexpr, REDUCE: tl.constexpr, GROUP: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """REDUCE 0: out [rows, m]; 1 the largest, 2 the sum of each run of `run` concepts: out [runs, rows]. own: stride of the
    negatives between concepts, 0 where they are shared."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * run
    here = row < rows
    k = tl.arange(0, BLOCK_K)
    column = tl.arange(0, GROUP * SAMPLES)
    sample, within = column % SAMPLES, column // SAMPLES
    slot = tl.arange(0, SAMPLES)
    n = n1 + n0
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, tl.minimum(first + run, m), GROUP):
        concept = (start + within).to(tl.int64)
        there = (concept < tl.minimum(first + run, m)) & (sample < n)
        is_one = sample < n1
        at = tl.where(is_one, (concept * n1 + sample) * d, concept * own + (sample - n1).to(tl.int64) * d)
        acc = tl.zeros([BLOCK_M, GROUP * SAMPLES], tl.float32)
        for begin in range(0, d, BLOCK_K):
            inside = begin + k < d
            a = tl.load(
                weights + row[:, None] * d + (begin + k)[None, :], mask=here[:, None] & inside[None, :], other=0.0
            )
            place = at[None, :] + (begin + k)[:, None]
            x = tl.load(positives + place, mask=inside[:, None] & (there & is_one)[None, :], other=0.0)
            x += tl.load(negatives + place, mask=inside[:, None] & (there & (sample >= n1))[None, :], other=0.0)
            acc = tl.dot(a, x, acc, input_precision="tf32x3")
        act = tl.reshape(acc, [BLOCK_M, GROUP, SAMPLES])
        one = (slot < n1)[None, None, :]
        other = ((slot >= n1) & (slot < n))[None, None, :]
        if BINARY:
            exceeds = (act[:, :, :, None] > act[:, :, None, :]) & (slot < n)[None, None, None, :]
            z = tl.sum(exceeds.to(tl.int32), 3) > (n - 1) // 2
            ones = tl.sum((z & one).to(tl.int32), 2)
            others = tl.sum((z & other).to(tl.int32), 2)
            mi = tl.load(table + ones * (n0 + 1) + others)
        else:
            p = (n1 * 1.0) / n
            mean1 = tl.sum(tl.where(one, act, 0.0), 2) / n1
            mean0 = tl.sum(tl.where(other, act, 0.0), 2) / n0
            off1 = tl.where(one, act - mean1[:, :, None], 0.0)
            off0 = tl.where(other, act - mean0[:, :, None], 0.0)
            spread = (tl.sum(off1 * off1, 2) + tl.sum(off0 * off0, 2)) / n
            gap = tl.abs(mean1 - mean0)
            scale = tl.max(tl.where(one | other, tl.abs(act), 0.0), 2)
            gap = tl.where(gap > ROUNDING * scale, gap, 0.0)
            signal = p * (1 - p) * gap * gap
            ratio = tl.where(signal > 0, signal / tl.maximum(spread, 1.1754943508222875e-38), 0.0)
            ratio = tl.minimum(ratio, LARGEST)
            # log1p, to float32's precision for small ratios
            y = 1.0 + ratio
            log = tl.where(y == 1.0, ratio, tl.log(y) * (ratio / tl.where(y == 1.0, 1.0, y - 1.0)))
            mi = 0.5 * log
        which = start + tl.arange(0, GROUP)
        real = (which < tl.minimum(first + run, m))[None, :]
        if REDUCE == 0:
            tl.store(out + row[:, None] * m + which[None, :], mi, mask=here[:, None] & real)
        elif REDUCE == 1:
            total = tl.maximum(total, tl.max(tl.where(real, mi, 0.0), 1))
        else:
            total += tl.sum(tl.where(real, mi, 0.0), 1)
    if REDUCE != 0:
        tl.store(out + tl.program_id(1).to(tl.int64) * rows + row, total, mask=here)


def informax(weights: Tensor, positives: Tensor, negatives: Tensor, estimator: str, reduce: str) -> Tensor:
    """As `fastunlearn.reference.informax.informax`; all float32, at most 64 samples a concept."""
    (rows, d), (m, n1, _), n0 = weights.shape, positives.shape, negatives.shape[1]
    device = weights.device
    samples = max(16, triton.next_power_of_2(n1 + n0))
    group = max(1, 64 // samples)
    block = max(16, min(128, COMPARED // (group * samples * samples))) if estimator == "binary" else 64
    tiles = triton.cdiv(rows, block)
    # Runs of concepts, as many as fill the device.
    runs = max(1, min(triton.cdiv(m, group), triton.cdiv(1024, max(1, tiles))))
    run = triton.cdiv(triton.cdiv(m, runs), group) * group
    runs = triton.cdiv(m, run)
    kind = {"none": 0, "max": 1, "mean": 2}[reduce]
    out = torch.empty((rows, m) if kind == 0 else (runs, rows), dtype=torch.float32, device=device)
    table = information_table(n1, n0).float().to(device)
    own = 0 if len(negatives) == 1 else n0 * d
    if rows:
        with torch.cuda.device_of(weights):
            _informax[(tiles, runs)](
                weights, positives.contiguous(), negatives.contiguous(), table, out, rows, d, m, n1, n0, own,
                run, estimator == "binary", kind, group, samples, block, 32, num_warps=4, num_stages=2,
            )  # fmt: skip
    return out if kind == 0 else out.amax(0) if kind == 1 else out.sum(0) / m


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
