"""A linear layer or convolution with a masked low-rank adapter, in plain PyTorch.

With a frozen weight W [out, in], factors A [r, in] and B [out, r], a mask M and a scale s (SPARE's per-weight adapter, arXiv
2602.07058, and SparsePEFT's, arXiv 2410.03750):

    W_eff = W + s (B A) o M,        y = x W_eff^T + b
    dX = dY W_eff,   G = dY^T X,    dB = s (M o G) A^T,    dA = s B^T (M o G)

W_eff is rounded once, to the type it is multiplied in; where M is not set it is W bit for bit. Without a mask y is that of an
ordinary adapter, x W^T + s (x A^T) B^T + b, which needs no product of the weight's size beside x W^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastunlearn.reference.mask import mask_unpack


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bools(mask: Tensor, rows: int, cols: int, block: int) -> Tensor:
    """bool [rows, cols] of bits (uint8, a BitMask's) or of a block mask (bool, one entry a tile of block x block)."""
    if mask.dtype == torch.uint8:
        return mask_unpack(mask, cols)
    return mask.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :cols]


def weight(
    weight: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scaling: float, block: int, dtype: torch.dtype
) -> Tensor:
    """W_eff [out, in] in `dtype`, for weight [out, in]."""
    kind = wide(weight.dtype)
    w = weight.to(kind)
    full = torch.addmm(w, B.to(kind), A.to(kind), alpha=scaling)
    if mask is not None:
        full = torch.where(bools(mask, weight.shape[0], weight.shape[1], block), full, w)
    return full.to(dtype)


def contract(G: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, scaling: float, block: int) -> tuple[Tensor, Tensor]:
    """(dA [r, in], dB [out, r]) of the weight's gradient G [out, in]."""
    kind = wide(G.dtype)
    g = G.to(kind) if mask is None else torch.where(bools(mask, G.shape[0], G.shape[1], block), G.to(kind), 0)
    dA, dB = B.to(kind).T @ g * scaling, g @ A.to(kind).T * scaling
    return dA.to(A.dtype), dB.to(B.dtype)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scaling: float, y: Tensor) -> Tensor:
    """y + s (x A^T) B^T, in y's memory: x [n, in], y [n, out]."""
    return y.addmm_(x @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=scaling)


def low_rank_gradients(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(dA, dB) of an adapter without a mask, from grad [n, out] and x [n, in]."""
    a, b = A.to(x.dtype), B.to(x.dtype)
    dA, dB = (grad @ b).T @ x * scaling, grad.T @ (x @ a.T) * scaling
    return dA.to(A.dtype), dB.to(B.dtype)
