"""A step that is a combination of gradients: one launch for each element type of the parameters.

A program takes BLOCK entries of one tensor, found by bisection as in kernels/saliency.py. Rounding: kernels/adamw.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels._common import TL_DTYPES
from fastunlearn.kernels.adamw import _random, _to_bfloat16
from fastunlearn.kernels.gram import _find, _may
from fastunlearn.kernels.saliency import _CODES, MIXED, _load

BLOCK = 2048
WARPS = 8
# Rows of the table; the first three as in kernels/gram.py. Then addresses of each group's gradient (0: zeros), then the
# factors, as the bits of fp32 numbers.
SIZE = tl.constexpr(0)
FIRST = tl.constexpr(1)
BITS = tl.constexpr(2)
CODES = tl.constexpr(3)
PARAM = tl.constexpr(4)
INDEX = tl.constexpr(5)
KEYS = tl.constexpr(6)
ROWS = tl.constexpr(7)


@triton.jit
def _block(
    table, count, tensor, places, mask, numel, GROUPS: tl.constexpr, P: tl.constexpr, CODE: tl.constexpr, HAS_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: every entry is there and may move."""
    may = _may(table, count, tensor, places, mask, numel, HAS_BITS)
    codes = tl.load(table + CODES * count + tensor)
    change = tl.zeros([BLOCK], tl.float32)
    for group in tl.static_range(GROUPS):
        address = tl.load(table + (ROWS + group) * count + tensor)
        bits = tl.load(table + (ROWS + GROUPS + group) * count + tensor)
        factor = bits.to(tl.int32).to(tl.float32, bitcast=True)
        # What counts for nothing is not read: it may be no gradient at all, or not finite.
        if (address != 0) & (bits != 0):
            change += factor * _load(address, places, may, (codes >> (2 * group)) & 3, CODE, ALIGNED, WHOLE)
    param = tl.load(table + PARAM * count + tensor).to(tl.pointer_type(P))
    if ALIGNED:
        param = tl.multiple_of(param, 16)
    param += places
    if WHOLE:
        before = tl.load(param)
    else:
        before = tl.load(param, mask=may, other=0.0)
    after = before.to(tl.float32) + change
    if STOCHASTIC:
        index = tl.load(table + INDEX * count + tensor) + places
        keys = (table + KEYS * count + tensor).to(tl.pointer_type(tl.int32))
        out = _to_bfloat16(after, _random(index, index, keys), True)
    elif tl.bfloat16 == P:
        out = _to_bfloat16(after, 0, False)
    else:
        out = after.to(P)
    if WHOLE:
        tl.store(param, out)
    else:
        tl.store(param, out, mask=may)


@triton.jit(do_not_specialize=["count"])
def _combine(
    table, count, STEPS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, CODE: tl.constexpr, HAS_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    tensor = _find(table, count, block, STEPS)
    start = (block - tl.load(table + FIRST * count + tensor)) * BLOCK
    places = start + tl.arange(0, BLOCK)
    numel = tl.load(table + SIZE * count + tensor)
    mask = places < numel
    # Loads without a mask are 16 bytes wide.
    whole = start + BLOCK <= numel
    if HAS_BITS:
        whole = whole & (tl.load(table + BITS * count + tensor) == 0)
    if whole:
        _block(table, count, tensor, places, mask, numel, GROUPS, P, CODE, False, STOCHASTIC, ALIGNED, BLOCK, True)
    else:
        _block(table, count, tensor, places, mask, numel, GROUPS, P, CODE, HAS_BITS, STOCHASTIC, ALIGNED, BLOCK, False)


def combine_(
    params: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor | None]],
    bits: Sequence[Tensor | None],
    factors: np.ndarray,
    keys: np.ndarray,
    stochastic: Sequence[bool],
    firsts: Sequence[int],
) -> None:
    """params[t] += sum_g factors[t, g] * groups[g][t]; all 1-D, contiguous and on one device.

    Args:
        factors: float32 [tensors, groups]. keys: uint32 [tensors, 2]. stochastic: which are rounded at random.
        firsts: numbers of the first entries, for that.
    """
    kinds = list(zip([p.dtype for p in params], stochastic))
    for wanted in dict.fromkeys(kinds):
        taken = [t for t, kind in enumerate(kinds) if kind == wanted and params[t].numel()]
        if taken:
            rows = [[group[t] for t in taken] for group in groups]
            _launch(
                [params[t] for t in taken], rows, [bits[t] for t in taken], factors[taken], keys[taken], wanted[1],
                [firsts[t] for t in taken],
            )  # fmt: skip


def _launch(
    params: Sequence[Tensor], groups: Sequence[Sequence[Tensor | None]], bits: Sequence[Tensor | None],
    factors: np.ndarray, keys: np.ndarray, stochastic: bool, firsts: Sequence[int],
) -> None:  # fmt: skip
    n, count, device = len(groups), len(params), params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "hamu_step_: cannot be captured in a CUDA graph: its factors are computed on the host, from the gradients"
        )
    sizes = np.array([p.numel() for p in params], dtype=np.int64)
    blocks = -(-sizes // BLOCK)
    distinct = {x.dtype for group in groups for x in group if x is not None}
    mixed = len(distinct) != 1
    codes = [
        sum(_CODES[x.dtype] << (2 * g) for g, x in enumerate(column) if x is not None) if mixed else 0
        for column in zip(*groups)
    ]
    marks = [0 if b is None else b.data_ptr() for b in bits]
    addresses = [[0 if x is None else x.data_ptr() for x in group] for group in groups]
    places = [p.data_ptr() for p in params]
    table = torch.from_numpy(
        np.array(
            [
                sizes,
                np.cumsum(blocks) - blocks,
                marks,
                codes,
                places,
                firsts,
                np.ascontiguousarray(keys).view(np.int64)[:, 0],
                *addresses,
                *np.ascontiguousarray(factors.T).view(np.int32),
            ],
            dtype=np.int64,
        )
    )
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    aligned = all(a % 16 == 0 for row in [places, *addresses] for a in row)
    with torch.cuda.device_of(table):
        _combine[(int(blocks.sum()),)](
            table, count, (count - 1).bit_length(), n, TL_DTYPES[params[0].dtype],
            MIXED if mixed else _CODES[distinct.pop()], any(marks), stochastic, aligned, BLOCK, num_warps=WARPS,
        )  # fmt: skip
