"""The two passes of sid_loss in C++ (csrc/sid.cpp), with the reference's signatures: fastunlearn/reference/sid.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastunlearn import _native


def _inputs(teacher: Tensor, fake: Tensor, noise: Tensor, alpha: float) -> tuple[Tensor, Any]:
    """(noise of a type that goes with the predictions, what the C++ functions take first); all in row-major memory."""
    if noise.dtype != teacher.dtype:
        noise = noise.float()
    codes = _native.DTYPES
    where = (teacher.data_ptr(), fake.data_ptr(), noise.data_ptr(), codes[teacher.dtype], codes[noise.dtype])
    return noise, (*where, *teacher.shape, alpha)


def sid_sums(teacher: Tensor, fake: Tensor, noise: Tensor, alpha: float) -> Tensor:
    n, size = teacher.shape
    noise, inputs = _inputs(teacher, fake, noise, alpha)
    partial = torch.empty(n, -(-size // _native.library().sid_unit), 2, dtype=torch.float64)
    out = torch.empty(n, 2)
    _native.library().sid_sums_cpu(*inputs, partial.data_ptr(), out.data_ptr())
    return out


def sid_gradients(teacher: Tensor, fake: Tensor, noise: Tensor, factor: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    noise, inputs = _inputs(teacher, fake, noise, alpha)
    of_teacher, of_fake = torch.empty_like(teacher), torch.empty_like(fake)
    _native.library().sid_gradients_cpu(*inputs, factor.data_ptr(), of_teacher.data_ptr(), of_fake.data_ptr())
    return of_teacher, of_fake
