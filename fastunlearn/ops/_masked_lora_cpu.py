"""The masked adapter on a CPU: BLAS's products with two C++ passes between them, a run of rows at a time.

W_eff, s B A and the weight's gradient exist for a run of rows only, in memory that the next run uses again: the eager way spends
most of its time on memory that it touches for the first time. A run of a block mask takes the columns of its set blocks only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastunlearn import _native

#: entries of a run: its weight, product and gradient stay in a core's cache
_RUN = 1 << 19
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Adapter(NamedTuple):
    """A [r, in], B [out, r]; mask: bits (uint8), blocks (bool) or None; block: side of a block."""

    A: Tensor
    B: Tensor
    mask: Tensor | None
    scaling: float
    block: int

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
        step = max(16, _RUN // max(cols, 1))
        for at in range(0, rows, step):
            run = slice(at, min(at + step, rows))
            yield _Run(run, None, mask[run])
        return
    columns = torch.arange(cols)
    for i, on in enumerate(mask.repeat_interleave(adapter.block, 1)[:, :cols]):
        yield _Run(slice(i * adapter.block, min((i + 1) * adapter.block, rows)), columns[on], None)


def _fill(out: Tensor, weight: Tensor, run: _Run, adapter: Adapter, A: Tensor, B: Tensor, delta: Tensor | None) -> None:
    """W_eff of a run of rows, into `out` [rows of the run, cols]; A and B fp32."""
    w, b = weight[run.rows], B[run.rows]
    if run.bits is None:
        assert run.columns is not None
        out.copy_(w)
        if len(run.columns):
            out[:, run.columns] = torch.addmm(
                w[:, run.columns].float(), b, A[:, run.columns], alpha=adapter.scaling
            ).to(out.dtype)
        return
    assert delta is not None
    d = torch.mm(b, A, out=delta[: len(b)])
    codes = _native.DTYPES
    _native.library().masked_lora_weight_cpu(
        w.data_ptr(), codes[w.dtype], d.data_ptr(), run.bits.data_ptr(), *w.shape, adapter.scaling, out.data_ptr(),
        codes[out.dtype],
    )  # fmt: skip


def _scratch(shape: torch.Size, adapter: Adapter, dtype: torch.dtype) -> Tensor | None:
    """Memory of the largest run."""
    sizes = [run.rows.stop - run.rows.start for run in _runs(shape, adapter)]
    return torch.empty(max(sizes, default=0), shape[1], dtype=dtype)


def weight(weight: Tensor, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """W_eff [out, in] in `dtype`."""
    out = torch.empty(weight.shape, dtype=dtype)
    A, B = adapter.A.float(), adapter.B.float()
    delta = _scratch(weight.shape, adapter, torch.float32)
    for run in _runs(weight.shape, adapter):
        _fill(out[run.rows], weight, run, adapter, A, B, delta)
    return out


def _effective_runs(weight: Tensor, adapter: Adapter, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W_eff of them): the memory of one is that of the next."""
    A, B = adapter.A.float(), adapter.B.float()
    delta, kept = _scratch(weight.shape, adapter, torch.float32), _scratch(weight.shape, adapter, dtype)
    assert kept is not None
    for run in _runs(weight.shape, adapter):
        if run.columns is not None and not len(run.columns) and weight.dtype == dtype:
            yield run.rows, weight[run.rows]
            continue
        out = kept[: run.rows.stop - run.rows.start]
        _fill(out, weight, run, adapter, A, B, delta)
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
    dx = torch.zeros(grad.shape[0], weight_.shape[1], dtype=grad.dtype)
    for rows, w in _effective_runs(weight_, adapter, grad.dtype):
        dx.addmm_(grad[:, rows], w)
    return dx


def _keep(G: Tensor, bits: Tensor | None) -> None:
    if bits is not None:
        _native.library().masked_lora_keep_cpu(G.data_ptr(), _native.DTYPES[G.dtype], bits.data_ptr(), *G.shape)


def gradients(grad: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(dA, dB); of G = dY^T X there is never more than a run of rows."""
    A, B = adapter.A.float(), adapter.B.float()
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    shape = torch.Size((B.shape[0], A.shape[1]))
    scratch = (
        _scratch(shape, adapter, x.dtype) if adapter.mask is not None and adapter.mask.dtype == torch.uint8 else None
    )
    for run in _runs(shape, adapter):
        dy = grad[:, run.rows].T
        if run.columns is None:
            assert scratch is not None
            G = torch.mm(dy, x, out=scratch[: len(dy)])
            _keep(G, run.bits)
            dB[run.rows] = G.float() @ A.T
            dA.addmm_(B[run.rows].T, G.float())
        elif len(run.columns):
            G = (dy @ x[:, run.columns]).float()
            dB[run.rows] = G @ A[:, run.columns].T
            dA[:, run.columns] += B[run.rows].T @ G
    return dA.mul_(adapter.scaling).to(adapter.A.dtype), dB.mul_(adapter.scaling).to(adapter.B.dtype)


def contract(G: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(dA, dB) from the weight's gradient G [out, in]; bits write zeros into it."""
    A, B = adapter.A.float(), adapter.B.float()
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    for run in _runs(G.shape, adapter):
        g = G[run.rows] if run.columns is None else G[run.rows][:, run.columns]
        a = A if run.columns is None else A[:, run.columns]
        _keep(g, run.bits)
        g = g.float()
        dB[run.rows] = g @ a.T
        if run.columns is None:
            dA.addmm_(B[run.rows].T, g)
        else:
            dA[:, run.columns] += B[run.rows].T @ g
    return dA.mul_(adapter.scaling).to(adapter.A.dtype), dB.mul_(adapter.scaling).to(adapter.B.dtype)
