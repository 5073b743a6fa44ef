"""linear_divergence: KL, UNDIAL, CE-U and PDU against torch's from whole logits, on paper, and what is no input."""

from __future__ import annotations

import math

import pytest
import torch

import fastunlearn
from fastunlearn import ops
from tests.ops.linear_loss_proof import LinearLossProof, case, inputs, memory_of
from tests.proof import Aot

BACKENDS = ["reference", "triton"]
KINDS = ["kl", "undial", "ce_u", "pdu"]
SMALL = 1 << 12


def _cases():
    out = {}
    for kind in KINDS:
        out |= {
            kind: case(kind=kind, bias=True),
            f"{kind}, chunks": case(kind=kind, bytes_=SMALL),
            f"{kind}, trained": case(kind=kind, trains="hwb", bias=True),
            f"{kind}, blocks": case(kind=kind, trains="hwb", bias=True, bytes_=SMALL),
            f"{kind}, capped": case(kind=kind, trains="hw", softcap=2.0, scale=1.5, bytes_=SMALL),
            f"{kind}, capped, frozen": case(kind=kind, softcap=2.0, scale=0.5, bytes_=SMALL),
            f"{kind}, wide": case(kind=kind, shape=(2, 3), vocabulary=5003, trains="hw", bytes_=1 << 19, spread=0.3),
            f"{kind}, sharp": case(kind=kind, spread=20, trains="hw", reduction="token"),
            f"{kind}, none counts": case(kind=kind, ignored=1.1, trains="hw"),
            f"{kind}, fp16": case(kind=kind, shape=(16, 9), dtype=torch.float16, width=33, vocabulary=77, trains="hw"),
            f"{kind}, bf16": case(
                kind=kind, shape=(16, 9), dtype=torch.bfloat16, width=33, vocabulary=77, bytes_=1 << 14
            ),
        }
    return out


