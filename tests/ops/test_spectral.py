"""The closed forms against normal equations, scipy's Sylvester solver, per-row Cholesky and finite differences, in float64."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

import fastunlearn
from fastunlearn import ops
from fastunlearn.reference import spectral as reference
from tests.proof import Aot, OpProof, assert_derived, assert_equal


def problem(heights=(5, 7, 3), d=12, m=4, T=3, seed=0, dtype=torch.float64, device="cpu", size=1.0):
    """Projections, tokens of m concepts, what they become, their moments, a relevance for every row."""
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(h, d, generator=g, dtype=torch.float64) for h in heights]
    c, a = (size * torch.randn(m, T, d, generator=g, dtype=torch.float64) for _ in range(2))
    x = torch.randn(d, 2, generator=g, dtype=torch.float64)
    relevance = torch.rand(sum(heights), generator=g, dtype=torch.float64)
    relevance[::4] = 0
    out = {
        "weights": [w.to(dtype) for w in weights],
        "c": c, "a": a,
        "S": torch.einsum("mti,mtj->ij", c, c), "S_star": torch.einsum("mti,mtj->ij", a, c),
        "R": x @ x.T,
        "relevance": relevance,
    }  # fmt: skip
    return {k: [t.to(device) for t in v] if isinstance(v, list) else v.to(device) for k, v in out.items()}


def rows_of(p):
    return torch.cat([w.double() for w in p["weights"]])


def per_row(p, system, right):
    """Row i: solve w system(i) = right(i, w0), by Cholesky, one after another."""
    out = []
    for i, w in enumerate(rows_of(p)):
        out.append(torch.cholesky_solve(right(i, w)[:, None], torch.linalg.cholesky(system(i)))[:, 0])
    return torch.stack(out)


def robust(p, lam=0.7, gamma=0.0, eta=1.0, relevance=True):
    eye = torch.eye(p["S"].shape[0], dtype=torch.float64)
    alpha = p["relevance"] if relevance else torch.ones_like(p["relevance"])
    H = p["S"] + gamma * p["R"]
    star = p["S_star"] + gamma * eta * p["R"]
    new = per_row(
        p,
        lambda i: lam * eye + alpha[i] * H,
        lambda i, w: w @ (lam * eye + alpha[i] * star),
    )
    return list(new.split([len(w) for w in p["weights"]]))


def _case(**kwargs):
    lam = kwargs.pop("lam", 0.7)
    gamma, eta = kwargs.pop("gamma", 0.0), kwargs.pop("eta", 1.0)
    relevance = kwargs.pop("relevance", True)
    kwargs.setdefault("dtype", torch.float32)

    def make(device):
        return {
            **problem(device=device, **kwargs), "lam": lam, "gamma": gamma, "eta": eta, "relevant": relevance,
        }  # fmt: skip

    return make


class TestSpectralSolve(OpProof):
    op = "spectral_solve"
    backends = ("triton",)
    aot = [
        Aot(
            "fastunlearn.kernels.spectral:_rotate",
            {"weights": "*fp32", "K": "*fp32", "values": "*fp32", "u": "*fp32", "v": "*fp32", "E": "*fp32", "sums": "*fp32",
             "rows": "i64", "d": "i32"},
            {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32},
            {"num_warps": 8, "num_stages": 3},
        )
    ]  # fmt: skip
    exact = False
    traced = ("held, eta 0", "halves")
    eps = 2e-5
    cases = {
        "small": _case(),
        "ragged": _case(heights=(33, 70, 1, 130), d=77, m=9, T=7),
        "one row": _case(heights=(1,), d=5, m=1, T=1),
        "tall": _case(heights=(300, 40), d=24, m=3, T=5),
        "more tokens than dimensions": _case(heights=(9, 30), d=16, m=40, T=4),
        "halves": _case(heights=(20, 9), dtype=torch.float16),
        "bf16": _case(heights=(20, 9), dtype=torch.bfloat16),
        "held": _case(heights=(20, 9), gamma=0.4),
        "held, eta 0": _case(heights=(20, 9), gamma=0.4, eta=0.0),
        "no relevance": _case(heights=(40, 9), d=40, relevance=False),
        "no rows": _case(heights=(0, 4)),
    }
    few = ("small", "ragged", "tall", "held, eta 0", "no relevance", "halves", "no rows")

    def run(self, args):
        return ops.spectral_solve(
            [w.clone() for w in args["weights"]], args["S"], args["S_star"], lam=args["lam"], R=args["R"], gamma=args["gamma"],
            eta=args["eta"], relevance=args["relevance"] if args["relevant"] else None,
        )  # fmt: skip

    def library_calls(self, args):
        num, alpha = len(args["weights"]), args["relevance"] if args["relevant"] else None
        for traces in (False, True):
            yield torch.ops.fastunlearn.spectral_solve.default, (
                args["weights"], args["S"], args["S_star"], [args["lam"]] * num, alpha, args["R"], [args["gamma"]] * num, args["eta"],
                None, "robust", [], traces,
            )  # fmt: skip

    def oracle(self, args):
        return robust(args, args["lam"], args["gamma"], args["eta"], args["relevant"])

    def test_reference(self, case):
        args = self.cases[case]("cpu")
        got = self._run("reference", args)
        dtype = args["weights"][0].dtype
        assert all(g.dtype == dtype for g in got)
        eps = self.eps if dtype == torch.float32 else torch.finfo(dtype).eps
        assert_derived(got, got, self.oracle(args), eps, factor=0)
        wide = {**args, "weights": [w.double() for w in args["weights"]]}
        exact = self._run("reference", wide)
        assert_derived(exact, exact, self.oracle(wide), 1e-11, factor=0)


def test_traces_of_the_kernel():
    """The sums of the epilogue over two column tiles and a ragged edge."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("runs Triton's interpreter")
    from fastunlearn.kernels import spectral as kernels

    rows, d = 150, 140
    w, K = torch.randn(rows, d), torch.randn(d, d)
    values, u, v = torch.rand(d) * 9, torch.rand(rows) + 0.5, torch.rand(rows)
    v[3] = 0
    got, want = kernels.rotate(w, K, values, u, v), reference.rotate(w, K, values, u, v)
    exact = reference.rotate(*(t.double() for t in (w, K, values, u, v)))
    assert_derived(got, want, exact)
    assert got[1].dtype == torch.float64


