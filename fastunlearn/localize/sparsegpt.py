"""SparseGPT's sweep: weights are removed column by column, and the columns to the right make up for what was lost (Frantar
and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", algorithm 1).

With H = (2/n) X X^T + damping and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), column j of the sweep

    scores   w_j^2 / U_jj^2
    error    e = (w_j - q_j) / U_jj, q_j being w_j where it is kept and 0 where not
    then     w_k -= e U_jk for all columns k > j.

U_jj^2 is [H_F^-1]_jj for the columns F = {j, j+1, ...} still free, so each step is the optimal brain surgeon's update
restricted to what lies to the right. The same sweep with a mask that is given carries a dense update over to the survivors
of a pruned weight: `obs_compensate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.localize.patterns import Pattern, parse_pattern
from fastunlearn.ops.mask import BitMask
from fastunlearn.ops.topk import floor_count

#: (columns of the weight as rows [k, out], their U_jj [k], index of the first) -> bool [k, out], which to keep
_Choose = Callable[[Tensor, Tensor, int], Tensor]
#: a dead column's share of the mean diagonal: it goes before any column that carries something
_DEAD = 1e-12
#: bytes of the float64 systems that exact solves hold at once
_EXACT_BYTES = 1 << 28


class NotPositiveDefinite(ValueError):
    """A damped Hessian without a Cholesky factor; more damping, or more calibration text, gives it one."""


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32 inside the `with`: neither TF32 on a GPU nor bfloat16 on a CPU, whatever is allowed outside.

    torch keeps this twice, by `set_float32_matmul_precision` (and `allow_tf32`) and by `fp32_precision`, and raises where the two
    disagree: each is put back by what it was set with.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"  # untouched: the precision was set by `fp32_precision` alone
    if legacy == "highest" and all(precision in ("none", "ieee") for precision in before):
        yield
        return
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, before):
            # "none" inherits: only what was set for this backend itself is set again.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


@contextmanager
def input_hessians(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """H = (2/n) X X^T of the inputs that linear layers see inside the `with`, n being the number of tokens; read them after it.

    Twice the mean outer product of an input with itself: the Hessian of a layer's mean squared output error, the same for
    every row of its weight. Layers that are called with the very same tensor one after another (the query, key and value
    of an attention) share the product.

    Args:
        layers: name -> layer, called with one tensor [..., in].

    Yields:
        A dict that holds name -> fp32 [in, in] when the `with` ends, also under autocast and with TF32 allowed. Layers that
        were never called are missing. Under `torch.inference_mode()` every layer pays for its own product.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    last: list[tuple[Tensor, int, Tensor]] = []

    def add(name: str, x: Tensor) -> None:
        # The sums outlive an inference mode that the layers may run in.
        with torch.inference_mode(False), torch.no_grad():
            flat = x.detach().reshape(-1, x.shape[-1])
            # An inference tensor does not count what is written to it.
            version = -1 if x.is_inference() else x._version
            if not (last and last[0][0] is x and last[0][1] == version >= 0):
                with torch.autocast(x.device.type, enabled=False), _full_precision():
                    wide = flat.float()
                    last[:] = [(x, version, wide.T @ wide)]
            product = last[0][2]
            if name in sums:
                sums[name] += product
            else:
                sums[name] = product.clone()
        tokens[name] = tokens.get(name, 0) + len(flat)

    with torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            hooks.callback(handle.remove)
        hooks.callback(last.clear)
        yield sums
    for name, total in sums.items():
        total *= 2 / max(tokens[name], 1)


