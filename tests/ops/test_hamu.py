"""The HAMU step: the closed form against constrained optimisers in float64, every backend, every edge of the problem."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import fastunlearn
from fastunlearn import BitMask, ops
from fastunlearn.ops._hamu_solve import Problem, solve
from fastunlearn.ops.gram import UNIT, too_many
from tests.proof import Aot, OpProof, assert_derived, convert

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = {
    "list": [(5, 7), (16,), (33, 200), (4, 3, 3, 3), (1,)],
    "units": [(UNIT + 77,), (2048,), (3, 2049)],
    "empty tensors": [(0,), (3, 0), (70,)],
}


def _inputs(
    shapes, retain=1, dtypes=(torch.float32,), param=None, density=None, missing=(), conflict=0.3, device="cpu", seed=0, **options
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(s, generator=generator) for s in shapes]

    params, forget = draw(), draw()
    groups = [[x + conflict * f for x, f in zip(draw(), forget)] for _ in range(retain)]
    rows = [
        [x.to(dtypes[(g + i) % len(dtypes)]).to(device) for i, x in enumerate(row)]
        for g, row in enumerate([*groups, forget])
    ]
    may = None if density is None else [(torch.rand(s, generator=generator) < density).to(device) for s in shapes]
    if may is not None:
        for row in rows:
            for x, m in zip(row, may):
                x[~m] = float("nan")
    for g, t in missing:
        rows[g][t] = None
    params = [p.to(param or torch.float32).to(device) for p in params]
    return {"params": params, "rows": rows, "may": may, "options": {"lr": 1e-2, **options}}


def _case(shapes="list", *args, **options):
    return lambda device: _inputs(SHAPES[shapes], *args, device=device, **options)


def gram64(rows, may=None):
    out = []
    for t in range(len(rows[0])):
        like = next(row[t] for row in rows if row[t] is not None)
        flat = torch.stack(
            [(torch.zeros_like(like) if row[t] is None else row[t]).double().reshape(-1) for row in rows]
        )
        flat = flat if may is None else flat[:, may[t].reshape(-1)]
        out.append(flat @ flat.T)
    return torch.stack(out).numpy()


def plain64(args):
    """The step in float64: the changes by the same plan of exact inner products, and its certificate."""
    options = dict(args["options"])
    lr = options.pop("lr")
    if options.pop("descent", False):
        rows = [*args["rows"][:-1], [None if x is None else -x for x in args["rows"][-1]]]
    else:
        rows = args["rows"]
    gram = gram64(rows, args["may"])
    norms = np.sqrt(np.einsum("tgg->g", gram))
    limit = options.pop("max_grad_norm", None)
    clip = np.ones(len(rows)) if limit is None else np.minimum(1.0, limit / norms)
    budgets = options.pop("budgets", None)
    variant = options.get("variant", "q")
    demand = options.get("q")
    if demand is None:
        demand = 0.0 if variant == "u" and budgets is not None else options.get("ratio", 0.5) * lr
    simple = len(rows) == 2 and (budgets is None or variant == "q")
    problem = Problem(
        gram, lr, demand, variant, options.get("scope", "tensor"),
        options.get("allocation") or ("norms" if simple else "joint"), options.get("rule", "exact"),
        None if budgets is None else np.array(budgets) * clip[:-1], clip,
    )  # fmt: skip
    plan = solve(problem)
    out = []
    for t, p in enumerate(args["params"]):
        change = torch.zeros(p.shape, dtype=torch.float64)
        for g, row in enumerate(rows):
            if row[t] is not None and plan.coefficients[t, g]:
                change += plan.coefficients[t, g] * row[t].double()
        after = p.double() + change
        out.append(after if args["may"] is None else torch.where(args["may"][t], after, p.double()))
    numbers = [plan.s, plan.capacity, plan.hardness, plan.largest, plan.step_norm, *plan.predicted]
    return [*out, torch.tensor(numbers, dtype=torch.float64)]


def measure(certificate):
    c = certificate
    numbers = [c.s, c.capacity, c.hardness, c.largest, c.step_norm, *c.predicted_retain, c.predicted_forget]
    return torch.tensor(numbers, dtype=torch.float64)


class TestHamuStep(OpProof):
    op = "hamu_step_"
    backends = ("native", "triton")
    exact = False
    eps = 3e-6
    cases = {
        "q": _case(),
        "u": _case(variant="u"),
        "global": _case(scope="global"),
        "joint": _case(allocation="joint"),
        "paper's rule": _case(rule="paper", ratio=3.0),
        "hard": _case(conflict=3.0, ratio=2.0),
        "easy": _case(conflict=-3.0, ratio=0.1),
        "units": _case("units"),
        "empty tensors": _case("empty tensors"),
        "clipped": _case(max_grad_norm=1.0, ratio=0.3),
        "descent": _case(descent=True),
        "three groups": _case("list", 3),
        "three groups, u": _case("list", 3, variant="u"),
        "three budgets": _case("list", 3, budgets=[0.0, 1e-3, 1e-2]),
        "u by budgets": _case("list", 2, variant="u", budgets=[0.0, 1e-2]),
        "u by budgets, clipped": _case("list", 2, variant="u", budgets=[0.0, 1e-2], max_grad_norm=1.0),
        "masked": _case(density=0.4),
        "masked units bf16": _case("units", density=0.4, dtypes=[torch.bfloat16], param=torch.bfloat16),
        "missing": _case(missing=[(0, 1), (1, 2)]),
        "mixed": _case("list", 2, dtypes=list(FLOATS.values()), param=torch.float16),
        "bf16 to nearest": _case("units", dtypes=[torch.bfloat16], param=torch.bfloat16, stochastic=False),
        "bf16": _case("units", param=torch.bfloat16, seed=3),
    }
    few = (
        "q",
        "u",
        "empty tensors",
        "clipped",
        "three budgets",
        "masked",
        "masked units bf16",
        "missing",
        "mixed",
        "bf16",
    )
    aot = [
        Aot(
            "fastunlearn.kernels.hamu:_combine",
            {"table": "*i64", "count": "i32"},
            {
                "STEPS": 9,
                "GROUPS": groups,
                "P": f"tl.{param}",
                "CODE": code,
                "HAS_BITS": bits,
                "STOCHASTIC": stochastic,
                "ALIGNED": True,
                "BLOCK": 2048,
            },
            {"num_warps": 8},
        )
        for groups, param, code, bits, stochastic in [
            (2, "float32", 0, False, False),
            (2, "bfloat16", 2, True, True),
            (5, "bfloat16", -1, False, False),
            (2, "float16", 1, True, False),
        ]
    ]

    def _call(self, args):
        params = [p.clone() for p in args["params"]]
        options = dict(args["options"])
        options["stochastic_rounding"] = options.pop("stochastic", True)
        with fastunlearn.backend("auto"):
            masks = None if args["may"] is None else [BitMask.pack(m) for m in args["may"]]
        *retain, forget = args["rows"]
        retain = retain if len(retain) > 1 else retain[0]
        return params, ops.hamu_step_(params, retain, forget, masks=masks, **options)

    def run(self, args):
        params, certificate = self._call(args)
        # Everything but the head of the groups' numbers, which the comparison takes from `measure`.
        return [*params, certificate.values]

    def _compare(self, out, args):
        *params, values = out
        args = convert(args, lambda t: t.cpu())
        reference = self._run("reference", args)
        k = len(args["rows"]) - 1
        certificates = [measure(ops.Certificate(v, k, len(params))) for v in (values, reference[-1])]
        want = plain64({**args, "options": {n: v for n, v in args["options"].items() if n != "stochastic"}})
        assert_derived([*params, certificates[0]], [*reference[:-1], certificates[1]], want, self.eps)
        if args["may"] is not None:
            for p, before, may in zip(params, args["params"], args["may"]):
                assert torch.equal(p.cpu()[~may], before[~may])

    def test_reference(self, case):
        args = self.cases[case]("cpu")
        self._compare(self._run("reference", args), args)

    def library_calls(self, args):
        options = dict(args["options"])
        rows, params = args["rows"], [p.clone() for p in args["params"]]
        nothing = torch.empty(0, dtype=torch.uint8)
        bits = [nothing] * len(params) if args["may"] is None else [BitMask.pack(m).bits for m in args["may"]]
        grads = [torch.empty(0, 0) if x is None else x for row in rows for x in row]
        simple = len(rows) == 2
        choices = [options.get("variant", "q"), options.get("scope", "tensor"), "norms" if simple else "joint", "exact"]
        yield (
            torch.ops.fastunlearn.hamu_step_.default,
            (
                params, grads, len(rows), bits, 1e-2, options.get("ratio", 0.5) * 1e-2, None, choices, options.get("budgets"),
                options.get("max_grad_norm"), False, False, True, 0, 1,
            ),
        )  # fmt: skip


# ---- the maths, against optimisers that know nothing of it ---------------------------------------------------------------


def _problem(gram, **options):
    k = gram.shape[1] - 1
    fields = {"lr": 0.1, "variant": "q", "scope": "tensor", "allocation": "norms", "rule": "exact", "budgets": None}
    return Problem(gram=gram, clip=np.ones(k + 1), **{**fields, **options})


def _slsqp(objective, constraints, size, seed=0):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    best = math.inf
    for _ in range(4):
        found = optimize.minimize(
            objective, 1e-2 * rng.normal(size=size), method="SLSQP", options={"maxiter": 500, "ftol": 1e-13},
            constraints=[{"type": "ineq", "fun": c} for c in constraints],
        )  # fmt: skip
        # It may end because it can no longer improve: what counts is a point that is allowed.
        if min(c(found.x) for c in constraints) > -1e-8:
            best = min(best, found.fun)
    return best


def _gradients(seed, blocks, k, d, conflict):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(blocks, k + 1, d)) * np.exp(0.5 * rng.normal(size=(blocks, k + 1, 1)))
    g[:, :k] += conflict * g[:, k:]
    return g, np.einsum("bkd,bld->bkl", g, g)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("variant", ["q", "u"])
def test_closed_form_is_the_optimum(seed, variant):
    """One tensor: HAMU-Q and HAMU-U as the paper states them."""
    g, gram = _gradients(seed, 1, 1, 6, [-1.0, 0.0, 1.0][seed % 3])
    r, f = g[0]
    radius = 0.1 * np.linalg.norm(r if variant == "q" else f)
    largest = radius * np.linalg.norm(f if variant == "q" else r)
    demand = largest * [0.05, 0.4, 0.9][seed // 4]
    plan = solve(_problem(gram, demand=demand, variant=variant))
    step = plan.coefficients[0] @ g[0]
    unit = lambda x: x * radius  # noqa: E731
    assert np.linalg.norm(step) <= radius * (1 + 1e-12)
    assert plan.predicted == pytest.approx([r @ step, f @ step], rel=1e-12)
    scale = radius * np.linalg.norm(r)
    ball = lambda d: 1 - d @ d  # noqa: E731
    if variant == "q":
        assert f @ step >= demand * (1 - 1e-12)
        best = _slsqp(lambda d: (r @ unit(d)) / scale, [lambda d: (f @ unit(d) - demand) / largest, ball], 6)
        assert (r @ step) / scale == pytest.approx(best, abs=1e-6)
        # The paper's single-block flag: kappa > kappa2.
        assert plan.flagged == bool(r @ f > math.sqrt(max(0, (r @ r) * (f @ f) - demand**2 * (r @ r) / radius**2)))
    else:
        assert r @ step <= -demand * (1 - 1e-12)
        best = _slsqp(lambda d: -(f @ unit(d)) / scale, [lambda d: (-(r @ unit(d)) - demand) / largest, ball], 6)
        assert -(f @ step) / scale == pytest.approx(best, abs=1e-6)
        assert plan.flagged == (f @ step < 0)


@pytest.mark.parametrize("seed", range(6))
def test_angle_form_is_the_paper_s_allocation(seed):
    """Tensor by tensor, R_i = lr ||g_r,i|| and Q_i by norms: every block solves the paper's own problem."""
    g, gram = _gradients(seed, 4, 1, 5, 0.8)
    lr = 0.1
    products = np.linalg.norm(g[:, 0], axis=1) * np.linalg.norm(g[:, 1], axis=1)
    demand = 0.6 * lr * products.sum()
    plan = solve(_problem(gram, demand=demand))
    assert plan.s == pytest.approx(0.6, rel=1e-12)
    for (r, f), factors, product in zip(g, plan.coefficients, products):
        q, radius = demand * product / products.sum(), lr * np.linalg.norm(r)
        step, kappa = factors @ np.stack([r, f]), r @ f
        if kappa <= -q * np.linalg.norm(r) / radius:
            want = -radius * r / np.linalg.norm(r)
        else:
            p = r - kappa / (f @ f) * f
            want = q / (f @ f) * f - math.sqrt(radius**2 - q**2 / (f @ f)) * p / np.linalg.norm(p)
        np.testing.assert_allclose(step, want, rtol=0, atol=1e-12)
    assert plan.predicted[1] >= demand * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("variant", ["q", "u"])