def solve(p, **kwargs):
    with fastunlearn.backend("reference"):
        out = ops.spectral_solve(p["weights"], p["S"], p["S_star"], **{"lam": 0.7, **kwargs})
    return out


def test_paper_is_the_sylvester_equation():
    p = problem()
    A = p["S"] + p["R"] + 0.3 * torch.eye(12, dtype=torch.float64)
    got = solve(p, lam=0.3, R=p["R"], gamma=1.0, relevance=p["relevance"], mode="paper")
    rows = rows_of(p)
    want = scipy.linalg.solve_sylvester(p["relevance"].diag().numpy(), A.numpy(), (rows @ p["S_star"]).numpy())
    torch.testing.assert_close(torch.cat(got), torch.from_numpy(want), rtol=1e-11, atol=1e-11)
    # Eq. 10, the Kronecker system.
    n, d = rows.shape
    eye = {k: torch.eye(k, dtype=torch.float64) for k in (n, d)}
    K = torch.kron(eye[d], p["relevance"].diag()) + torch.kron(A, eye[n])
    vec = torch.linalg.solve(K, (rows @ p["S_star"]).T.flatten()).view(d, n).T
    torch.testing.assert_close(torch.cat(got), vec, rtol=1e-10, atol=1e-10)


def test_paper_refuses_nothing_as_a_target():
    p = problem()
    with pytest.raises(ValueError, match="whose only solution is W = 0"):
        solve({**p, "S_star": torch.zeros(12, 12)}, mode="paper")


