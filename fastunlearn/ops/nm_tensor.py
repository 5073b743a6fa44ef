"""Compressed N:M tensors: of every m consecutive columns of a row the n survivors side by side, and one bit an entry.

A 2:4 tensor of 16-bit entries takes 9/16 of its bytes: half of them, and a bit for each. Entries are moved, never computed with: a
tensor that is compressed and expanded again is the masked one bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastunlearn import _backend, _native
from fastunlearn.ops.mask import BitMask, _padding_is_zero, rows_cols
from fastunlearn.ops.nm import _check_memory, _check_pattern
from fastunlearn.reference import nm_tensor as reference

_OP = _backend.register("nm_compress", native=("cpu", "cuda"))
#: bytes of the entries that are taken
SIZES = (2, 4, 8)
_NO_ROW = 0x7F7F7F7F7F7F7F7F  # csrc/nm_tensor.h: kNoRow


def gather_native(dense: Tensor, bits: Tensor, n: int, m: int, wrong_row: Tensor | None = None) -> Tensor:
    """dense [rows, cols] in row-major memory -> values. `wrong_row`: int64 scalar for the check of a mask on a GPU."""
    rows, cols = dense.shape
    values = _native.fresh((rows, cols // m * n), dense.dtype, dense.device)
    bits = bits.contiguous()
    where = (dense.data_ptr(), bits.data_ptr(), rows, cols, n, m, dense.element_size(), values.data_ptr())
    if _native.is_cuda(dense.device):
        checked = 0 if wrong_row is None else wrong_row.data_ptr()
        _native.library().nm_gather_cuda(*where, checked, *_native.stream(dense.device))
    else:
        _native.library().nm_gather_cpu(*where)
    return values


def expand_native(values: Tensor, bits: Tensor, n: int, m: int, out: Tensor) -> Tensor:
    """values -> out [rows, cols], every entry written."""
    values, bits = values.contiguous(), bits.contiguous()
    where = (values.data_ptr(), bits.data_ptr(), *out.shape, n, m, out.element_size(), out.data_ptr())
    if _native.is_cuda(out.device):
        _native.library().nm_expand_cuda(*where, *_native.stream(out.device))
    else:
        _native.library().nm_expand_cpu(*where)
    return out


def _refuse(row: int, what: str, n: int, m: int) -> ValueError:
    return ValueError(
        f"{what}: row {row} is the first with a group of {m} columns that has not {n} set bits; want an {n}:{m} mask "
        f"(ops.nm_mask(scores, {n}, {m}) makes one)"
    )


def check_mask(bits: Tensor, cols: int, n: int, m: int, what: str) -> None:
    """Refuses bits that are no n:m mask of `cols` columns. Synchronises with the device.

    Raises:
        ValueError: naming the first wrong row.
    """
    row: int | None
    # No call of the op: a mask is looked at whatever backend was asked for.
    native = _backend.current_backend() != "reference"
    if bits.device.type == "cpu" and native and _native.unusable(bits.device) is None:
        bits = bits.contiguous()
        row = _native.library().nm_first_wrong_row_cpu(bits.data_ptr(), bits.shape[0], cols, n, m)
        row = None if row == _NO_ROW else row
    else:
        row = reference.first_wrong_row(bits, cols, n, m) if bits.numel() else None
    if row is not None:
        raise _refuse(row, what, n, m)


def _gather(dense: Tensor, bits: Tensor, n: int, m: int, check: bool) -> Tensor:
    """`check`: refuses a mask that is not n:m (and waits for the device to know)."""
    if _backend.resolve(_OP, dense.device) == "reference":
        if check and (row := reference.first_wrong_row(bits, dense.shape[1], n, m)) is not None:
            raise _refuse(row, "mask", n, m)
        return reference.nm_gather(dense, bits, n, m)
    dense = _native.in_memory(dense)
    if not check:
        return gather_native(dense, bits, n, m)
    if not _native.is_cuda(dense.device):
        check_mask(bits, dense.shape[1], n, m, "mask")
        return gather_native(dense, bits, n, m)
    found = torch.full((), _NO_ROW, dtype=torch.int64, device=dense.device)
    values = gather_native(dense, bits, n, m, found)
    if (at := int(found)) != _NO_ROW:
        raise _refuse(at, "mask", n, m)
    return values


def _expand(values: Tensor, bits: Tensor, cols: int, n: int, m: int) -> Tensor:
    if _backend.resolve(_OP, values.device) == "reference":
        return reference.nm_expand(values, bits, cols)
    out = _native.fresh((bits.shape[0], cols), values.dtype, values.device)
    return expand_native(_native.in_memory(values), bits, n, m, out)


@torch.library.custom_op("fastunlearn::nm_gather", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _gather_op(dense: Tensor, bits: Tensor, n: int, m: int, check: bool) -> Tensor:
    return _gather(dense, bits, n, m, check)


@_gather_op.register_fake
def _(dense: Tensor, bits: Tensor, n: int, m: int, check: bool) -> Tensor:
    return dense.new_empty(dense.shape[0], dense.shape[1] // m * n)


@torch.library.custom_op("fastunlearn::nm_expand", mutates_args=())
def _expand_op(values: Tensor, bits: Tensor, cols: int, n: int, m: int) -> Tensor:
    return _expand(values, bits, cols, n, m)


@_expand_op.register_fake
def _(values: Tensor, bits: Tensor, cols: int, n: int, m: int) -> Tensor:
    return values.new_empty(values.shape[0], cols)


def gathered(dense: Tensor, bits: Tensor, n: int, m: int, check: bool = False) -> Tensor:
    """values of dense [rows, cols], outside of autograd."""
    dense = dense.detach()
    return (_gather_op if _backend.traced(dense, bits) else _gather)(dense, bits, n, m, check)


def _expand_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bits, _, ctx.n, ctx.m = inputs
    ctx.save_for_backward(bits)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return gathered(grad, ctx.saved_tensors[0], ctx.n, ctx.m), None, None, None, None


_expand_op.register_autograd(_expand_backward, setup_context=_expand_setup)


class _Expand(torch.autograd.Function):
    """What an eager call goes through: no dispatch."""

    @staticmethod
    def forward(values: Tensor, bits: Tensor, cols: int, n: int, m: int) -> Tensor:
        return _expand(values, bits, cols, n, m)

    setup_context = staticmethod(_expand_setup)
    backward = staticmethod(once_differentiable(_expand_backward))  # type: ignore[assignment]


class NMTensor:
    """A tensor of which an n:m mask says what is stored; the rest is 0.

    Attributes:
        values: floating [rows, cols / m * n]: each row's survivors, columns in order. May require a gradient.
        mask: BitMask of the dense shape.
        n, m: the pattern: n of m consecutive columns are stored.

    Example:
        >>> weight = fastunlearn.ops.nm_compress(layer.weight, mask, 2, 4)
        >>> weight.values.requires_grad_()
        >>> y = fastunlearn.ops.nm_linear(x, weight, layer.bias)
    """

    __slots__ = ("m", "mask", "n", "values")

    values: Tensor
    mask: BitMask
    n: int
    m: int

    def __init__(self, values: Tensor, mask: BitMask, n: int, m: int, *, check: bool = True):
        """Wraps values and a mask (no copy).

        Args:
            check: look at every bit of the mask, and so wait for the device. False where it is known to be n:m, as in a layer
                that wraps its values and bits at every step.

        Raises:
            TypeError: values are no floating tensor, the mask is no BitMask, n or m no int. ValueError: they do not fit one
            another, are on different devices, or the mask is not n:m (the message names the first wrong row).
        """
        _check_tensor("values", values)
        if not isinstance(mask, BitMask):
            raise TypeError(f"mask: want a BitMask, got {type(mask).__name__} (BitMask.pack(tensor))")
        _check_pattern(n, m, mask.cols, "mask")
        want = (mask.rows, mask.cols // m * n)
        if tuple(values.shape) != want:
            raise ValueError(
                f"values: {n}:{m} of shape {tuple(mask.shape)} has values of shape {want}, got {tuple(values.shape)}"
            )
        if values.device != mask.device:
            raise ValueError(f"mask: on {mask.device}, but values are on {values.device}; move one of them")
        if check and not _backend.traced(values, mask.bits) and values.device.type != "meta":
            check_mask(mask.bits, mask.cols, n, m, "mask")
        self.values, self.mask, self.n, self.m = values, mask, n, m

    @classmethod
    def _of(cls, values: Tensor, mask: BitMask, n: int, m: int) -> NMTensor:
        """Wraps what is known to fit, without a check."""
        tensor = cls.__new__(cls)
        tensor.values, tensor.mask, tensor.n, tensor.m = values, mask, n, m
        return tensor

    @property
    def shape(self) -> torch.Size:
        """The dense shape."""
        return self.mask.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    @property
    def nbytes(self) -> int:
        """Bytes of values and bits together."""
        return self.values.nbytes + self.mask.bits.nbytes

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> NMTensor:
        """On another device or of another type; as `torch.Tensor.to`, a type may come first. Differentiable."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        values = self.values.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return NMTensor._of(values, self.mask.to(values.device, non_blocking), self.n, self.m)

    def detach(self) -> NMTensor:
        """The same memory, without a gradient."""
        return NMTensor._of(self.values.detach(), self.mask, self.n, self.m)

    def clone(self) -> NMTensor:
        """A copy of values and bits; differentiable in the values."""
        return NMTensor._of(self.values.clone(), self.mask.clone(), self.n, self.m)

    def to_dense(self) -> Tensor:
        """The tensor of `shape`, 0 where nothing is stored. Differentiable: the values get the dense gradient, gathered."""
        values, bits, cols = self.values, self.mask.bits, self.mask.cols
        run = _expand_op if _backend.traced(values, bits) else _Expand.apply
        return run(values, bits, cols, self.n, self.m).view(self.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """A dense tensor's entries where this one stores something: a dense gradient -> the gradient of the values.

        Args:
            dense: floating tensor of `shape` on this device, of any floating type.

        Returns:
            [rows, cols / m * n] of dense.dtype, outside of autograd.

        Raises:
            TypeError: not a dense floating tensor, a DTensor. ValueError: of another shape or device.
        """
        _check_tensor("dense", dense)
        _check_same("dense", dense, self.mask)
        return gathered(dense.reshape(rows_cols(self.shape)), self.mask.bits, self.n, self.m)

    def state(self, name: str = "weight") -> dict[str, Tensor]:
        """Two tensors for a safetensors file, {name}.values and {name}.bits; `metadata` says the rest."""
        return {f"{name}.values": self.values.detach().contiguous(), f"{name}.bits": self.mask.bits.contiguous()}

    def metadata(self) -> str:
        """Shape and pattern as JSON: a string for the metadata of that file."""
        return json.dumps({"shape": list(self.shape), "n": self.n, "m": self.m})

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], metadata: str, name: str = "weight") -> NMTensor:
        """What `state(name)` and `metadata()` were made of (no copy).

        Raises:
            ValueError: a tensor is missing, metadata are damaged, they do not fit one another, the mask is not n:m.
        """
        try:
            said = json.loads(metadata)
            shape, n, m = [int(size) for size in said["shape"]], said["n"], said["m"]
        except (KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(f"metadata: want what NMTensor.metadata() gives, got {metadata!r} ({error!r})") from error
        for part in ("values", "bits"):
            if f"{name}.{part}" not in tensors:
                raise ValueError(f"tensors: no {name}.{part}; there are: {', '.join(sorted(tensors)) or 'none'}")
        mask = BitMask(tensors[f"{name}.bits"], shape)
        if not _padding_is_zero(mask):
            raise ValueError(f"tensors: {name}.bits has bits set behind its {mask.cols} columns")
        return cls(tensors[f"{name}.values"], mask, n, m)

    def __repr__(self) -> str:
        return f"NMTensor(shape={tuple(self.shape)}, {self.n}:{self.m}, dtype={self.dtype}, device={self.device})"


def _check_tensor(what: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what}: want a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{what}: want a floating tensor, got {tensor.dtype} ({what}.float() converts)")
    if tensor.dtype.itemsize not in SIZES:
        raise TypeError(f"{what}: want float64, float32, float16 or bfloat16, got {tensor.dtype}")
    _check_memory(what, tensor)


def _check_same(what: str, tensor: Tensor, mask: BitMask) -> None:
    if tensor.shape != mask.shape:
        raise ValueError(f"{what}: shape {tuple(tensor.shape)}, but the mask is of shape {tuple(mask.shape)}")
    if tensor.device != mask.device:
        raise ValueError(f"{what}: on {tensor.device}, but the mask is on {mask.device}; move one of them")


def nm_compress(weight: Tensor, mask: BitMask, n: int, m: int) -> NMTensor:
    """Stores the survivors of an n:m mask: n values a group of m consecutive columns, and a bit an entry.

    Looks at the whole mask, and so waits for the device. What lies off the mask is dropped, whether it is 0 or not.

    Args:
        weight: floating [rows, cols]; of more dimensions: shape[0] rows, the others flattened; of one: one row. float64,
            float32, float16 or bfloat16.
        mask: BitMask of weight.shape with exactly n bits in every group.
        n: values kept of a group, 0 <= n <= m.
        m: columns of a group, 1 to 64; must divide the number of columns.

    Returns:
        NMTensor(values [rows, cols / m * n], mask); the values are new memory outside of autograd, the mask is not copied.

    Raises:
        TypeError: weight is no dense tensor of these types, or a DTensor; mask is no BitMask; n or m no int. ValueError: n or m out of
        range, m does not divide the columns, weight and mask differ in shape or device, weight is on meta (outside of tracing), a group of the mask has not n bits
        (the message names the first such row).

    Example:
        >>> mask = fastunlearn.ops.nm_mask(layer.weight.detach().abs(), 2, 4)
        >>> weight = fastunlearn.ops.nm_compress(layer.weight, mask, 2, 4)
        >>> weight.to_dense()  # layer.weight where the mask is set, 0 elsewhere
    """
    _check_tensor("weight", weight)
    if not isinstance(mask, BitMask):
        raise TypeError(f"mask: want a BitMask, got {type(mask).__name__} (BitMask.pack(tensor))")
    rows, cols = rows_cols(weight.shape)
    _check_pattern(n, m, cols, "weight")
    _check_same("weight", weight, mask)
    if weight.is_meta and not _backend.traced(weight):
        raise ValueError("weight: on meta, which holds no values; want a weight on a device")
    return NMTensor._of(gathered(weight.reshape(rows, cols), mask.bits, n, m, check=True), mask, n, m)