def test_groups_are_the_optimum(seed, variant):
    k, blocks, d = 2 + seed % 3, 1 + seed % 2, 6
    g, gram = _gradients(seed, blocks, k, d, 0.7 * (seed % 2))
    budgets = np.abs(np.random.default_rng(seed).normal(size=k)) * 0.01 * (seed % 2)
    radii = 0.1 * np.linalg.norm(g[:, :k].mean(1) if variant == "q" else g[:, k], axis=1)
    options = {"variant": variant, "allocation": "joint", "budgets": budgets}
    with pytest.raises(ops.InfeasibleError) as error:
        solve(_problem(gram, demand=1e9, **options))
    demand = 0.5 * error.value.largest
    plan = solve(_problem(gram, demand=demand, **options))
    steps = np.einsum("bk,bkd->bd", plan.coefficients, g)
    assert (np.linalg.norm(steps, axis=1) <= radii * (1 + 1e-9)).all()
    scale = radii.sum() * np.linalg.norm(g, axis=2).max()

    def change(v):
        return np.einsum("bkd,bd->k", g, v[: blocks * d].reshape(blocks, d) * radii[:, None])

    balls = [lambda v, b=b: 1 - (v[: blocks * d].reshape(blocks, d)[b] ** 2).sum() for b in range(blocks)]
    if variant == "q":
        assert plan.predicted[k] >= demand - 1e-7 * scale
        best = _slsqp(
            lambda v: v[-1],
            [lambda v: (change(v)[k] - demand) / scale, *balls]
            + [lambda v, j=j: v[-1] - (change(v)[j] - budgets[j]) / scale for j in range(k)],
            blocks * d + 1, seed,
        )  # fmt: skip
        mine = (plan.predicted[:k] - budgets).max() / scale
    else:
        assert (plan.predicted[:k] <= budgets - demand + 1e-7 * scale).all()
        best = _slsqp(
            lambda v: -change(v)[k] / scale,
            [*balls, *[lambda v, j=j: (budgets[j] - demand - change(v)[j]) / scale for j in range(k)]],
            blocks * d, seed,
        )  # fmt: skip
        mine = -plan.predicted[k] / scale
    assert mine <= best + 1e-6
    if math.isfinite(best):
        assert mine == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_capacity_is_exact(k, seed):
    g, gram = _gradients(seed, 3, k, 5, 1.0)
    budgets = np.full(k, 0.01 * seed)
    plan = solve(
        _problem(gram, demand=1e-6, budgets=budgets if seed else None, allocation="joint" if k > 1 else "norms")
    )
    radii = 0.1 * np.linalg.norm(g[:, :k].mean(1), axis=1)
    scale = radii.sum() * np.linalg.norm(g, axis=2).max()

    def change(v):
        return np.einsum("bkd,bd->k", g, v.reshape(3, 5) * radii[:, None]) / scale

    balls = [lambda v, b=b: 1 - (v.reshape(3, 5)[b] ** 2).sum() for b in range(3)]
    keep = [lambda v, j=j: budgets[j] / scale - change(v)[j] for j in range(k)]
    best = _slsqp(lambda v: -change(v)[k], [*balls, *keep], 15, seed)
    assert plan.capacity / scale == pytest.approx(-best, abs=1e-6)


