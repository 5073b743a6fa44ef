"""Products with a compressed N:M weight that is never written (the maths: fastunlearn/reference/nm_linear.py), for few tokens.

`product` reads a tile's bits and its values, and deals the values out in registers; where a byte of bits holds no whole groups, the bits
say where the values lie: the groups before it hold KEEP values each, and within a group the set bits count. It multiplies by W^T or,
backward, by W. `gradient` makes a tile of dy^T x and stores what has its bit set. What several programs add up to they leave side by
side in fp32, and `finish` adds it in one order: the same bits every time.

A tile of the weight is [M, N / 8, 8]: a byte of the mask is read once for its eight entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn._tuned import tuned
from fastunlearn.kernels._common import set_bits, tf32_allowed

#: options of the launch that `python -m benchmarks tune` tries beside the defaults
CANDIDATES = dict.fromkeys(
    ("nm_linear.product", "nm_linear.gradient_tile"),
    tuple({"num_warps": w, "num_stages": s} for w in (4, 8) for s in (2, 3, 4)),
)
#: GPU, as torch names it -> tokens up to which the compressed weight is read directly. `python -m benchmarks run --ops nm_linear`
#: measures both ways.
FEW_TOKENS: dict[str, int] = {}
#: For a GPU that is not in FEW_TOKENS, from counting bytes: expanding a 2:4 weight and reading it again moves 4.5 times as much,
#: which more than pays for a slower product as long as the product waits for memory.
DEFAULT_FEW = 64
#: Programs that fill a GPU of this generation twice over.
_PROGRAMS = 264


def few_tokens(device: torch.device) -> int:
    """Tokens up to which the compressed weight is read directly on this device."""
    return FEW_TOKENS.get(torch.cuda.get_device_name(device) if device.type == "cuda" else "", DEFAULT_FEW)


@triton.jit
def _begin(row_bits, here, col0, byte, bytes_, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """Places [M, N / 8], within a row's values, of the first value of each byte of a tile that starts at column `col0`."""
    if 8 % GROUP == 0:
        begin = (byte * (8 * KEEP // GROUP))[None, :] + bytes_ * 0
    else:
        # Of the group that the tile starts in: at most 63 columns before it.
        group = col0 // GROUP
        back = col0 // 8 - 8 + tl.arange(0, 8)
        before = tl.load(row_bits[:, None] + back[None, :], mask=here[:, None] & (back >= 0)[None, :], other=0)
        skip = tl.minimum(tl.maximum(group * GROUP - back * 8, 0), 8)
        first = group * KEEP + tl.sum(set_bits(before.to(tl.int32) & ((255 << skip) & 255)[None, :]), 1)
        ones = set_bits(bytes_)
        begin = first[:, None] + tl.cumsum(ones, 1) - ones
    return begin


@triton.jit
def _survivors(bits, row, col0, rows, width, KEEP: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(places within a row's values, whether the bit is set), both [M, N / 8, 8], of a tile; col0 a multiple of 8."""
    here = row < rows
    byte = col0 // 8 + tl.arange(0, N // 8)
    row_bits = bits + row * width
    bytes_ = tl.load(
        row_bits[:, None] + byte[None, :], mask=here[:, None] & (byte < width)[None, :], other=0
    ).to(tl.int32)  # fmt: skip
    begin = _begin(row_bits, here, col0, byte, bytes_, KEEP, GROUP)
    place = tl.arange(0, 8)
    below = ((1 << place) - 1)[None, None, :]
    places = begin[:, :, None] + set_bits(bytes_[:, :, None] & below)
    return places, ((bytes_[:, :, None] >> place[None, None, :]) & 1) != 0


@triton.jit
def _entry(v0, v1, v2, v3, bytes_, rank, place: tl.constexpr, PER: tl.constexpr):
    """(entries at one place of every byte, values before the next place); rank: values before this one."""
    w = v0
    if PER >= 2:
        w = tl.where(rank == 0, v0, v1)
    if PER == 4:
        w = tl.where(rank < 2, w, tl.where(rank == 2, v2, v3))
    bit = (bytes_ >> place) & 1
    return tl.where(bit != 0, w, 0.0), rank + bit


@triton.jit
def _dealt(v, bytes_, PER: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Values [M, N / 8 * PER] of bytes [M, N / 8] that hold PER each, at their columns: [M, N]; 0 where the bit is not set.

    A thread has whole bytes and their values: all of it happens in its registers.
    """
    if PER == 4:
        even, odd = tl.split(tl.reshape(v, (M, N // 8, 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
    elif PER == 2:
        v0, v1 = tl.split(tl.reshape(v, (M, N // 8, 2)))
        v2, v3 = v0, v0
    else:
        v0, v1, v2, v3 = v, v, v, v
    w0, rank = _entry(v0, v1, v2, v3, bytes_, bytes_ * 0, 0, PER)
    w1, rank = _entry(v0, v1, v2, v3, bytes_, rank, 1, PER)
    w2, rank = _entry(v0, v1, v2, v3, bytes_, rank, 2, PER)
    w3, rank = _entry(v0, v1, v2, v3, bytes_, rank, 3, PER)
    w4, rank = _entry(v0, v1, v2, v3, bytes_, rank, 4, PER)
    w5, rank = _entry(v0, v1, v2, v3, bytes_, rank, 5, PER)
    w6, rank = _entry(v0, v1, v2, v3, bytes_, rank, 6, PER)
    w7, rank = _entry(v0, v1, v2, v3, bytes_, rank, 7, PER)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (M, N))


@triton.jit
def _weight(
    values, bits, row, col0, rows, width, kept,
    KEEP: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of the dense weight [M, N], 0 outside of it."""
    PER: tl.constexpr = 8 * KEEP // GROUP
    if (8 % GROUP == 0) and ((PER == 1) | (PER == 2) | (PER == 4)):
        # Where a byte's values lie does not depend on its bits: both are read at once, as wide as they lie.
        here = row < rows
        byte = col0 // 8 + tl.arange(0, N // 8)
        inside = here[:, None] & (byte < width)[None, :]
        bytes_ = tl.load(bits + (row * width)[:, None] + byte[None, :], mask=inside, other=0).to(tl.int32)
        place = col0 // 8 * PER + tl.arange(0, N // 8 * PER)
        v = tl.load(
            values + (row * kept)[:, None] + place[None, :], mask=here[:, None] & (place < kept)[None, :], other=0.0
        )
        w = _dealt(v, bytes_, PER, M, N)
    else:
        places, may = _survivors(bits, row, col0, rows, width, KEEP, GROUP, M, N)
        w = tl.load(values + (row * kept)[:, None, None] + places, mask=may & (places < kept), other=0.0)
        w = tl.reshape(w, (M, N))
    return w


@triton.jit(do_not_specialize=["tokens", "chunk"])
def product(
    x, values, bits, partial, tokens, rows, cols, width, kept, chunk,
    KEEP: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """partial fp32 [programs in axis 1, tokens, rows]: x W^T over `chunk` tiles of columns; backward, for x [tokens, rows]:
    [.., tokens, cols]: x W over `chunk` tiles of rows. Axis 2: tiles of tokens."""
    own, part = tl.program_id(0), tl.program_id(1)
    t = tl.program_id(2) * T + tl.arange(0, T)
    if BACKWARD:
        acc = tl.zeros([N, T], tl.float32)
        tiles = tl.cdiv(rows, M)
    else:
        acc = tl.zeros([M, T], tl.float32)
        tiles = tl.cdiv(cols, N)
    for tile in range(part * chunk, tl.minimum(part * chunk + chunk, tiles)):
        if BACKWARD:
            row0, col0 = tile * M, own * N
            inner, size = row0 + tl.arange(0, M), rows
        else:
            row0, col0 = own * M, tile * N
            inner, size = col0 + tl.arange(0, N), cols
        v = tl.load(
            x + t[None, :].to(tl.int64) * size + inner[:, None], mask=(inner < size)[:, None] & (t < tokens)[None, :], other=0.0
        )  # fmt: skip
        row = (row0 + tl.arange(0, M)).to(tl.int64)
        w = _weight(values, bits, row, col0, rows, width, kept, KEEP, GROUP, M, N)
        acc += tl.dot(tl.trans(w) if BACKWARD else w, v, input_precision=PRECISION)
    if BACKWARD:
        outer, size = own * N + tl.arange(0, N), cols
    else:
        outer, size = own * M + tl.arange(0, M), rows
    place = (part.to(tl.int64) * tokens + t)[None, :] * size + outer[:, None]
    tl.store(partial + place, acc, mask=(outer < size)[:, None] & (t < tokens)[None, :])


@triton.jit(do_not_specialize=["parts", "count"])
def finish(partial, bias, out, parts, count, size, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [count] = the sum of partial [parts, count], and the bias [size] of its place in a row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    place = at
    for _ in range(parts):
        total += tl.load(partial + place, mask=at < count, other=0.0)
        place += count
    if BIAS:
        total += tl.load(bias + at % size, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["tokens"])
def gradient_tile(
    grad, x, bits, out, tokens, rows, cols, width, kept,
    KEEP: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [rows, kept]: the survivors of grad^T x, of grad [tokens, rows] and x [tokens, cols]. Grid: tiles of columns, of rows."""
    col0 = tl.program_id(0) * N
    row = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    col = col0 + tl.arange(0, N)
    g = tl.zeros([M, N], tl.float32)
    for t0 in range(0, tokens, T):
        t = (t0 + tl.arange(0, T)).to(tl.int64)
        dy = tl.load(
            grad + t[None, :] * rows + row[:, None], mask=(row < rows)[:, None] & (t < tokens)[None, :], other=0.0
        )
        v = tl.load(x + t[:, None] * cols + col[None, :], mask=(t < tokens)[:, None] & (col < cols)[None, :], other=0.0)
        g += tl.dot(dy, v, input_precision=PRECISION)
    places, may = _survivors(bits, row, col0, rows, width, KEEP, GROUP, M, N)
    tl.store(
        out + (row * kept)[:, None, None] + places, tl.reshape(g, (M, N // 8, 8)).to(out.dtype.element_ty), mask=may & (places < kept)
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied exactly, unless the user lets such products be TF32."""
    return "ieee" if dtype == torch.float32 and not tf32_allowed() else "tf32"


def multiply(
    x: Tensor, values: Tensor, bits: Tensor, n: int, m: int, *, bias: Tensor | None = None, cols: int | None = None
) -> Tensor:
    """x W^T + bias of x [tokens, cols]; with `cols` backward: x W of x [tokens, rows]. Contiguous all."""
    backward = cols is not None
    rows, kept = values.shape
    cols = x.shape[1] if cols is None else cols
    tokens, bits = x.shape[0], bits.contiguous()
    outer, inner = (cols, rows) if backward else (rows, cols)
    own, step = 64, 64
    T = min(64, max(16, triton.next_power_of_2(tokens)))
    columns = triton.cdiv(tokens, T)
    programs, tiles = triton.cdiv(outer, own), triton.cdiv(inner, step)
    chunk = max(1, triton.cdiv(tiles * programs * columns, 2 * _PROGRAMS), triton.cdiv(256, step))
    parts = triton.cdiv(tiles, chunk)
    partial = torch.empty(parts, tokens, outer, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, outer, dtype=x.dtype, device=x.device)
    key = f"{8 * x.dtype.itemsize} bits, {n}:{m}, {T} tokens{', backward' if backward else ''}"
    options = tuned("nm_linear.product", key, x.device, num_warps=4, num_stages=3)
    with torch.cuda.device_of(x):
        product[(programs, parts, columns)](
            x, values, bits, partial, tokens, rows, cols, bits.shape[1], kept, chunk,
            KEEP=n, GROUP=m, T=T, M=64, N=64, PRECISION=_precision(x.dtype), BACKWARD=backward, **options,
        )  # fmt: skip
        finish[(triton.cdiv(out.numel(), 1024),)](
            partial, out if bias is None else bias, out, parts, out.numel(), outer,
            BIAS=bias is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out


def gradient(grad: Tensor, x: Tensor, bits: Tensor, n: int, m: int) -> Tensor:
    """values of grad^T x, of grad [tokens, rows] and x [tokens, cols]; the dense gradient is never written."""
    tokens, rows = grad.shape
    cols = x.shape[1]
    bits = bits.contiguous()
    out = torch.empty(rows, cols // m * n, dtype=grad.dtype, device=grad.device)
    key = f"{8 * grad.dtype.itemsize} bits, {n}:{m}"
    options = tuned("nm_linear.gradient_tile", key, grad.device, num_warps=4, num_stages=3)
    with torch.cuda.device_of(grad):
        gradient_tile[(triton.cdiv(cols, 64), triton.cdiv(rows, 64))](
            grad, x, bits, out, tokens, rows, cols, bits.shape[1], out.shape[1],
            KEEP=n, GROUP=m, T=32, M=64, N=64, PRECISION=_precision(grad.dtype), **options,
        )  # fmt: skip
    return out
