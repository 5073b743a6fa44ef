"""SAU's redistribution factors of a whole list of tensors (the maths: fastunlearn/reference/redistribute.py).

Three kernels, none of which the host waits for. `measure` reads the importance: sums of every row, then the squares of its
factors (a row that fits a block stays in registers, a longer one is read again from the cache). `finish` makes of them, for each
tensor, the number of survivors before every cell (a row's run of COLS columns) and one over the rms. `write` reads the
importance once more and writes the factors. Tensors of one element type and width are one launch; a table has their addresses.

A tile is [ROWS, COLS / 8, 8]: a byte of the mask is read once for its eight entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels._common import TL_DTYPES, set_bits

TILE = 4096
WARPS = 4
# Rows of the table, int64 [FIELDS, tensors].
IMPORTANCE = tl.constexpr(0)
BITS = tl.constexpr(1)
ROWS = tl.constexpr(2)
COLS = tl.constexpr(3)
FIRST_ROW = tl.constexpr(4)
FIRST_CELL = tl.constexpr(5)
FIRST_GROUP = tl.constexpr(6)  # groups of rows: tiles of `measure`
FIRST_TILE = tl.constexpr(7)  # tiles of `write`
CELLS = tl.constexpr(8)
GROUPS = tl.constexpr(9)
FIELDS = 10


@triton.jit
def _tensor(table, count, low, high, item, field, STEPS: tl.constexpr):
    """The last of the tensors low .. high - 1 that starts at or before `item`, by STEPS bisections."""
    low = item * 0 + low
    high = item * 0 + high
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        here = tl.load(table + field * count + middle) <= item
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return low


@triton.jit
def _tile(
    table, count, tensor, first, rows, cols, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """(importance, what is no entry as 0 [R, C / 8, 8]; bytes of the mask [R, C / 8]) from row `first` and column `start` on."""
    importance = tl.load(table + IMPORTANCE * count + tensor).to(tl.pointer_type(TYPE))
    bits = tl.load(table + BITS * count + tensor).to(tl.pointer_type(tl.uint8))
    width = (cols + 7) // 8
    # Places within a tile take 32 bits: of rows that are longer than a tile it has one.
    height = tl.minimum(rows - first, R).to(tl.int32)
    inner = tl.minimum(cols - start, C).to(tl.int32)
    if ALIGNED:
        # What is read from a table says nothing of itself, and loads are as wide as is known to be right.
        importance = tl.multiple_of(importance, 16)
        cols = cols // 8 * 8
        inner = inner // 8 * 8
    row = tl.arange(0, R)
    byte = tl.arange(0, C // 8)
    inside = (row < height)[:, None] & (byte < (inner + 7) // 8)[None, :]
    at = (row * width.to(tl.int32))[:, None] + byte[None, :]
    bytes_ = tl.load(bits + (first * width + start // 8) + at, mask=inside, other=0).to(tl.int32)
    col = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    entry = (row < height)[:, None, None] & (col < inner)[None, :, :]
    at = (row * cols.to(tl.int32))[:, None, None] + col[None, :, :]
    x = tl.load(importance + (first * cols + start) + at, mask=entry, other=0.0).to(tl.float32)
    return x, bytes_


@triton.jit
def _may(bytes_):
    return ((bytes_[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1) != 0


@triton.jit
def _before(bytes_):
    """Set bits of a byte before each of its places: eight numbers of four bits."""
    ones = (bytes_ | (bytes_ << 12)) & 0x000F000F
    ones = (ones | (ones << 6)) & 0x03030303
    ones = (ones | (ones << 3)) & 0x11111111
    return ones * 0x11111110


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def _scale(kept, lost, survivors, beta):
    kept64 = tl.where(kept > 0, kept, 1.0).to(tl.float64)
    scale = beta * (lost.to(tl.float64) / kept64) * (survivors.to(tl.float64) / kept64)
    # 2^170 times the smallest number of fp32 is beyond any `clip`.
    scale = tl.where(scale < 1.496577676626845e51, scale, 1.496577676626845e51)
    return tl.where(kept > 0, scale, 0.0)


@triton.jit
def _factors(x, scale, clip):
    """min(1 + scale x, clip); scale fp64 [R]. Where it is beyond fp32, so may be survivors below fp32's normal numbers: 2^64 of it
    goes to them."""
    beyond = scale > 3.4028234663852886e38
    by = tl.where(beyond, scale * 5.421010862427522e-20, scale).to(tl.float32)
    lifted = x * tl.where(beyond, 18446744073709551616.0, 1.0).to(tl.float32)[:, None, None]
    return tl.minimum(1.0 + by[:, None, None] * lifted, clip)


@triton.jit
def _squares(x, may, scale, clip):
    f = tl.where(may, _factors(x, scale, clip), 0.0)
    return _sum(f * f)


@triton.jit(do_not_specialize=["count", "low", "high", "first"])
def measure(
    table, count, low, high, first, counts, scales, partial, beta, clip,
    STEPS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """counts int32 [cells]: survivors; scales fp64 [rows]: factor = 1 + scale * importance; partial fp64 [groups]: sum of
    their squares, NaN where something is no importance. WHOLE: a row is one cell."""
    group = tl.program_id(0).to(tl.int64) + first
    tensor = _tensor(table, count, low, high, group, FIRST_GROUP, STEPS)
    rows = tl.load(table + ROWS * count + tensor)
    cols = tl.load(table + COLS * count + tensor)
    first_row = (group - tl.load(table + FIRST_GROUP * count + tensor)) * R
    row = first_row + tl.arange(0, R)
    here = row < rows
    cell = counts + tl.load(table + FIRST_CELL * count + tensor)
    scale_to = scales + tl.load(table + FIRST_ROW * count + tensor) + row
    if WHOLE:
        x, bytes_ = _tile(table, count, tensor, first_row, rows, cols, 0, TYPE, ALIGNED, R, C)
        may = _may(bytes_)
        survivors = tl.sum(set_bits(bytes_), 1)
        tl.store(cell + row, survivors, mask=here)
        kept = _sum(tl.where(may, x, 0.0))
        lost = _sum(tl.where(may, 0.0, x))
        least = tl.min(tl.min(x, 2), 1)
        scale = _scale(kept, lost, survivors, beta)
        squares = _squares(x, may, scale, clip).to(tl.float64)
    else:
        chunks = (cols + C - 1) // C
        kept = tl.zeros([R], tl.float32)
        lost = tl.zeros([R], tl.float32)
        survivors = tl.zeros([R], tl.int32)
        least = tl.zeros([R], tl.float32)
        for chunk in range(0, chunks):
            x, bytes_ = _tile(table, count, tensor, first_row, rows, cols, chunk * C, TYPE, ALIGNED, R, C)
            may = _may(bytes_)
            these = tl.sum(set_bits(bytes_), 1)
            tl.store(cell + row * chunks + chunk, these, mask=here)
            survivors += these
            kept += _sum(tl.where(may, x, 0.0))
            lost += _sum(tl.where(may, 0.0, x))
            least = tl.minimum(least, tl.min(tl.min(x, 2), 1))
        scale = _scale(kept, lost, survivors, beta)
        squares = tl.zeros([R], tl.float64)
        for chunk in range(0, chunks):
            x, bytes_ = _tile(table, count, tensor, first_row, rows, cols, chunk * C, TYPE, ALIGNED, R, C)
            squares += _squares(x, _may(bytes_), scale, clip).to(tl.float64)
    tl.store(scale_to, scale, mask=here)
    # NaN and infinite ones are in the sums; a row whose sum is beyond fp32 has no factors either.
    good = (least >= 0) & (kept < float("inf")) & (lost < float("inf"))
    tl.store(partial + group, tl.sum(tl.where(good, squares, float("nan")), 0))


@triton.jit(do_not_specialize=["count"])
def finish(table, count, counts, partial, starts, normalisers, found, BLOCK: tl.constexpr):
    """One program a tensor: starts int64 [cells]: survivors of the tensor before the cell; normalisers fp32 [tensors];
    found int64 [2, tensors]: survivors, and 1 where the importance is none."""
    tensor = tl.program_id(0)
    cells = tl.load(table + CELLS * count + tensor)
    first = tl.load(table + FIRST_CELL * count + tensor)
    before = first * 0
    for at in range(0, cells, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        n = tl.load(counts + first + offs, mask=offs < cells, other=0).to(tl.int64)
        upto = tl.cumsum(n, 0)
        tl.store(starts + first + offs, before + upto - n, mask=offs < cells)
        before += tl.sum(n, 0)
    groups = tl.load(table + GROUPS * count + tensor)
    first = tl.load(table + FIRST_GROUP * count + tensor)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, groups, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        total += tl.load(partial + first + offs, mask=offs < groups, other=0.0)
    squares = tl.sum(total, 0)
    none = (before == 0) & (squares == squares)
    normaliser = 1.0 / tl.sqrt(tl.where(none, 1.0, squares) / tl.where(before == 0, 1, before).to(tl.float64))
    tl.store(normalisers + tensor, normaliser.to(tl.float32))
    tl.store(found + tensor, before)
    tl.store(found + count + tensor, tl.where(squares == squares, 0, 1).to(tl.int64))


@triton.jit(do_not_specialize=["count", "low", "high", "first"])
def write(
    table, outs, count, low, high, first, starts, scales, normalisers, clip,
    STEPS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """outs int64 [2, tensors]: addresses of the results, and their entries."""
    tile = tl.program_id(0).to(tl.int64) + first
    tensor = _tensor(table, count, low, high, tile, FIRST_TILE, STEPS)
    rows = tl.load(table + ROWS * count + tensor)
    cols = tl.load(table + COLS * count + tensor)
    chunks = (cols + C - 1) // C
    tile -= tl.load(table + FIRST_TILE * count + tensor)
    chunk = tile % chunks
    first_row = tile // chunks * R
    row = first_row + tl.arange(0, R)
    here = row < rows
    x, bytes_ = _tile(table, count, tensor, first_row, rows, cols, chunk * C, TYPE, ALIGNED, R, C)
    cell = starts + tl.load(table + FIRST_CELL * count + tensor) + row * chunks + chunk
    scale = tl.load(scales + tl.load(table + FIRST_ROW * count + tensor) + row, mask=here, other=0.0)
    ones = set_bits(bytes_)
    begin = tl.load(cell, mask=here, other=0)
    upto = tl.cumsum(ones, 1) - ones
    places = upto[:, :, None] + ((_before(bytes_)[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15)
    # Of a result that is too short nothing beyond its end is written.
    room = tl.minimum(tl.maximum(tl.load(outs + count + tensor) - begin, 0), C).to(tl.int32)
    f = _factors(x, scale, clip) * tl.load(normalisers + tensor)
    out = tl.load(outs + tensor).to(tl.pointer_type(tl.float32)) + begin
    tl.store(out[:, None, None] + places, f, mask=_may(bytes_) & (places < room[:, None, None]))


def _shape(cols: int, tile: int) -> tuple[bool, int, int]:
    """(a row is one cell, ROWS, COLS) of a tile for rows of `cols` entries."""
    width = min(tile, max(16, triton.next_power_of_2(cols)))
    return cols <= width, tile // width, width


class Call:
    """Measures; then `write` writes. All tensors [rows, cols], contiguous and on one device.

    Attributes:
        found: int64 [2, tensors] on the device: survivors, and whether the importance is none.
    """

    def __init__(
        self, importance: Sequence[Tensor], bits: Sequence[Tensor], beta: float, clip: float, tile: int = TILE
    ):
        self.device, self.clip = importance[0].device, clip
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "redistribution: called while a CUDA graph is captured; its table is uploaded anew by every call and would be "
                "stale when the graph is replayed. Call it outside the graph"
            )
        n = len(importance)
        kinds = [
            (t.dtype, t.data_ptr() % 16 == 0 and t.shape[1] % 8 == 0, *_shape(t.shape[1], tile)) for t in importance
        ]
        self.order = sorted(range(n), key=lambda i: str(kinds[i]))
        columns: list[list[int]] = [[] for _ in range(FIELDS)]
        row_at = cell_at = group_at = tile_at = 0
        # (kind, first tensor, end, first group, groups, first tile, tiles): one launch of `measure` and of `write`
        self.launches: list[tuple[tuple, int, int, int, int, int, int]] = []
        for place, i in enumerate(self.order):
            (rows, cols), (_, _, _, height, width) = importance[i].shape, kinds[i]
            groups, chunks = (-(-rows // height), -(-cols // width)) if rows and cols else (0, 0)
            if not self.launches or self.launches[-1][0] != kinds[i]:
                self.launches.append((kinds[i], place, place, group_at, 0, tile_at, 0))
            kind, low, _, group0, _, tile0, _ = self.launches[-1]
            values = (importance[i].data_ptr(), bits[i].data_ptr(), rows, cols, row_at, cell_at, group_at, tile_at)
            for column, value in zip(columns, (*values, rows * chunks, groups)):
                column.append(value)
            row_at, cell_at = row_at + rows, cell_at + rows * chunks
            group_at, tile_at = group_at + groups, tile_at + groups * chunks
            self.launches[-1] = (kind, low, place + 1, group0, group_at - group0, tile0, tile_at - tile0)
        self.count = n
        self.inputs = (importance, bits)  # alive until the launches are queued
        self.table = self._upload(chain.from_iterable(columns))
        like = {"device": self.device}
        counts = torch.empty(cell_at, dtype=torch.int32, **like)
        partial = torch.empty(group_at, dtype=torch.float64, **like)
        self.starts = torch.empty(cell_at, dtype=torch.int64, **like)
        self.scales = torch.empty(row_at, dtype=torch.float64, **like)
        self.normalisers = torch.empty(n, dtype=torch.float32, **like)
        found = torch.empty(2, n, dtype=torch.int64, **like)
        with torch.cuda.device_of(importance[0]):
            for (dtype, aligned, whole, height, width), low, high, group0, groups, _, _ in self.launches:
                if groups:
                    measure[(groups,)](
                        self.table, n, low, high, group0, counts, self.scales, partial, beta, clip,
                        (high - low - 1).bit_length(), TL_DTYPES[dtype], aligned, whole, height, width, num_warps=WARPS,
                    )  # fmt: skip
            finish[(n,)](
                self.table, n, counts, partial, self.starts, self.normalisers, found, 1024, num_warps=WARPS
            )  # fmt: skip
        self.places = [0] * n
        for place, i in enumerate(self.order):
            self.places[i] = place
        self.found = found if self.order == list(range(n)) else found[:, self._upload(self.places)]

    def _upload(self, numbers: Sequence[int] | chain) -> Tensor:
        host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
        # From pinned memory the copy is queued and the host does not wait for the device.
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def write(self, outs: Sequence[Tensor]) -> None:
        """Fills `outs`, fp32 [entries] each; what does not fit is left out."""
        sorted_ = [outs[i] for i in self.order]
        addresses = self._upload([o.data_ptr() for o in sorted_] + [o.numel() for o in sorted_])
        with torch.cuda.device_of(self.inputs[0][0]):
            for (dtype, aligned, _, height, width), low, high, _, _, tile0, tiles in self.launches:
                if tiles:
                    write[(tiles,)](
                        self.table, addresses, self.count, low, high, tile0, self.starts, self.scales, self.normalisers,
                        self.clip, (high - low - 1).bit_length(), TL_DTYPES[dtype], aligned, height, width, num_warps=WARPS,
                    )  # fmt: skip