def test_the_paper_s_rule_is_sufficient_only_and_has_the_right_sign():
    flagged = {"exact": 0, "paper": 0}
    for seed in range(300):
        _, gram = _gradients(seed, 3, 1, 4, 0.3)
        demand = solve(_problem(gram, demand=0.0)).largest * 0.85
        exact, paper = (solve(_problem(gram, demand=demand, rule=rule)) for rule in ("exact", "paper"))
        assert paper.capacity <= exact.capacity * (1 + 1e-9)
        flagged["exact"] += exact.flagged
        flagged["paper"] += paper.flagged
        if (gram[:, 0, 1] < 0).all():
            # All easy: whatever the ball allows keeps, too. Without its sign kappa^2 would stop here.
            assert not exact.flagged
            assert not paper.flagged
    assert 0 < flagged["exact"] < flagged["paper"] < 300


@given(st.integers(0, 2**31), st.sampled_from(["q", "u"]), st.floats(0, 1), st.floats(-2, 2))
def test_promises(seed, variant, share, conflict):
    """Any gradients: inside the balls, the demand met, never worse than asked, hardness in [0, 1]."""
    g, gram = _gradients(seed, 3, 1, 3, conflict)
    problem = {"variant": variant, "demand": 0.0}
    largest = solve(_problem(gram, **problem)).largest
    problem["demand"] = share * largest
    plan = solve(_problem(gram, **problem))
    steps = np.einsum("bk,bkd->bd", plan.coefficients, g)
    radii = 0.1 * np.linalg.norm(g[:, 0 if variant == "q" else 1], axis=1)
    assert (np.linalg.norm(steps, axis=1) <= radii * (1 + 1e-7)).all()
    met = plan.predicted[1] if variant == "q" else -plan.predicted[0]
    assert met >= problem["demand"] - 1e-9 * largest
    assert 0 <= plan.hardness <= 1
    joint = solve(_problem(gram, **problem, allocation="joint"))
    assert (joint.predicted[0] if variant == "q" else -joint.predicted[1]) <= (
        plan.predicted[0] if variant == "q" else -plan.predicted[1]
    ) + 1e-6 * largest