def official(p, lam, es=2.0, mu=0.4, R=None, masks=None, concepts=None):
    """The system of the authors' editor, row by row: (lam + mu) I + mu R + C C^T + es S + es m_i Pi."""
    d = p["S"].shape[0]
    eye = torch.eye(d, dtype=torch.float64)
    C = concepts
    pi = C @ torch.linalg.solve(C.T @ C + 1e-8 * torch.eye(C.shape[1], dtype=torch.float64), C.T)
    if C.shape[1] >= d:
        pi = eye
    m = masks.max(1).values
    G = (lam + mu) * eye + C @ C.T + es * p["S"] + (mu * R if R is not None else 0)

    def right(i, w):
        b = (lam + mu) * w
        for k in range(masks.shape[1]):
            b = b + es * masks[i, k] * ((p["a"][k] @ w)[:, None] * p["c"][k]).sum(0)
        return b

    return per_row(p, lambda i: G + es * m[i] * pi, right)


@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("held", [False, True])
def test_official_is_one_cholesky_a_row(m, held):
    p = problem(m=m)
    masks = torch.rand(15, m, dtype=torch.float64)
    C = p["c"][:, 0].T.contiguous()
    R = p["R"] if held else None
    want = official(p, 0.5, masks=masks, concepts=C, R=R)
    es, mu = 2.0, 0.4
    got = ops.spectral_solve(
        p["weights"], C @ C.T + es * p["S"], None, lam=0.5 + mu, R=R, gamma=mu, eta=0.0, projector=C,
        relevance=es * masks.max(1).values, mode="official", per_concept=(es * masks, p["a"], p["c"]),
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-8, atol=1e-8)


def test_official_with_one_mask_for_all_concepts():
    p = problem()
    C = p["c"][:, 0].T.contiguous()
    want = official(p, 0.5, masks=torch.ones(15, 4, dtype=torch.float64), concepts=C)
    got = ops.spectral_solve(
        p["weights"], C @ C.T + 2 * p["S"], 2 * p["S_star"], lam=0.9, projector=C, relevance=2.0, mode="official"
    )
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", ["robust", "official"])
def test_matrices_and_numbers_for_each_weight(mode):
    """Layer-specific S, R, lam and gamma: each weight as if alone."""
    p = problem()
    S = torch.stack([p["S"] * (i + 1) for i in range(3)])
    R = torch.stack([p["R"] * (i + 1) for i in range(3)])
    star = torch.stack([p["S_star"] + i for i in range(3)])
    lams, gammas = [0.5, 0.7, 1.1], [0.1, 0.0, 0.2]
    parts = p["relevance"].split([5, 7, 3])
    got = ops.spectral_solve(
        p["weights"], S, star, lam=lams, R=R, gamma=gammas, eta=0.5, relevance=list(parts), mode=mode
    )
    for i, w in enumerate(p["weights"]):
        alone = ops.spectral_solve(
            w, S[i], star[i], lam=lams[i], R=R[i], gamma=gammas[i], eta=0.5, relevance=parts[i], mode=mode
        )
        torch.testing.assert_close(got[i], alone, rtol=1e-12, atol=1e-12)
    shared = ops.spectral_solve(p["weights"], p["S"], p["S_star"], lam=lams, R=p["R"], gamma=gammas, mode=mode)
    for i, w in enumerate(p["weights"]):
        alone = ops.spectral_solve(w, p["S"], p["S_star"], lam=lams[i], R=p["R"], gamma=gammas[i], mode=mode)
        torch.testing.assert_close(shared[i], alone, rtol=1e-11, atol=1e-11)


def objective(rows, p, lam, gamma, eta):
    """The robust objective, from its definition; rows without relevance are not in it."""
    old, alpha = rows_of(p), p["relevance"]
    c, a = p["c"].flatten(0, 1), p["a"].flatten(0, 1)
    value = (rows @ c.T - old @ a.T).square().sum(1)
    value = value + gamma * ((rows - eta * old) @ p["R"] * (rows - eta * old)).sum(1)
    return (alpha * value + lam * (rows - old).square().sum(1)).sum()