class TestLinearDivergence(LinearLossProof):
    op = "linear_divergence"
    cases = _cases()
    few = tuple(
        f"{k}{rest}" for k in KINDS for rest in (", chunks", ", trained", ", blocks", ", capped", ", wide", ", none counts", ", fp16")
    )  # fmt: skip
    differences = tuple(f"{k}{rest}" for k in KINDS for rest in (", chunks", ", trained", ", blocks", ", capped"))
    cancelling = (
        case(kind="pdu", shape=(1, 5), width=9, vocabulary=33, dtype=torch.bfloat16, trains="hw", bias=True, ignored=0,
             reduction="token", bytes_=300, spread=8),
        *(case(kind=kind, dtype=torch.bfloat16, trains="hwb", bias=True, bytes_=SMALL) for kind in KINDS),
    )  # fmt: skip
    aot = [
        Aot(
            "fastunlearn.kernels.linear_divergence:rows",
            {"logits": f"*{dtype}", "reference": f"*{dtype}", "labels": "*i64", "value": "*fp32", "stats": "*fp32",
             "cols": "i32", "edge": "i32", "stride": "i32", "ref_stride": "i32", "strength": "fp32", "scale": "fp32", "softcap": "fp32"},
            {"GRADIENT": True, "KIND": kind, "CAP": cap, "BLOCK": 2048},
            {"num_warps": 8},
        )
        for dtype, kind, cap in [("bf16", 0, False), ("bf16", 1, True), ("fp32", 2, True), ("fp16", 3, False)]
    ] + [
        Aot(
            "fastunlearn.kernels.linear_divergence:block",
            {"logits": f"*{dtype}", "reference": f"*{dtype}", "labels": "*i64", "stats": "*fp32", "cols": "i32", "edge": "i32",
             "stride": "i32", "ref_stride": "i32", "start": "i32", "share": "fp32", "strength": "fp32", "scale": "fp32",
             "softcap": "fp32"},
            {"KIND": kind, "CAP": cap, "BLOCK": 2048},
            {"num_warps": 4},
        )
        for dtype, kind, cap in [("bf16", 0, False), ("fp32", 2, True), ("bf16", 3, False)]
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Logits 0, ln 3, ln 4 (p = 1/8, 3/8, 4/8) against equal ones (q = 1/3), label 2."""
    one, labels = torch.ones(1, 1, 1), torch.tensor([[2]])
    weight, flat = torch.tensor([[0.0], [math.log(3)], [math.log(4)]]), torch.zeros(3, 1)

    def value(kind, *reference, **options):
        hidden = one.clone().requires_grad_()
        with fastunlearn.backend(backend):
            v = ops.linear_divergence(hidden, weight, *(reference or (None, None)), labels, kind=kind, **options)[0]
        # The hidden state scales the logits: d / d hidden = sum_v gradient_v w_v.
        return float(v.detach()), float(torch.autograd.grad(v.sum(), hidden)[0])

    w, p = [0, math.log(3), math.log(4)], [1 / 8, 3 / 8, 4 / 8]

    def slope(t):
        return sum((a - b) * x for a, b, x in zip(p, t, w))

    q = [1 / 3] * 3
    kl = sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q))
    assert value("kl", one, flat) == pytest.approx((kl, slope(q)), abs=1e-6)
    # exp(-ln 2) of the label is left: 1, 1, 1/2 over 5/2
    t = [0.4, 0.4, 0.2]
    assert value("undial", one, flat, strength=math.log(2)) == pytest.approx(
        (-sum(b * math.log(a) for a, b in zip(p, t)), slope(t)), abs=1e-6
    )
    # without the label: 1/8 and 3/8 over 4/8
    t = [0.25, 0.75, 0.0]
    assert value("ce_u") == pytest.approx((-0.25 * math.log(1 / 8) - 0.75 * math.log(3 / 8), slope(t)), abs=1e-6)
    gap = math.log(4) - math.log(12) / 3
    assert value("pdu") == pytest.approx((gap**2, 2 * gap * gap), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_is_zero_at_the_reference(backend):
    args = inputs((3, 5), kind="kl")
    hidden = args["hidden"].requires_grad_()
    with fastunlearn.backend(backend):
        value = ops.linear_divergence(hidden, args["weight"], hidden.detach(), args["weight"], args["labels"])[0]
    assert value.abs().max() < 1e-5
    assert torch.autograd.grad(value.sum(), hidden)[0].abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_of_the_largest(backend):
    """pdu: the first of the largest logits moves down, as torch's max has it."""
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [2.0], [2.0]], requires_grad=True)
    with fastunlearn.backend(backend):
        value = ops.linear_divergence(hidden, weight, None, None, torch.tensor([[0]]), kind="pdu")[0]
        value.sum().backward()
    gap = 2 - 4 / 3
    assert weight.grad.flatten().tolist() == pytest.approx([-2 * gap / 3, 2 * gap * (1 - 1 / 3), -2 * gap / 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains", ["h", "hw"])
def test_memory_does_not_grow_with_the_vocabulary(kind, trains):
    limit = 1 << 22
    got = [memory_of(kind, vocabulary, trains, limit) for vocabulary in (5000, 80_000)]
    assert max(got) <= 1.1 * limit


def test_references_take_no_gradient():
    args = inputs(kind="kl")
    hidden, ref = args["hidden"].requires_grad_(), args["ref_hidden"].requires_grad_()
    value = ops.linear_divergence(hidden, args["weight"], ref, args["ref_weight"].requires_grad_(), args["labels"])[0]
    value.sum().backward()
    assert ref.grad is None
    assert hidden.grad is not None


H, W, L = torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.linear_divergence(H, W, H, W, L, kind="ceu"), ValueError, "kind: want one of 'kl'.*got 'ceu'; did you mean 'ce_u'"),
        (lambda: ops.linear_divergence(H, W, None, W, L), ValueError, "ref_hidden: kl compares with a reference"),
        (lambda: ops.linear_divergence(H, W, H, None, L, kind="undial"), ValueError, "ref_weight: undial compares"),
        (lambda: ops.linear_divergence(H, W, H, None, L, kind="pdu"), ValueError, "ref_hidden: pdu has no reference"),
        (lambda: ops.linear_divergence(H, W, None, None, L, kind="pdu", ref_bias=W[:, 0]), ValueError, "ref_bias: pdu has"),
        (lambda: ops.linear_divergence(H, W, H, W[:4], L), ValueError, "ref_weight: want weight's vocabulary of 5, got 4"),
        (lambda: ops.linear_divergence(H, W, H[:1], W, L), ValueError, r"labels: want \(1, 3\), one for each hidden state of ref_hidden"),
        (lambda: ops.linear_divergence(H, W, H.half(), W.half(), L), ValueError, "ref_hidden: torch.float16 on cpu, but hidden is"),
        (lambda: ops.linear_divergence(H, W, H, W, L, strength=-1), ValueError, "strength: want a number >= 0, got -1"),
        (lambda: ops.linear_divergence(H, W, H, W, L, reduction="sum"), ValueError, "reduction: want"),
        (lambda: ops.linear_divergence(H, W[:1], None, None, L, kind="ce_u"), ValueError, "want 2 rows at least"),
        (lambda: ops.linear_divergence(H, W, H, W, L + 5), ValueError, "labels: want -100"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