def test_binding_names_the_group_that_blocks():
    f = torch.randn(40)
    free, blocking = torch.randn(40), 2 * f + 0.01 * torch.randn(40)
    p = [torch.zeros(40)]
    certificate = ops.hamu_step_(p, [[free], [blocking]], [f], lr=1e-2, ratio=1.0)
    assert certificate.flagged
    assert certificate.binding == (1,)
    assert certificate.hardness > 0.8
    before = p[0].clone()
    assert not ops.hamu_step_(p, [[free], [blocking]], [f], lr=1e-2, ratio=1.0, skip_flagged=True).taken
    assert torch.equal(p[0], before)
    easy = ops.hamu_step_(p, [[-f], [-f + 0.1 * free]], [f], lr=1e-2, ratio=1.0)
    assert not easy.flagged
    assert easy.binding == ()
    assert easy.hardness == pytest.approx(0, abs=1e-6)


# ---- the step --------------------------------------------------------------------------------------------------------


def test_first_order_promises_hold_on_a_quadratic():
    torch.manual_seed(1)
    a, b, w = torch.randn(30, 30) / 30, torch.randn(30), torch.randn(30)
    retain = lambda x: (a @ x).square().sum()  # noqa: E731
    forget = lambda x: ((x - b) ** 4).mean()  # noqa: E731
    a64, b64 = a.double(), b.double()
    retain64 = lambda x: float((a64 @ x.double()).square().sum())  # noqa: E731
    forget64 = lambda x: float(((x.double() - b64) ** 4).mean())  # noqa: E731
    x = w.clone().requires_grad_()
    (gr,), (gf,) = torch.autograd.grad(retain(x), [x]), torch.autograd.grad(forget(x), [x])
    for variant in ("q", "u"):
        p = w.clone()
        certificate = ops.hamu_step_([p], [gr], [gf], lr=3e-4, ratio=0.05, variant=variant)
        changes = forget64(p) - forget64(w), [retain64(p) - retain64(w)]
        assert changes[0] == pytest.approx(certificate.predicted_forget, rel=0.1)
        assert certificate.holds(*changes)
        assert not certificate.holds(-changes[0], [1.0])