@pytest.mark.parametrize(("gamma", "eta"), [(0.0, 1.0), (0.5, 1.0), (0.5, 0.0)])
def test_the_gradient_of_the_objective_vanishes(gamma, eta):
    p = problem()
    new = torch.cat(solve(p, R=p["R"], gamma=gamma, eta=eta, relevance=p["relevance"])).requires_grad_()
    (grad,) = torch.autograd.grad(objective(new, p, 0.7, gamma, eta), new)
    assert grad.abs().max() < 1e-9
    # And by differences: it is a minimum.
    at = objective(new.detach(), p, 0.7, gamma, eta)
    for _ in range(20):
        assert objective(new.detach() + 1e-3 * torch.randn_like(new), p, 0.7, gamma, eta) > at


def test_traces_of_the_edit():
    p = problem()
    new, traces = solve(p, R=p["R"], gamma=0.4, relevance=p["relevance"], traces=True)
    H, at = p["S"] + 0.4 * p["R"], 0
    for i, (w, n) in enumerate(zip(p["weights"], new)):
        D, alpha = n - w, p["relevance"][at : at + len(w)]
        at += len(w)
        torch.testing.assert_close(traces.energy[i], D.square().sum())
        torch.testing.assert_close(traces.spectral[i], ((D @ H) * D).sum())
        own = ((D @ H) * D).sum(1) + 0.7 / alpha.clamp_min(1e-300) * D.square().sum(1)
        torch.testing.assert_close(traces.decrease[i], own[alpha > 0].sum())
    # The decrease is that of the objective, where all rows are relevant.
    p["relevance"].fill_(1)
    new, traces = solve(p, R=p["R"], gamma=0.4, relevance=p["relevance"], traces=True)
    rows, old = torch.cat(new), rows_of(p)
    gap = objective(old, p, 0.7, 0.4, 1.0) - objective(rows, p, 0.7, 0.4, 1.0)
    torch.testing.assert_close(traces.decrease.sum(), gap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["robust", "gate", "official"])
def test_nothing_to_erase_changes_no_bit(mode, dtype):
    p = problem(dtype=dtype)
    p["weights"][0][0, 0] = -0.0
    zero = torch.zeros(12, 12, dtype=torch.float64)
    relevance = None if mode == "official" else p["relevance"]
    for kwargs in ({}, {"R": p["R"], "gamma": 1.0}):
        got = ops.spectral_solve(p["weights"], zero, zero, lam=0.5, relevance=relevance, mode=mode, **kwargs)
        if mode == "official" and kwargs:
            assert_derived(got, got, p["weights"], 1e-6 if dtype != torch.bfloat16 else 1e-2, factor=0)
        else:
            assert_equal(got, p["weights"])
    same = ops.spectral_solve(p["weights"], p["S"], p["S"], lam=0.5, relevance=0.3)
    assert_equal(same, p["weights"])