def _check(weight: Tensor, hessian: Tensor, damping: float, block_size: int, what: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{what}: want floating [out, in], got {weight.dtype} {tuple(weight.shape)}")
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"hessian: want [in, in] = {(weight.shape[1],) * 2} for a {what} {tuple(weight.shape)}, got {tuple(hessian.shape)}"
        )
    if hessian.device != weight.device:
        raise ValueError(f"hessian: is on {hessian.device}, {what} on {weight.device}; want one device")
    if not damping >= 0:
        raise ValueError(f"damping: want a share of the mean diagonal >= 0, got {damping}")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size: want at least 1 column, got {block_size!r}")


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A copy of the Hessian with `damping` times its mean diagonal added to the diagonal.

    Dead columns (a diagonal entry of 0: no token ever had anything there) get 1e-12 of the mean instead: what stands in
    them ranks below all else, by magnitude, and what is kept keeps its value.

    Raises:
        ValueError: entries that are not finite, or a negative diagonal.
    """
    diagonal = hessian.diagonal()
    # One number to fetch: NaN and infinities pass into the sum of magnitudes.
    if not bool(hessian.abs().sum().isfinite() & (diagonal >= 0).all()):
        raise ValueError("hessian: want finite entries and a diagonal >= 0; did the calibration give NaN or infinity?")
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    out = hessian.clone()
    out.diagonal().copy_(torch.where(diagonal == 0, _DEAD * mean, diagonal + damping * mean))
    return out


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1 and a positive diagonal.

    From one Cholesky factor of H with rows and columns in reverse order: R R^T = H with R upper triangular gives U = R^-1.

    Raises:
        NotPositiveDefinite: H is not; a ValueError.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if bool(failed):
        raise NotPositiveDefinite(
            "hessian: not positive definite with this damping; give a larger one, or more calibration text"
        )
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(
        upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True
    )


def _sweep(columns: Tensor, factor: Tensor, block: int, group: int, choose: _Choose) -> Tensor:
    """The sweep, in place on the columns [in, out] of a weight; returns the kept entries, bool [in, out].

    `group` columns are chosen at once, and a block holds whole groups. Errors go to the other columns of the block at once,
    to those beyond it in one product.
    """
    count = len(columns)
    diagonal = factor.diagonal()
    kept = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    for start in range(0, count, block):
        stop = min(start + block, count)
        errors = torch.empty_like(columns[start:stop])
        for first in range(start, stop, group):
            past = min(first + group, stop)
            kept[first:past] = choose(columns[first:past], diagonal[first:past], first)
            for j in range(first, past):
                removed = ~kept[j]
                error = errors[j - start]
                torch.mul(columns[j], removed, out=error)
                error /= diagonal[j]
                columns[j].masked_fill_(removed, 0)
                if j + 1 < stop:
                    columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        if stop < count:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return kept


def _working_copy(weight: Tensor) -> Tensor:
    """The columns of a weight as contiguous rows, fp32 (float64 stays)."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().T.to(dtype, memory_format=torch.contiguous_format, copy=True)