def test_clipping_is_of_each_group_and_predictions_are_not_clipped():
    args = _inputs(SHAPES["list"], ratio=0.3, max_grad_norm=1.0)
    r, f = args["rows"]
    p = [torch.zeros_like(x) for x in r]
    certificate = ops.hamu_step_(p, r, f, **args["options"])
    norms = [math.sqrt(sum(float(x.double().square().sum()) for x in row)) for row in (r, f)]
    assert certificate.norms == pytest.approx(norms, rel=1e-6)
    assert certificate.clip == pytest.approx([1 / n for n in norms], rel=1e-6)
    assert certificate.largest <= 1e-2 * (1 + 1e-9)
    measured = [sum(float((x.double() * y).sum()) for x, y in zip(row, p)) for row in (r, f)]
    assert measured == pytest.approx([certificate.predicted_retain[0], certificate.predicted_forget], rel=1e-5)
    assert certificate.predicted_forget * certificate.clip[1] >= 0.3 * 1e-2 * (1 - 1e-6)
    assert certificate.cosines.shape == (5, 1)


def test_budgets_are_of_losses_and_not_of_clipped_gradients():
    forget, other = torch.randn(200), torch.randn(200)
    retain = [[10 * forget + other], [other]]
    certificate = ops.hamu_step_(
        [torch.zeros(200)], retain, [forget], lr=0.1, variant="u", budgets=[0.02, 5.0], max_grad_norm=1.0
    )
    assert max(certificate.clip) < 0.1
    assert certificate.budgets == pytest.approx([0.02, 5.0])
    assert certificate.predicted_retain[0] == pytest.approx(0.02, rel=1e-4)
    # What the budget allows is within the certificate, what is far beyond it is not.
    predicted = certificate.predicted_forget, certificate.predicted_retain
    assert certificate.holds(*predicted)
    assert not certificate.holds(predicted[0], [2.0, predicted[1][1]])
    assert certificate.to_dict()["budgets"] == certificate.budgets
    assert ops.hamu_step_([torch.zeros(200)], [other], [forget], lr=0.1).budgets is None


