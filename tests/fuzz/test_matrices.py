"""Any matrices: ScaPre's solves, traces, information, polar factors and moments against float64 and their definitions."""

from __future__ import annotations

import math

import torch

from fastunlearn import ops
from tests.fuzz.draws import FLOATS, WIDE, Draw, fuzz, near, on
from tests.ops.test_spectral import robust
from tests.proof import assert_derived


def heights(draw: Draw) -> list[int]:
    return [draw.pick((0, 1, 5, 17, 40)) for _ in range(draw.integer(1, 3))]


def dtype_of(draw: Draw) -> torch.dtype:
    return draw.pick(WIDE if draw.backend == "reference" else (torch.float32, torch.float16))


@fuzz("spectral_solve", backends=("reference", "triton"))
def test_spectral_solve(draw: Draw) -> None:
    dtype, d = dtype_of(draw), draw.pick((1, 2, 5, 17, 33))
    rows = heights(draw)
    weights = [draw.tensor((h, d), dtype) for h in rows]
    tokens = draw.values((draw.integer(0, 12), d), draw.pick(("normal", "ties", "zeros")))
    anchors, x = draw.values(tokens.shape, "normal"), draw.values((d, 2), "normal")
    relevance = draw.pick(
        (torch.rand(sum(rows), generator=draw.generator).double(), torch.zeros(sum(rows)).double(), None)
    )
    p = {"weights": weights, "S": tokens.T @ tokens, "S_star": anchors.T @ tokens, "R": x @ x.T}
    p["relevance"] = torch.ones(sum(rows), dtype=torch.float64) if relevance is None else relevance
    lam, gamma, eta = draw.pick((0.1, 0.7, 5.0)), draw.pick((0.0, 0.4)), draw.pick((0.0, 1.0))
    if draw.backend == "reference":
        # "expanded" is another matrix, of one row's values: symmetric no more, unless they are all the same.
        p["S"] = draw.lay(p["S"])
    got = on(
        draw.backend,
        lambda: ops.spectral_solve(
            [w.clone() for w in weights], p["S"], p["S_star"], lam=lam, R=p["R"], gamma=gamma, eta=eta, relevance=relevance,
        ),
    )  # fmt: skip
    symmetric = bool((p["S"] - p["S"].mT).abs().max() <= 1e-5 * p["S"].abs().max())
    assert (got is ValueError) != symmetric
    if not symmetric:
        return
    if not sum(rows):
        assert [g.shape for g in got] == [(0, d)] * len(rows)
        return
    want = robust(p, lam, gamma, eta, relevance is not None)
    condition = (float(torch.linalg.matrix_norm(p["S"] + gamma * p["R"], 2)) + lam) / lam
    eps = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for g, w, before in zip(got, want, weights):
        assert g.dtype == dtype
        near(g, w, eps * (1 + math.sqrt(condition)) * max(1.0, float(w.abs().max()) if w.numel() else 0))
        if relevance is not None and not bool(relevance.any()):
            assert torch.equal(g, before)


@fuzz("spectral_trace", backends=("reference", "triton"))
def test_spectral_trace(draw: Draw) -> None:
    dtype, d = dtype_of(draw), draw.pick((1, 2, 5, 17, 33))
    weights = [draw.tensor((h, d), dtype, ("normal", "zeros", "ties")).detach().requires_grad_() for h in heights(draw)]
    wide_A = torch.float64 if dtype == torch.float64 else torch.float32
    A = draw.tensor((len(weights), d, d) if draw.maybe() else (d, d), wide_A)

    def run():
        out = ops.spectral_trace(weights, A)
        return [out.detach(), *torch.autograd.grad(out.sum(), weights)]

    got = on(draw.backend, run)
    each = A if A.dim() == 3 else A.expand(len(weights), d, d)
    symmetric = ((each + each.mT) / 2).double()
    wide = [w.detach().double() for w in weights]
    eps = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 3 * torch.finfo(dtype).eps)
    sizes = torch.stack([((w.abs() @ a.abs()) * w.abs()).sum() for w, a in zip(wide, symmetric)])
    near(got[0], torch.stack([((w @ a) * w).sum() for w, a in zip(wide, symmetric)]), eps * sizes + 1e-30)
    for g, w, a in zip(got[1:], wide, symmetric):
        near(g, 2 * w @ a, eps * 2 * (w.abs() @ a.abs()) + 1e-7)


