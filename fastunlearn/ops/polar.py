"""Polar factors, the Bures distance of projections and the geodesic between them: ScaPre's geometry term, without nested roots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastunlearn import _backend
from fastunlearn.ops._exact import exactly
from fastunlearn.ops._spectral_checks import matrices
from fastunlearn.reference import polar as reference

_OP = _backend.register("polar", triton=("cuda",))

Method = Literal["newton-schulz", "svd"]


class Geodesic(NamedTuple):
    """What `bures_geodesic` gives."""

    weights: list[Tensor]
    rotation: list[float]  #: ||W_0 Q - W_0|| / ||W_0|| of each weight
    moved: list[bool]  #: False: the guard left the weight as it was


def _method(method: str, steps: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method: want one of {', '.join(get_args(Method))}; got {method!r}")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= 100:
        raise ValueError(f"steps: want a whole number from 1 to 100, got {steps!r}")


def polar(M: Tensor, *, method: Method = "newton-schulz", steps: int = 10) -> Tensor:
    """Polar factor U V^T of each matrix M = U s V^T; directions without a singular value stay 0 (a partial isometry).

    Args:
        M: [..., p, q]; float16 and bfloat16 are computed in float32.
        method: "newton-schulz": products alone, for singular values down to 1e-5 of the norm in ten steps (float32: 1e-4 in nine; in
            directions without a singular value rounding then leaves up to 3e-3); "svd": exact, slow on a GPU.
        steps: at most, of the iteration; each is the best odd quintic for what the steps before left.

    Returns:
        [..., p, q] in M's dtype.

    Raises:
        TypeError, ValueError: no floating matrices, unknown method, steps out of range.
    """
    if not isinstance(M, Tensor) or not M.is_floating_point() or M.dim() < 2:
        got = f"{M.dtype} {tuple(M.shape)}" if isinstance(M, Tensor) else type(M).__name__
        raise TypeError(f"M: want floating matrices [..., p, q], got {got}")
    _method(method, steps)
    return _polar_op(M.detach(), method, steps) if _backend.traced(M) else _polar(M, method, steps)


@exactly
def _polar(M: Tensor, method: str, steps: int) -> Tensor:
    # The singular value decomposition is the vendor's on every backend.
    wide = M.dtype == torch.float64 and method != "svd"
    beyond = {"triton": "M is float64; the kernel takes up to float32"} if wide else None
    backend = _backend.resolve(_OP, M.device, beyond)
    x = M.detach().resolve_neg()
    x = x if x.dtype == torch.float64 else x.float()
    if method == "svd":
        return reference.by_svd(x).to(M.dtype)
    maths: Any = reference
    if backend == "triton":
        from fastunlearn.kernels import polar as kernels

        maths = kernels
    return maths.newton_schulz(x, steps).to(M.dtype)


# What torch.compile sees. A singular value decomposition waits for the device.
@torch.library.custom_op("fastunlearn::polar", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _polar_op(M: Tensor, method: str, steps: int) -> Tensor:
    return _polar(M, method, steps).contiguous()


@_polar_op.register_fake
def _(M: Tensor, method: str, steps: int) -> Tensor:
    return torch.empty_like(M, memory_format=torch.contiguous_format)


def _pairs(weights: Any, old: Any) -> tuple[list[Tensor], list[Tensor], bool]:
    new, single = matrices(weights)
    before, _ = matrices(old)
    if [w.shape for w in new] != [w.shape for w in before] or [w.device for w in new] != [w.device for w in before]:
        raise ValueError(f"old: want a matrix of the same shape and device for each of the {len(new)} weights")
    return new, before, single


def _wide(w: Tensor) -> Tensor:
    return w.detach() if w.dtype == torch.float64 else w.detach().float()


@exactly
def bures_distance(weights: Tensor | Sequence[Tensor], old: Tensor | Sequence[Tensor]) -> Tensor:
    """Bures-Wasserstein distance of W W^T and W_0 W_0^T, by the nuclear norm of W_0^T W.

    Args:
        weights, old: [rows, d] each, one or a list.

    Returns:
        float64 [num]; squared it is L_g of arXiv 2601.06162, eq. 5.

    Raises:
        TypeError, ValueError: no matrices, shapes or devices that differ.
    """
    new, before, _ = _pairs(weights, old)
    found = [reference.bures_distance(w.detach().double(), o.detach().double()) for w, o in zip(new, before)]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


@exactly
def bures_geodesic(
    weights: Tensor | Sequence[Tensor],
    old: Tensor | Sequence[Tensor],
    t: float,
    *,
    guard: float | None = 0.5,
    method: Method = "newton-schulz",
    steps: int = 10,
) -> Geodesic:
    """(1 - t) W + t W_0 Q: the share t of the way from W W^T to W_0 W_0^T, mapped back to weights by Procrustes.

    Q turns the inputs of W_0, that is, what it says of all text. Where it turns them far the step does harm rather than repair: a
    weight with ||W_0 Q - W_0|| above `guard` ||W_0|| is left as it is.

    Args:
        weights: W, [rows, d] each. old: W_0, the same shapes. t: in [0, 1]; beta / (1 + beta) minimises ||W' - W||^2 + beta L_g(W').
        guard: see above; None: no guard. method, steps: of `polar`.

    Returns:
        `Geodesic`: weights (always a list, old dtypes), rotations, which of them moved.

    Raises:
        TypeError, ValueError: no matrices, shapes or devices that differ, t or guard out of range.
    """
    new, before, _ = _pairs(weights, old)
    _method(method, steps)
    if not 0 <= t <= 1:
        raise ValueError(f"t: want a number in [0, 1], got {t}")
    if guard is not None and not guard >= 0:
        raise ValueError(f"guard: want a number of at least 0 or None, got {guard}")
    outs, rotations, moved = [], [], []
    for w, o in zip(new, before):
        W, W0 = _wide(w), _wide(o)
        C, Q0, Q1 = reference.core(W0, W)
        factor = polar(C, method=method, steps=steps)
        whole = float(factor.square().sum()) > len(factor) - 0.5
        if Q0 is not None and Q1 is not None and whole:
            turned = (W0 @ Q0) @ factor @ Q1.mT
        else:
            # Where W says nothing of what W_0 does, Q is not determined: as near to no turn as can be.
            full = factor if Q0 is None or Q1 is None else Q0 @ factor @ Q1.mT
            turned = W0 @ (full if whole else reference.completed(full))
        scale = float(W0.norm())
        rotation = float((turned - W0).norm()) / scale if scale else 0.0
        goes = guard is None or rotation <= guard
        outs.append(((1 - t) * W + t * turned).to(w.dtype) if goes and t else w.detach().clone())
        rotations.append(rotation)
        moved.append(goes)
    return Geodesic(outs, rotations, moved)