def test_stochastic_rounding_moves_what_nearest_loses():
    torch.manual_seed(0)
    p = [torch.ones(200_000, dtype=torch.bfloat16)]
    r, f = [torch.randn(200_000).bfloat16()], [torch.randn(200_000).bfloat16()]
    for backend in ("reference", "native"):
        with fastunlearn.backend(backend):
            moved = [p[0].clone()]
            certificate = ops.hamu_step_(moved, r, f, lr=1e-5, ratio=0.5)
            kept = [p[0].clone()]
            ops.hamu_step_(kept, r, f, lr=1e-5, ratio=0.5, stochastic_rounding=False)
            again = [p[0].clone()]
            ops.hamu_step_(again, r, f, lr=1e-5, ratio=0.5)
            other = [p[0].clone()]
            ops.hamu_step_(other, r, f, lr=1e-5, ratio=0.5, step=2)
        assert torch.equal(kept[0], p[0])
        assert torch.equal(moved[0], again[0])
        assert not torch.equal(moved[0], other[0])
        change = moved[0].double() - 1
        assert float(change @ r[0].double()) == pytest.approx(certificate.predicted_retain[0], rel=0.35)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_layouts(backend):
    p, r, f = (torch.randn(6, 4, 3, 3) for _ in range(3))
    may = torch.rand(6, 4, 3, 3) < 0.5
    last = torch.channels_last
    with fastunlearn.backend(backend):
        want = p.clone()
        ops.hamu_step_([want], [r], [f], lr=0.1, masks=[may])
        for q in (p.to(memory_format=last, copy=True), p.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)):
            stride = q.stride()
            ops.hamu_step_([q], [r.to(memory_format=last)], [f], lr=0.1, masks=[may])
            assert q.stride() == stride
            torch.testing.assert_close(q, want, rtol=1e-6, atol=1e-7)
            assert torch.equal(q[~may], p[~may])
        raw = torch.randn(5001)
        start = raw.clone()
        ops.hamu_step_([raw[1:]], [torch.randn(5000)], [torch.randn(5000)], lr=0.1)
        assert raw[0] == start[0]
        assert (raw[1:] != start[1:]).any()


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize(("variant", "retain", "density"), [("q", 1, None), ("u", 1, 0.5), ("q", 2, 0.5)])
def test_scales_are_a_change_of_variables(backend, variant, retain, density):
    made = _inputs(SHAPES["list"], retain, density=density, missing=((0, 1),))
    generator = torch.Generator().manual_seed(7)
    scales = [torch.rand(s, generator=generator) * 3 + 0.1 for s in SHAPES["list"]]
    may = made["may"] or [torch.ones(s, dtype=torch.bool) for s in SHAPES["list"]]
    options = {"lr": 1e-2, "variant": variant, "share": 0.6, "masks": made["may"]}
    # In z = p / D a gradient is D g, and p moves by D times what z moves.
    mine = [[None if x is None else d * x for d, x in zip(scales, row)] for row in made["rows"]]
    z = [torch.zeros(s) for s in SHAPES["list"]]
    start = [p.clone() for p in made["params"]]
    with fastunlearn.backend(backend):
        wanted = ops.hamu_step_(z, mine[:-1], mine[-1], **options)
        found = ops.hamu_step_(made["params"], made["rows"][:-1], made["rows"][-1], scales=scales, **options)
    torch.testing.assert_close(found.values, wanted.values)
    for p, before, d, change, free in zip(made["params"], start, scales, z, may):
        torch.testing.assert_close(p, torch.where(free, before + d * change, before), rtol=1e-5, atol=1e-7)
        assert torch.equal(p[~free], before[~free])


@pytest.mark.parametrize("variant", ["q", "u"])
def test_unharmed_is_about_growth_only(variant):
    made = _inputs(SHAPES["list"], 2, conflict=0.0)
    rows = made["rows"]
    certificate = ops.hamu_step_(made["params"], rows[:-1], rows[-1], lr=1e-3, variant=variant, share=0.3)
    predicted, forget = certificate.predicted_retain, certificate.predicted_forget
    assert max(predicted) < 0
    assert certificate.holds(forget, predicted)
    assert certificate.unharmed(predicted)
    # Half of the promised fall: nothing is harmed, the promise is not kept.
    fall = [p / 2 for p in predicted]
    assert not certificate.holds(forget, fall)
    assert certificate.unharmed(fall)
    assert not certificate.unharmed([-predicted[0], 0.0])
    budgeted = ops.hamu_step_(made["params"], rows[:-1], rows[-1], lr=1e-3, variant=variant, budgets=[0.5, 0.0], **({"share": 0.3} if variant == "q" else {}))  # fmt: skip
    assert budgeted.unharmed([0.5, 0.0])
    assert not budgeted.unharmed([0.0, 50.0])


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_scales_of_layouts(backend):
    p, r, f = (torch.randn(6, 4, 3, 3) for _ in range(3))
    square = [torch.randn(6, 6) for _ in range(3)]
    last = torch.channels_last
    with fastunlearn.backend(backend):
        for (q, gr, gf), layouts in (
            ((p, r, f), [lambda x: x.to(memory_format=last, copy=True), lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)]),
            (square, [lambda x: x.T.contiguous().T]),
        ):  # fmt: skip
            scale = torch.rand(q.shape) * 3 + 0.1
            want = q.clone()
            ops.hamu_step_([want], [gr.clone()], [gf.clone()], lr=0.1, share=0.5, scales=[scale])
            for layout in layouts:
                for other in (layout, torch.clone):
                    moved = layout(q)
                    ops.hamu_step_([moved], [other(gr)], [layout(gf)], lr=0.1, share=0.5, scales=[other(scale)])
                    torch.testing.assert_close(moved, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bit_gradients(dtype):
    r, f = torch.randn(3000).to(dtype), torch.randn(3000).to(dtype)
    scale = torch.rand(3000) + 0.5
    want, found = torch.zeros(3000), torch.zeros(3000)
    ops.hamu_step_([want], [r.float()], [f.float()], lr=0.1, share=0.5, scales=[scale])
    ops.hamu_step_([found], [r], [f], lr=0.1, share=0.5, scales=[scale])
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-3)


