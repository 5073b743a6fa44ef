"""The Frechet distance of two sets of features, each taken for a normal distribution (Dowson & Landau 1982; FID: Heusel et al. 2017).

    d^2 = ||m_1 - m_2||^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2)

C_1 C_2 is not symmetric, but it has the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is: two symmetric eigendecompositions in fp64
replace the square root of a general matrix, and singular covariances (fewer images than features) need no offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean fp64 [F] and covariance fp64 [F, F] of `count` features."""

    mean: Tensor
    covariance: Tensor
    count: int


def moments(features: Tensor) -> Moments:
    """Moments of features [n, F]; the covariance is divided by n - 1, as numpy.cov has it.

    Raises:
        ValueError: another shape, fewer than two features, or some that are not finite.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features: want [n >= 2, F], got {tuple(features.shape)}")
    x = features.double()
    if not torch.isfinite(x).all():
        raise ValueError("features: not finite")
    mean = x.mean(0)
    centred = x - mean
    return Moments(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(one: Moments, two: Moments) -> float:
    """d^2 of the formula above (what is called FID), >= 0.

    Raises:
        ValueError: features of different length.
    """
    if one.mean.shape != two.mean.shape:
        raise ValueError(f"moments: want features of one length, got {len(one.mean)} and {len(two.mean)}")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp_min(0).sqrt()
    inner = torch.linalg.eigvalsh(root.T @ two.covariance @ root)
    cross = inner.clamp_min(0).sqrt().sum()
    distance = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace() - 2 * cross
    # Rounding may leave a distance of nothing a little below it.
    return max(0.0, float(distance))
