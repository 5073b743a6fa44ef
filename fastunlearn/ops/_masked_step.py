"""One step of masked AdamW or SGD on a batch of tensors, and its norm: tables, numbers, choice of backend.

Nothing is checked here: fastunlearn/ops/adamw.py (the public ops) and fastunlearn/optim come in through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.ops import _masked_cuda
from fastunlearn.ops._slots import Batch, units
from fastunlearn.reference import adamw as reference
from fastunlearn.reference.stochastic import rounding_keys

# On a GPU "auto" takes Triton, which has passed its tests on one; the CUDA kernels, made because Triton's miss their limit,
# take its place when they have too (fastunlearn/gpu_runs.json).
_ADAMW = _backend.register("masked_adamw_", triton=("cuda",), native=("cpu", "cuda"))
_SGD = _backend.register("masked_sgd_", triton=("cuda",), native=("cpu", "cuda"))
_NORM = _backend.register("masked_grad_norm", triton=("cuda",), native=("cpu", "cuda"))

#: entries of a unit of work of the C++ and CUDA code (csrc/adamw.h: kUnit)
_UNIT = 32 * 1024


class Tables:
    """The tables of a batch, kept from step to step."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.rounds = b""
        self.moves = 0
        self.revision = 0  #: of everything but the addresses of gradients
        self.rows = np.zeros((0, 12), dtype=np.int64)
        self.unit_tensor = np.zeros(0, dtype=np.int32)
        self.first_unit = np.zeros(0, dtype=np.int64)
        self.launches: Any = None  # kernels/adamw.py keeps its blocks here
        self.device_units: Any = None  # and _masked_cuda.py its units

    def update(self, batch: Batch, rounds: np.ndarray | None = None) -> Tables:
        """Brings the tables up to date; `rounds` bool [tensors]: which are rounded at random."""
        if rounds is None:
            rounds = np.zeros(len(batch), dtype=bool)
        flags = rounds.tobytes()
        if batch is not self.batch or flags != self.rounds:
            rows = batch.addresses(rounds)
            if not np.array_equal(rows[:, 8], self.rows[:, 8]):
                self.unit_tensor, self.first_unit = units(rows[:, 8].tolist(), _UNIT)
            self.batch, self.rounds, self.rows, self.moves = batch, flags, rows, batch.moves
            self.revision += 1
        elif self.moves != batch.moves:
            self.rows[:, 1] = batch.grad_addresses
            self.moves = batch.moves
        return self


@dataclass(slots=True, kw_only=True)
class Options:
    """Numbers of one step of AdamW or SGD; tensors that share them share the object."""

    lr: float
    weight_decay: float
    maximize: bool
    step: int  #: number of this step, from 1
    seed: int
    stochastic: bool  #: rounding of bfloat16 parameters
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    first: bool = False  #: the momentum buffer holds nothing yet


@dataclass(slots=True)
class _Shared:
    """Options of many tensors, of which there are few."""

    distinct: list[Options]
    which: np.ndarray  #: int [tensors]


def _share(options: Sequence[Options]) -> _Shared:
    if len(set(map(id, options))) == 1:
        return _Shared([options[0]], np.zeros(len(options), dtype=np.int64))
    places: dict[int, int] = {}
    which = [places.setdefault(id(o), len(places)) for o in options]
    distinct: list[Options] = [options[0]] * len(places)
    for place, i in {place: i for i, place in enumerate(which)}.items():
        distinct[place] = options[i]
    return _Shared(distinct, np.array(which))


def _words(values: Sequence[int]) -> np.ndarray:
    return np.array([value & 0xFFFFFFFFFFFFFFFF for value in values], dtype=np.uint64)


def _keys(batch: Batch, shared: _Shared) -> np.ndarray:
    seeds, steps = (_words([getattr(o, name) for o in shared.distinct])[shared.which] for name in ("seed", "step"))
    return rounding_keys(seeds, steps, np.array(batch.indices, dtype=np.uint64))


def _adamw_numbers(shared: _Shared) -> np.ndarray:
    """float32 [tensors, 8]: csrc/adamw.h, kHyper."""
    rows = [
        (
            1 - o.beta1,
            o.beta2,
            1 - o.beta2,
            o.eps,
            o.lr * o.weight_decay,
            o.lr / (1 - o.beta1**o.step),
            math.sqrt(1 - o.beta2**o.step),
            -1.0 if o.maximize else 1.0,
        )
        for o in shared.distinct
    ]
    return np.array(rows, dtype=np.float32)[shared.which]


def _sgd_numbers(shared: _Shared) -> np.ndarray:
    rows = [
        (o.momentum, 1 - o.dampening, o.weight_decay, o.lr, o.nesterov, o.first, 0.0, -1.0 if o.maximize else 1.0)
        for o in shared.distinct
    ]
    return np.array(rows, dtype=np.float32)[shared.which]


def _rounds(batch: Batch, shared: _Shared) -> np.ndarray:
    """bool [tensors]: which are rounded at random."""
    return np.array([o.stochastic for o in shared.distinct])[shared.which] & batch.roundable()