def test_one_relevance_for_all_is_one_matrix(monkeypatch):
    p = problem()
    rows = torch.full((15,), 0.25, dtype=torch.float64)
    want, traces = solve(p, R=p["R"], gamma=0.4, relevance=rows, traces=True)
    same = solve(p, R=p["R"], gamma=0.4, relevance=0.25, traces=True)
    for a, b in zip((*want, *traces), (*same[0], *same[1])):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    for a, b in zip(want, solve(p, R=p["R"], gamma=0.4, relevance=0.25)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    monkeypatch.undo()
    assert_equal(solve(p, lam=1e300, relevance=1e-300), p["weights"])
    assert_equal(solve(p, relevance=0.0), p["weights"])


@pytest.mark.parametrize("mode", ["robust", "gate"])
def test_rows_of_no_relevance_stay_bit_for_bit(mode):
    p = problem(dtype=torch.float32)
    got = torch.cat(solve(p, relevance=p["relevance"], mode=mode))
    still = p["relevance"] == 0
    assert still.any()
    assert torch.equal(got[still], torch.cat(p["weights"])[still])
    assert not (got[~still] == torch.cat(p["weights"])[~still]).all(1).any()


def test_one_concept_is_uce_and_time():
    p = problem(m=1, T=1)
    c, a, eye = p["c"][0, 0], p["a"][0, 0], torch.eye(12, dtype=torch.float64)
    for mode in ("robust", "gate", "official"):
        for w, got in zip(p["weights"], solve(p, lam=0.1, mode=mode)):
            want = (0.1 * w + torch.outer(w @ a, c)) @ torch.linalg.inv(0.1 * eye + torch.outer(c, c))
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_gate_is_between():
    p = problem()
    full = torch.cat(solve(p))
    old = rows_of(p)
    got = torch.cat(solve(p, relevance=p["relevance"], mode="gate"))
    torch.testing.assert_close(got, old + p["relevance"][:, None] * (full - old))


def test_the_edit_stays_in_the_span_of_the_tokens():
    p = problem(m=2, T=2)
    off = torch.linalg.svd(p["c"].flatten(0, 1))[2][4:].T
    edit = torch.cat(solve(p, R=p["R"], gamma=0.3, relevance=p["relevance"])) - rows_of(p)
    assert edit.norm() > 0.1
    # With R the eigenvectors mix, but N = S - S* is zero off the span on its right side only after the inverse of H = S.
    plain = torch.cat(solve(p, relevance=p["relevance"])) - rows_of(p)
    assert (plain @ off).abs().max() < 1e-12


def test_order_of_concepts_does_not_matter():
    p = problem()
    order = torch.randperm(4)
    c, a = p["c"][order], p["a"][order]
    moved = {**p, "S": torch.einsum("mti,mtj->ij", c, c), "S_star": torch.einsum("mti,mtj->ij", a, c)}
    want, got = (solve(q, relevance=p["relevance"]) for q in (p, moved))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    masks = torch.rand(15, 4, dtype=torch.float64)
    both = [
        solve({**p, "S_star": None}, mode="official", per_concept=(masks[:, o], p["a"][o], p["c"][o]))
        for o in (torch.arange(4), order)
    ]
    for g, w in zip(*both):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("relevance", [False, True])
def test_condition_1e8_in_single_precision(relevance):
    """d x d in float64, products in float32: the error does not grow with the condition as it does in a float32 solve."""
    p = problem(heights=(64, 96), d=48, m=60, T=4, size=100.0)
    lam = float(torch.linalg.eigvalsh(p["S"])[-1]) / 1e8
    assert lam < 1
    rows = p["relevance"] * 0 + 0.5 if relevance else None
    wide = solve(p, lam=lam, relevance=rows)
    narrow = {**p, "weights": [w.float() for w in p["weights"]]}
    exact = solve({**p, "weights": [w.double() for w in narrow["weights"]]}, lam=lam, relevance=rows)
    got = solve(narrow, lam=lam, relevance=rows)
    for g, w, e in zip(got, wide, exact):
        assert (g.double() - e).abs().max() < 2e-6 * e.abs().max()
        assert (g.double() - w).abs().max() < 1e-5 * w.abs().max()


def test_more_concepts_than_dimensions_and_one_weight():
    p = problem(m=40)
    got = ops.spectral_solve(p["weights"][1], p["S"], p["S_star"], lam=0.7)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, robust(p, relevance=False)[1], rtol=1e-10, atol=1e-10)
    assert ops.spectral_solve([], p["S"], p["S_star"], lam=0.7) == []


def test_span_drops_what_is_no_direction():
    C = torch.randn(12, 3, dtype=torch.float64)
    basis = reference.span(torch.cat([C, C[:, :1] * 2, torch.zeros(12, 1)], 1))
    assert basis.shape == (12, 3)
    torch.testing.assert_close(basis @ (basis.T @ C), C)
    assert reference.span(torch.zeros(12, 0)).shape == (12, 0)