def test_a_gradient_in_two_lists_is_scaled_once():
    shared, second, f, scale = (torch.randn(40) for _ in range(4))
    scale = scale.abs() + 0.5
    results = []
    for alias in (True, False):
        p = torch.zeros(2 * 40).view(2, 40).unbind()
        p = [x.clone() for x in p]
        mine = shared.clone()
        groups = [[mine, second.clone()], [mine if alias else shared.clone(), second.clone() * 2]]
        ops.hamu_step_(p, groups, [f.clone(), f.clone()], lr=0.1, share=0.3, scales=[scale, scale])
        results.append(p)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_refused_step_leaves_scaled_gradients_as_they_were():
    g, f = torch.randn(50), torch.randn(50)
    retain, forget, p = g.clone(), f.clone(), torch.zeros(50)
    scale = torch.rand(50) + 0.5
    with pytest.raises(ops.InfeasibleError):
        ops.hamu_step_([p], [retain], [forget], lr=0.1, q=1e6, scales=[scale])
    torch.testing.assert_close(retain, g)
    torch.testing.assert_close(forget, f)
    with pytest.raises(ValueError, match="g_retain\\[1\\]: zero in every entry"):
        ops.hamu_step_([p], [[retain], [torch.zeros(50)]], [forget], lr=0.1, scales=[scale])
    torch.testing.assert_close(retain, g)
    assert not p.any()


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_autograd_sees_the_change(backend):
    p = torch.randn(7, requires_grad=True)
    saved = (p * p).sum()
    before = p._version
    with fastunlearn.backend(backend), torch.no_grad():
        ops.hamu_step_([p], [torch.randn(7)], [torch.randn(7)], lr=0.1)
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_more_groups_than_a_word_has_types(backend):
    """Two bits of an int64 are a group's type."""
    results = []
    for name in ("reference", backend):
        made = _inputs([(70,), (3, 40)], 33, dtypes=(torch.bfloat16,))
        with fastunlearn.backend(name):
            certificate = ops.hamu_step_(made["params"], made["rows"][:-1], made["rows"][-1], lr=1e-2, share=0.3)
        results.append([*made["params"], certificate.values])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    mixed = [[torch.zeros(3, dtype=(torch.bfloat16, torch.float32)[g % 2])] for g in range(32)]
    assert "31 of them" in too_many(mixed)["triton"]
    assert too_many(mixed[:31]) == {}
    assert too_many(mixed[::2]) == {}


def test_edges_of_single_tensors():
    """Gradients that are zero, equal, opposite or missing in one tensor only."""
    r = [torch.zeros(4), torch.randn(4), torch.randn(4), None, torch.randn(4), torch.tensor([2.0])]
    f = [torch.randn(4), torch.zeros(4), None, torch.randn(4), torch.randn(4), torch.tensor([3.0])]
    f[4] = 2 * r[4]
    for variant in ("q", "u"):
        p = [torch.zeros(4) for _ in range(5)] + [torch.zeros(1)]
        certificate = ops.hamu_step_(p, r, f, lr=0.1, ratio=0.1, variant=variant)
        assert all(x.isfinite().all() for x in p)
        still = (0, 3) if variant == "q" else (1, 2)
        for t in still:
            assert not p[t].any()
        other = (1, 2) if variant == "q" else (0, 3)
        for t in other:
            assert p[t].any()
        assert certificate.cosines[4, 0] == pytest.approx(1)
    p = [torch.zeros(4)]
    opposite = ops.hamu_step_(p, [r[1]], [-r[1]], lr=0.1, ratio=0.0)
    torch.testing.assert_close(p[0], -0.1 * r[1])
    assert not opposite.flagged
    assert opposite.hardness == 0
    same = ops.hamu_step_([torch.zeros(4)], [r[1]], [r[1]], lr=0.1, ratio=0.1)
    assert same.flagged
    assert same.hardness == pytest.approx(1, abs=1e-3)


_g = torch.ones(3)
_nan = torch.tensor([1.0, float("nan"), 0.0])


