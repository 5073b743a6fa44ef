"""Second moments of text features, in float64 (the S of ScaPre, arXiv 2601.06162, eq. 4)."""

from __future__ import annotations

from torch import Tensor

#: Tokens at once: a copy of so many in float64 is all the memory it takes.
CHUNK = 8192


def token_moments(anchors: Tensor, features: Tensor, weights: Tensor | None, out: Tensor) -> Tensor:
    """out += sum_t weight_t anchor_t feature_t^T; [tokens, d] twice, [tokens], float64 [d, d]."""
    parts = zip(anchors.split(CHUNK), features.split(CHUNK))
    for i, (a, c) in enumerate(parts):
        left = a.double() if weights is None else a.double() * weights[i * CHUNK : (i + 1) * CHUNK, None].double()
        out.addmm_(left.T, c.double())
    return out
