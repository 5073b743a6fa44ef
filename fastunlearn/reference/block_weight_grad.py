"""The gradient of a weight on chosen square tiles, in plain PyTorch: dW = dY^T X where the block mask is set, 0 elsewhere.

Of a convolution X is the unfolded input: row t of X is the patch that output place t sees, and dW [out, in * kh * kw] is tiled as a
matrix, the way `BitMask` lays a convolution's weight out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spread(block_mask: Tensor, block: int, rows: int, cols: int) -> Tensor:
    """bool [ceil(rows / block), ceil(cols / block)] -> bool [rows, cols]."""
    return block_mask.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :cols]


def tiled(dense: Tensor, block: int) -> Tensor:
    """Tiles of dense [rows, cols]: [ceil(rows / block), ceil(cols / block), block, block], zeros where one hangs over the edge."""
    rows, cols = (-(-size // block) for size in dense.shape)
    padded = F.pad(dense, (0, cols * block - dense.shape[1], 0, rows * block - dense.shape[0]))
    return padded.view(rows, block, cols, block).transpose(1, 2)


def patches(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """x [n, channels, h, w] -> [n * places, channels * kh * kw]."""
    unfolded = F.unfold(x, kernel_size, dilation, padding, stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def block_weight_grad(grad: Tensor, x: Tensor, block_mask: Tensor, block: int) -> Tensor:
    """grad [tokens, rows], x [tokens, cols] -> [rows, cols], zero off the mask."""
    off = ~spread(block_mask, block, grad.shape[1], x.shape[1])
    return torch.mm(grad.T, x).masked_fill_(off, 0)