def _call(params=None, retain=None, forget=None, **options):
    params = [torch.zeros(3)] if params is None else params
    options = {"lr": 0.1, **options}
    return lambda: ops.hamu_step_(
        params, [_g] if retain is None else retain, [_g] if forget is None else forget, **options
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (_call(q=1.0), ValueError, r"q: Q = 1 of forgetting lies beyond the trust ball; the largest feasible Q of this step is 0\.3"),
        (_call(q=1.0, variant="u"), ValueError, "largest feasible U"),
        (_call(retain=[[_g], [-_g]], variant="u"), ValueError, "largest feasible U"),
        (_call(forget=[torch.zeros(3)]), ValueError, "g_forget: zero in every entry that may move"),
        (_call(retain=[torch.zeros(3)]), ValueError, "g_retain: zero in every entry"),
        (_call(retain=[[_g], [torch.zeros(3)]]), ValueError, r"g_retain\[1\]: zero in every entry"),
        (_call(forget=[_nan]), ValueError, "g_forget: the gradient of tensor 0 is not finite; nothing was changed"),
        (_call(retain=[_nan]), ValueError, "g_retain: the gradient of tensor 0 is not finite"),
        (_call(retain=[]), ValueError, "g_retain: empty"),
        (_call(retain=[[_g], []]), ValueError, r"g_retain\[1\]: an empty group"),
        (_call(retain=[None]), ValueError, "g_retain: every gradient is None"),
        (_call(forget=[None]), ValueError, "g_forget: every gradient is None"),
        (_call(retain=[[_g], _g]), TypeError, "g_retain: mixes tensors and lists"),
        (_call(retain=_g), TypeError, "g_retain: want a list of tensors"),
        (_call(forget=[_g, _g]), ValueError, "g_forget: want 1 gradients"),
        (_call(forget=[torch.ones(4)]), ValueError, r"shape \(4,\), want \(3,\)"),
        (_call(forget=[_g.double()]), TypeError, "want float32, float16 or bfloat16, got torch.float64"),
        (_call(params=[]), ValueError, "params: empty"),
        (_call(params=[torch.zeros(6)[::2]]), ValueError, r"params\[0\]: strides"),
        (_call(lr=0.0), ValueError, "lr: want a finite number > 0"),
        (_call(ratio=-1.0), ValueError, "ratio: want a finite number >= 0"),
        (_call(ratio=0.5, q=0.5), ValueError, "q, ratio, share: give one of them"),
        (_call(share=1.5), ValueError, r"share: want a number in \[0, 1\], got 1.5"),
        (_call(variant="x"), ValueError, "variant: want one of 'q', 'u'"),
        (_call(scope="layer"), ValueError, "scope: want one of"),
        (_call(rule="paper", retain=[[_g], [_g]]), ValueError, 'rule: "paper" is for one retain group'),
        (_call(allocation="norms", retain=[[_g], [_g]]), ValueError, 'allocation: "norms" is for one retain group'),
        (_call(budgets=[0.0, 0.0]), ValueError, "budgets: want 1"),
        (_call(budgets=[float("inf")]), ValueError, "budgets: want finite"),
        (_call(budgets=[0.0], variant="u", q=0.1), ValueError, 'budgets: with variant "u"'),
        (_call(masks=[]), ValueError, "masks: want 1"),
        (_call(scales=[]), ValueError, "scales: want 1 tensors"),
        (_call(scales=torch.ones(1, 3)), ValueError, "scales: want 1 tensors"),
        (_call(scales=[torch.ones(4)]), ValueError, r"scales\[0\]: want float32 \(3,\) on cpu, got torch.float32 \(4,\)"),
        (_call(scales=[torch.ones(3).double()]), ValueError, r"scales\[0\]: want float32 .* got torch.float64"),
        (_call(max_grad_norm=0.0), ValueError, "max_grad_norm: want a finite number > 0"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("variant", ["q", "u"])
def test_a_share_of_what_the_ball_holds(variant, groups):
    args = _inputs(SHAPES["list"], groups)
    *retain, forget = args["rows"]
    retain = retain if groups > 1 else retain[0]
    for share in (0.0, 0.4, 1.0):
        p = [x.clone() for x in args["params"]]
        c = ops.hamu_step_(p, retain, forget, lr=1e-2, share=share, variant=variant)
        assert c.demand == pytest.approx(share * c.largest, rel=1e-6)
        q = [x.clone() for x in args["params"]]
        other = ops.hamu_step_(q, retain, forget, lr=1e-2, q=c.demand, variant=variant)
        assert other.predicted_forget == pytest.approx(c.predicted_forget, rel=1e-4, abs=1e-5 * c.largest)


def test_nothing_moves_where_a_step_is_refused():
    p = [torch.randn(3)]
    before = p[0].clone()
    for retain, forget, q in (([_g], [_g], 1.0), ([_nan], [_g], 0.1), ([_g], [torch.zeros(3)], 0.1)):
        with pytest.raises(ValueError, match=r".*"):
            ops.hamu_step_(p, retain, forget, lr=0.1, q=q)
        assert torch.equal(p[0], before)
    twice = torch.zeros(3)
    with pytest.raises(ValueError, match="the same memory twice"):
        ops.hamu_step_([twice, twice], [_g, _g], [_g, -_g], lr=0.1, ratio=0.0)


def test_frozen_entries_may_hold_anything():
    p, mask = [torch.randn(64)], torch.arange(64) % 3 == 0
    r, f = torch.randn(64), torch.randn(64)
    want = p[0].clone()
    small = [want[mask].clone()]
    ops.hamu_step_(small, [r[mask]], [f[mask]], lr=0.1, ratio=0.5)
    r[~mask], f[~mask] = float("nan"), float("inf")
    ops.hamu_step_(p, [r], [f], lr=0.1, ratio=0.5, masks=[mask])
    assert torch.equal(p[0][~mask], want[~mask])
    torch.testing.assert_close(p[0][mask], small[0], rtol=1e-6, atol=1e-7)
