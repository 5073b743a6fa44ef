"""The CUDA side of a masked step (csrc/adamw.cu): tables go to the device in one copy, and nothing waits for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn import _native
from fastunlearn.ops._slots import Batch

_PARAM_TYPE, _GRAD_TYPE = 9, 10  # columns of the table (csrc/adamw.h: Field)


class _Units:
    """Which unit of work belongs to which tensor, on the device; the same for as long as the sizes are."""

    def __init__(self, tables: Any, device: torch.device):
        self.unit_tensor = tables.unit_tensor
        moved = _upload(np.concatenate([tables.first_unit, self.unit_tensor.astype(np.int64)]), device)
        n = len(tables.first_unit)
        self.first = moved[:n]
        self.tensor = moved[n:].to(torch.int32)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """int64 words on the device. From pinned memory, so that the host does not wait."""
    host = torch.from_numpy(array)
    return host.clone() if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _units(tables: Any, device: torch.device) -> _Units:
    units = tables.device_units
    if units is None or units.unit_tensor is not tables.unit_tensor:
        units = tables.device_units = _Units(tables, device)
    return units


def _kinds(rows: np.ndarray) -> int:
    """Bit 3 * parameter type + gradient type for each pair that occurs."""
    return int(np.bitwise_or.reduce(1 << (3 * rows[:, _PARAM_TYPE] + rows[:, _GRAD_TYPE])))


def step(
    name: str, batch: Batch, tables: Any, numbers: np.ndarray, keys: np.ndarray, grad_scale: Tensor | None
) -> None:
    """One step of `masked_adamw` or `masked_sgd`; arguments as in fastunlearn/ops/_masked_step.py."""
    device = batch.device
    n = len(batch)
    # One buffer, one copy: addresses, numbers (8 fp32 are 4 words), rounding keys (2 uint32 are a word).
    words = np.concatenate([tables.rows.ravel(), numbers.ravel().view(np.int64), keys.ravel().view(np.int64)])
    here = _upload(words, device)
    units = _units(tables, device)
    start = here.data_ptr()
    hyper = start + 8 * tables.rows.size
    getattr(_native.library(), f"{name}_cuda")(
        start,
        hyper,
        hyper + 8 * 4 * n,
        units.tensor.data_ptr(),
        units.first.data_ptr(),
        len(tables.unit_tensor),
        0 if grad_scale is None else grad_scale.data_ptr(),
        _kinds(tables.rows),
        *_native.stream(device),
    )


def sumsq(batch: Batch, tables: Any) -> Tensor:
    """Sum of squares of the gradients that may move: float64 scalar on the device."""
    device = batch.device
    here = _upload(tables.rows.ravel(), device)
    units = _units(tables, device)
    partial = torch.empty(len(tables.unit_tensor), dtype=torch.float64, device=device)
    _native.library().masked_sumsq_cuda(
        here.data_ptr(),
        units.tensor.data_ptr(),
        units.first.data_ptr(),
        len(tables.unit_tensor),
        partial.data_ptr(),
        _kinds(tables.rows),
        *_native.stream(device),
    )
    return partial.sum()