class TestSpectralTrace(OpProof):
    op = "spectral_trace"
    backends = ("triton",)
    aot = [
        Aot(
            "fastunlearn.kernels.spectral:_trace",
            {"table": "*i64", "sums": "*fp32", "d": "i32"},
            {"CODE": code, "ALIGNED": True, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32},
            {"num_warps": 8, "num_stages": 3},
        )
        for code in (0, 1, 2)
    ]
    exact = False
    differentiable = True
    cases = {
        "shared": lambda device: {
            "weights": [w.float().to(device) for w in problem()["weights"]],
            "A": problem()["S"].float().to(device),
        },
        "batched": lambda device: {
            "weights": [w.float().to(device) for w in problem()["weights"]],
            "A": torch.stack([problem(seed=i)["S"].float() for i in range(3)]).to(device),
        },
        "no rows": lambda device: {"weights": [torch.zeros(0, 4, device=device)], "A": torch.eye(4, device=device)},
    }

    def run(self, args):
        return ops.spectral_trace(args["weights"], args["A"].detach())

    def oracle(self, args):
        A = args["A"].double()
        return torch.stack(
            [
                torch.trace(w.double() @ (A if A.dim() == 2 else A[i]) @ w.double().T)
                for i, w in enumerate(args["weights"])
            ]
        )

    def test_reference(self, case):
        args = self.cases[case]("cpu")
        got = self._run("reference", args)
        torch.testing.assert_close(got.double(), self.oracle(args), rtol=1e-5, atol=1e-6)

    def test_gradient(self, few_case):
        args = self.cases[few_case]("cpu")
        leaves = [w.double().requires_grad_() for w in args["weights"]]
        A = args["A"].double()
        with fastunlearn.backend("reference"):
            assert torch.autograd.gradcheck(lambda *w: ops.spectral_trace(list(w), A), leaves)
            ops.spectral_trace(leaves, A).sum().backward()
        for i, w in enumerate(leaves):
            torch.testing.assert_close(w.grad, 2 * w.detach() @ (A if A.dim() == 2 else A[i]))

    def library_calls(self, args):
        yield torch.ops.fastunlearn.spectral_trace.default, (args["weights"], args["A"])


def test_trace_of_parameters_and_of_the_symmetric_part():
    w = torch.nn.Parameter(torch.randn(6, 4))
    A = torch.randn(4, 4)
    out = ops.spectral_trace(w, A)
    assert out.shape == (1,)
    torch.testing.assert_close(out[0], torch.trace(w @ A @ w.T))
    out.sum().backward()
    torch.testing.assert_close(w.grad, w.detach() @ (A + A.T))
    assert ops.spectral_trace([], A).shape == (0,)
    half = torch.nn.Parameter(torch.randn(6, 4).bfloat16())
    ops.spectral_trace([half], A).sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batched", [False, True])