def _activations(draw: Draw) -> tuple[list[torch.Tensor], torch.dtype, int]:
    dtype, d = dtype_of(draw), draw.pick((1, 4, 17, 33))
    return [draw.tensor((h, d), dtype) for h in heights(draw)], dtype, d


@fuzz("informax", backends=("reference", "triton"))
def test_informax(draw: Draw) -> None:
    """Whole numbers: activations are exact, and ties are ties on every backend."""
    weights, dtype, d = _activations(draw)
    whole = draw.maybe()
    m, n1, n0 = draw.integer(1, 5), draw.integer(1, 9), draw.integer(1, 9)
    positives, negatives = (draw.tensor((k, n, d), torch.float32) for k, n in ((m, n1), (draw.pick((1, m)), n0)))
    if whole:
        weights, positives, negatives = (
            [(2 * w).round() for w in weights], positives.round().clamp(-2, 2), negatives.round().clamp(-2, 2)
        )  # fmt: skip
    estimator, reduce = draw.pick(("binary", "gaussian")), draw.pick(("max", "mean", "none"))
    call = lambda: ops.informax(weights, positives, negatives, estimator=estimator, reduce=reduce)  # noqa: E731
    got = on(draw.backend, call)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((got >= 0).all())
    assert bool(got.isfinite().all())
    rows = torch.cat([w.double() for w in weights])
    samples = torch.cat([positives.double(), negatives.double().expand(m, -1, -1)], 1)
    a = torch.einsum("rd,mnd->rmn", rows, samples)
    if estimator == "binary":
        z = a > a.median(-1, keepdim=True).values
        each = sum(_term(z, zz, slice(*at), n1 + n0) for zz in (True, False) for at in ((0, n1), (n1, n1 + n0)))
        # A sample at the median to within rounding may fall on either side of it.
        gaps = (a - a.median(-1, keepdim=True).values).abs()
        sure = whole | ((gaps > 1e-4) | (gaps == 0)).all(-1)
    else:
        one, other, p = a[..., :n1], a[..., n1:], n1 / (n1 + n0)
        gap = one.mean(-1) - other.mean(-1)
        within = p * (one - one.mean(-1, keepdim=True)).square().mean(-1)
        within = within + (1 - p) * (other - other.mean(-1, keepdim=True)).square().mean(-1)
        each = 0.5 * torch.log1p(p * (1 - p) * gap**2 / within)
        sure = (within > 1e-3) & (gap.abs() > 1e-3)
    if reduce != "none":
        each, sure = (each.amax(1) if reduce == "max" else each.mean(1)), sure.all(1)
    near(torch.where(sure, got, 0), torch.where(sure, each, 0).to(torch.float64), 2e-4)


def _term(z: torch.Tensor, above: bool, at: slice, total: int) -> torch.Tensor:
    """p log(p / (p(z) p(y))) of samples on one side of the median and of one kind."""
    side = z if above else ~z
    joint, margin = side[..., at].double().sum(-1), side.double().sum(-1)
    size = z[..., at].shape[-1]
    return torch.where(joint > 0, joint / total * (joint * total / (margin * size).clamp_min(1)).clamp_min(1e-9).log(), 0.0)  # fmt: skip


@fuzz("row_entropy", backends=("reference", "triton"))
def test_row_entropy(draw: Draw) -> None:
    weights, _, d = _activations(draw)
    bins, n = draw.pick((2, 3, 20, 33)), draw.integer(1, 40)
    samples = draw.tensor((n, d), torch.float32, ("normal", "zeros", "ties"))
    got = on(draw.backend, lambda: ops.row_entropy(weights, samples, bins=bins))
    assert got.shape == (sum(len(w) for w in weights),)
    assert bool(((got >= 0) & (got <= 1 + 1e-6)).all())
    rows = torch.cat([w.double() for w in weights])
    a = rows @ samples.double().T
    if not len(a):
        return
    low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
    place = (a - low) / (high - low).clamp_min(1e-30) * bins
    # What lies at a border to within rounding may fall into either bin; rows of one activation are 0.
    sure = (((place - place.round()).abs() > 1e-3) | (a == low) | (a == high)).all(1) & ((high - low)[:, 0] > 1e-3)
    counts = torch.zeros(len(a), bins, dtype=torch.float64)
    counts.scatter_add_(1, place.long().clamp_(max=bins - 1), torch.ones_like(a))
    want = -torch.special.xlogy(counts / n, counts / n).sum(1) / math.log(bins)
    near(torch.where(sure, got, 0), torch.where(sure, want, 0), 1e-5)


