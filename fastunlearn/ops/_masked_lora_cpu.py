"""The masked adapter on a CPU: BLAS's wide products, and two C++ passes with the factors' thin ones, a run of rows at a time.

W_eff and the weight's gradient exist for a run of rows only, in memory that the next run uses again: the eager way spends most of
its time on memory that it touches for the first time. A run of a block mask takes the columns of its set blocks only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastunlearn import _native

#: entries of a run: few enough to stay in a processor's cache, enough for BLAS
_RUN = 1 << 21
#: ranks up to which the thin products of the gradients are C++'s
_THIN = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Adapter(NamedTuple):
    """A [r, in], B [out, r]; mask: bits (uint8), blocks (bool) or None; block: side of a block."""

    A: Tensor
    B: Tensor
    mask: Tensor | None
    scaling: float
    block: int

    def wide(self) -> Adapter:
        """With factors in fp32 and row-major memory."""
        return self._replace(A=_native.in_memory(self.A.float()), B=_native.in_memory(self.B.float()))

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class _Run(NamedTuple):
    rows: slice
    columns: Tensor | None  #: those that may differ from the weight's; None for all
    bits: Tensor | None


def _runs(shape: torch.Size, adapter: Adapter) -> Iterator[_Run]:
    rows, cols = shape
    mask = adapter.mask
    assert mask is not None
    if mask.dtype == torch.uint8:
        count = -(-rows * cols // _RUN)
        step = max(16, -(-rows // (16 * max(count, 1))) * 16)
        for at in range(0, rows, step):
            run = slice(at, min(at + step, rows))
            yield _Run(run, None, mask[run])
        return
    columns = torch.arange(cols)
    for i, on in enumerate(mask.repeat_interleave(adapter.block, 1)[:, :cols]):
        yield _Run(slice(i * adapter.block, min((i + 1) * adapter.block, rows)), columns[on], None)


def _fill(out: Tensor, weight: Tensor, run: _Run, wide: Adapter) -> None:
    """W_eff of a run of rows, into `out` [rows of the run, cols]."""
    w, b = weight[run.rows], wide.B[run.rows]
    if run.bits is None:
        assert run.columns is not None
        out.copy_(w)
        if len(run.columns):
            out[:, run.columns] = torch.addmm(
                w[:, run.columns].float(), b, wide.A[:, run.columns], alpha=wide.scaling
            ).to(out.dtype)
        return
    codes = _native.DTYPES
    _native.library().masked_lora_effective_cpu(
        w.data_ptr(), codes[w.dtype], wide.A.data_ptr(), b.data_ptr(), run.bits.data_ptr(), *w.shape, wide.rank, wide.scaling,
        out.data_ptr(), codes[out.dtype],
    )  # fmt: skip


def _scratch(shape: torch.Size, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """Memory of the largest run."""
    sizes = [run.rows.stop - run.rows.start for run in _runs(shape, adapter)]
    return torch.empty(max(sizes, default=0), shape[1], dtype=dtype)


def weight(weight: Tensor, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """W_eff [out, in] in `dtype`."""
    out, wide = torch.empty(weight.shape, dtype=dtype), adapter.wide()
    for run in _runs(weight.shape, adapter):
        _fill(out[run.rows], weight, run, wide)
    return out


def _effective_runs(weight: Tensor, adapter: Adapter, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W_eff of them): the memory of one is that of the next."""
    wide, kept = adapter.wide(), _scratch(weight.shape, adapter, dtype)
    for run in _runs(weight.shape, adapter):
        if run.columns is not None and not len(run.columns) and weight.dtype == dtype:
            yield run.rows, weight[run.rows]
            continue
        out = kept[: run.rows.stop - run.rows.start]
        _fill(out, weight, run, wide)
        yield run.rows, out


def forward(x: Tensor, weight_: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
    """x [n, in] W_eff^T + bias."""
    if x.dtype != torch.float32:
        return F.linear(x, weight(weight_, adapter, x.dtype), bias)
    y = torch.empty(x.shape[0], weight_.shape[0], dtype=x.dtype)
    for rows, w in _effective_runs(weight_, adapter, x.dtype):
        if bias is None:
            torch.mm(x, w.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, w.T, out=y[:, rows])
    return y


def backward(grad: Tensor, weight_: Tensor, adapter: Adapter) -> Tensor:
    """dX = dY W_eff."""
    # In 16 bits every partial sum would be rounded.
    if grad.dtype != torch.float32:
        return grad @ weight(weight_, adapter, grad.dtype)
    dx = torch.empty(grad.shape[0], weight_.shape[1], dtype=grad.dtype)
    for rows, w in _effective_runs(weight_, adapter, grad.dtype):
        torch.addmm(dx, grad[:, rows], w, beta=0 if rows.start == 0 else 1, out=dx)
    return dx


class _Sums:
    """dA and dB of runs of the weight's gradient G, one after the other."""

    def __init__(self, adapter: Adapter):
        self.adapter, self.wide = adapter, adapter.wide()
        self.dA, self.dB = torch.zeros_like(self.wide.A), torch.zeros_like(self.wide.B)

    def add_bits(self, G: Tensor, run: _Run) -> None:
        """G [rows of the run, cols] in row-major memory, which may be written; what the bits do not set counts as 0."""
        assert run.bits is not None
        wide, b, db = self.wide, self.wide.B[run.rows], self.dB[run.rows]
        library = _native.library()
        if wide.rank > _THIN:
            library.masked_lora_keep_cpu(G.data_ptr(), _native.DTYPES[G.dtype], run.bits.data_ptr(), *G.shape)
            torch.mm(G.float(), wide.A.T, out=db)
            self.dA.addmm_(b.T, G.float())
            return
        partial = torch.empty(library.masked_lora_strips(G.shape[1]), *b.shape)
        library.masked_lora_contract_cpu(
            G.data_ptr(), _native.DTYPES[G.dtype], wide.A.data_ptr(), b.data_ptr(), run.bits.data_ptr(), *G.shape, wide.rank,
            partial.data_ptr(), self.dA.data_ptr(), db.data_ptr(),
        )  # fmt: skip

    def add_columns(self, G: Tensor, run: _Run) -> None:
        """G [rows of the run, columns of the run]."""
        G = G.float()
        self.dB[run.rows] = G @ self.wide.A[:, run.columns].T
        self.dA[:, run.columns] += self.wide.B[run.rows].T @ G

    def gradients(self) -> tuple[Tensor, Tensor]:
        a = self.adapter
        return self.dA.mul_(a.scaling).to(a.A.dtype), self.dB.mul_(a.scaling).to(a.B.dtype)


def gradients(grad: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(dA, dB); of G = dY^T X there is never more than a run of rows."""
    sums = _Sums(adapter)
    shape = torch.Size((adapter.B.shape[0], adapter.A.shape[1]))
    assert adapter.mask is not None
    scratch = _scratch(shape, adapter, x.dtype) if adapter.mask.dtype == torch.uint8 else None
    for run in _runs(shape, adapter):
        dy = grad[:, run.rows].T
        if run.columns is None:
            assert scratch is not None
            sums.add_bits(torch.mm(dy, x, out=scratch[: len(dy)]), run)
        elif len(run.columns):
            sums.add_columns(dy @ x[:, run.columns], run)
    return sums.gradients()


def contract(G: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(dA, dB) from the weight's gradient G [out, in] in row-major memory."""
    sums = _Sums(adapter)
    for run in _runs(G.shape, adapter):
        if run.columns is None:
            sums.add_bits(G[run.rows], run)
        elif len(run.columns):
            sums.add_columns(G[run.rows][:, run.columns], run)
    return sums.gradients()
