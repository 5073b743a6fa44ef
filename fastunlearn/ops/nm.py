"""N:M sparsity: of every m consecutive input columns of a row, n are kept.

The pattern is that of sparse tensor cores (2:4) and of its wider relatives (4:8, 8:16): "input columns" are the second
dimension of a linear layer's weight [out, in]; a convolution's are its shape[1:] in row-major order.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.ops.mask import BitMask, rows_cols
from fastunlearn.reference import mask as reference_mask
from fastunlearn.reference import nm as reference

_MASK = _backend.register("nm_mask", native=("cpu", "cuda"))
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_GROUP = 64  # csrc/nm.h: kMaxGroup


def _check_pattern(n: int, m: int, cols: int, what: str) -> None:
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: want an int, got {type(value).__name__}")
    if not 1 <= m <= MAX_GROUP:
        raise ValueError(f"m: want a group of 1 to {MAX_GROUP} columns, got {m}")
    if not 0 <= n <= m:
        raise ValueError(f"n: want 0 <= n <= m = {m} kept columns a group, got {n}")
    if cols % m:
        raise ValueError(
            f"{what}: {cols} columns are no multiple of m = {m}; leave this tensor out of the {n}:{m} pattern, choose an m "
            f"that divides {cols}, or pad the columns to {-(-cols // m) * m}"
        )


def _warn_nan(n: int, m: int) -> None:
    warnings.warn(
        f"nm_mask: scores hold NaN; a NaN ranks below every number, and still exactly {n} of {m} are kept",
        RuntimeWarning,
        stacklevel=3,
    )


def _may_synchronise(device: torch.device) -> bool:
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _nm_bits(scores: Tensor, n: int, m: int) -> Tensor:
    """[rows, cols] -> bits [rows, ceil(cols / 8)]."""
    rows, cols = scores.shape
    unsupported = {}
    if scores.dtype not in _NATIVE_DTYPES:
        unsupported["native"] = f"scores are {scores.dtype}; native code takes float32, float16 and bfloat16"
    backend = _backend.resolve(_MASK, scores.device, unsupported)
    if n == 0 or n == m or scores.numel() == 0:
        return (BitMask.ones if n == m else BitMask.zeros)((rows, cols), scores.device).bits
    if backend == "reference":
        if _may_synchronise(scores.device) and bool(scores.isnan().any()):
            _warn_nan(n, m)
        return reference_mask.mask_pack(reference.nm_mask(scores, n, m))
    scores = scores.contiguous()
    bits = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8, device=scores.device)
    args = (scores.data_ptr(), _native.DTYPES[scores.dtype], rows, cols, n, m, bits.data_ptr())
    if _native.is_cuda(scores.device):
        seen = torch.zeros((), dtype=torch.int32, device=scores.device)
        _native.library().nm_mask_cuda(*args, seen.data_ptr(), *_native.stream(scores.device))
        nan = _may_synchronise(scores.device) and bool(seen)
    else:
        nan = _native.library().nm_mask_cpu(*args)
    if nan:
        _warn_nan(n, m)
    return bits


@torch.library.custom_op("fastunlearn::nm_mask", mutates_args=())
def _nm_mask_op(scores: Tensor, n: int, m: int) -> Tensor:
    return _nm_bits(scores, n, m)


@_nm_mask_op.register_fake
def _(scores: Tensor, n: int, m: int) -> Tensor:
    return scores.new_empty(scores.shape[0], (scores.shape[1] + 7) // 8, dtype=torch.uint8)


def nm_mask(scores: Tensor, n: int, m: int) -> BitMask:
    """Keeps the n highest scores of every m consecutive columns of a row.

    Scores are compared as they are, signs included: pass `weight.abs()` for a magnitude pattern, |W| * norm for Wanda's.
    -0.0 equals 0.0; ties keep the lowest column; NaN ranks below every number, -inf included (still exactly n a group are
    kept, and a `RuntimeWarning` says so). To see a NaN, a call on a GPU waits for the device, unless a CUDA graph is being
    captured; with n = 0 or n = m nothing is compared and nothing is warned of.

    Args:
        scores: floating [rows, cols]; of more dimensions: shape[0] rows, the others flattened; of one dimension: one row.
            float32, float16 and bfloat16 are native, other floating types run as plain PyTorch.
        n: columns kept in a group, 0 <= n <= m.
        m: columns of a group, 1 to 64; must divide the number of columns.

    Returns:
        BitMask of scores.shape on the scores' device.

    Raises:
        TypeError: scores are no floating tensor, n or m no int. ValueError: n or m out of range, or m does not divide the
        columns.

    Example:
        >>> mask = fastunlearn.ops.nm_mask(layer.weight.detach().abs(), 2, 4)
        >>> layer.weight.data.mul_(mask.unpack())
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: want a tensor, got {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"scores: want a floating tensor, got {scores.dtype} (scores.float() converts)")
    rows, cols = rows_cols(scores.shape)
    _check_pattern(n, m, cols, "scores")
    flat = scores.detach().reshape(rows, cols)
    return BitMask(_nm_mask_op(flat, n, m) if _backend.traced(flat) else _nm_bits(flat, n, m), scores.shape)
