"""The gradient of a weight on chosen square tiles only: dW = dY^T X sampled by a block mask, of linear layers and convolutions.

The maths: fastunlearn/reference/block_weight_grad.py. What a mask of weights leaves of a backward pass is all of it: only where whole
tiles stay may their products be left out. On a GPU a Triton kernel takes a list of tiles (few of them are split over tokens); on a CPU
a C++ product packs what tiles of a column share. From some density on the dense product is faster, and its tiles are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastunlearn import _backend, _native
from fastunlearn.ops._exact import exactly
from fastunlearn.reference import block_weight_grad as reference

_LINEAR = _backend.register("block_weight_grad", native=("cpu",), triton=("cuda",))
_CONV = _backend.register("conv2d_block_weight_grad", native=("cpu",), triton=("cuda",))
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("dense", "tiles")
#: Density from which a CPU's BLAS makes the whole product faster than the tiles (measured: benchmarks/ops/block_weight_grad.py).
_DENSE_FROM_LINEAR = 0.8
_DENSE_FROM_CONV = 0.8


class Convolution(NamedTuple):
    """How a convolution slides: two numbers each, and its groups."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def flat(self) -> list[int]:
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def of(cls, flat: list[int]) -> Convolution:
        kernel, stride, padding, dilation = ((flat[i], flat[i + 1]) for i in range(0, 8, 2))
        return cls(kernel, stride, padding, dilation, flat[8])


class _Plan(NamedTuple):
    """Where the set tiles are.

    Attributes:
        places: int32 [n, 2] on the mask's device, row-major: block row, block column.
        by_column: int64 [n, 3] on the CPU, sorted by column: block row, block column, number in row-major order.
        density: share of the tiles that are set.
    """

    places: Tensor
    by_column: Tensor
    density: float


# A mask stays the same over thousands of steps; to find its tiles anew would wait for the GPU in each.
_plans: Any = WeakIdKeyDictionary()


def _plan(mask: Tensor) -> _Plan:
    version = None if mask.is_inference() else mask._version
    known = _plans.get(mask)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    places = mask.nonzero()
    order = places[:, 1].argsort(stable=True)
    by_column = torch.cat([places, torch.arange(len(places), device=mask.device)[:, None]], 1)[order]
    plan = _Plan(places.int().contiguous(), by_column.cpu().contiguous(), len(places) / max(mask.numel(), 1))
    _plans[mask] = (version, plan)
    return plan


def _kernels() -> Any:
    from fastunlearn.kernels import block_weight_grad

    return block_weight_grad


def _unsupported(x: Tensor, block: int) -> dict[str, str]:
    out = {}
    if x.dtype not in _KERNEL_DTYPES:
        why = f"x is {x.dtype}; kernels take float32, float16 and bfloat16"
        return {"native": why, "triton": why}
    if block not in (64, 128):
        out["triton"] = f"block {block}; the kernel takes 64 and 128"
    return out


def _sides(grad: Tensor, x: Tensor, conv: Convolution | None) -> tuple[int, int]:
    if conv is None:
        return grad.shape[1], x.shape[1]
    return grad.shape[1], x.shape[1] // conv.groups * conv.kernel[0] * conv.kernel[1]


