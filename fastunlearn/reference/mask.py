"""BitMask in plain PyTorch: bits of a row little-endian in bytes, every row starts on a byte, padding bits 0."""

from __future__ import annotations

import torch
from torch import Tensor


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def mask_pack(bools: Tensor) -> Tensor:
    """bool [rows, cols] -> uint8 [rows, ceil(cols / 8)]."""
    rows, cols = bools.shape
    padded = torch.nn.functional.pad(bools.to(torch.uint8), (0, -cols % 8))
    eights = padded.view(rows, (cols + 7) // 8, 8) << _places(bools.device)
    return eights.sum(-1, dtype=torch.uint8)


def mask_unpack(bits: Tensor, cols: int) -> Tensor:
    """uint8 [rows, ceil(cols / 8)] -> bool [rows, cols]."""
    eights = bits.unsqueeze(-1) >> _places(bits.device) & 1
    return eights.flatten(1)[:, :cols].bool()


def mask_count(bits: Tensor) -> Tensor:
    """Number of set bits, int64 scalar tensor."""
    return (bits.unsqueeze(-1) >> _places(bits.device) & 1).sum(dtype=torch.int64)


def mask_prefix(bits: Tensor, chunk: int) -> Tensor:
    """int64 [ceil(bytes / chunk) + 1]: set bits in bytes [0, i * chunk) of `bits` in row-major order."""
    flat = bits.flatten()
    per_byte = (flat.unsqueeze(-1) >> _places(bits.device) & 1).sum(-1, dtype=torch.int64)
    per_chunk = torch.nn.functional.pad(per_byte, (0, -flat.numel() % chunk)).view(-1, chunk).sum(-1)
    return torch.nn.functional.pad(per_chunk.cumsum(0), (1, 0))
