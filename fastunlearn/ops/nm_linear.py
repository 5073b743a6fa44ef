"""A linear layer whose weight is a compressed N:M tensor: y = x W^T + b, and the gradient of its values.

One autograd Function, which keeps x, the values and the bits: F.linear(x, w.to_dense()) would keep every layer's dense weight
alive for the backward pass. Few tokens are multiplied by a weight that is never written (a Triton kernel that reads the values); for
many, one layer at a time is expanded into a buffer that all layers share and multiplied by cuBLAS (on a CPU: by BLAS), in the
forward pass and again in the backward pass, where the dense gradient takes the buffer's place before it is gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastunlearn import _backend, _native
from fastunlearn.ops._dense_buffer import dense_buffer
from fastunlearn.ops.nm import _check_memory
from fastunlearn.ops.nm_tensor import NMTensor, _check_tensor, expand_native, gather_native
from fastunlearn.reference import nm_linear as reference

_OP = _backend.register("nm_linear", triton=("cuda",), native=("cpu", "cuda"))
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: GPU, as torch names it -> tokens from which cuSPARSELt, which wants the weight in a form of its own and gets it by expanding and
#: compressing anew, takes less time than expanding and cuBLAS. Only what was measured there belongs here.
CUSPARSELT: dict[str, int] = {}


def _kernels() -> Any:
    from fastunlearn.kernels import nm_linear

    return nm_linear


def _resolve(x: Tensor) -> str:
    without: dict[str, str] = {}
    if x.dtype not in _KERNEL_DTYPES:
        without["triton"] = f"x is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    elif x.is_cuda and _backend._triton_missing() is None:
        from fastunlearn.kernels._common import too_old

        without |= too_old(x.device, "float32 gradients") if x.dtype == torch.float32 else {}
    if x.is_cuda and _backend.current_backend() == "auto" and not without and _native.unusable(x.device) is None:
        most = _kernels().few_tokens(x.device) if _backend._triton_missing() is None else 0
        if x.shape[0] > most:
            without["triton"] = f"{x.shape[0]} tokens; up to {most} the compressed weight is read directly"
    return _backend.resolve(_OP, x.device, without)


def _by_cusparselt(x: Tensor, w: Tensor, n: int, m: int) -> bool:
    """Whether the table sends this product there, and cuSPARSELt takes it: 2:4, 16-bit, sides of multiples of 16."""
    if not CUSPARSELT or (n, m) != (2, 4) or x.dtype.itemsize != 2 or any(s % 16 for s in (*x.shape, *w.shape)):
        return False
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
    return x.shape[0] >= CUSPARSELT.get(name, 1 << 62)


def _forward(
    x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, n: int, m: int, compiled: bool = False
) -> Tensor:
    """x [tokens, cols], row-major -> [tokens, rows]."""
    rows, cols = bits.shape[0], x.shape[1]
    backend = _resolve(x)
    if backend == "reference" or not x.numel() or not values.numel():
        return reference.nm_linear(x, values, bits, bias)
    if backend == "triton":
        return _kernels().multiply(x, values, bits, n, m, bias=None if bias is None else _native.in_memory(bias))
    with dense_buffer((rows, cols), values.dtype, x.device, compiled=compiled) as w:
        expand_native(values, bits, n, m, w)
        if _by_cusparselt(x, w, n, m):
            return torch._cslt_sparse_mm(torch._cslt_compress(w), x.t(), bias=bias, transpose_result=True)
        return F.linear(x, w, bias)


def _backward(
    grad: Tensor, x: Tensor | None, values: Tensor, bits: Tensor, cols: int, n: int, m: int, needs_x: bool,
    compiled: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dvalues) of grad [tokens, rows], row-major; dvalues only where x is given."""
    backend = _resolve(grad)
    if backend == "reference" or not grad.numel() or not values.numel():
        return reference.nm_linear_backward(grad, x, values, bits, cols, n, m, needs_x)
    dx = dvalues = None
    if backend == "triton":
        kernels = _kernels()
        dx = kernels.multiply(grad, values, bits, n, m, cols=cols) if needs_x else None
        return dx, kernels.gradient(grad, x, bits, n, m) if x is not None else None
    with dense_buffer((bits.shape[0], cols), values.dtype, grad.device, compiled=compiled) as w:
        if needs_x:
            dx = grad @ expand_native(values, bits, n, m, w)
        if x is not None:
            dvalues = gather_native(torch.mm(grad.T, x, out=w), bits, n, m)
    return dx, dvalues


