"""The eigenbasis step of ScaPre's solve: a product whose epilogue divides and takes the traces (maths: reference/spectral.py).

    E = v_i (W K)_ij / (u_i + v_i values_j), and for every row the sums of E^2, values E^2 and E (W K)

Products without such an epilogue (back from the eigenbasis, the shared Cholesky factor) are the vendor's library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.reference.spectral import rotate_back as rotate_back
from fastunlearn.reference.spectral import subtract_product as subtract_product

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 32


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
    tiles = triton.cdiv(d, BLOCK_N)
    sums = torch.empty(tiles, 3, rows, dtype=torch.float32, device=stacked.device)
    if rows:
        with torch.cuda.device_of(stacked):
            _rotate[(tiles, triton.cdiv(rows, BLOCK_M))](
                stacked, K.contiguous(), values.contiguous(), u.contiguous(), v.contiguous(), E, sums, rows, d,
                BLOCK_M, BLOCK_N, BLOCK_K, num_warps=8, num_stages=3,
            )  # fmt: skip
    return E, sums.sum(0, dtype=torch.float64).T if traces else None
