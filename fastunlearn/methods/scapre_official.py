"""ScaPre as its authors' published code computes it, from facts about that code; the solve is exact and fast.

Its program for many concepts (erase_scale.py):

For every projection W0, with the concepts' last words C, context tokens c_kt (last word to the last position), the tokens c'_kt of the
anchor in their places (from its own last word on; of the empty anchor from the first position), S = sum c c^T:

    mu        mean normalised entropy of its rows' activations on noisy copies of C
    m_ki      sigmoid(z-score over rows of the mutual information of row i and concept k, / T)^p;  m_i = max over k
    R         U diag(mu (1 - gate(s))) U^T of C = U s V^T, gate = sigmoid(s - median), where `ased`
    row i     w_i ((lamb + mu) I + R + C C^T + es S + es m_i P_C) = (lamb + mu) w0_i + es sum_k m_ki sum_t (w0_i c'_kt) c_kt^T

and then, row by row, fixed-point steps towards the least |w - a|^2 (lamb + mu) + mu d(w w^T, w0 w0^T)^2. Its program for few (erase.py,
the presets of ROLLBACKS) has no such steps and goes back a share of the way instead, h_i being the normalised entropy of row i:

    row i     v_i (lamb I + C C^T + es S) = lamb w0_i + es sum_k m_ki sum_t (w0_i c'_kt) c_kt^T - es w0_i C' C'^T
              w_i = a_i v_i + (1 - a_i) w0_i,  a_i = alpha_min + (1 - alpha_min) (1 - h_i)

with C' = (I - U diag(gate(s)) U^T) C where `residual`, else 0. The code draws noise anew wherever it needs some, without a seed; here
one seeded draw serves all, and C C^T is in S as it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastunlearn import ops
from fastunlearn.data.concepts import noisy
from fastunlearn.data.prompts import TextStream, empty_feature
from fastunlearn.report.cost import free_bytes

if TYPE_CHECKING:
    from fastunlearn.methods.scapre import ScaPreConfig

#: es, p (None: no mask), ased, entropy samples, of the published commands
PRESETS: dict[str | None, tuple[float | None, float | None, bool, int]] = {
    None: (None, 5.0, False, 20),
    "diversi50": (3.0, 5.0, False, 20),
    "confuse5": (2.0, 8.0, True, 30),
    "artists": (2.0, 8.0, True, 30),
    "nsfw": (2.0, None, False, 20),
}
#: alpha_min and whether there is C', of the published commands of the other program; es 1, p 2, 20 samples
ROLLBACKS: dict[str | None, tuple[float, bool]] = {
    "imagenette": (0.8, False),
    "artists-rollback": (0.5, False),
    "confuse5-residual": (1.0, True),
}
TEMPERATURE, BINS = 0.7, 20


def soft_mask(information: Tensor, power: float, temperature: float = TEMPERATURE) -> Tensor:
    """[rows of one projection, m] -> in (0, 1): sigmoid of the z-score over the rows, to a power."""
    deviation = (
        information.std(0, correction=1).clamp_min(1e-8) if len(information) > 1 else torch.ones_like(information[0])
    )
    return ((information - information.mean(0)) / deviation / temperature).sigmoid() ** power


def bures_rows(new: Tensor, old: Tensor, lam: float, mu: float, steps: int = 1) -> Tensor:
    """The code's fixed-point steps, row by row: from a = `new` towards the line of w0 = `old`.

    u <- lam |a| u_a + mu |w0| kappa u0 with kappa = max(0, cos(u, u0)), |w| = (lam |a| + mu |w0| kappa) / (lam + mu).
    """
    length, length0 = (t.norm(dim=1, keepdim=True) for t in (new, old))
    tiny = torch.finfo(new.dtype).tiny
    direction, direction0 = new / length.clamp_min(tiny), old / length0.clamp_min(tiny)
    u, radius = direction, length
    for _ in range(steps):
        kappa = (u * direction0).sum(1, keepdim=True).clamp_min(0)
        radius = (lam * length + mu * length0 * kappa) / (lam + mu)
        u = lam * length * direction + mu * length0 * kappa * direction0
        u = u / u.norm(dim=1, keepdim=True).clamp_min(tiny)
    return radius * u


def _between(new: Tensor, old: Tensor, share: Tensor) -> Tensor:
    """Row i goes share_i of the way from `old` to `new`."""
    wide = torch.promote_types(new.dtype, torch.float32)
    return torch.lerp(old.to(wide), new.to(wide), share[:, None].to(wide)).to(old.dtype)


def _context(stream: TextStream, names: Sequence[str], guides: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Last words [m, d]; features from there on and, in their places, the anchors' from their last words on, [m, T, d], as long as
    both have some, 0 behind."""
    # A space, as in the code, tokenises to nothing.
    anchors = [guide or " " for guide in guides]
    mine, theirs = (stream.encode(texts).double() for texts in (names, anchors))
    starts = [(stream.tokens(texts).lengths - 2).tolist() for texts in (names, anchors)]
    c, a = torch.zeros_like(mine), torch.zeros_like(mine)
    for k, (start, other) in enumerate(zip(*starts, strict=True)):
        count = mine.shape[1] - max(start, other)
        c[k, :count], a[k, :count] = mine[k, start : start + count], theirs[k, other : other + count]
    return c[:, 0].clone(), c, a