def _dense(grad: Tensor, x: Tensor, conv: Convolution | None) -> Tensor:
    """The whole gradient [rows, cols]."""
    if conv is None:
        return grad.T @ x
    rows, cols = _sides(grad, x, conv)
    shape = x.new_empty(1).expand(rows, x.shape[1] // conv.groups, *conv.kernel)
    made = torch.ops.aten.convolution_backward(
        grad, x, shape, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, [False, True, False]
    )[1]
    return made.reshape(rows, cols)


def _keep_tiles(dense: Tensor, mask: Tensor, block: int, out: Tensor | None, packed: bool) -> Tensor:
    """Of a whole gradient what the mask leaves; without `out` in its own memory."""
    if packed:
        # By a list: to index by the mask waits for the GPU.
        tiles = reference.tiled(dense, block)[tuple(_plan(mask).places.T)]
        return tiles if out is None else out.copy_(tiles)
    rows, cols = dense.shape
    if out is not None:
        return torch.where(reference.spread(mask, block, rows, cols), dense, out, out=out)
    if rows % block == 0 and cols % block == 0:
        dense.view(rows // block, block, cols // block, block).masked_fill_(~mask[:, None, :, None], 0)
        return dense
    return dense.masked_fill_(~reference.spread(mask, block, rows, cols), 0)


def _by_definition(grad: Tensor, x: Tensor, mask: Tensor, block: int, conv: Convolution | None) -> Tensor:
    if conv is None:
        return reference.block_weight_grad(grad, x, mask, block)
    if conv.groups > 1:
        return _keep_tiles(_dense(grad, x, conv), mask, block, None, False)
    flat = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    unfolded = reference.patches(x, conv.kernel, conv.stride, conv.padding, conv.dilation)
    return reference.block_weight_grad(flat, unfolded, mask, block)


@exactly
def _write(
    grad: Tensor, x: Tensor, mask: Tensor, block: int, conv: Convolution | None, out: Tensor | None, packed: bool
) -> Tensor:
    """Fills `out`, or makes it: dense [rows, cols], or packed [n, block, block].

    Raises:
        ValueError: packed, and `out` is for another number of tiles.
    """
    if packed and out is not None:
        _check_tiles(out, mask, block)
    op = _LINEAR if conv is None else _CONV
    backend = _backend.resolve(op, x.device, _unsupported(x, block))
    rows, cols = _sides(grad, x, conv)
    if backend == "reference" or not grad.numel() or not x.numel():
        dense = _by_definition(grad, x, mask, block, conv)
        return dense if out is None and not packed else _keep_tiles(dense, mask, block, out, packed)
    plan = _plan(mask)
    if backend == "native":
        from_here = _DENSE_FROM_LINEAR if conv is None else _DENSE_FROM_CONV
    else:
        from_here = _kernels().dense_from(x.device, conv is not None)
    if plan.density >= from_here or (conv is not None and conv.groups > 1):
        dense = _dense(grad, x, conv)
        if plan.density == 1 and out is None and not packed:
            return dense
        return _keep_tiles(dense, mask, block, out, packed)
    n = plan.places.shape[0]
    if out is None:
        out = x.new_empty(n, block, block) if packed else x.new_zeros(rows, cols)
    if not n:
        return out
    if backend == "triton":
        if conv is None:
            grad, x = (t if t.stride(1) == 1 and not t.is_neg() else _native.in_memory(t) for t in (grad, x))
            geometry = None
        else:
            grad, x = grad.resolve_neg(), x.resolve_neg()
            geometry = tuple(conv.flat[:8])
        _kernels().tiles(grad, x, plan.places, block, out, packed, geometry)
        return out
    grad, x = _native.in_memory(grad), _native.in_memory(x)
    if conv is None:
        layer = [x.shape[0], rows, cols, *[0] * 13]
    else:
        images, channels, height, width = x.shape
        places = grad.shape[2] * grad.shape[3]
        layer = [images * places, rows, cols, channels, height, width, *grad.shape[2:], *conv.flat[:8]]
    _native.library().block_weight_grad_cpu(
        grad.data_ptr(), x.data_ptr(), _native.DTYPES[x.dtype], layer, plan.by_column.data_ptr(), n, block,
        out.data_ptr(), packed,
    )  # fmt: skip
    return out


# As torch.library ops: what torch.compile sees. `conv`: Convolution.flat, or empty for a linear layer.
@torch.library.custom_op("fastunlearn::block_weight_grad", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _op(grad: Tensor, x: Tensor, block_mask: Tensor, block: int, conv: list[int], packed: bool) -> Tensor:
    made = _write(grad, x, block_mask, block, Convolution.of(conv) if conv else None, None, packed)
    return made.clone() if made.data_ptr() in (grad.data_ptr(), x.data_ptr()) and made.numel() else made


@_op.register_fake
def _(grad: Tensor, x: Tensor, block_mask: Tensor, block: int, conv: list[int], packed: bool) -> Tensor:
    if packed:
        return x.new_empty(torch.library.get_ctx().new_dynamic_size(), block, block)
    return x.new_empty(_sides(grad, x, Convolution.of(conv) if conv else None))


@torch.library.custom_op("fastunlearn::block_weight_grad_", mutates_args=("out",), tags=_backend.NOT_CAPTURED)
def _op_(grad: Tensor, x: Tensor, block_mask: Tensor, block: int, conv: list[int], packed: bool, out: Tensor) -> None:
    _write(grad, x, block_mask, block, Convolution.of(conv) if conv else None, out, packed)


@_op_.register_fake
def _(grad: Tensor, x: Tensor, block_mask: Tensor, block: int, conv: list[int], packed: bool, out: Tensor) -> None:
    return None


# ---- checks -------------------------------------------------------------------------------------------------------------------


def _check_inputs(grad_out: Any, x: Any) -> None:
    for name, tensor in (("grad_out", grad_out), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: want a tensor, got {type(tensor).__name__}")
        # The compiler lets nobody ask for a layout inside a backward pass.
        if not tensor.is_floating_point() or (not torch.compiler.is_compiling() and tensor.layout != torch.strided):
            raise TypeError(f"{name}: want a dense floating tensor, got {tensor.dtype}")
    if grad_out.dtype != x.dtype:
        raise ValueError(f"grad_out: {grad_out.dtype}, but x is {x.dtype}; cast one of them (grad_out.to(x.dtype))")
    if grad_out.device != x.device:
        raise ValueError(f"grad_out: on {grad_out.device}, but x is on {x.device}; move one of them")


def _check_mask(block_mask: Any, block: Any, rows: int, cols: int, device: torch.device) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block: want a whole number of at least 1, got {block!r}")
    if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool:
        what = block_mask.dtype if isinstance(block_mask, Tensor) else type(block_mask).__name__
        raise TypeError(f"block_mask: want a torch.bool tensor, got {what}")
    want = (-(-rows // block), -(-cols // block))
    if tuple(block_mask.shape) != want:
        raise ValueError(
            f"block_mask: a weight of shape {(rows, cols)} has {want} tiles of {block}, got {tuple(block_mask.shape)}"
        )
    if block_mask.device != device:
        raise ValueError(f"block_mask: on {block_mask.device}, but x is on {device}; move it there")


def _check_tiles(out: Tensor, mask: Tensor, block: int) -> None:
    """Known from the second call on without waiting for the GPU."""
    want = (len(_plan(mask).places), block, block)
    if tuple(out.shape) != want:
        raise ValueError(f"out: want shape {want}, got {tuple(out.shape)}")


def _run(
    grad: Tensor, x: Tensor, mask: Tensor, block: int, conv: Convolution | None, out: Any, layout: str, shape: tuple[int, ...]
) -> Tensor:  # fmt: skip
    """`shape`: of the weight, as its layer has it."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: want dense or tiles, got {layout!r}")
    rows, cols = _sides(grad, x, conv)
    packed = layout == "tiles"
    if out is not None:
        if not isinstance(out, Tensor) or out.dtype != x.dtype or out.device != x.device:
            what = f"{out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"out: want a tensor of {x.dtype} on {x.device}, got {what}")
        if not packed and tuple(out.shape) not in ((rows, cols), shape):
            raise ValueError(f"out: want shape {(rows, cols)}, got {tuple(out.shape)}")
        # Dynamo does not trace is_neg; what it calls resolves such views.
        if not out.is_contiguous() or (not torch.compiler.is_dynamo_compiling() and out.is_neg()):
            raise ValueError("out: want row-major memory; out.contiguous() makes it")
    grad, x = grad.detach(), x.detach()
    flat = conv.flat if conv is not None else []
    with torch.no_grad():
        if out is None:
            if _backend.traced(grad, x, mask):
                return _op(grad, x, mask, block, flat, packed)
            return _write(grad, x, mask, block, conv, None, packed)
        target = out.detach() if packed else out.detach().view(rows, cols)
        if _backend.traced(grad, x, mask, target):
            _op_(grad, x, mask, block, flat, packed, target)
        else:
            _write(grad, x, mask, block, conv, target, packed)
    return out


def block_weight_grad(
    grad_out: Tensor,
    x: Tensor,
    block_mask: Tensor,
    block: int = 128,
    *,
    out: Tensor | None = None,
    layout: str = "dense",
) -> Tensor:
    """dW = grad_out^T x of a linear layer, on the tiles of a mask only; not differentiable.

    The set tiles of a mask are found once, and again when the mask has been written to: finding them waits for the GPU.

    Args:
        grad_out: [..., rows], gradient of the layer's output; float32, float16 or bfloat16 (float64 as plain PyTorch).
        x: [..., cols], the layer's input, of the same leading sizes, type and device. Sums are fp32.
        block_mask: bool [ceil(rows / block), ceil(cols / block)]: tiles that are wanted.
        block: side of a tile; Triton takes 64 and 128, all else any.
        out: written instead of a new tensor; then nothing is zero-filled: dense, entries off the mask stay as they are (a buffer
            that was zero stays so for as long as the mask is the same).
        layout: "dense": [rows, cols], zero off the mask; "tiles": [set tiles, block, block] in row-major order of the tiles,
            zero where a tile hangs over the weight's edge.

    Returns:
        The gradient, in x's type; `out` where it was given.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_inputs(grad_out, x)
    if not grad_out.dim() or not x.dim() or grad_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"grad_out: want [..., rows] with x's leading sizes {tuple(x.shape[:-1])}, got {tuple(grad_out.shape)}"
        )
    rows, cols = grad_out.shape[-1], x.shape[-1]
    _check_mask(block_mask, block, rows, cols, x.device)
    tokens = x.shape[:-1].numel()
    return _run(
        grad_out.reshape(tokens, rows), x.reshape(tokens, cols), block_mask, block, None, out, layout, (rows, cols)
    )


def _two(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}: want one or two whole numbers of at least {least}, got {value!r}")
    return (pair[0], pair[1])


def conv2d_block_weight_grad(
    grad_out: Tensor,
    x: Tensor,
    block_mask: Tensor,
    kernel_size: int | tuple[int, int],
    block: int = 128,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    out: Tensor | None = None,
    layout: str = "dense",
) -> Tensor:
    """As `block_weight_grad`, of a convolution whose weight is tiled as the matrix [out, in / groups * kh * kw].

    Args:
        grad_out: [n, out, oh, ow]. x: [n, in, h, w].
        block_mask: bool [ceil(out / block), ceil(in / groups * kh * kw / block)].
        kernel_size, stride, padding, dilation, groups: as torch.nn.functional.conv2d; padding in pixels. With several groups the
            whole gradient is made and its tiles are kept.
        out: of shape [out, in / groups * kh * kw] or the weight's own.

    Returns:
        [out, in / groups * kh * kw] or [set tiles, block, block].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_inputs(grad_out, x)
    for name, tensor in (("grad_out", grad_out), ("x", x)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: want four dimensions [n, channels, height, width], got {tuple(tensor.shape)}")
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups or grad_out.shape[1] % groups:
        raise ValueError(f"groups: want a divisor of {x.shape[1]} and {grad_out.shape[1]} channels, got {groups!r}")
    conv = Convolution(
        _two("kernel_size", kernel_size, 1), _two("stride", stride, 1), _two("padding", padding, 0),
        _two("dilation", dilation, 1), groups,
    )  # fmt: skip
    size = [
        (x.shape[2 + i] + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel[i] - 1) - 1) // conv.stride[i] + 1
        for i in (0, 1)
    ]
    if list(grad_out.shape) != [x.shape[0], grad_out.shape[1], *size]:
        raise ValueError(
            f"grad_out: this convolution of x {tuple(x.shape)} gives [{x.shape[0]}, out, {size[0]}, {size[1]}], "
            f"got {tuple(grad_out.shape)}"
        )
    rows, cols = _sides(grad_out, x, conv)
    _check_mask(block_mask, block, rows, cols, x.device)
    shape = (rows, x.shape[1] // groups, *conv.kernel)
    return _run(grad_out, x, block_mask, block, conv, out, layout, shape)
