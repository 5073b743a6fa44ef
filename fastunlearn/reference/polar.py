"""Polar factors and the Bures distance between covariances of projections, in plain PyTorch.

With Sigma = W W^T and Sigma_0 = W_0 W_0^T the nested roots of ScaPre's geometry term (arXiv 2601.06162, eq. 5) are a nuclear norm,

    tr((Sigma^1/2 Sigma_0 Sigma^1/2)^1/2) = ||W_0^T W||_*,   so   L_g = ||W||^2 + ||W_0||^2 - 2 ||W_0^T W||_* = min_Q ||W - W_0 Q||^2

with Q the polar factor of W_0^T W, and (1 - t) W + t W_0 Q is the point t on the geodesic between them.

The iteration X <- a X + b X X^T X + c (X X^T)^2 X drives singular values to 1. Its coefficients are, step by step, those of the
odd quintic that comes closest to 1 on the interval in which the values are by then (found by Remez exchange). At the interval's upper
end its slope is up to 26, and beyond it nothing holds: rounding that takes a value there grows from step to step, by 3e6 in the first
six, and then without end. The intervals are therefore wider than the values, by `MARGIN`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

#: In units of an interval's upper end. A step adds terms of up to 50 times its result (8.5 x, 25 x^3, 19 x^5), of n x n matrices, so
#: that its rounding is about 50 sqrt(n) eps: 4e-4 in float32 for n = 4096. The last step leaves less than 1e-9 more. Of the margins
#: near it, 2e-3 is the one that keeps 1, the value of a matrix of one row or rank, above 0.6 on its way through nine steps: what falls
#: low and comes back (to 0.015 with 1e-3) brings the rounding of the larger number with it.
MARGIN = {torch.float32: 2e-3, torch.float64: 1e-9}


def _closest(low: float, high: float) -> tuple[float, float, float]:
    """a x + b x^3 + c x^5 closest to 1 on [low, high]: its error takes its largest value, with both signs, at four points."""
    if high - low < 1e-4 * high:
        # The limit: value 1, slope and curvature 0 in the middle.
        x = (low + high) / 2
        return 1.875 / x, -1.25 / x**3, 0.375 / x**5
    inner = [low + (high - low) * share for share in (0.25, 0.75)]
    a = b = c = 0.0
    for _ in range(60):
        points = torch.tensor([low, *inner, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        rows = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, _ = torch.linalg.solve(rows, torch.ones(4, dtype=torch.float64)).tolist()
        # Extrema: a + 3 b x^2 + 5 c x^4 = 0.
        root = max(9 * b * b - 20 * a * c, 0.0) ** 0.5
        moved = sorted(max((-3 * b + sign * root) / (10 * c), low**2) ** 0.5 for sign in (-1, 1))
        done = max(abs(m - i) for m, i in zip(moved, inner)) < 1e-13 * high
        inner = moved
        if done:
            break
    return a, b, c


def _schedule_from(low: float, steps: int, margin: float) -> tuple[list[tuple[float, float, float]], float]:
    """Coefficients of `steps` steps for singular values in [low, 1], and how far from 1 they leave them."""
    high, found = 1 + margin, []
    for _ in range(steps):
        a, b, c = _closest(low, high)
        found.append((a, b, c))
        low = min(a * x + b * x**3 + c * x**5 for x in (low, high))
        high = (2 - low) * (1 + margin)
    return found, 1 - low


@cache
def schedule(steps: int, floor: float, margin: float) -> tuple[tuple[float, float, float], ...]:
    """At most `steps` steps that bring the widest interval [low, 1], low >= floor, to within 1e-7 of 1.

    Args:
        margin: by which share of its upper end each step's interval is wider than what the steps before leave.
    """

    def left(low: float) -> float:
        return _schedule_from(low, steps, margin)[1]

    tight, wide = 0.9, floor
    if left(wide) <= 1e-7:
        tight = wide
    for _ in range(0 if tight == wide else 40):
        middle = (tight * wide) ** 0.5
        tight, wide = (middle, wide) if left(middle) <= 1e-7 else (tight, middle)
    enough = next((n for n in range(1, steps) if _schedule_from(tight, n, margin)[1] <= 1e-7), steps)
    return tuple(_schedule_from(tight, enough, margin)[0])


def symmetric(A: Tensor, C: Tensor | None = None, b: float = 0.0, c: float = 1.0) -> Tensor:
    """c A A^T + b C of [batch, p, q] and, symmetric, [batch, p, p]."""
    if C is None:
        return A @ A.mT if c == 1 else c * (A @ A.mT)
    return torch.baddbmm(C, A, A.mT, beta=b, alpha=c)


def newton_schulz(M: Tensor, steps: int, symmetric: Callable[..., Tensor] = symmetric) -> Tensor:
    """Polar factor of each matrix of M [..., p, q]; directions whose singular value is 0 stay near 0.

    Args:
        symmetric: computes the products that are symmetric.
    """
    if not M.numel():
        return M.clone()
    tall = M.shape[-2] > M.shape[-1]
    X = (M.mT if tall else M).contiguous()
    # Entries of size 1, or the norms below leave the range of their type.
    top = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(top > 0, top, 1.0)
    # The values lie in (0, 1], to within rounding: ||M||_2^2 <= ||M||_1 ||M||_inf, and never above the Frobenius norm.
    sums = X.abs()
    norm = (sums.sum(-1).amax(-1) * sums.sum(-2).amax(-1)).sqrt()
    norm = torch.minimum(norm, X.flatten(-2).norm(dim=-1))[..., None, None]
    X = X / torch.where(norm > 0, norm, 1.0)
    lead, shape = X.shape[:-2], X.shape
    X = X.reshape(-1, *shape[-2:])
    # What rounding leaves in directions without a value grows as the smallest values do: float32 stops at 1e-4.
    for a, b, c in schedule(steps, 1e-9 if X.dtype == torch.float64 else 1e-4, MARGIN[X.dtype]):
        G = symmetric(X)
        P = symmetric(G, G, b, c)
        X = torch.baddbmm(X, P, X, beta=a)
    X = X.reshape(*lead, *shape[-2:])
    return X.mT if tall else X


def by_svd(M: Tensor) -> Tensor:
    """U V^T over the singular values that are none of rounding."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    top = s.amax(-1, keepdim=True) if s.numel() else s
    kept = s > top * max(M.shape[-2:]) * torch.finfo(M.dtype).eps
    return (U * kept[..., None, :].to(M.dtype)) @ Vh


def core(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(C, Q0, Q1) with old^T new = Q0 C Q1^T and C as small as min(rows, d); no factors where rows >= d."""
    if old.shape[-2] >= old.shape[-1]:
        return old.mT @ new, None, None
    Q0, R0 = torch.linalg.qr(old.mT)
    Q1, R1 = torch.linalg.qr(new.mT)
    return R0 @ R1.mT, Q0, Q1


def completed(factor: Tensor) -> Tensor:
    """The orthogonal matrix nearest the identity among those that continue a partial isometry F [d, d]."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + by_svd((eye - factor @ factor.mT) @ (eye - factor.mT @ factor))


def bures_distance(new: Tensor, old: Tensor) -> Tensor:
    """[...] of [..., rows, d] twice."""
    nuclear = torch.linalg.svdvals(core(old, new)[0]).sum(-1)
    squared = new.square().sum((-2, -1)) + old.square().sum((-2, -1)) - 2 * nuclear
    return squared.clamp_min(0).sqrt()
