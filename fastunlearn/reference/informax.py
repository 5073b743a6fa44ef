"""How much an output row of a projection tells of a concept, in plain PyTorch (arXiv 2601.06162, eqs. 6 and 7).

The activation a = w . s of row w on a sample s is compared with the row's median over all samples: z = [a > median]. With y = 1
for the samples of a concept and 0 for the others, the mutual information of z and y depends on two counts alone, how many
samples of either kind lie above: it is looked up in a table of (positives + 1) x (negatives + 1) numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Activations at once, in entries.
CHUNK = 2**26
#: error of an activation, in units of its dtype
ROUNDING = 8


def information_table(positives: int, negatives: int) -> Tensor:
    """float64 [positives + 1, negatives + 1]: mutual information (nats) of y and z by the numbers of samples with z = 1."""
    total = positives + negatives

    def term(joint: Tensor, margin: Tensor, size: int) -> Tensor:
        # p log(p / (p(z) p(y))); nothing where there is no such sample.
        safe = joint.clamp_min(1) * total / (margin.clamp_min(1) * size)
        return torch.where(joint > 0, joint / total * safe.log(), 0.0)

    a = torch.arange(positives + 1, dtype=torch.float64)[:, None].expand(-1, negatives + 1)
    b = torch.arange(negatives + 1, dtype=torch.float64)[None, :].expand(positives + 1, -1)
    above, below = a + b, total - a - b
    return (
        term(a, above, positives) + term(b, above, negatives)
        + term(positives - a, below, positives) + term(negatives - b, below, negatives)
    )  # fmt: skip


def binary(activations: Tensor, positives: int, table: Tensor) -> Tensor:
    """activations [..., samples], the positives first -> mutual information [...]; threshold: the (lower) median."""
    z = activations > activations.median(-1, keepdim=True).values
    a, b = z[..., :positives].sum(-1), z[..., positives:].sum(-1)
    return table.to(activations)[a, b]


def gaussian(activations: Tensor, positives: int) -> Tensor:
    """activations [..., samples], the positives first -> [...]: 1/2 log(1 + p (1 - p) (m1 - m0)^2 / variance within)."""
    one, other = activations[..., :positives], activations[..., positives:]
    p = positives / activations.shape[-1]
    gap = (one.mean(-1) - other.mean(-1)).abs()
    # Means that differ by rounding alone are one.
    rounding = ROUNDING * torch.finfo(activations.dtype).eps * activations.abs().amax(-1)
    gap = torch.where(gap > rounding, gap, 0.0)
    within = p * one.var(-1, correction=0) + (1 - p) * other.var(-1, correction=0)
    signal = p * (1 - p) * gap.square()
    ratio = torch.where(signal > 0, signal / within.clamp_min(torch.finfo(within.dtype).tiny), 0.0)
    return 0.5 * torch.log1p(ratio.clamp(max=torch.finfo(within.dtype).max))


def informax(weights: Tensor, positives: Tensor, negatives: Tensor, estimator: str, reduce: str) -> Tensor:
    """weights [rows, d], positives [m, n1, d], negatives [m or 1, n0, d] -> [rows], or [rows, m] with reduce "none"."""
    m, n1, d = positives.shape
    n0 = negatives.shape[1]
    table = information_table(n1, n0).to(weights)
    samples = torch.cat([positives, negatives.expand(m, -1, -1)], 1).reshape(-1, d)
    parts = []
    for rows in weights.split(max(1, CHUNK // max(1, len(samples)))):
        a = (rows @ samples.T).view(len(rows), m, n1 + n0)
        mi = binary(a, n1, table) if estimator == "binary" else gaussian(a, n1)
        parts.append(mi if reduce == "none" else mi.amax(1) if reduce == "max" else mi.mean(1))
    return torch.cat(parts)


def row_entropy(weights: Tensor, samples: Tensor, bins: int) -> Tensor:
    """weights [rows, d], samples [n, d] -> [rows]: entropy of a row's activations in `bins` equal bins, over log bins."""
    parts = []
    for rows in weights.split(max(1, CHUNK // max(1, len(samples)))):
        a = rows @ samples.T
        low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
        place = ((a - low) / (high - low).clamp_min(1e-30) * bins).long().clamp_(0, bins - 1)
        counts = torch.zeros(len(rows), bins, dtype=a.dtype, device=a.device)
        p = counts.scatter_add_(1, place, torch.ones_like(a)) / len(samples)
        parts.append(-torch.special.xlogy(p, p).sum(1) / math.log(bins))
    return torch.cat(parts)