@torch.no_grad()
@_full_precision()
def sparsegpt_sweep(
    weight: Tensor, hessian: Tensor, pattern: Pattern | str | float, *, damping: float = 0.01, block_size: int = 128
) -> tuple[Tensor, BitMask]:
    """Prunes one weight and corrects what is left of it, by SparseGPT.

    n:m is chosen group by group inside the sweep, from weights that carry the corrections so far. Unstructured: block by
    block, and inside a block per output row (the paper's own choice is the block as a whole), so that every row keeps
    floor(density * in).

    Args:
        weight: floating [out, in]; not changed. The computation is in fp32 (float64 for a float64 weight).
        hessian: [in, in], from `input_hessians`; any scale, since the damping is relative and the sweep knows no other.
        pattern: as `parse_pattern` reads it.
        damping: share of the mean diagonal added to the diagonal.
        block_size: columns whose errors are collected before they go to the columns beyond; for n:m rounded to whole groups.

    Returns:
        The new weight, of the weight's dtype, zero off the mask; the mask.

    Raises:
        ValueError: shapes, devices, damping or block_size as said above do not fit; m does not divide the columns; a Hessian
            that is not finite or, damped, not positive definite.
    """
    _check(weight, hessian, damping, block_size, "weight")
    pattern = parse_pattern(pattern)
    columns = _working_copy(weight)
    cols = len(columns)
    if pattern.m is not None and cols % pattern.m:
        raise ValueError(f"weight: {cols} columns are no multiple of m = {pattern.m}")
    with torch.autocast(weight.device.type, enabled=False):
        factor = inverse_factor(damped(hessian.to(columns.dtype), damping))
        if pattern.n is not None and pattern.m is not None:
            n, m = pattern.n, pattern.m
            group = m
            block = max(block_size // m, 1) * m

            def choose(values: Tensor, diagonal: Tensor, first: int) -> Tensor:
                return ops.nm_mask((values / diagonal[:, None]).square().T, n, m).unpack().T

        else:
            block = group = min(block_size, cols)
            total = pattern.density

            def choose(values: Tensor, diagonal: Tensor, first: int) -> Tensor:
                # The difference of running counts: a row ends with floor(density * in), whatever the block size.
                k = floor_count(total, first + len(values)) - floor_count(total, first)
                scores = (values / diagonal[:, None]).square().T.contiguous()
                return ops.topk_mask([scores], k=k, scope="row")[0].unpack().T

        kept = _sweep(columns, factor, block, group, choose)
    return columns.T.to(weight.dtype, memory_format=torch.contiguous_format), BitMask.pack(kept.T.contiguous())


@torch.no_grad()
@_full_precision()
def obs_compensate(
    delta: Tensor,
    mask: BitMask,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    steps: int = 0,
    exact: bool = False,
) -> Tensor:
    """An update with support on the mask whose effect on the layer's outputs is near that of a dense update.

    The wanted update minimises (d - delta) H (d - delta)^T row by row over all d that are zero off the mask:
    d_M = delta_M + H_MM^-1 H_MP delta_P, with M the entries of a row in the mask, P the others. The default is SparseGPT's
    sweep, whose cost is that of one Cholesky factor and one product whatever the mask; since it corrects only columns to
    the right, it lies between dropping delta_P and the minimum. `steps` of conjugate gradients take it on from there, all rows
    at once (ten come within one per cent of the minimum on layers of SmolLM2-135M at 2:4); `exact` solves every row.

    With the dense weight in the place of delta the result is the weight that SparseGPT's correction gives for a mask chosen
    elsewhere.

    Args:
        delta: floating [out, in]; not changed. The sweep is in fp32 (float64 for a float64 delta).
        mask: of delta's shape.
        hessian: [in, in] of the inputs on which the effect is to stay, from `input_hessians`; any scale.
        damping: share of the mean diagonal added to the diagonal.
        block_size: columns whose errors are collected before they go to the columns beyond.
        steps: of conjugate gradients (preconditioned by the diagonal) after the sweep; one product [out, in] x [in, in] each.
        exact: the minimum instead, in float64: one system of `in` unknowns a row, in^3 / 3 operations each.

    Returns:
        Of delta's shape and dtype, exactly zero off the mask.

    Raises:
        ValueError: shapes, devices, damping or block_size as said above do not fit; a Hessian that is not finite or, damped,
            not positive definite.
    """
    _check(delta, hessian, damping, block_size, "delta")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0 or (steps and exact):
        raise ValueError(f"steps: want an int >= 0, and none with exact=True; got {steps!r}, exact={exact}")
    if mask.shape != delta.shape or mask.device != delta.device:
        raise ValueError(
            f"mask: want shape {tuple(delta.shape)} on {delta.device} as delta, got {tuple(mask.shape)} on {mask.device}"
        )
    kept = mask.unpack()
    with torch.autocast(delta.device.type, enabled=False):
        if exact:
            return _solve_rows(delta.double(), kept, damped(hessian.double(), damping)).to(delta.dtype)
        columns = _working_copy(delta)
        factor = inverse_factor(damped(hessian.to(columns.dtype), damping))
        given = kept.T.contiguous()
        block = min(block_size, len(columns))
        _sweep(columns, factor, block, block, lambda values, _, first: given[first : first + len(values)])
        out = columns.T
        if steps:
            out = _descend(delta.to(columns.dtype), out, kept, damped(hessian.to(columns.dtype), damping), steps)
    return out.to(delta.dtype, memory_format=torch.contiguous_format)


def _descend(delta: Tensor, start: Tensor, kept: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for H_MM d_M = (H delta)_M, every row by itself, from a start with support M."""
    scale = kept / hessian.diagonal()
    d = start.clone()
    residual = ((delta - d) @ hessian).mul_(kept)
    direction = residual * scale
    slope = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        ahead = (direction @ hessian).mul_(kept)
        # Rows that have arrived, or have no entries, divide nothing by nothing.
        curvature = (direction * ahead).sum(1, keepdim=True)
        length = torch.where(curvature > 0, slope / curvature, 0)
        d.addcmul_(length, direction)
        residual.addcmul_(length, ahead, value=-1)
        conditioned = residual * scale
        fresh = (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned.addcmul_(torch.where(slope > 0, fresh / slope, 0), direction)
        slope = fresh
    return d


def _solve_rows(delta: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """H_MM d_M = (H delta)_M for every row; entries off the mask are unknowns with a one on the diagonal and nothing else."""
    rows = max(1, _EXACT_BYTES // max(hessian.numel() * 8, 1))
    out = torch.empty_like(delta)
    for some, inside, result in zip(delta.split(rows), kept.split(rows), out.split(rows)):
        weights = inside.to(delta.dtype)
        systems = hessian * weights[:, :, None] * weights[:, None, :]
        systems.diagonal(dim1=1, dim2=2).add_(1 - weights)
        lower, failed = torch.linalg.cholesky_ex(systems)
        if bool(failed.any()):
            raise ValueError("hessian: not positive definite with this damping; give a larger one")
        right = (some @ hessian) * weights
        result.copy_(torch.cholesky_solve(right[:, :, None], lower)[:, :, 0] * weights)
    return out
