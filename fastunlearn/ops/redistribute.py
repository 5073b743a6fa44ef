"""SAU's importance-aware redistribution: what pruning took from a row, its survivors make up for by larger updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.ops._later import check_nan as check_nan
from fastunlearn.ops._later import say_later
from fastunlearn.ops.mask import BitMask, rows_cols
from fastunlearn.ops.topk import integers
from fastunlearn.reference import mask as reference_mask
from fastunlearn.reference import redistribute as reference

_OP = _backend.register("redistribution", native=("cpu",), triton=("cuda",))
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CLIP = 1e6  # squares of factors are summed in fp32


def _flat(importance: Sequence[Tensor]) -> list[Tensor]:
    """[rows, cols] of each, row-major in memory."""
    return [_native.in_memory(t.detach().reshape(rows_cols(t.shape))) for t in importance]


def _say_invalid(i: int, importance: Tensor) -> str:
    parts = {
        "NaN": importance.isnan(),
        "infinite": importance.isinf(),
        "negative": importance < 0,
    }
    found = [f"{int(where.sum())} {what}" for what, where in parts.items() if bool(where.any())]
    what = " and ".join(found) + " entries" if found else "a row whose sum is beyond the largest float32"
    return (
        f"importance[{i}]: want finite numbers of at least 0, got {what}"
        + (" (importance.abs() makes magnitudes)" if not bool(parts["NaN"].any() | parts["infinite"].any()) else "")
    )  # fmt: skip


def _say_size(i: int, got: int, wanted: int) -> str:
    return f"out[{i}]: want {wanted} entries, one for each set bit of mask[{i}], got {got}"


def _counts(bits: Sequence[Tensor]) -> list[int]:
    """Set bits of each mask on a CPU."""
    if _native._C is None:
        return [int(reference_mask.mask_count(b)) for b in bits]
    counts = torch.empty(len(bits), dtype=torch.int64)
    pairs = integers(chain.from_iterable((b.data_ptr(), b.numel()) for b in bits))
    _native._C.mask_counts_cpu(pairs.data_ptr(), len(bits), counts.data_ptr())
    return counts.tolist()


def _unsupported(importance: Sequence[Tensor]) -> dict[str, str]:
    wide = next((t.dtype for t in importance if t.dtype not in _NATIVE_DTYPES), None)
    if wide is None:
        return {}
    why = f"importance is {wide}; kernels take float32, float16 and bfloat16"
    return {"native": why, "triton": why}


def _run(
    importance: Sequence[Tensor], bits: Sequence[Tensor], outs: Sequence[Tensor] | None, beta: float, clip: float
) -> list[Tensor]:
    """importance [rows, cols] and bits of each tensor, all on one device and contiguous."""
    device = importance[0].device
    backend = _backend.resolve(_OP, device, _unsupported(importance))
    if backend == "triton":
        from fastunlearn.kernels import redistribute as kernels

        return _run_triton(kernels, importance, bits, outs, beta, clip)
    if backend == "reference":
        made = []
        for i, (t, b) in enumerate(zip(importance, bits)):
            if not bool(reference.valid_importance(t)):
                raise ValueError(_say_invalid(i, t))
            made.append(reference.redistribution(t, reference_mask.mask_unpack(b, t.shape[1]), beta, clip).float())
        if outs is None:
            return made
        _check_sizes(outs, [len(f) for f in made])
        for out, factors in zip(outs, made):
            out.copy_(factors)
        return list(outs)
    counts = _counts(bits)
    if outs is None:
        outs = [torch.empty(n, dtype=torch.float32) for n in counts]
    _check_sizes(outs, counts)
    codes = _native.DTYPES
    table = integers(
        chain.from_iterable(
            (t.data_ptr(), b.data_ptr(), o.data_ptr(), *t.shape, codes[t.dtype], 0, 0)
            for t, b, o in zip(importance, bits, outs)
        )
    )
    wrong = _native.library().redistribute_cpu(table.data_ptr(), len(outs), beta, clip)
    if wrong >= 0:
        raise ValueError(_say_invalid(wrong, importance[wrong]))
    return list(outs)


def _check_sizes(outs: Sequence[Tensor], counts: Sequence[int]) -> None:
    for i, (out, n) in enumerate(zip(outs, counts)):
        if out.numel() != n:
            raise ValueError(_say_size(i, out.numel(), n))


def _run_triton(
    kernels: Any,
    importance: Sequence[Tensor],
    bits: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    beta: float,
    clip: float,
) -> list[Tensor]:
    call = kernels.Call(importance, bits, beta, clip)
    if outs is None:
        # Without `out` its size has to be known: the one place where the host waits, and so the errors are known too.
        counts, wrong = call.found.tolist()
        _raise_invalid(wrong, importance)
        outs = [torch.empty(n, dtype=torch.float32, device=importance[0].device) for n in counts]
        call.write(outs)
        return list(outs)
    call.write(outs)
    sizes = [out.numel() for out in outs]

    def words(found: Tensor) -> list[str]:
        counts, wrong = found.tolist()
        said = [_say_size(i, n, want) for i, (n, want) in enumerate(zip(sizes, counts)) if n != want]
        said += [f"importance[{i}]: holds NaN, infinite or negative entries; its factors are NaN" for i, w in enumerate(wrong) if w]  # fmt: skip
        return [f"redistribution: {text}" for text in said[:3]]

    if call.found.is_cuda:
        say_later(call.found, words, UserWarning)
    else:
        counts, wrong = call.found.tolist()
        _raise_invalid(wrong, importance)
        _check_sizes(outs, counts)
    return list(outs)


def _raise_invalid(wrong: Sequence[int], importance: Sequence[Tensor]) -> None:
    for i, w in enumerate(wrong):
        if w:
            raise ValueError(_say_invalid(i, importance[i]))


# What torch.compile sees. The sizes of the results depend on the masks: unbacked symbols, unless `out` is given.
@torch.library.custom_op("fastunlearn::redistribution", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _redistribution_op(importance: Sequence[Tensor], bits: Sequence[Tensor], beta: float, clip: float) -> list[Tensor]:
    return _run(_flat(importance), bits, None, beta, clip)


@_redistribution_op.register_fake
def _(importance: Sequence[Tensor], bits: Sequence[Tensor], beta: float, clip: float) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [t.new_empty(context.new_dynamic_size(), dtype=torch.float32) for t in importance]


@torch.library.custom_op(
    "fastunlearn::redistribution_out",
    mutates_args=("out",),
    schema="(Tensor[] importance, Tensor[] bits, Tensor(a!)[] out, float beta, float clip) -> ()",
    tags=_backend.NOT_CAPTURED,
)
def _redistribution_out_op(
    importance: list[Tensor], bits: list[Tensor], out: list[Tensor], beta: float, clip: float
) -> None:
    _run(_flat(importance), bits, out, beta, clip)


@_redistribution_out_op.register_fake
def _(importance: list[Tensor], bits: list[Tensor], out: list[Tensor], beta: float, clip: float) -> None:
    return None


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: want a number in [{low:g}, {high:g}], got {type(value).__name__}")
    if not low <= value <= high or math.isnan(value):
        raise ValueError(f"{name}: want a number in [{low:g}, {high:g}], got {value}")
    return float(value)


def _check_pair(i: int, importance: Any, mask: Any, device: torch.device | None) -> torch.device:
    if not isinstance(importance, Tensor):
        raise TypeError(f"importance[{i}]: want a tensor, got {type(importance).__name__}")
    if hasattr(importance, "to_local"):
        raise TypeError(
            f"importance[{i}]: a DTensor; the factors are normalised over the whole tensor, so gather it first (full_tensor())"
        )
    if not importance.is_floating_point() or importance.layout != torch.strided:
        raise TypeError(f"importance[{i}]: want a dense floating tensor, got {importance.dtype}, {importance.layout}")
    if not isinstance(mask, BitMask):
        raise TypeError(f"mask[{i}]: want a BitMask, got {type(mask).__name__} (BitMask.pack packs a bool tensor)")
    if mask.shape != importance.shape:
        raise ValueError(f"mask[{i}]: shape {tuple(mask.shape)}, but importance[{i}] is {tuple(importance.shape)}")
    where = importance.device
    if mask.device != where:
        raise ValueError(f"mask[{i}]: on {mask.device}, but importance[{i}] is on {where}; move one of them")
    if device is not None and where != device:
        raise ValueError(f"importance[{i}]: on {where}, the first on {device}; call once for every device")
    return where


def _check_out(outs: Sequence[Any], device: torch.device) -> None:
    for i, out in enumerate(outs):
        if not isinstance(out, Tensor) or out.dtype != torch.float32 or out.dim() != 1 or not out.is_contiguous():
            got = (
                f"{out.dtype} {tuple(out.shape)}, strides {out.stride()}"
                if isinstance(out, Tensor)
                else type(out).__name__
            )
            raise TypeError(f"out[{i}]: want a contiguous float32 tensor of one dimension, got {got}")
        # Dynamo does not trace is_neg; a compiled call is asked where it runs.
        if not torch.compiler.is_dynamo_compiling() and out.is_neg():
            raise TypeError(
                f"out[{i}]: a lazily negated view, whose memory holds the opposite of its entries; want a tensor of its own"
            )
        if out.device != device:
            raise ValueError(f"out[{i}]: on {out.device}, but importance[{i}] is on {device}")


@overload
def redistribution(
    importance: Tensor, mask: BitMask, *, beta: float = 1.0, clip: float = 5.0, out: Tensor | None = None
) -> Tensor: ...


@overload
def redistribution(
    importance: Sequence[Tensor],
    mask: Sequence[BitMask],
    *,
    beta: float = 1.0,
    clip: float = 5.0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]: ...


def redistribution(
    importance: Tensor | Sequence[Tensor],
    mask: BitMask | Sequence[BitMask],
    *,
    beta: float = 1.0,
    clip: float = 5.0,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Factors on the updates of a pruned tensor's survivors: more where its row has lost much and the entry matters much.

    Importance-aware redistribution of SAU (arXiv 2602.00577), as a reconstruction: the paper's equations are not public. For
    output row i, lost_i and kept_i are the sums of the importance over its pruned and surviving entries, and

        r_ij = (lost_i / kept_i) (importance_ij / mean importance of the row's survivors)
        factor_ij = min(1 + beta r_ij, clip), divided by the root mean square of all of the tensor's factors

    so that the learning rate keeps its meaning: rms 1 over the tensor. The factors belong on the update,
    `MaskedAdamW(..., lr_scale=factors)`: Adam divides a factor on the gradient out again.

    A row whose survivors have no importance, and a row that lost nothing, has r = 0; a row without survivors has no factors and
    what it lost is lost; an empty mask gives no factors, a full one factors of 1.

    Args:
        importance: of the dense weights, at least 0 and finite: |w g| over the forget set, or Wanda's |w| * norm. float32, float16
            or bfloat16 (float64 runs as plain PyTorch); of any shape: rows as `BitMask` has them (a tensor of one dimension is one
            row, a convolution's rows are its output channels). Or a list of tensors: one call for a whole model.
        mask: the survivors: a BitMask of the importance's shape, or a list of them.
        beta: strength, in [0, 1]; 0 gives factors of 1.
        clip: largest factor before it is normalised, in [1, 1e6].
        out: where the factors go: float32 [survivors], contiguous, or a list of them. With it a call on a GPU that runs the
            Triton kernels waits for nothing; an importance that is none, and an `out` of the wrong size (of which nothing beyond
            its end is written), are then warned of by a later call, by `fastunlearn.ops.redistribute.check_nan()` or when the
            process ends. Plain PyTorch (float64, `backend("reference")`) waits for its checks there, and raises.

    Returns:
        float32 [survivors], one factor for each set bit in row-major order; a list of them for lists. Without `out` the Triton
        kernels' call waits once, for the sizes.

    Raises:
        TypeError: no floating tensors, no BitMasks, `out` of another kind. ValueError: shapes, devices or lengths that differ,
        beta or clip out of range, a negative, infinite or NaN importance, a row whose sum is beyond float32, an `out` of the
        wrong size. RuntimeError: a CUDA graph is being captured.

    Example:
        >>> factors = ops.redistribution([importance[n] for n in masks], list(masks.values()))
        >>> optim.MaskedAdamW(movable, masks, lr=1e-5, lr_scale=dict(zip(masks, factors)))
    """
    single = isinstance(importance, Tensor)
    if single != isinstance(mask, BitMask):
        raise TypeError(
            f"importance, mask: want one tensor and one BitMask or a list of each, got {type(importance).__name__} and "
            f"{type(mask).__name__}"
        )
    tensors: list[Any] = [importance] if single else list(importance)
    masks: list[Any] = [mask] if single else list(mask)  # type: ignore[arg-type]
    if len(tensors) != len(masks):
        raise ValueError(f"mask: {len(masks)} masks for {len(tensors)} tensors of importance; want one for each")
    beta, clip = _number("beta", beta, 0.0, 1.0), _number("clip", clip, 1.0, MAX_CLIP)
    device: torch.device | None = None
    for i, (t, m) in enumerate(zip(tensors, masks)):
        device = _check_pair(i, t, m, device)
    outs: list[Any] | None = None
    if out is not None:
        outs = [out] if single else list(out)
        if len(outs) != len(tensors):
            raise ValueError(f"out: {len(outs)} tensors for {len(tensors)} of importance; want one for each")
        if device is not None:
            _check_out(outs, device)
    if not tensors:
        return []
    bits = [m.bits.contiguous() for m in masks]
    if _backend.traced(tensors, bits, outs or []):
        detached = [t.detach() for t in tensors]
        if outs is None:
            outs = _redistribution_op(detached, bits, beta, clip)
        else:
            _redistribution_out_op(detached, bits, outs, beta, clip)
    else:
        outs = _run(_flat(tensors), bits, outs, beta, clip)
    return outs[0] if single else outs