@fuzz("polar", backends=("reference", "triton"))
def test_polar(draw: Draw) -> None:
    dtype = dtype_of(draw)
    shape = (*draw.pick(((), (0,), (2,), (1, 3))), draw.pick((0, 1, 4, 17)), draw.pick((0, 1, 5, 16)))
    M = draw.tensor(shape, dtype, ("normal", "zeros", "huge" if dtype == torch.float64 else "normal"))
    method = draw.pick(("newton-schulz", "svd"))
    got = on(draw.backend, lambda: ops.polar(M, method=method))
    assert got.shape == M.shape
    assert got.dtype == dtype
    assert bool(got.isfinite().all())
    U, s, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s
    if bool((s > 1e-2 * top).all()):
        near(got, U @ Vh, 1e-4 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps)
    elif bool((s == 0).all()):
        assert bool((got == 0).all())


@fuzz("bures_distance", backends=("reference",))
def test_bures_distance(draw: Draw) -> None:
    dtype, d = draw.pick(WIDE), draw.pick((1, 5, 17))
    pairs = [[draw.tensor((h, d), dtype, ("normal", "zeros")) for _ in range(2)] for h in heights(draw)]
    got = on(draw.backend, lambda: ops.bures_distance([a for a, _ in pairs], [b for _, b in pairs]))
    assert got.dtype == torch.float64
    for g, (a, b) in zip(got, pairs, strict=True):
        a, b = a.double(), b.double()
        nuclear = torch.linalg.svdvals(b.T @ a).sum() if len(a) else torch.zeros(())
        want = (a.square().sum() + b.square().sum() - 2 * nuclear).clamp_min(0)
        assert abs(float(g) ** 2 - float(want)) <= 1e-5 * (1 + float(a.square().sum() + b.square().sum()))


@fuzz("bures_geodesic", backends=("reference", "triton"))
def test_bures_geodesic(draw: Draw) -> None:
    dtype, d, t = dtype_of(draw), draw.pick((1, 5, 16)), draw.pick((0.0, 0.3, 1.0))
    old = [draw.tensor((h, d), dtype) for h in heights(draw)]
    new = [(w.double() + draw.pick((0.0, 0.05, 1.0)) * draw.values(w.shape, "normal")).to(dtype) for w in old]
    guard = draw.pick((None, 0.5))
    found = on(draw.backend, lambda: ops.bures_geodesic(new, old, t, guard=guard))
    assert [w.dtype for w in found.weights] == [dtype] * len(old)
    for w, before, start, moved in zip(found.weights, new, old, found.moved, strict=True):
        assert bool(w.isfinite().all())
        if not moved or t == 0:
            assert torch.equal(w, before)
        elif d <= len(start) and bool((torch.linalg.svdvals(start.double().T @ before.double()) > 1e-2).all()):
            U, _, Vh = torch.linalg.svd(start.double().T @ before.double())
            want = (1 - t) * before.double() + t * start.double() @ (U @ Vh)
            near(w, want, 1e-3 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps)


@fuzz("token_moments", backends=("reference", "triton"))
def test_token_moments(draw: Draw) -> None:
    dtype = draw.pick(WIDE if draw.backend == "reference" else FLOATS)
    shape = (*draw.shape(draw.integer(1, 2)), draw.pick((0, 1, 4, 17, 65)))
    features = draw.tensor(shape, dtype, ("normal", "normal", "ties", "zeros", "special"))
    weights = draw.pick((None, torch.rand(shape[:-1], generator=draw.generator)))
    anchors = draw.tensor(shape, dtype) if draw.maybe() else None
    out = torch.randn(shape[-1], shape[-1], dtype=torch.float64, generator=draw.generator) if draw.maybe() else None
    start = 0 if out is None else out.clone()
    got = on(draw.backend, lambda: ops.token_moments(features, weights, out, anchors=anchors))
    if not bool(features.isfinite().all()):
        assert got is ValueError
        assert out is None or torch.equal(out, start)
        return
    c = features.double().flatten(0, -2)
    a = c if anchors is None else anchors.double().flatten(0, -2)
    w = torch.ones(len(c), dtype=torch.float64) if weights is None else weights.double().flatten()
    want = start + (w[:, None] * a).T @ c
    assert_derived(got, got, want if isinstance(want, torch.Tensor) else torch.tensor(want), 1e-12, factor=0)
