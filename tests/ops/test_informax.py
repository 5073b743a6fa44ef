"""Mutual information of rows and concepts: brute force over the 2 x 2 table, the values that exist, every backend."""

from __future__ import annotations

import math

import pytest
import torch

import fastunlearn
from fastunlearn import ops
from fastunlearn.reference import informax as reference
from tests.proof import Aot, OpProof


def brute_force(weights, positives, negatives):
    """Eq. 6, sample by sample: [rows, m]."""
    rows = torch.cat([w.double() for w in weights])
    out = torch.zeros(len(rows), len(positives), dtype=torch.float64)
    for k, pos in enumerate(positives.double()):
        neg = negatives[k if len(negatives) > 1 else 0].double()
        y = [1] * len(pos) + [0] * len(neg)
        for i, w in enumerate(rows):
            a = [float(w @ s) for s in (*pos, *neg)]
            tau = sorted(a)[(len(a) - 1) // 2]
            z = [int(x > tau) for x in a]
            for zz in (0, 1):
                for yy in (0, 1):
                    joint = sum(p == zz and q == yy for p, q in zip(z, y)) / len(a)
                    if joint:
                        margins = z.count(zz) / len(a) * (y.count(yy) / len(a))
                        out[i, k] += joint * math.log(joint / margins)
    return out


def brute_force_gaussian(weights, positives, negatives):
    rows = torch.cat([w.double() for w in weights])
    out = torch.zeros(len(rows), len(positives), dtype=torch.float64)
    for k, pos in enumerate(positives.double()):
        neg = negatives[k if len(negatives) > 1 else 0].double()
        p = len(pos) / (len(pos) + len(neg))
        for i, w in enumerate(rows):
            one, other = pos @ w, neg @ w
            within = p * one.var(correction=0) + (1 - p) * other.var(correction=0)
            gap = p * (1 - p) * (one.mean() - other.mean()) ** 2
            out[i, k] = 0.5 * math.log1p(float(gap / within)) if gap > 0 else 0
    return out


def _case(heights=(5, 8), d=12, m=3, n1=5, n0=5, shared=True, dtype=torch.float32, apart=0.3, seed=0, **kwargs):
    def make(device):
        g = torch.Generator().manual_seed(seed)
        centre = apart * torch.randn(m, 1, d, generator=g)
        return {
            "weights": [torch.randn(h, d, generator=g).to(device, dtype) for h in heights],
            "positives": (centre + torch.randn(m, n1, d, generator=g)).to(device),
            "negatives": torch.randn(1 if shared else m, n0, d, generator=g).to(device),
            "estimator": "binary", "reduce": "none", **kwargs,
        }  # fmt: skip

    return make


class TestInformax(OpProof):
    op = "informax"
    backends = ("triton",)
    exact = False
    traced = ("none", "gaussian mean")
    eps = 1e-5
    cases = {
        "none": _case(),
        "max": _case(reduce="max"),
        "mean": _case(reduce="mean", shared=False),
        "many concepts": _case(m=23, n1=3, n0=4, reduce="max"),
        "ragged": _case(heights=(70, 131), d=77, m=7, shared=False),
        "unbalanced": _case(n1=1, n0=9, reduce="max"),
        "many samples": _case(heights=(30,), n1=20, n0=25, m=2),
        "halves": _case(dtype=torch.float16),
        "bf16": _case(dtype=torch.bfloat16, reduce="mean"),
        "one concept of one sample": _case(heights=(3,), m=1, n1=1, n0=1),
        "gaussian": _case(estimator="gaussian"),
        "gaussian max": _case(
            estimator="gaussian", reduce="max", heights=(70, 131), d=77, m=7, n1=4, n0=9, shared=False
        ),
        "gaussian mean": _case(estimator="gaussian", reduce="mean", m=9),
    }
    few = ("max", "mean", "many concepts", "ragged", "unbalanced", "many samples", "gaussian max", "gaussian mean")
    aot = [
        Aot(
            "fastunlearn.kernels.informax:_informax",
            {"activations": "*fp32", "table": "*fp32", "out": "*fp32", "rows": "i32", "m": "i32", "n1": "i32", "n0": "i32",
             "own": "i32", "run": "i32"},
            {"BINARY": binary, "REDUCE": kind, "SLOTS": slots, "BLOCK_M": 8192 // slots},
            {"num_warps": 4},
        )
        for binary, kind, slots in [(True, 1, 16), (True, 0, 64), (False, 2, 16), (False, 0, 32)]
    ]  # fmt: skip

    def run(self, args):
        return ops.informax(
            args["weights"], args["positives"], args["negatives"], estimator=args["estimator"], reduce=args["reduce"]
        )

    def library_calls(self, args):
        told = (args["positives"], args["negatives"], args["estimator"], args["reduce"])
        yield torch.ops.fastunlearn.informax.default, (torch.cat(args["weights"]), *told)

    def oracle(self, args):
        by = brute_force if args["estimator"] == "binary" else brute_force_gaussian
        mi = by(args["weights"], args["positives"], args["negatives"])
        return {"none": lambda: mi, "max": lambda: mi.amax(1), "mean": lambda: mi.mean(1)}[args["reduce"]]()


def _samples(heights, n, d=12, dtype=torch.float32, bins=20):
    def make(device):
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(h, d, generator=g).to(device, dtype) for h in heights]
        return {"weights": weights, "samples": torch.randn(n, d, generator=g).to(device), "bins": bins}

    return make


class TestRowEntropy(OpProof):
    op = "row_entropy"
    backends = ("triton",)
    exact = False
    traced = ("ragged", "no rows")
    eps = 1e-5
    cases = {
        "ragged": _samples((33, 7), 45),
        "two bins": _samples((5,), 20, bins=2),
        "one sample": _samples((3,), 1),
        "wide rows": _samples((40,), 33, d=70, bins=33),
        "half": _samples((9,), 20, dtype=torch.float16),
        "no rows": _samples((0, 0), 5),
    }
    aot = [
        Aot(
            "fastunlearn.kernels.informax:_entropy",
            {"weights": "*fp32", "samples": "*fp32", "out": "*fp32", "rows": "i64", "n": "i32", "d": "i32", "bins": "i32"},
            {"BINS": 32, "BLOCK_M": 32, "BLOCK_S": 32, "BLOCK_K": 32},
            {"num_warps": 4, "num_stages": 2},
        )
    ]  # fmt: skip

    def run(self, args):
        return ops.row_entropy(args["weights"], args["samples"], bins=args["bins"])

    def library_calls(self, args):
        yield torch.ops.fastunlearn.row_entropy.default, (torch.cat(args["weights"]), args["samples"], args["bins"])

    def oracle(self, args):
        samples, out = args["samples"].double(), []
        for w in torch.cat([w.double() for w in args["weights"]]):
            p = torch.histc(samples @ w, bins=args["bins"]) / len(samples)
            out.append(-torch.special.xlogy(p, p).sum() / math.log(args["bins"]))
        return torch.stack(out) if out else torch.zeros(0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_three_values_at_five_and_five(backend):
    args = _case(heights=(200,), m=6, apart=0.4)("cpu")
    with fastunlearn.backend(backend):
        mi = TestInformax().run(args)
    values = torch.tensor([0.0201355, 0.1927447, math.log(2)])
    assert (mi[..., None] - values).abs().min(-1).values.max() < 1e-6
    assert len(mi.unique()) == 3


def test_the_table_is_every_count():
    """All ways to lie above, each counted from its own samples; ties above the median included."""
    for n1, n0 in [(1, 1), (5, 5), (3, 8)]:
        table = reference.information_table(n1, n0)
        for a in range(n1 + 1):
            for b in range(n0 + 1):
                y = torch.tensor([1] * n1 + [0] * n0)
                z = torch.tensor([1] * a + [0] * (n1 - a) + [1] * b + [0] * (n0 - b))
                want = 0.0
                for yy in (0, 1):
                    for zz in (0, 1):
                        joint = float(((y == yy) & (z == zz)).double().mean())
                        if joint:
                            want += joint * math.log(
                                joint / float((y == yy).double().mean() * (z == zz).double().mean())
                            )
                assert float(table[a, b]) == pytest.approx(want, abs=1e-12)
    assert reference.information_table(5, 5).min() >= 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_ties(backend):
    """Samples that are all equal tell nothing; equal ones of each kind tell all."""
    w = torch.randn(6, 4)
    same = torch.ones(1, 5, 4)
    with fastunlearn.backend(backend):
        assert ops.informax(w, same, same).eq(0).all()
        assert ops.informax(w, same, same, estimator="gaussian").eq(0).all()
        # The lower median of five and five is one of the lower five.
        torch.testing.assert_close(ops.informax(w, 2 * same, same), torch.full((6,), math.log(2)))
        assert ops.informax(w, 2 * same, same, estimator="gaussian").isfinite().all()


def test_order_of_concepts_and_of_rows():
    args = _case(m=6)("cpu")
    order = torch.randperm(6)
    w, pos, neg = args["weights"], args["positives"], args["negatives"]
    whole = ops.informax(w, pos, neg)
    assert torch.equal(ops.informax(w, pos[order], neg), whole)
    assert torch.equal(
        ops.informax(w, pos, neg, reduce="none")[:, order], ops.informax(w, pos[order], neg, reduce="none")
    )
    assert torch.equal(torch.cat([ops.informax(x, pos, neg) for x in w]), whole)
    torch.testing.assert_close(ops.informax(w, pos[0], neg[0]), ops.informax(w, pos, neg, reduce="none")[:, 0])


def test_rows_in_chunks(monkeypatch):
    args = _case(heights=(40, 21), reduce="max")("cpu")
    want = TestInformax().run(args)
    entropy = ops.row_entropy(args["weights"], args["positives"])
    monkeypatch.setattr(reference, "CHUNK", 200)
    assert torch.equal(TestInformax().run(args), want)
    assert torch.equal(ops.row_entropy(args["weights"], args["positives"]), entropy)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("case", ["mean", "many concepts", "gaussian max", "none"])
def test_concepts_in_chunks(case, backend, monkeypatch):
    """As many activations at once as fit the workspace of the kernels."""
    kernels = pytest.importorskip("fastunlearn.kernels.informax")
    args = TestInformax.cases[case]("cpu")
    rows, n1 = sum(len(w) for w in args["weights"]), args["positives"].shape[1]
    monkeypatch.setattr(kernels, "WORKSPACE", 4 * rows * n1 * 3)
    with fastunlearn.backend(backend):
        torch.testing.assert_close(TestInformax().run(args), TestInformax().oracle(args).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bins", [2, 20])
def test_entropy_by_histogram(bins):
    w, samples = torch.randn(17, 6, dtype=torch.float64), torch.randn(3, 11, 6, dtype=torch.float64)
    got = ops.row_entropy(w, samples, bins=bins)
    for row, value in zip(w, got):
        a = samples.flatten(0, 1) @ row
        p = torch.histc(a, bins=bins) / len(a)
        want = -float(torch.special.xlogy(p, p).sum()) / math.log(bins)
        assert float(value) == pytest.approx(want, abs=1e-12)
    assert ops.row_entropy(torch.randn(3, 6), torch.ones(4, 6)).eq(0).all()
    assert got.min() >= 0
    assert got.max() <= 1


W, P, N = torch.randn(3, 4), torch.randn(2, 5, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.informax([], P, N), ValueError, "weights: want at least one"),
        (lambda: ops.informax(W.int(), P, N), TypeError, r"weights\[0\]: want a dense floating matrix"),
        (lambda: ops.informax(W, P[0, 0], N), TypeError, "positives: want a floating tensor"),
        (lambda: ops.informax(W, P[..., :3], N), ValueError, "positives: want width 4"),
        (lambda: ops.informax(W, P, N.to("meta")), ValueError, "negatives: want width 4 on cpu"),
        (lambda: ops.informax(W, P[:, :0], N), ValueError, "positives: want at least one sample"),
        (lambda: ops.informax(W, P, N.expand(3, -1, -1)), ValueError, "each of the 2; got"),
        (lambda: ops.informax(W, P, N, estimator="mi"), ValueError, "estimator: want one of binary, gaussian"),
        (lambda: ops.informax(W, P, N, reduce="sum"), ValueError, "reduce: want one of max, mean, none"),
        (lambda: ops.informax(W, P * float("nan"), N), ValueError, "positives: want finite numbers"),
        (lambda: ops.informax(W / 0, P, N), ValueError, "weights: want finite numbers"),
        (lambda: ops.row_entropy(W, P / 0), ValueError, "samples: want finite numbers"),
        (lambda: ops.row_entropy(W, P, bins=1), ValueError, "bins: want a whole number"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
