"""topk_mask: the k largest scores of a list of tensors as bit masks, exactly, without concatenating or sorting them.

On a CPU and a GPU: a sample brackets the k-th value, one pass over the scores writes the bits that the bracket decides and
gathers the few entries inside it, an exact selection among those completes the bits (csrc/topk.cpp, csrc/topk.cu).
"""

from __future__ import annotations

import numbers
import operator
import sys
import warnings
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.ops._later import check_nan as check_nan
from fastunlearn.ops._later import say_later
from fastunlearn.ops.mask import BitMask, rows_cols
from fastunlearn.reference import topk as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Scope = Literal["global", "tensor", "row"]
Key = Literal["value", "abs"]

_OP = _backend.register("topk_mask", native=("cpu", "cuda"))
#: Bins of a histogram on a GPU (csrc/topk.h: kTopkBins).
BINS = 2048
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def floor_count(density: float, n: int) -> int:
    """floor(density * n), by the largest k with k / n <= density in double precision.

    The product itself rounds: 0.29 * 100 is 28.999999999999996. The quotient k / n of two integers is correctly rounded, so
    29 / 100 is the very number that 0.29 is: a density that was written or computed as k / n gives k.
    """
    k = min(n, int(density * n))
    while k < n and (k + 1) / n <= density:
        k += 1
    while k > 0 and k / n > density:
        k -= 1
    return k