def refuse_capture(device: torch.device) -> None:
    """
    Raises:
        RuntimeError: a CUDA graph is being captured: it would repeat the addresses and numbers of this one step.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the masked optimisers cannot be captured in a CUDA graph: addresses, step sizes and random keys are uploaded at "
            "every step, and a graph would repeat those of the captured one; step outside of the graph"
        )


def _launch(
    name: str,
    batch: Batch,
    options: Sequence[Options],
    numbers: Callable[[_Shared], np.ndarray],
    grad_scale: Tensor | None,
    tables: Tables | None,
) -> str | None:
    """Runs a step by a kernel; "reference" where none can."""
    op = _ADAMW if name == "masked_adamw" else _SGD
    backend = _backend.resolve(op, batch.device)
    if backend == "reference":
        return backend
    refuse_capture(batch.device)
    shared = _share(options)
    rounds, hyper = _rounds(batch, shared), numbers(shared)
    tables = (tables or Tables()).update(batch, rounds)
    keys = _keys(batch, shared) if rounds.any() else np.zeros((len(batch), 2), dtype=np.uint32)
    if backend == "triton":
        from fastunlearn.kernels import adamw as kernels

        kernels.step(name, batch, tables, hyper, keys, grad_scale)
    elif _native.is_cuda(batch.device):
        _masked_cuda.step(name, batch, tables, hyper, keys, grad_scale)
    else:
        getattr(_native.library(), f"{name}_cpu")(
            tables.rows.ctypes.data,
            hyper.ctypes.data,
            keys.ctypes.data,
            tables.unit_tensor.ctypes.data,
            tables.first_unit.ctypes.data,
            len(tables.unit_tensor),
            0 if grad_scale is None else grad_scale.data_ptr(),
        )
    # As writing through torch does: a backward pass through what was overwritten must raise.
    torch.autograd.graph.increment_version(batch.params)
    return backend


def _reference_extras(batch: Batch, options: Sequence[Options], grad_scale: Tensor | None) -> list[dict[str, Any]]:
    shared = _share(options)
    keys, rounds = _keys(batch, shared), _rounds(batch, shared)
    return [
        {
            "factor": (-1.0 if o.maximize else 1.0) * (1.0 if grad_scale is None else grad_scale),
            "scale": batch.scales[i],
            "master": batch.masters[i],
            "key": keys[i].tolist() if rounds[i] else None,
        }
        for i, o in enumerate(options)
    ]


def reads_gradients(name: str, device: torch.device) -> bool:
    """Whether a step needs the gradients as tensors (and not only their addresses)."""
    return _backend.resolve(_ADAMW if name == "masked_adamw" else _SGD, device) == "reference"


def adamw_batch(
    batch: Batch, options: Sequence[Options], grad_scale: Tensor | None = None, tables: Tables | None = None
) -> None:
    """One AdamW step of tensors on one device (the optimiser's way in: nothing is checked here)."""
    if not len(batch):
        return
    if _launch("masked_adamw", batch, options, _adamw_numbers, grad_scale, tables) != "reference":
        return
    for i, extras in enumerate(_reference_extras(batch, options, grad_scale)):
        o, first, second = options[i], batch.first[i], batch.second[i]
        assert first is not None
        assert second is not None
        reference.masked_adamw_(
            batch.params[i],
            batch.grads[i],
            batch.slots[i].may(),
            first,
            second,
            o.step,
            lr=o.lr,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            **extras,
        )


def sgd_batch(
    batch: Batch, options: Sequence[Options], grad_scale: Tensor | None = None, tables: Tables | None = None
) -> None:
    """One SGD step of tensors on one device (the optimiser's way in: nothing is checked here)."""
    if not len(batch):
        return
    if _launch("masked_sgd", batch, options, _sgd_numbers, grad_scale, tables) != "reference":
        return
    for i, extras in enumerate(_reference_extras(batch, options, grad_scale)):
        o = options[i]
        reference.masked_sgd_(
            batch.params[i],
            batch.grads[i],
            batch.slots[i].may(),
            batch.first[i],
            o.first,
            lr=o.lr,
            momentum=o.momentum,
            dampening=o.dampening,
            weight_decay=o.weight_decay,
            nesterov=o.nesterov,
            **extras,
        )


def sumsq_batch(batch: Batch, tables: Tables | None = None) -> Tensor:
    """Sum of squares of the gradients that may move, of tensors on one device: float64 scalar there, no synchronisation."""
    backend = _backend.resolve(_NORM, batch.device)
    if backend == "reference":
        return torch.stack([reference.masked_sumsq(g, s.may()) for g, s in zip(batch.grads, batch.slots)]).sum()
    refuse_capture(batch.device)
    tables = (tables or Tables()).update(batch)
    if backend == "triton":
        from fastunlearn.kernels import adamw as kernels

        return kernels.sumsq(batch, tables)
    if _native.is_cuda(batch.device):
        return _masked_cuda.sumsq(batch, tables)
    partial = torch.empty(len(tables.unit_tensor), dtype=torch.float64)
    _native.library().masked_sumsq_cpu(
        tables.rows.ctypes.data,
        tables.unit_tensor.ctypes.data,
        tables.first_unit.ctypes.data,
        len(tables.unit_tensor),
        partial.data_ptr(),
    )
    return partial.sum()
