"""linear_nll: torch's cross entropy of whole logits, every backend, every way through the buffer, and what is no input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastunlearn
from fastunlearn import ops
from fastunlearn.ops import _linear_loss
from tests.ops.linear_loss_proof import LinearLossProof, budget, case, from_logits, inputs, memory_of, torch_alone
from tests.proof import Aot, assert_derived, convert

BACKENDS = ["reference", "triton"]
HALF, BF16 = torch.float16, torch.bfloat16
#: bytes that hold the logits of a few tokens of the cases only
SMALL = 1 << 10


class TestLinearNll(LinearLossProof):
    op = "linear_nll"
    cases = {
        "frozen head": case(),
        "frozen head, many chunks": case(bytes_=SMALL, bias=True),
        "trained head": case(trains="hwb", bias=True),
        "trained head, blocks": case(trains="hwb", bias=True, bytes_=SMALL),
        "head alone": case(trains="w", bytes_=SMALL),
        "bias alone": case(trains="b", bias=True),
        "by token": case(trains="hw", reduction="token", bytes_=SMALL),
        "capped": case(trains="hwb", bias=True, softcap=3.0, scale=0.7, bytes_=SMALL),
        "capped, frozen": case(softcap=3.0, scale=-2.0),
        "scaled": case(trains="hw", scale=0.0625, spread=16),
        "wide": case(shape=(3, 5), vocabulary=9001, trains="hw", bytes_=1 << 18, spread=0.3),
        "wide, frozen": case(shape=(3, 4), vocabulary=5000, ignored=0, spread=0.3),
        "sharp": case(spread=60, trains="hw"),
        "all count": case(ignored=0, trains="hw"),
        "none counts": case(ignored=1.1, trains="hwb", bias=True),
        "no tokens": case(shape=(3, 0), trains="hw"),
        "no rows": case(shape=(0, 4), trains="hw"),
        "one dimension": case(shape=(9,), bytes_=SMALL),
        "three dimensions": case(shape=(2, 3, 4), trains="hw"),
        "vocabulary of one": case(vocabulary=1, trains="hw"),
        "fp16": case(shape=(8, 9), dtype=HALF, width=33, vocabulary=77, bytes_=4 * SMALL),
        "fp16, trained": case(
            shape=(8, 9), dtype=HALF, width=33, vocabulary=77, trains="hwb", bias=True, bytes_=8 * SMALL
        ),
        "bf16": case(shape=(8, 9), dtype=BF16, width=33, vocabulary=77, trains="hw"),
        "bf16, frozen": case(shape=(8, 9), dtype=BF16, width=33, vocabulary=77, bytes_=4 * SMALL),
        "bf16, capped": case(shape=(8, 9), dtype=BF16, vocabulary=77, trains="hw", softcap=5.0),
        "rows of any length": case(vocabulary=4099, bytes_=1 << 15, dtype=BF16),
    }
    few = ("frozen head", "frozen head, many chunks", "trained head", "trained head, blocks", "by token", "capped", "wide",
           "all count", "none counts", "no tokens", "one dimension", "vocabulary of one", "fp16", "fp16, trained",
           "bf16, capped", "rows of any length")  # fmt: skip
    differences = ("frozen head, many chunks", "trained head", "trained head, blocks", "by token", "capped")
    cancelling = (
        case(shape=(3, 6, 3), width=15, vocabulary=15, dtype=BF16, trains="hw", softcap=5.0, ignored=0.5, bytes_=1, spread=8),
        case(dtype=BF16, trains="hwb", bias=True, bytes_=SMALL),
    )  # fmt: skip
    aot = [
        Aot(
            "fastunlearn.kernels.linear_nll:rows",
            {"logits": f"*{kind}", "labels": "*i64", "value": "*fp32", "stats": "*fp32", "cols": "i32", "edge": "i32", "stride": "i32",
             "scale": "fp32", "softcap": "fp32"},
            {"GRADIENT": gradient, "CAP": cap, "BLOCK": 4096},
            {"num_warps": 8},
        )
        for kind, gradient, cap in [("bf16", True, False), ("bf16", False, False), ("fp32", True, True), ("fp16", True, True)]
    ] + [
        Aot(
            "fastunlearn.kernels.linear_nll:block",
            {"logits": f"*{kind}", "labels": "*i64", "stats": "*fp32", "cols": "i32", "edge": "i32", "stride": "i32", "start": "i32",
             "scale": "fp32", "softcap": "fp32"},
            {"CAP": cap, "BLOCK": 2048},
            {"num_warps": 4},
        )
        for kind, cap in [("bf16", False), ("fp32", True)]
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Logits 0, ln 3 and ln 4: p = 1/8, 3/8, 4/8."""
    hidden = torch.tensor([[[1.0], [1.0], [1.0]]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)], [math.log(4)]])
    with fastunlearn.backend(backend):
        nll, counts = ops.linear_nll(hidden, weight, torch.tensor([[0, -100, 2]]))
    assert nll.tolist() == pytest.approx([math.log(8) + math.log(2)])
    assert counts.tolist() == [2]
    # sum_v p_v w_v - w_y
    mean = 3 / 8 * math.log(3) + 4 / 8 * math.log(4)
    nll.sum().backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([mean, 0, mean - math.log(4)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trains", ["h", "hw"])
def test_npo_of_sequences(backend, trains):
    """Every sequence has a weight of its own, which only the loss behind the op knows."""
    args = inputs((4, 6), trains=trains, bytes_=1 << 10)
    reference, got, want = torch.rand(4), [], []
    for into, f in ((got, lambda h, w: ops.linear_nll(h, w, args["labels"])[0]),
                    (want, lambda h, w: from_logits("nll", args, {"hidden": h, "weight": w}).sum(-1))):  # fmt: skip
        h, w = args["hidden"].clone().requires_grad_(), args["weight"].clone().requires_grad_("w" in trains)
        with fastunlearn.backend(backend), budget(args["budget"]):
            loss = 2 / 0.1 * F.softplus(0.1 * (reference - f(h, w))).mean()
            loss.backward()
        into += [loss.detach(), h.grad, *([w.grad] if "w" in trains else [])]
    assert_derived(got, want, [t.double() for t in want], eps=2e-6)


@pytest.mark.parametrize("trains", ["h", "hw"])
def test_twice_through_one_graph(trains):
    args = inputs(trains=trains)
    hidden, weight = args["hidden"].requires_grad_(), args["weight"].requires_grad_("w" in trains)
    leaves = [hidden, weight][: len(trains)]
    nll = ops.linear_nll(hidden, weight, args["labels"])[0]
    first = torch.autograd.grad(nll.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(nll.sum(), leaves)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_no_second_derivatives():
    args = inputs()
    hidden = args["hidden"].requires_grad_()
    nll = ops.linear_nll(hidden, args["weight"], args["labels"])[0].sum()
    grad = torch.autograd.grad(nll, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), hidden)


@pytest.mark.parametrize("trains", ["h", "hw"])
def test_memory_does_not_grow_with_the_vocabulary(trains):
    limit = 1 << 20
    got = [memory_of("nll", vocabulary, trains, limit) for vocabulary in (5000, 80_000)]
    assert max(got) <= 1.1 * limit
    assert got[1] <= 1.1 * got[0]


def test_ignored_tokens_are_not_computed(monkeypatch):
    args = inputs((6, 7), ignored=0.7)
    args["hidden"][args["labels"] == -100] = math.nan
    hidden = args["hidden"].requires_grad_()
    seen = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: seen.append(len(a)) or mm(a, b, **k))
    nll, counts = ops.linear_nll(hidden, args["weight"], args["labels"])
    nll.sum().backward()
    assert seen == [int(counts.sum())] * 2
    assert nll.isfinite().all()
    assert hidden.grad[args["labels"] == -100].eq(0).all()


def test_autocast_is_that_of_a_linear_layer():
    args = inputs(width=33, trains="hw")
    got, want = [], []
    for into, f in ((got, lambda h, w: ops.linear_nll(h, w, args["labels"])[0]),
                    (want, lambda h, w: from_logits("nll", args, {"hidden": h, "weight": w}).sum(-1))):  # fmt: skip
        h, w = args["hidden"].clone().requires_grad_(), args["weight"].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            nll = f(h, w)
        assert nll.dtype == torch.float32
        into += [nll.detach(), *torch.autograd.grad((nll * args["upstream"]).sum(), [h, w])]
        assert into[-1].dtype == torch.float32
    exact = convert(args, lambda t: t.double() if t.is_floating_point() else t)
    assert_derived(got, want, torch_alone(exact))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    args = inputs((4, 6), trains="hw")
    weight = args["weight"].t().contiguous().t()
    hidden = torch.randn(6, 4, 40)[..., 3:19].transpose(0, 1)
    with fastunlearn.backend(backend):
        want = ops.linear_nll(hidden.clone(), args["weight"], args["labels"])[0]
        for h, w in ((hidden, weight), (torch._neg_view(-hidden), torch._neg_view(-weight))):
            torch.testing.assert_close(ops.linear_nll(h, w, args["labels"])[0], want)
        assert torch.equal(ops.linear_nll(hidden.clone(), args["weight"], args["labels"].int())[0], want)


def test_a_loss_scale_of_fp16_does_not_overflow():
    """u h beyond 65504 where the gradient is not."""
    args = inputs(dtype=torch.float16, trains="hw", spread=8)
    h, w = args["hidden"].requires_grad_(), (args["weight"] * 0.01).requires_grad_()
    with budget(1 << 10):
        (ops.linear_nll(h, w, args["labels"])[0].sum() * 8192 / 15).backward()
        assert w.grad.isfinite().all()
        assert h.grad.isfinite().all()


def test_nan_in_a_token_stays_there():
    args = inputs((3, 5), ignored=0)
    args["hidden"][1, 2, 0] = math.nan
    nll = ops.linear_nll(args["hidden"], args["weight"], args["labels"], reduction="token")[0]
    assert nll.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trains", ["h", "hw"])
def test_entries_that_are_ruled_out(backend, trains):
    """Those of a bias of -inf have probability and gradient 0, as in torch."""
    args = inputs(bias=True, trains=trains, bytes_=SMALL)
    args["labels"] = torch.where(args["labels"] < 0, -100, args["labels"] % 30)
    args["bias"][30:] = -math.inf
    with fastunlearn.backend(backend):
        got = TestLinearNll().run(args)
    want = torch_alone(args)
    assert all(t.isfinite().all() for t in want)
    assert_derived(got, want, [t.double() for t in want], eps=2e-6)


def test_rows_are_touched_up_to_a_multiple_of_16_where_that_is_their_memory():
    """Triton loads whole vectors only where it knows that the row's end is aligned."""
    pytest.importorskip("triton")
    from fastunlearn.kernels.linear_nll import last
    from fastunlearn.ops._linear_loss import _buffer

    assert last(_buffer(3, 50_257, torch.empty(0, dtype=torch.bfloat16))) == 50_272
    assert last(_buffer(3, 50_257, torch.empty(0))[:, :33]) == 48
    assert last(torch.empty(3, 33)) == 33
    padded = torch.empty(3, 48)
    assert last(padded[:, :33]) == 48
    assert last(padded[:, 20:]) == 28, "the last row would end outside"
    assert last(padded[:2, 20:]) == 28, "the next row's entries are not free"
    assert last(padded[:, :33], torch.empty(3, 33)) == 33
    assert last(torch.empty(3, 32)) == 32


def test_double_runs_as_reference_on_request_only():
    hidden, weight, labels = torch.rand(2, 3, 4).double(), torch.rand(5, 4).double(), torch.zeros(2, 3).long()
    assert ops.linear_nll(hidden, weight, labels)[0].dtype == torch.float64
    # Where there is a GPU no Triton kernel takes a CPU tensor.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(fastunlearn.BackendError, match="float64"), fastunlearn.backend("triton"):
        ops.linear_nll(hidden.to(device), weight.to(device), labels.to(device))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    vocabulary, n = 1 << 17, (1 << 14) + 5
    hidden = torch.randn(1, n, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, 8, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (1, n), device="cuda")
    with fastunlearn.backend("triton"):
        with budget(8 << 30):
            whole = ops.linear_nll(hidden, weight, labels, reduction="token")[0]
        parts = ops.linear_nll(hidden, weight, labels, reduction="token")[0]
    torch.testing.assert_close(whole, parts)


@pytest.mark.gpu
def test_refused_in_a_graph():
    hidden, weight = torch.randn(4, 8, device="cuda"), torch.randn(9, 8, device="cuda")
    labels = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.linear_nll(hidden, weight, labels)


H, W, L = torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.linear_nll(1.0, W, L), TypeError, "hidden: want a tensor, got float"),
        (lambda: ops.linear_nll(H.int(), W, L), TypeError, "hidden: want a dense tensor of float32.*got torch.int32"),
        (lambda: ops.linear_nll(H[0, 0], W, L), ValueError, r"hidden: want \[..., tokens, width\], got \(4,\)"),
        (lambda: ops.linear_nll(H, W[0], L), ValueError, r"weight: want \[vocabulary, width\]"),
        (lambda: ops.linear_nll(H, W.t(), L), ValueError, r"weight: want \[vocabulary, 4\] for hidden \(2, 3, 4\), got \(4, 5\)"),
        (lambda: ops.linear_nll(H, W[:0], L), ValueError, "weight: want"),
        (lambda: ops.linear_nll(H, W.half(), L), TypeError, "weight: torch.float16, but hidden is torch.float32"),
        (lambda: ops.linear_nll(H, W, L, bias=W[0]), ValueError, r"bias: want \[5\]"),
        (lambda: ops.linear_nll(H, W, L, bias=W[:, 0].half()), TypeError, "bias: torch.float16"),
        (lambda: ops.linear_nll(H, W, L.float()), TypeError, "labels: want an int64 tensor, got torch.float32"),
        (lambda: ops.linear_nll(H, W, [0]), TypeError, "labels: want an int64 tensor, got list"),
        (lambda: ops.linear_nll(H, W, L[:, 1:]), ValueError, r"labels: want \(2, 3\), one for each hidden state"),
        (lambda: ops.linear_nll(H, W, L + 5), ValueError, r"labels: want -100 \(ignored\) or a row of weight, 0 to 4; got 5"),
        (lambda: ops.linear_nll(H, W, L - 1), ValueError, "got -1"),
        (lambda: ops.linear_nll(H, W.to("meta"), L), ValueError, "weight: on meta, but hidden is on cpu"),
        (lambda: ops.linear_nll(H, W, L, reduction="mean"), ValueError, "reduction: want one of 'sequence', 'token', got 'mean'"),
        (lambda: ops.linear_nll(H, W, L, logit_scale=0.0), ValueError, "logit_scale: want a finite number other than 0"),
        (lambda: ops.linear_nll(H, W, L, logit_scale="1"), TypeError, "logit_scale: want"),
        (lambda: ops.linear_nll(H, W, L, softcap=-1.0), ValueError, "softcap: want a number > 0, or None"),
        (lambda: ops.linear_nll(H, W, L, softcap=math.inf), ValueError, "softcap: want"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_pieces_are_even():
    even = _linear_loss._even
    assert even(0, 100, 64) == 1
    assert even(100, 100, 64) == 100
    assert even(1000, 300, 64) == 256
    assert even(10, 3, 64) == 3
    for total in (1, 7, 63, 64, 65, 999, 4096):
        for most in (1, 5, 64, 70, 500):
            assert 1 <= even(total, most, 64) <= max(most, 1)
