"""ScaPre's closed forms in plain PyTorch (arXiv 2601.06162, eqs. 3 and 8 - 10, and the systems of its published code).

All rows w of all projections share one symmetric matrix H (second moments of text features), whose eigenvectors Q and values L
are found once. A system that differs from row to row only by multiples of the identity is then two products and one division:

    w_new = w - v (w K)_j / (u + v L_j) Q^T,   K = N Q       rows u, v: see `rotate` and `rotate_back`

What is d x d is done in float64, what has as many rows as the model in the dtype of the stacked weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Singular values below this share of the largest are no direction of a span.
RANK_TOLERANCE = 1e-10


def rotate(
    stacked: Tensor, K: Tensor, values: Tensor, u: Tensor, v: Tensor, traces: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The product, the division and the sums that its epilogue takes.

    Args:
        stacked: [rows, d]. K: [d, d]. values: [d]. u, v: [rows], u above 0.

    Returns:
        E = v_i (stacked K)_ij / (u_i + v_i values_j) [rows, d]; float64 [rows, 3], where asked for: sums over j of E^2, of
        values E^2 and of E (stacked K).
    """
    E = stacked @ K
    # A row with v = 0 is divided by infinity.
    share = u / v
    E.div_(share[:, None] + values[None, :])
    if not traces:
        return E, None
    squares = E.square()
    energy, spectral = squares.sum(1, dtype=torch.float64), (squares @ values).double()
    return E, torch.stack([energy, spectral, torch.where(v > 0, share.double() * energy, 0.0) + spectral], 1)


def rotate_back(stacked: Tensor | None, E: Tensor, Q: Tensor) -> Tensor:
    """stacked - E Q^T, in its memory; E Q^T where `stacked` is None."""
    return E @ Q.T if stacked is None else stacked.addmm_(E, Q.T, alpha=-1)


def subtract_product(stacked: Tensor, D: Tensor, rows: Tensor | None) -> Tensor:
    """stacked - diag(rows) stacked D."""
    return torch.addmm(stacked, stacked, D, alpha=-1) if rows is None else stacked - rows[:, None] * (stacked @ D)


def shared_factor(H: Tensor, N: Tensor, lam: float) -> Tensor:
    """N (lam I + H)^-1 by Cholesky, float64 [d, d]: one matrix for all rows where none differs from the others."""
    system = H + lam * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.cholesky_solve(N.T, torch.linalg.cholesky(system)).T


def span(concepts: Tensor) -> Tensor:
    """Orthonormal basis [d, rank] of the columns of `concepts` [d, m], in float64; more columns than d give rank d at most."""
    U, s, _ = torch.linalg.svd(concepts.double(), full_matrices=False)
    return U[:, s > RANK_TOLERANCE * s.max()] if s.numel() else U


def projected(
    stacked: Tensor, H: Tensor, lam: float, basis: Tensor, d: Tensor, target: Tensor | None, masked: tuple[Tensor, ...] | None
) -> Tensor:  # fmt: skip
    """Rows of w (lam I + H + d_i P) = lam w0 + t_i with P the projector on `basis`: one Cholesky, and Woodbury for d_i P.

    With G = lam I + H, B^T G^-1 B = Y diag(h) Y^T and Z = G^-1 B Y the row is
        w0 - w0 H G^-1 + t G^-1 - sum_j d_i / (1 + d_i h_j) (lam w0 z_j + t z_j) z_j^T

    Args:
        stacked: w0 [rows, d]. H: float64 [d, d]. basis: B, float64 [d, rank]. d: [rows], at least 0.
        target: t = w0 target, float64 [d, d]; or None, and
        masked: (mask [rows, m], anchors [m, T, d], features [m, T, d]): t_i = sum_k mask_ik sum_t (w0_i . anchor_kt) feature_kt.
    """
    dtype = stacked.dtype
    G = H + lam * torch.eye(len(H), dtype=H.dtype, device=H.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(G))
    Z = inverse @ basis
    h, Y = torch.linalg.eigh(basis.T @ Z)
    Z = Z @ Y
    moved = H @ inverse
    along = lam * Z
    if target is not None:
        moved = moved - target @ inverse
        along = along + target @ Z
    out = torch.addmm(stacked, stacked, moved.to(dtype), alpha=-1)
    coefficients = stacked @ along.to(dtype)
    if masked is not None:
        mask, anchors, features = masked
        # As many concepts at once as keep their activations near 256 MiB.
        chunk = max(1, 2**26 // max(1, len(stacked) * anchors.shape[1]))
        both = torch.cat([inverse, Z], 1)
        for m, a, c in zip(mask.split(chunk, 1), anchors.split(chunk), features.split(chunk)):
            v = stacked @ a.reshape(-1, a.shape[-1]).to(dtype).T
            v = (v.view(len(v), *a.shape[:2]) * m[:, :, None].to(dtype)).flatten(1)
            added = v @ (c.reshape(-1, c.shape[-1]).double() @ both).to(dtype)
            out += added[:, : len(H)]
            coefficients += added[:, len(H) :]
    share = d[:, None] / (1 + d[:, None] * h.to(dtype)[None, :])
    return out.addmm_(coefficients * share, Z.to(dtype).T, alpha=-1)


def spectral_trace(weights: list[Tensor], A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """tr(W A W^T) of each [num], and its gradients halved, W A; A symmetric [d, d] or [num, d, d]."""
    products = [w @ a for w, a in zip(weights, A if A.dim() == 3 else [A] * len(weights))]
    if not weights:
        return A.new_zeros(0), products
    return torch.stack([(p * w).sum() for p, w in zip(products, weights)]), products
