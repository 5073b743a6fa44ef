"""Masked AdamW, SGD and the masked gradient norm in Triton: a list of tensors is one launch for each kind of element types.

A program takes BLOCK entries of one tensor. It reads their bits, finds the place of each entry that may move by a prefix
sum (from the mask's prefix counts), and loads parameter and gradient only there: memory sectors without a set bit are
not touched. Moments lie side by side. The maths: fastunlearn/reference/adamw.py; rounding: csrc/stochastic.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fastunlearn.kernels._common import TL_DTYPES
from fastunlearn.ops._slots import BLOCK, Batch, units

# Columns of the table of addresses (csrc/adamw.h: Field).
FIELDS = tl.constexpr(12)
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
BITS = tl.constexpr(2)
PREFIX = tl.constexpr(3)
FIRST = tl.constexpr(4)
SECOND = tl.constexpr(5)
MASTER = tl.constexpr(6)
SCALE = tl.constexpr(7)
NUMEL = tl.constexpr(8)
HYPER = tl.constexpr(8)
# Sums of a block's squares that fp32 holds to its precision.
LOWEST_SUM = tl.constexpr(2.0**-90)
HIGHEST_SUM = tl.constexpr(2.0**127)


@triton.jit
def _entries(row, start, BLOCK_SIZE: tl.constexpr):
    """(offsets, which of them may move, their places in the compact tensors, whether there is one at all)."""
    offs = start + tl.arange(0, BLOCK_SIZE)
    numel = tl.load(row + NUMEL)
    bits = tl.load(row + BITS)
    masked = tl.where(bits != 0, numel, 0)  # entries that have bits: all or none
    byte = tl.load(bits.to(tl.pointer_type(tl.uint8)) + offs // 8, mask=offs < masked, other=255)
    may = (offs < numel) & (((byte.to(tl.int32) >> (offs % 8).to(tl.int32)) & 1) != 0)
    prefix = tl.load(row + PREFIX).to(tl.pointer_type(tl.int64)) + start // BLOCK_SIZE
    before = tl.load(prefix, mask=start < masked, other=0)
    before = tl.where(start < masked, before, start)
    places = before + tl.cumsum(may.to(tl.int32), 0) - 1
    return offs, may, places


@triton.jit
def _random(start, offs, key):
    # Entries of a block share the upper word of their index: blocks start at multiples of a power of two.
    a = tl.load(key).to(tl.uint32, bitcast=True)
    b = tl.load(key + 1).to(tl.uint32, bitcast=True)
    b ^= (start >> 32).to(tl.uint32) * 0x9E3779B9
    x = offs.to(tl.uint32) + a
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x += b
    x ^= x >> 15
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _to_bfloat16(x, random, STOCHASTIC: tl.constexpr):
    u = x.to(tl.uint32, bitcast=True)
    if not STOCHASTIC:
        # To nearest even: spelled out, because the interpreter truncates.
        random = 0x7FFF + ((u >> 16) & 1)
    special = (u & 0x7F800000) == 0x7F800000
    quiet = tl.where((u & 0x007FFFFF) != 0, 0x00400000, 0).to(tl.uint32)
    u = tl.where(special, u | quiet, u + (random & 0xFFFF))
    return (u >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _read(row, offs, may, places, P: tl.constexpr, G: tl.constexpr, HAS_MASTER: tl.constexpr, HAS_SCALE: tl.constexpr):
    """(parameter, gradient, factor on the learning rate) in fp32."""
    g = tl.load(tl.load(row + GRAD).to(tl.pointer_type(G)) + offs, mask=may, other=0.0).to(tl.float32)
    if HAS_MASTER:
        p = tl.load(tl.load(row + MASTER).to(tl.pointer_type(tl.float32)) + places, mask=may, other=0.0)
    else:
        p = tl.load(tl.load(row + PARAM).to(tl.pointer_type(P)) + offs, mask=may, other=0.0).to(tl.float32)
    if HAS_SCALE:
        s = tl.load(tl.load(row + SCALE).to(tl.pointer_type(tl.float32)) + places, mask=may, other=0.0)
    else:
        s = 1.0
    return p, g, s


@triton.jit
def _write(row, start, offs, may, places, p, key, P: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr):
    if HAS_MASTER:
        tl.store(tl.load(row + MASTER).to(tl.pointer_type(tl.float32)) + places, p, mask=may)
    if STOCHASTIC:
        out = _to_bfloat16(p, _random(start, offs, key), True)
    elif tl.bfloat16 == P:
        out = _to_bfloat16(p, 0, False)
    else:
        out = p.to(P)
    tl.store(tl.load(row + PARAM).to(tl.pointer_type(P)) + offs, out, mask=may)


@triton.jit
def masked_adamw_kernel(
    table,
    hyper,
    keys,
    grad_scale,
    block_tensor,
    first_block,
    P: tl.constexpr,
    G: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    t = tl.load(block_tensor + tl.program_id(0)).to(tl.int64)
    start = (tl.program_id(0) - tl.load(first_block + t)) * BLOCK_SIZE
    row, h = table + t * FIELDS, hyper + t * HYPER
    offs, may, places = _entries(row, start, BLOCK_SIZE)
    p, g, s = _read(row, offs, may, places, P, G, HAS_MASTER, HAS_SCALE)
    g *= tl.load(h + 7) * tl.load(grad_scale)
    first = tl.load(row + FIRST).to(tl.pointer_type(tl.float32)) + places
    second = tl.load(row + SECOND).to(tl.pointer_type(tl.float32)) + places
    m = tl.load(first, mask=may, other=0.0)
    v = tl.load(second, mask=may, other=0.0)
    p -= tl.load(h + 4) * s * p
    m += tl.load(h) * (g - m)
    v = v * tl.load(h + 1) + tl.load(h + 2) * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(h + 6)) + tl.load(h + 3)
    p -= tl.load(h + 5) * s * tl.div_rn(m, denominator)
    tl.store(first, m, mask=may)
    tl.store(second, v, mask=may)
    _write(row, start, offs, may, places, p, keys + 2 * t, P, HAS_MASTER, STOCHASTIC)


@triton.jit
def masked_sgd_kernel(
    table,
    hyper,
    keys,
    grad_scale,
    block_tensor,
    first_block,
    P: tl.constexpr,
    G: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    t = tl.load(block_tensor + tl.program_id(0)).to(tl.int64)
    start = (tl.program_id(0) - tl.load(first_block + t)) * BLOCK_SIZE
    row, h = table + t * FIELDS, hyper + t * HYPER
    offs, may, places = _entries(row, start, BLOCK_SIZE)
    p, g, s = _read(row, offs, may, places, P, G, HAS_MASTER, HAS_SCALE)
    g = g * (tl.load(h + 7) * tl.load(grad_scale)) + tl.load(h + 2) * p
    update = g
    if HAS_FIRST:
        first = tl.load(row + FIRST).to(tl.pointer_type(tl.float32)) + places
        momentum = tl.load(h)
        starts = tl.load(h + 5) != 0.0
        b = tl.load(first, mask=may, other=0.0)
        b = tl.where(starts, g, b * momentum + tl.load(h + 1) * g)
        tl.store(first, b, mask=may)
        update = tl.where(tl.load(h + 4) != 0.0, g + momentum * b, b)
    p -= tl.load(h + 3) * s * update
    _write(row, start, offs, may, places, p, keys + 2 * t, P, HAS_MASTER, STOCHASTIC)


@triton.jit
def masked_sumsq_kernel(table, block_tensor, first_block, partial, G: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    t = tl.load(block_tensor + tl.program_id(0)).to(tl.int64)
    start = (tl.program_id(0) - tl.load(first_block + t)) * BLOCK_SIZE
    row = table + t * FIELDS
    offs, may, _ = _entries(row, start, BLOCK_SIZE)
    g = tl.load(tl.load(row + GRAD).to(tl.pointer_type(G)) + offs, mask=may, other=0.0).to(tl.float32)
    total = tl.sum(g * g, 0).to(tl.float64)
    # In fp32, as not every GPU is quick at fp64. What that has lost of a sum in between, BLOCK_SIZE squares below 2^-126 at
    # most, is less than its rounding.
    if (total < LOWEST_SUM) | (total > HIGHEST_SUM):
        wide = g.to(tl.float64)
        total = tl.sum(wide * wide, 0)
    tl.store(partial + tl.program_id(0), total)


class _Launches:
    """The blocks of every kind of tensor in a list. They follow from sizes and types alone and stay when memory moves."""

    def __init__(self, sizes: np.ndarray, kinds: list[tuple[Any, ...]], device: torch.device):
        self.revision = -1
        self.sizes, self.members, self.device = sizes.copy(), kinds, device
        self.kinds: list[tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]] = []
        for wanted in dict.fromkeys(kinds):
            members = [i for i, k in enumerate(kinds) if k == wanted]
            local, first = units(sizes[members].tolist(), BLOCK)
            rows = np.array(members, dtype=np.int32)
            firsts = np.zeros(len(kinds), dtype=np.int64)
            firsts[members] = first
            self.kinds.append((wanted, _to_device(rows[local], device), _to_device(firsts, device)))


def _launches(batch: Batch, tables: Any, kind: Callable[[int], tuple[Any, ...]]) -> _Launches:
    launches: _Launches | None = tables.launches
    if launches is not None and launches.revision == tables.revision:
        return launches
    sizes, kinds, device = tables.rows[:, NUMEL.value], [kind(i) for i in range(len(batch))], batch.device
    if (
        launches is None
        or launches.device != device
        or launches.members != kinds
        or not np.array_equal(launches.sizes, sizes)
    ):
        launches = tables.launches = _Launches(sizes, kinds, device)
    launches.revision = tables.revision
    return launches


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # Pinned, so that the copy does not wait for the device.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _upload(
    rows: np.ndarray, numbers: np.ndarray, keys: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(table, numbers, keys, the number 1) on the device, in one copy; each starts at a multiple of 16 bytes."""
    n = len(rows)
    host = torch.empty(2 + 17 * n, dtype=torch.int64, pin_memory=device.type == "cuda")
    words = host.numpy()
    ends = 2 + 12 * n, 2 + 16 * n
    words[:2].view(np.float32)[:] = 1.0
    words[2 : ends[0]].reshape(n, 12)[:] = rows
    words[ends[0] : ends[1]].view(np.float32).reshape(n, 8)[:] = numbers
    words[ends[1] :].view(np.uint32).reshape(n, 2)[:] = keys
    there = host.to(device, non_blocking=True)
    one, table, hyper, pairs = there.split([2, 12 * n, 4 * n, n])
    return table, hyper.view(torch.float32), pairs.view(torch.int32), one.view(torch.float32)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def step(name: str, batch: Batch, tables: Any, numbers: np.ndarray, keys: np.ndarray, grad_scale: Any) -> None:
    """One step of `masked_adamw` or `masked_sgd`; arguments as in fastunlearn/ops/_masked_step.py."""
    kernel = masked_adamw_kernel if name == "masked_adamw" else masked_sgd_kernel
    stochastic = tables.rows[:, 11]

    def kind(i: int) -> tuple[Any, ...]:
        return (
            TL_DTYPES[batch.params[i].dtype],
            TL_DTYPES[batch.grad_dtypes[i]],
            batch.masters[i] is not None,
            batch.scales[i] is not None,
            bool(stochastic[i]),
            batch.first[i] is not None,
        )

    device = batch.device
    launches = _launches(batch, tables, kind)
    table, hyper, words, one = _upload(tables.rows, numbers, keys, device)
    scale = one if grad_scale is None else grad_scale
    with _on(device):
        for options, block_tensor, first_block in launches.kinds:
            kernel[(block_tensor.numel(),)](
                table, hyper, words, scale, block_tensor, first_block, *options, BLOCK_SIZE=BLOCK
            )


def sumsq(batch: Batch, tables: Any) -> torch.Tensor:
    """Sum of squares of the gradients that may move: float64 scalar on the device."""
    device = batch.device
    launches = _launches(batch, tables, lambda i: (TL_DTYPES[batch.grad_dtypes[i]],))
    table = _to_device(tables.rows, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with _on(device):
        for (dtype,), block_tensor, first_block in launches.kinds:
            partial = torch.empty(block_tensor.numel(), dtype=torch.float64, device=device)
            masked_sumsq_kernel[(block_tensor.numel(),)](
                table, block_tensor, first_block, partial, dtype, BLOCK_SIZE=BLOCK
            )
            total += partial.sum()
    return total