def test_spectral_trace_of_the_kernel(batched, dtype):
    """Several tiles each way, ragged edges, an empty weight: the traces and the products that gradients are made of."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("runs Triton's interpreter")
    from fastunlearn.kernels import spectral as kernels

    d = 140
    weights = [(torch.randn(h, d) / d**0.5).to(dtype) for h in (70, 0, 130, 1)]
    A = torch.stack([a @ a.T / d for a in torch.randn(4, d, d)])
    A = (A if batched else A[0]).to(dtype)
    got, want = kernels.spectral_trace(weights, A), reference.spectral_trace(weights, A)
    exact = reference.spectral_trace([w.double() for w in weights], A.double())
    assert got[0].dtype == dtype
    assert_derived(got, want, exact)
    assert kernels.spectral_trace([], A)[0].shape == (0,)
    with fastunlearn.backend("triton"):
        leaf = weights[2].float().requires_grad_()
        ops.spectral_trace(leaf, A[0].float() if batched else A.float()).sum().backward()
    assert fastunlearn.explain("spectral_trace").last == "triton:cpu"
    assert_derived(leaf.grad, leaf.grad, 2 * leaf.detach().double() @ (A[0] if batched else A).double(), 1e-5, factor=0)


def test_the_gradient_by_finite_differences():
    """Central differences of the objective, from its definition, at the solution: no slope in any direction."""
    p = problem()
    new = torch.cat(solve(p, R=p["R"], gamma=0.5, relevance=p["relevance"]))
    size, step = float(objective(new, p, 0.7, 0.5, 1.0)), 1e-4
    for i in range(0, new.numel(), 7):
        way = torch.zeros(new.numel(), dtype=torch.float64)
        way[i] = step
        way = way.view_as(new)
        slope = (objective(new + way, p, 0.7, 0.5, 1.0) - objective(new - way, p, 0.7, 0.5, 1.0)) / (2 * step)
        assert abs(float(slope)) < 1e-9 * size / step


P = problem()
W, S, X, HALF = P["weights"], P["S"], P["S_star"], torch.full((15,), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.spectral_solve([1.0], S, X, lam=1), TypeError, r"weights\[0\]: want a dense floating matrix"),
        (lambda: ops.spectral_solve([W[0][0]], S, X, lam=1), TypeError, r"float64 \(12,\)"),
        (lambda: ops.spectral_solve([W[0], W[1][:, :5]], S, X, lam=1), ValueError, r"weights\[1\]: \(7, 5\)"),
        (lambda: ops.spectral_solve(W, S[:3], X, lam=1), ValueError, r"S: want \[12, 12\]"),
        (lambda: ops.spectral_solve(W, S, None, lam=1), TypeError, "S_star: want a tensor"),
        (lambda: ops.spectral_solve(W, S * float("nan"), X, lam=1), ValueError, "S: want finite"),
        (lambda: ops.spectral_solve(W, X, X, lam=1), ValueError, "S: want a symmetric matrix"),
        (lambda: ops.spectral_solve(W, S.to("meta"), X, lam=1), ValueError, "S: on meta"),
        (lambda: ops.spectral_solve(W, S, X, lam=0), ValueError, "lam: want finite numbers above 0, got 0"),
        (lambda: ops.spectral_solve(W, S, X, lam=[1.0]), ValueError, "lam: want a number, or one for each of the 3"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, gamma=-1), ValueError, "gamma: want"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, eta=float("inf")), ValueError, "eta: want"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, mode="papers"), ValueError, "mode: want one of robust, official"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, relevance=torch.ones(4)), ValueError, "each of the 15 rows, got 4"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, relevance=[torch.ones(4)] * 3), ValueError, r"relevance\[0\]"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, relevance=-1.0), ValueError, "relevance: want finite numbers of at"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, relevance="all"), TypeError, "relevance: want a number, a tensor"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, projector=S), ValueError, "only mode 'official' takes them"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, projector=S[:3], mode="official"), ValueError, "projector: want"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, traces=True, mode="gate"), ValueError, "traces: only mode"),
        (lambda: ops.spectral_solve(W, S, X, lam=1, mode="official", per_concept=(S, S, S)), ValueError, "S_star: want None"),
        (lambda: ops.spectral_solve(W, S, None, lam=1, mode="official", per_concept=(S, S, S)), ValueError, "want mask"),
        (lambda: ops.spectral_solve(W, S, None, lam=1, mode="official", per_concept=3), TypeError, "per_concept: want"),
        (lambda: ops.spectral_solve(W, -S * 1e9, X, lam=1), ArithmeticError, "not positive definite"),
        (lambda: ops.spectral_solve(W, -S, X, lam=1, relevance=HALF), ArithmeticError, "it has the eigenvalue -"),
        (lambda: ops.spectral_solve(W, -S, X, lam=1, relevance=HALF, mode="paper"), ArithmeticError, "positive semidefinite"),
        (lambda: ops.spectral_trace(W, [1.0]), TypeError, "A: want a floating tensor"),
        (lambda: ops.spectral_trace(W, S[:4]), ValueError, r"A: want \[12, 12\]"),
        (lambda: ops.spectral_trace(W, S.clone().requires_grad_()), ValueError, "A: wants a gradient"),
        (lambda: ops.spectral_trace(W, S.to("meta")), ValueError, "A: on meta"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
