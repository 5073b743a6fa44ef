"""N:M sparsity: of every m consecutive input columns of a row, n are kept.

The pattern is that of sparse tensor cores (2:4) and of its wider relatives (4:8, 8:16): "input columns" are the second
dimension of a linear layer's weight [out, in]; a convolution's are its shape[1:] in row-major order.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import overload

import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.ops._later import check_nan as check_nan
from fastunlearn.ops._later import say_later
from fastunlearn.ops.mask import BitMask, rows_cols
from fastunlearn.ops.topk import empty_bits, integers
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


def _nan_words(n: int, m: int) -> str:
    return f"nm_mask: scores hold NaN; a NaN ranks below every number, and still exactly {n} of {m} are kept"


def _warn_nan(n: int, m: int) -> None:
    warnings.warn(_nan_words(n, m), RuntimeWarning, stacklevel=3)


def _check_memory(what: str, scores: Tensor) -> None:
    """Refuses what has no memory of its own that a kernel could read."""
    if hasattr(scores, "to_local"):
        raise TypeError(
            f"{what}: want a plain tensor, got a DTensor; pass {what}.to_local() where whole rows are sharded (Shard(0)), else "
            f"{what}.full_tensor()"
        )
    if scores.layout != torch.strided:
        raise TypeError(f"{what}: want a dense tensor, got {scores.layout} ({what}.to_dense() converts)")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _nm_bits(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """Each [rows, cols] -> bits [rows, ceil(cols / 8)], all in one allocation. All on one device, at least one tensor."""
    device = scores[0].device
    unsupported = {}
    wide = next((t.dtype for t in scores if t.dtype not in _NATIVE_DTYPES), None)
    if wide is not None:
        unsupported["native"] = f"scores are {wide}; native code takes float32, float16 and bfloat16"
    backend = _backend.resolve(_MASK, device, unsupported)
    if n == 0 or n == m:
        return [(BitMask.ones if n == m else BitMask.zeros)(t.shape, device).bits for t in scores]
    if backend == "reference":
        if not _capturing(device) and any(bool(t.isnan().any()) for t in scores):
            _warn_nan(n, m)
        return [reference_mask.mask_pack(reference.nm_mask(t, n, m)) for t in scores]
    scores = [_native.in_memory(t) for t in scores]
    bits = empty_bits([(t.shape[0], t.shape[1]) for t in scores], device)
    if _native.is_cuda(device):
        _nm_cuda(scores, bits, n, m)
    else:
        table = integers(chain.from_iterable(_item(t, b, 0) for t, b in zip(scores, bits)))
        if _native.library().nm_mask_cpu(table.data_ptr(), len(scores), n, m):
            _warn_nan(n, m)
    return bits


def _item(scores: Tensor, bits: Tensor, first: int) -> tuple[int, ...]:
    """csrc/nm.h: NmItem."""
    rows, cols = scores.shape
    return scores.data_ptr(), bits.data_ptr(), rows, cols, _native.DTYPES[scores.dtype], first


def _nm_cuda(scores: Sequence[Tensor], bits: Sequence[Tensor], n: int, m: int) -> None:
    """One launch for each element type; nothing waits for the device."""
    library, device = _native.library(), scores[0].device
    if len(scores) > 1 and _capturing(device):
        raise RuntimeError(
            "nm_mask: called with several tensors while a CUDA graph is captured; their table is uploaded anew by every call and "
            "would be stale when the graph is replayed. Call it outside the graph, or with one tensor at a time"
        )
    seen = torch.zeros((), dtype=torch.int32, device=device)
    per_tile = library.nm_tile_bytes()
    for dtype in dict.fromkeys(t.dtype for t in scores):
        rows: list[int] = []
        tiles = count = 0
        for t, b in zip(scores, bits):
            if t.dtype == dtype and t.numel():
                rows += _item(t, b, tiles)
                tiles += -(-b.numel() // per_tile)
                count += 1
        host = integers(rows)
        items, one = 0, host.data_ptr()
        if count > 1:
            table = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
            items, one = table.data_ptr(), 0
        code = _native.DTYPES[dtype]
        library.nm_mask_cuda(items, one, count, tiles, code, n, m, seen.data_ptr(), *_native.stream(device))
    if not seen.is_cuda:
        if bool(seen):
            _warn_nan(n, m)
    elif not _capturing(device):
        say_later(seen, lambda found: [_nan_words(n, m)] if bool(found) else [], RuntimeWarning)


@torch.library.custom_op("fastunlearn::nm_mask", mutates_args=())
def _nm_mask_op(scores: Tensor, n: int, m: int) -> Tensor:
    return _nm_bits([scores], n, m)[0]


@_nm_mask_op.register_fake
def _(scores: Tensor, n: int, m: int) -> Tensor:
    return scores.new_empty(scores.shape[0], (scores.shape[1] + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("fastunlearn::nm_masks", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _nm_masks_op(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    # Cloned: outputs of a library op share no memory.
    return [b.clone() for b in _nm_bits(scores, n, m)]


@_nm_masks_op.register_fake
def _(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    return [t.new_empty(t.shape[0], (t.shape[1] + 7) // 8, dtype=torch.uint8) for t in scores]


@overload
def nm_mask(scores: Tensor, n: int, m: int) -> BitMask: ...


@overload
def nm_mask(scores: Sequence[Tensor], n: int, m: int) -> list[BitMask]: ...


def nm_mask(scores: Tensor | Sequence[Tensor], n: int, m: int) -> BitMask | list[BitMask]:
    """Keeps the n highest scores of every m consecutive columns of a row.

    Scores are compared as they are, signs included: pass `weight.abs()` for a magnitude pattern, |W| * norm for Wanda's.
    -0.0 equals 0.0; ties keep the lowest column; NaN ranks below every number, -inf included (still exactly n a group are
    kept, and a `RuntimeWarning` says so). A native call on a GPU waits for nothing, so there the warning comes with a later call,
    from `fastunlearn.ops.nm.check_nan()` or when the process ends; none comes from a CUDA graph; with n = 0 or n = m nothing is compared and nothing is
    warned of.

    Args:
        scores: floating [rows, cols]; of more dimensions: shape[0] rows, the others flattened; of one dimension: one row.
            float32, float16 and bfloat16 are native, other floating types run as plain PyTorch. Or a list of such tensors on
            one device: one call for a whole model.
        n: columns kept in a group, 0 <= n <= m.
        m: columns of a group, 1 to 64; must divide the number of columns.

    Returns:
        BitMask of scores.shape on the scores' device; for a list a list of them, whose bits share one allocation.

    Raises:
        TypeError: scores are no dense floating tensor (or list of those), a DTensor, n or m no int. ValueError: n or m out of
        range, m does not divide the columns, tensors on different devices or on meta (outside of tracing). RuntimeError: several tensors while a CUDA graph is captured.

    Example:
        >>> mask = fastunlearn.ops.nm_mask(layer.weight.detach().abs(), 2, 4)
        >>> layer.weight.data.mul_(mask.unpack())
    """
    single = isinstance(scores, Tensor)
    if not single and not isinstance(scores, list | tuple):
        raise TypeError(f"scores: want a tensor or a list of tensors, got {type(scores).__name__}")
    flat: list[Tensor] = []
    for i, t in enumerate([scores] if single else scores):
        what = "scores" if single else f"scores[{i}]"
        if not isinstance(t, Tensor):
            raise TypeError(f"{what}: want a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{what}: want a floating tensor, got {t.dtype} (scores.float() converts)")
        _check_memory(what, t)
        if flat and t.device != flat[0].device:
            raise ValueError(f"{what}: on {t.device}, the first on {flat[0].device}; call once for every device")
        rows, cols = rows_cols(t.shape)
        _check_pattern(n, m, cols, what)
        flat.append(t.detach().reshape(rows, cols))
    traced = _backend.traced(flat)
    if flat and flat[0].is_meta and not traced:
        raise ValueError(
            f"{'scores' if single else 'scores[0]'}: on meta, which holds no values; want scores on a device"
        )
    if single:
        assert isinstance(scores, Tensor)
        bits = _nm_mask_op(flat[0], n, m) if traced else _nm_bits(flat, n, m)[0]
        return BitMask(bits, scores.shape)
    if not flat:
        _check_pattern(n, m, 0, "scores")
        return []
    found = _nm_masks_op(flat, n, m) if traced else _nm_bits(flat, n, m)
    return [BitMask._of(b, t.shape) for b, t in zip(found, scores)]