def official(
    stream: TextStream, old: Mapping[str, Tensor], names: Sequence[str], guides: Sequence[str], config: ScaPreConfig
) -> tuple[list[Tensor], Tensor, Tensor]:
    """New weights of `old`, the mask m_i [rows], and S.

    Raises:
        ValueError: its system has a mask for every row and concept, and these and the tokens do not fit memory.
    """
    scale, power, ased, copies = PRESETS.get(config.preset, (1.0, 2.0, False, 20))
    es = config.erase_scale if scale is None else scale
    weights = list(old.values())
    device = weights[0].device
    heights = [len(w) for w in weights]
    # Tokens of concepts and anchors as they come and in their places, mutual information and mask, float64.
    need = 8 * len(names) * (4 * stream.length * weights[0].shape[1] + 3 * sum(heights))
    free = free_bytes(device)
    if free is not None and need > free:
        raise ValueError(
            f"concepts: mode official holds the tokens and a mask of every row for all {len(names)} at once, {need / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free. Mode robust streams them"
        )
    last, c, a = (t.to(device) for t in _context(stream, names, guides))
    empty = empty_feature(stream).to(device)
    if power is None:
        masks = torch.ones(sum(heights), len(names), device=device)
    else:
        information = ops.informax(
            weights, *(noisy(t, config.samples, config.noise, config.seed) for t in (last, empty)), reduce="none"
        )
        masks = torch.cat([soft_mask(part, power) for part in information.split(heights)])
    entropies = ops.row_entropy(weights, noisy(last, copies, config.noise, config.seed), bins=BINS)
    U, s, _ = torch.linalg.svd(last.T, full_matrices=False)
    gate = (s - s.median()).sigmoid()
    S = ops.token_moments(last) + es * ops.token_moments(c)
    if config.preset in ROLLBACKS:
        floor, residual = ROLLBACKS[config.preset]
        C = last.T - (U * gate) @ (U.T @ last.T) if residual else torch.zeros_like(last.T)
        R = C @ C.T
        # What R adds on the left is taken out of S: it stands on the right alone.
        new = ops.spectral_solve(
            weights, S - es * R, None, lam=config.lamb, R=R, gamma=es, eta=-1.0, mode="official", relevance=0.0,
            per_concept=(es * masks, a, c),
        )  # fmt: skip
        share = (floor + (1 - floor) * (1 - entropies)).split(heights)
        return [_between(n, w, x) for n, w, x in zip(new, weights, share)], masks.amax(1), S
    mus = [float(part.mean()) for part in entropies.split(heights)]
    R = (U * (1 - gate)) @ U.T if ased else None
    new = ops.spectral_solve(
        weights, S, None, lam=[config.lamb + mu for mu in mus], R=R, gamma=mus, eta=0.0, projector=last.T,
        relevance=es * masks.amax(1), mode="official", per_concept=(es * masks, a, c),
    )  # fmt: skip
    made = []
    for n, w, mu in zip(new, weights, mus):
        dtype = torch.promote_types(n.dtype, torch.float32)
        made.append(bures_rows(n.to(dtype), w.to(dtype), config.lamb + mu, mu).to(w.dtype))
    return made, masks.amax(1), S