@torch.library.custom_op("fastunlearn::nm_linear", mutates_args=())
def _linear_op(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return _forward(_native.in_memory(x), _native.in_memory(values), bits, bias, n, m, compiled=True)


@_linear_op.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return x.new_empty(x.shape[0], bits.shape[0])


@torch.library.custom_op("fastunlearn::nm_linear_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor | None, values: Tensor, bits: Tensor, cols: int, n: int, m: int, needs_x: bool
) -> list[Tensor]:
    x = None if x is None else _native.in_memory(x)
    made = _backward(_native.in_memory(grad), x, _native.in_memory(values), bits, cols, n, m, needs_x, compiled=True)
    # A library op returns tensors: of no entries where there is nothing.
    return [grad.new_empty(0) if t is None else t for t in made]


@_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor | None, values: Tensor, bits: Tensor, cols: int, n: int, m: int, needs_x: bool
) -> list[Tensor]:
    dx = grad.new_empty(grad.shape[0], cols) if needs_x else grad.new_empty(0)
    return [dx, grad.new_empty(0) if x is None else grad.new_empty(values.shape)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bits, _, ctx.n, ctx.m = inputs
    # x is needed for the gradient of the values only, the values for that of x only.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, bits)
    ctx.cols = x.shape[1]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, bits = ctx.saved_tensors
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad[:4]
    dx = dvalues = None
    if needs_x or needs_values:
        where = (bits, ctx.cols, ctx.n, ctx.m, needs_x)
        if _backend.traced(grad, values):
            dx, dvalues = _backward_op(grad, x, values, *where)
        else:
            x = None if x is None else _native.in_memory(x)
            dx, dvalues = _backward(_native.in_memory(grad), x, _native.in_memory(values), *where)
    db = grad.sum(0) if needs_bias else None
    return dx if needs_x else None, dvalues if needs_values else None, None, db, None, None


_linear_op.register_autograd(_gradients, setup_context=_setup)


class _Linear(torch.autograd.Function):
    """What an eager call goes through: no dispatch."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
        return _forward(_native.in_memory(x), _native.in_memory(values), bits, bias, n, m)

    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_gradients))  # type: ignore[assignment]


def nm_linear(x: Tensor, nm_weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a compressed W; what F.linear(x, nm_weight.to_dense(), bias) gives, without keeping a dense W.

    Kept for the backward pass: x (where the values require a gradient), the values, the bits. The gradient of the values is the
    dense weight's, gathered; it has the values' shape and type. Where an expanded weight is multiplied, the same products are done in
    the same order as with a dense weight; where it is read directly, sums run in another order. Under autocast x, values and bias
    are cast as F.linear's arguments are. Not differentiable twice.

    Args:
        x: [..., cols] on the weight's device.
        nm_weight: NMTensor of two dimensions, [rows, cols], of x's type. float32, float16, bfloat16 or
            float64 (which no Triton kernel takes).
        bias: [rows] of x's type, or None.

    Returns:
        [..., rows] of x's type.

    Raises:
        TypeError: x or bias no dense floating tensor, nm_weight no NMTensor. ValueError: shapes, types or devices do not fit.
    """
    _check_tensor("x", x)
    if not isinstance(nm_weight, NMTensor):
        raise TypeError(f"nm_weight: want an NMTensor, got {type(nm_weight).__name__} (ops.nm_compress makes one)")
    values, mask = nm_weight.values, nm_weight.mask
    _check_memory("nm_weight.values", values)
    if len(mask.shape) != 2:
        raise ValueError(f"nm_weight: want one of two dimensions, [rows, cols], got {tuple(mask.shape)}")
    rows, cols = mask.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"x: want [..., {cols}] for a weight of shape {(rows, cols)}, got {tuple(x.shape)}")
    if bias is not None:
        _check_tensor("bias", bias)
        if tuple(bias.shape) != (rows,):
            raise ValueError(f"bias: want shape {(rows,)}, got {tuple(bias.shape)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = x.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for what, tensor in (("nm_weight", values), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(f"{what}: {tensor.dtype}, but x is {x.dtype}; cast one of them ({what}.to(x.dtype))")
        if tensor.device != x.device:
            raise ValueError(f"{what}: on {tensor.device}, but x is on {x.device}; move one of them")
    run = _linear_op if _backend.traced(x, values, mask.bits) else _Linear.apply
    y = run(
        x.reshape(-1, cols) if cols else x.reshape(x.shape[:-1].numel(), 0),
        values,
        mask.bits,
        bias,
        nm_weight.n,
        nm_weight.m,
    )
    return y.view(*x.shape[:-1], rows)
