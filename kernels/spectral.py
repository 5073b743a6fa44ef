"""The eigenbasis step of ScaPre's solve: a product whose epilogue divides and takes the traces (maths: reference/spectral.py).

    E = v_i (W K)_ij / (u_i + v_i values_j), and for every row the sums of E^2, values E^2 and E (W K)

and the spectral trace of a list of weights in one launch: W A, which its gradient is made of, with the sums of W (W A) taken on the way.
Products without such an epilogue (back from the eigenbasis, the shared Cholesky factor) are the vendor's library.
"""

from __future__ import annotations

from array import array

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn._tuned import tuned
from fastunlearn.reference.spectral import rotate_back as rotate_back
from fastunlearn.reference.spectral import subtract_product as subtract_product

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 32
#: options of the launch that `python -m benchmarks tune` tries beside the defaults
CANDIDATES = {
    "spectral.rotate": (
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 8, "num_stages": 4},
    ),
    "spectral.trace": (
        {"num_warps": 4, "num_stages": 3},
        {"num_warps": 8, "num_stages": 4},
        {"num_warps": 4, "num_stages": 4},
    ),
}


@triton.jit
def _rotate(
    weights, K, values, u, v, E, sums, rows, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums fp32 [column tiles, 3, rows]."""
    tile_n = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    here, there = row < rows, col < d
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d, BLOCK_K):
        inside = start + k < d
        a = tl.load(weights + row[:, None] * d + (start + k)[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        b = tl.load(K + (start + k)[:, None] * d + col[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        # Three TF32 products: float32's precision at the tensor cores' rate.
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    ui = tl.load(u + row, mask=here, other=1.0)
    vi = tl.load(v + row, mask=here, other=0.0)
    value = tl.load(values + col, mask=there, other=0.0)
    e = acc * (vi[:, None] / (ui[:, None] + vi[:, None] * value[None, :]))
    whole = here[:, None] & there[None, :]
    tl.store(E + row[:, None] * d + col[None, :], e, mask=whole)
    e = tl.where(whole, e, 0.0)
    base = sums + tile_n.to(tl.int64) * 3 * rows + row
    tl.store(base, tl.sum(e * e, 1), mask=here)
    tl.store(base + rows, tl.sum(e * e * value[None, :], 1), mask=here)
    tl.store(base + 2 * rows, tl.sum(e * acc, 1), mask=here)


def rotate(
    stacked: Tensor, K: Tensor, values: Tensor, u: Tensor, v: Tensor, traces: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As `fastunlearn.reference.spectral.rotate`; all float32."""
    rows, d = stacked.shape
    E = torch.empty_like(stacked)
    options = tuned(
        "spectral.rotate",
        str(d),
        stacked.device,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=8,
        num_stages=3,
    )
    tiles = triton.cdiv(d, options["BLOCK_N"])
    sums = torch.empty(tiles, 3, rows, dtype=torch.float32, device=stacked.device)
    if rows:
        with torch.cuda.device_of(stacked):
            _rotate[(tiles, triton.cdiv(rows, options["BLOCK_M"]))](
                stacked, K.contiguous(), values.contiguous(), u.contiguous(), v.contiguous(), E, sums, rows, d,
                **options,
            )  # fmt: skip
    return E, sums.sum(0, dtype=torch.float64).T if traces else None


# Columns of the table, one line a tile of rows: addresses of weight, product and matrix, first row, rows of the weight, where its sums go.
COLUMNS = tl.constexpr(6)
TRACE_M = 64


@triton.jit
def _trace(
    table, sums, d, CODE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums fp32 [places, tiles of columns]: of W (W A) over the tile; CODE: 0 fp32, 1 fp16, 2 bf16; ALIGNED: addresses are multiples
    of 16 bytes."""
    tile, tile_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = tl.float32 if CODE == 0 else tl.float16 if CODE == 1 else tl.bfloat16
    weight = tl.load(table + tile * COLUMNS).to(tl.pointer_type(element))
    product = tl.load(table + tile * COLUMNS + 1).to(tl.pointer_type(element))
    matrix = tl.load(table + tile * COLUMNS + 2).to(tl.pointer_type(element))
    if ALIGNED:
        # Addresses from a table say nothing of themselves, and loads are as wide as is known to be right.
        weight, product, matrix = tl.multiple_of(weight, 16), tl.multiple_of(product, 16), tl.multiple_of(matrix, 16)
    row = tl.load(table + tile * COLUMNS + 3) + tl.arange(0, BLOCK_M)
    here = row < tl.load(table + tile * COLUMNS + 4)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = col < d
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d, BLOCK_K):
        inside = start + k < d
        a = tl.load(weight + row[:, None] * d + (start + k)[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            matrix + (start + k).to(tl.int64)[:, None] * d + col[None, :],
            mask=inside[:, None] & there[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    place = row[:, None] * d + col[None, :]
    whole = here[:, None] & there[None, :]
    w = tl.load(weight + place, mask=whole, other=0.0).to(tl.float32)
    tl.store(product + place, acc.to(element), mask=whole)
    own = tl.load(table + tile * COLUMNS + 5)
    tl.store(sums + own * tl.num_programs(1) + tile_n, tl.sum(w * acc))


def spectral_trace(weights: list[Tensor], A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """As `fastunlearn.reference.spectral.spectral_trace`; weights and A of one dtype, up to float32."""
    if not weights:
        return A.new_zeros(0), []
    d, device = A.shape[-1], A.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "spectral_trace: called while a CUDA graph is captured; its table of addresses is uploaded anew by every call and would be "
            "stale when the graph is replayed. Call it outside the graph"
        )
    weights, A = [w.contiguous() for w in weights], A.contiguous()
    products = [torch.empty_like(w) for w in weights]
    each = [A[i] if A.dim() == 3 else A for i in range(len(weights))]
    # Every weight has as many places for sums as the highest: those that nobody writes stay 0.
    most = triton.cdiv(max(w.shape[0] for w in weights), TRACE_M)
    lines = array("q")
    for i, (w, p, a) in enumerate(zip(weights, products, each)):
        for tile, first in enumerate(range(0, w.shape[0], TRACE_M)):
            lines.extend((w.data_ptr(), p.data_ptr(), a.data_ptr(), first, w.shape[0], i * most + tile))
    if not lines:
        return A.new_zeros(len(weights)), products
    table = torch.frombuffer(lines, dtype=torch.int64)
    if device.type == "cuda":
        # From pinned memory the copy is queued and the host does not wait for the device.
        table = table.pin_memory().to(device, non_blocking=True)
    columns = triton.cdiv(d, BLOCK_N)
    sums = torch.zeros(len(weights) * most, columns, dtype=torch.float32, device=device)
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[A.dtype]
    options = tuned("spectral.trace", f"{d}, {code}", device, num_warps=8, num_stages=3)
    with torch.cuda.device_of(A):
        _trace[(len(lines) // COLUMNS.value, columns)](
            table, sums, d, code, all(t.data_ptr() % 16 == 0 for t in (*weights, *products, *each)), TRACE_M, BLOCK_N, BLOCK_K, **options,
        )  # fmt: skip
    # Sums of a weight's tiles in one order: the same in every run.
    return sums.view(len(weights), -1).sum(1, dtype=torch.float64).to(A.dtype), products