def counts_of(density: float | None, k: int | None, scope: Scope, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Entries to keep: [one number] in the global scope, else one for each tensor (in it, or in each of its rows)."""
    sizes = [rows * cols for rows, cols in shapes]
    spans = {"global": [sum(sizes)], "tensor": sizes, "row": [cols for _, cols in shapes]}[scope]
    if density is not None:
        return [floor_count(density, n) for n in spans]
    assert k is not None
    for i, n in enumerate(spans):
        if k > n:
            where = {"global": "all scores together", "tensor": f"scores[{i}]", "row": f"a row of scores[{i}]"}[scope]
            raise ValueError(f"k: want at most the number of entries, got k={k} for {n} in {where}")
    return [k] * len(spans)


def _check_scores(scores: Any) -> list[Tensor]:
    if isinstance(scores, Tensor):
        raise TypeError("scores: want a list of tensors, got one tensor; wrap it: topk_mask([scores], ...)[0]")
    if not isinstance(scores, list | tuple):
        raise TypeError(f"scores: want a list of tensors, got {type(scores).__name__}")
    if not scores:
        raise ValueError("scores: want at least one tensor, got an empty list")
    sharded: Any = ()
    if "torch.distributed.tensor" in sys.modules:
        sharded = sys.modules["torch.distributed.tensor"].DTensor
    out = []
    device, plain = None, True
    for i, t in enumerate(scores):
        if not isinstance(t, Tensor):
            raise TypeError(f"scores[{i}]: want a tensor, got {type(t).__name__}")
        if t.dtype not in _DTYPES:
            raise TypeError(
                f"scores[{i}]: want float32, float16, bfloat16 or float64, got {t.dtype} (convert it: scores.float())"
            )
        if device is None:
            device = t.device
        elif t.device != device:
            raise ValueError(f"scores[{i}] is on {t.device}, scores[0] on {device}: want one device")
        plain = plain and not t.requires_grad
        out.append(t.to_local() if sharded and isinstance(t, sharded) else t)
    return out if plain else [t.detach() for t in out]


def _check_density(density: Any) -> float:
    if isinstance(density, bool) or not isinstance(density, numbers.Real):
        raise TypeError(f"density: want a number in [0, 1] or a list of them, got {type(density).__name__}")
    share = float(density)
    if not 0 <= share <= 1:
        raise ValueError(f"density: want a share in [0, 1], got {density}")
    return share


def _check_amount(density: Any, k: Any) -> tuple[list[float] | None, int | None]:
    if (density is None) == (k is None):
        raise ValueError(f"density, k: want exactly one of the two, got density={density} and k={k}")
    if density is not None:
        several = density if isinstance(density, list | tuple) else [density]
        if not several:
            raise ValueError("density: want a number or a list with at least one, got an empty list")
        return [_check_density(d) for d in several], None
    if isinstance(k, bool):
        raise TypeError("k: want an int, got bool")
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k: want an int, got {type(k).__name__}") from None
    if k < 0:
        raise ValueError(f"k: want at least 0, got {k}")
    return None, k


def uniform(scores: Sequence[Tensor]) -> list[Tensor]:
    """The scores contiguous and of one dtype: the widest that is there, float32 for a mixture of 16 bits."""
    dtypes = {t.dtype for t in scores}
    if len(dtypes) == 1:
        return [_native.in_memory(t) for t in scores]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return [_native.in_memory(t.to(dtype)) for t in scores]


def extents(scores: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(rows, cols) of each tensor as a mask sees it."""
    shapes = [t.shape for t in scores]
    return [tuple(s) if len(s) == 2 else rows_cols(s) for s in shapes]  # type: ignore[misc]


def native_limits(scores: Sequence[Tensor]) -> dict[str, str]:
    """Backend -> why these scores are beyond it."""
    if scores[0].dtype == torch.float64:
        return {"native": "float64 scores have no 32-bit keys; float32 scores have a kernel"}
    return {}


def integers(values: Iterable[int]) -> Tensor:
    """int64 on the host."""
    values = array("q", values)
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def table(scores: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> Tensor:
    """int64: address, rows, cols, 0 of every tensor (csrc/topk.h: TopkTensor)."""
    return integers(x for t, (rows, cols) in zip(scores, shapes) for x in (t.data_ptr(), rows, cols, 0))


#: Every tensor's bits start on a multiple of this many bytes of the memory that they share.
_ALIGNMENT = 16


def empty_bits(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """uint8 [rows, ceil(cols / 8)] for each tensor, all in one allocation."""
    widths = [(cols + 7) // 8 for _, cols in shapes]
    starts, end = [], 0
    for (rows, _), width in zip(shapes, widths):
        starts.append(end)
        end += -(-rows * width // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8, device=device)
    return [memory.as_strided((rows, width), (width, 1), at) for (rows, _), width, at in zip(shapes, widths, starts)]


def addresses(bits: Sequence[Sequence[Tensor]]) -> Tensor:
    return integers(b.data_ptr() for row in bits for b in row)


def _nan_words(nan: int, entries: int, wanted: int) -> list[str]:
    """`wanted`: entries asked for, at most; 0 where that is not known for all scopes together."""
    if not nan:
        return []
    short = f"; only {entries - nan} of the {wanted} entries asked for are there to select" * (wanted > entries - nan)
    return [f"topk_mask: {nan} of {entries} scores are NaN and never selected{short}"]


def warn_nan(nan: int, entries: int, wanted: int) -> None:
    """As `_nan_words`."""
    for text in _nan_words(nan, entries, wanted):
        warnings.warn(text, UserWarning, stacklevel=5)


def refuse_capture(device: torch.device) -> None:
    """The tables of a call are uploaded from memory that is used again later: a graph would replay other contents."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "topk_mask: called while a CUDA graph is captured; its tables are uploaded anew by every call and would be stale "
            "when the graph is replayed. Call it outside the graph and capture what uses the masks"
        )


def _select(
    scores: Sequence[Tensor], densities: Sequence[float] | None, k: int | None, scope: Scope, key: Key
) -> list[list[Tensor]]:
    """Bits for every density and tensor."""
    shapes = extents(scores)
    counts = [counts_of(d, k, scope, shapes) for d in (densities if densities is not None else [None])]
    device, absolute = scores[0].device, key == "abs"
    flat = uniform(scores)
    if _backend.resolve(_OP, device, native_limits(flat)) == "reference":
        rows = [t.reshape(shape) for t, shape in zip(flat, shapes)]
        bits, nan = reference.topk_mask(rows, counts, scope, absolute)
        found: int | Tensor = int(nan)
    else:
        refuse_capture(device)
        bits = [empty_bits(shapes, device) for _ in counts]
        select = _select_cuda if _native.is_cuda(device) else _select_cpu
        found = select(flat, shapes, counts, scope, absolute, bits)
    per_scope = shapes if scope == "row" else [(1, 1)] * len(shapes)
    wanted = max(sum(c * rows for c, (rows, _) in zip(row, per_scope)) for row in counts)
    entries = sum(rows * cols for rows, cols in shapes)
    if isinstance(found, Tensor):
        say_later(found, lambda nan: _nan_words(int(nan), entries, wanted), UserWarning)
    else:
        warn_nan(found, entries, wanted)
    return bits


def _select_cpu(
    flat: list[Tensor],
    shapes: list[tuple[int, int]],
    counts: list[list[int]],
    scope: Scope,
    absolute: bool,
    bits: list[list[Tensor]],
) -> int:
    """Fills `bits`; returns the number of NaN."""
    library, dtype = _native.library(), _native.DTYPES[flat[0].dtype]
    tensors, ks, out = table(flat, shapes), integers(chain.from_iterable(counts)), addresses(bits)
    call = getattr(library, {"global": "topk_select_cpu", "tensor": "topk_tensors_cpu", "row": "topk_rows_cpu"}[scope])
    return call(tensors.data_ptr(), len(flat), dtype, absolute, len(counts), ks.data_ptr(), out.data_ptr())


class CudaCall:
    """Uploads the table of a call and keeps what it points to alive until the launches are queued (csrc/topk.h)."""

    def __init__(
        self,
        flat: list[Tensor],
        shapes: Sequence[tuple[int, int]],
        bits: list[list[Tensor]],
        params: list[list[list[int]]],
        absolute: bool,
        pooled: bool = False,
        rows: bool = False,
    ):
        """params [counts, scopes, 4]; rows: tiles are rows."""
        library, device = _native.library(), flat[0].device
        table: list[int] = []
        entries, tiles, per_tile = 0, 0, library.topk_tile_bytes()
        for t, (height, width) in zip(flat, shapes):
            table += (t.data_ptr(), height, width, entries, tiles)
            entries += height * width
            if not width:
                continue
            tiles += height if rows else -(-height * ((width + 7) // 8) // per_tile)
        places = [b.data_ptr() for row in bits for b in row]
        host = integers(chain(table, places, chain.from_iterable(chain.from_iterable(params))))
        if device.type == "cuda":
            host = host.pin_memory()  # the copy is queued: the host does not wait for the device
        self.upload = host.to(device, non_blocking=True)
        scopes, dtype = len(params[0]), _native.DTYPES[flat[0].dtype]
        size = 0 if rows else library.topk_workspace_cuda(len(params), scopes, entries, tiles, dtype, pooled)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.nan = torch.zeros((), dtype=torch.int64, device=device)
        start = self.upload.data_ptr()
        self.arguments = library.TopkCudaCall(
            start,
            start + 8 * len(table),
            start + 8 * (len(table) + len(places)),
            len(flat),
            len(params),
            scopes,
            entries,
            tiles,
            dtype,
            absolute,
            self.workspace.data_ptr(),
            self.nan.data_ptr(),
            *_native.stream(device),
        )


def _select_cuda(
    flat: list[Tensor],
    shapes: list[tuple[int, int]],
    counts: list[list[int]],
    scope: Scope,
    absolute: bool,
    bits: list[list[Tensor]],
) -> int | Tensor:
    """Fills `bits` without waiting for the device; returns the number of NaN, on a GPU as a tensor."""
    params = [[[k, 0, 0, 0] for k in row] for row in counts]
    call = CudaCall(flat, shapes, bits, params, absolute, pooled=len(params[0]) == 1, rows=scope == "row")
    library = _native.library()
    (library.topk_rows_cuda if scope == "row" else library.topk_select_cuda)(call.arguments)
    return call.nan if call.nan.is_cuda else int(call.nan)


# What torch.compile sees; bits of all tensors for the first density, then for the next one.
@torch.library.custom_op("fastunlearn::topk_mask", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _topk_mask(
    scores: Sequence[Tensor], densities: Sequence[float] | None, k: int | None, scope: str, key: str
) -> list[Tensor]:
    # Cloned: outputs of a library op share no memory.
    return [b.clone() for bits in _select(scores, densities, k, scope, key) for b in bits]  # type: ignore[arg-type]


@_topk_mask.register_fake
def _(scores: Sequence[Tensor], densities: Sequence[float] | None, k: int | None, scope: str, key: str) -> list[Tensor]:
    out = []
    for _ in densities if densities is not None else [None]:
        for t in scores:
            rows, cols = rows_cols(t.shape)
            out.append(t.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8))
    return out


@overload
def topk_mask(
    scores: Sequence[Tensor],
    density: float | None = None,
    k: int | None = None,
    *,
    scope: Scope = "global",
    key: Key = "value",
    process_group: ProcessGroup | None = None,
) -> list[BitMask]: ...


@overload
def topk_mask(
    scores: Sequence[Tensor],
    density: list[float] | tuple[float, ...],
    k: None = None,
    *,
    scope: Scope = "global",
    key: Key = "value",
    process_group: ProcessGroup | None = None,
) -> list[list[BitMask]]: ...


def topk_mask(
    scores: Sequence[Tensor],
    density: float | list[float] | tuple[float, ...] | None = None,
    k: int | None = None,
    *,
    scope: Scope = "global",
    key: Key = "value",
    process_group: ProcessGroup | None = None,
) -> list[BitMask] | list[list[BitMask]]:
    """Masks of the k largest scores: exactly k, whatever their values.

    Among equal scores the first wins, in the order of the list, then row-major; -0.0 equals 0.0; NaN is never selected (a
    warning says how many there are; where k exceeds the other entries, all of those are selected). The entries selected at
    one density are among those at any larger one.

    Args:
        scores: tensors of any shapes on one device; float32, float16, bfloat16 or float64 (plain PyTorch). Tensors of
            different dtypes are widened to the largest. Tensors that are not contiguous are copied.
        density: share of the entries of a scope to select, in [0, 1], or a list of shares, which gives a list of results
            from one pass over the scores. k = floor(density * entries), free of rounding: 0.29 of 100 is 29.
        k: the number itself, instead of a density.
        scope: "global": k among all tensors together; "tensor": k in each tensor; "row": k in each row as `BitMask` has
            rows (a tensor of one dimension is one row, a convolution has a row for each output channel).
        key: what is compared: "value" or "abs" (magnitude).
        process_group: rank r holds the r-th run of rows of every tensor (shards may differ in size or be empty; DTensors
            are taken as their local shards) and receives the masks of its rows: together exactly those of one process that
            holds everything. Only counts and histograms of keys travel. With scope "row" nothing travels: a rank's rows are
            complete.

    Returns:
        A `BitMask` for each tensor; for a list of densities a list of those. On a GPU nothing waits for the device, so the
        warning of NaN comes with a later call, from `fastunlearn.ops.topk.check_nan()` or when the process ends.

    Raises:
        TypeError: scores are not a list of floating-point tensors; density or k is not a number.
        ValueError: empty list, mixed devices, density outside [0, 1], k below 0 or beyond the entries of a scope, both or
            neither of density and k, unknown scope or key.
        RuntimeError: a CUDA graph is being captured on the scores' device.
    """
    tensors = _check_scores(scores)
    densities, count = _check_amount(density, k)
    if scope not in ("global", "tensor", "row"):
        raise ValueError(f"scope: want 'global', 'tensor' or 'row', got {scope!r}")
    if key not in ("value", "abs"):
        raise ValueError(f"key: want 'value' or 'abs', got {key!r}")
    if process_group is not None and scope != "row":
        from fastunlearn.ops import _topk_distributed

        by_density = _topk_distributed.select(tensors, densities, count, scope, key, process_group)
    elif _backend.traced(tensors):
        counts_of(None, count, scope, [rows_cols(t.shape) for t in tensors]) if count is not None else None
        out = _topk_mask(tensors, densities, count, scope, key)
        by_density = [out[i : i + len(tensors)] for i in range(0, len(out), len(tensors))]
    else:
        by_density = _select(tensors, densities, count, scope, key)
    masks = [[BitMask._of(b, t.shape) for b, t in zip(bits, tensors)] for bits in by_density]
    return masks if isinstance(density, list | tuple) else masks[0]
