"""Saliency scores: the four kinds over lists of mixed shapes and types."""

from __future__ import annotations

import pytest
import torch

import fastunlearn
from fastunlearn import ops
from fastunlearn.ops.saliency import KINDS
from tests.proof import Aot, OpProof, assert_equal, convert

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 4096  # of the Triton kernel
SHAPES = {
    "list": [(5, 7), (16,), (33, 200), (), (4, 3, 3, 3)],
    "one": [(1,)],
    "empty tensors": [(0,), (3, 0), (70,)],
    "nothing": [(0, 4)],
    "blocks": [(BLOCK,), (2 * BLOCK - 1,), (1,), (BLOCK + 5,)],
    "pieces": [(40_000,), (3, 33_333)],
}


def _inputs(shapes, kind, grad_dtypes, weight_dtypes=(torch.float32,), device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(dtypes):
        return [
            torch.randn(s, generator=generator).to(dtypes[i % len(dtypes)]).to(device) for i, s in enumerate(shapes)
        ]

    weights = make(weight_dtypes) if kind == "weight_grad" else None
    return {"scores": make([torch.float32]), "grads": make(grad_dtypes), "weights": weights, "kind": kind}


def plain64(args):
    """The closed form in double precision."""
    out = []
    for i, (s, g) in enumerate(zip(args["scores"], args["grads"])):
        g = g.double()
        if args["kind"] == "weight_grad":
            g = (args["weights"][i].double() * g).abs()
        out.append(s.double() + {"abs": g.abs(), "square": g * g, "signed": g, "weight_grad": g}[args["kind"]])
    return out


class Saliency(OpProof):
    op = "saliency_accumulate_"
    backends = ("native", "triton")

    def run(self, args):
        scores = [s.clone() for s in args["scores"]]
        assert ops.saliency_accumulate_(scores, args["grads"], args["weights"], args["kind"]) is scores
        return scores

    def library_calls(self, args):
        op = torch.ops.fastunlearn.saliency_accumulate_.default
        yield op, ([s.clone() for s in args["scores"]], args["grads"], args["weights"] or [], args["kind"])


def _cases(kinds):
    cases = {
        f"{kind} {shapes}": (lambda device, k=kind, s=shapes: _inputs(SHAPES[s], k, [torch.float32], device=device))
        for kind in kinds
        for shapes in SHAPES
    }
    for kind in kinds:
        for name, dtype in FLOATS.items():
            cases[f"{kind} {name}"] = lambda device, k=kind, d=dtype: _inputs(
                SHAPES["list"] + SHAPES["blocks"], k, [d], [d], device
            )
        cases[f"{kind} mixed"] = lambda device, k=kind: _inputs(
            SHAPES["list"] + SHAPES["blocks"], k, list(FLOATS.values()), list(FLOATS.values())[:2], device
        )
    return cases


class TestExact(Saliency):
    """One rounding per entry: the same bits everywhere."""

    cases = _cases(["abs", "signed"]) | {
        f"signed one {n} {name}": (lambda device, n=n, d=d: _inputs([(n,)], "signed", [d], device=device))
        for n in (BLOCK, 2 * BLOCK + 3)
        for name, d in FLOATS.items()
    }
    few = (
        "signed one 4096 fp32",
        "signed one 8195 bf16",
        "abs list",
        "abs blocks",
        "abs empty tensors",
        "signed mixed",
        "signed nothing",
        "abs bf16",
        "signed fp16",
    )
    aot = [
        Aot(
            "fastunlearn.kernels.saliency:_kernel",
            {"table": "*i64", "count": "i32"},
            {"STEPS": 9, "KIND": kind, "GRAD": grad, "WEIGHT": weight, "ALIGNED": aligned, "BLOCK": BLOCK},
            {"num_warps": 8},
        )
        for kind, grad, weight, aligned in [(0, 0, 0, True), (1, 1, 0, True), (2, 2, 0, False), (3, -1, -1, True)]
    ] + [
        Aot(
            "fastunlearn.kernels.saliency:_kernel_one",
            {"scores": "*fp32", "grads": f"*{grad}", "weights": "*fp16", "numel": "i64"},
            {"KIND": kind, "BLOCK": BLOCK},
            {"num_warps": 8},
        )
        for kind, grad in [(0, "bf16"), (3, "fp32")]
    ]

    def oracle(self, args):
        return [t.float() for t in plain64(args)]


class TestProducts(Saliency):
    """A product may or may not be rounded before it is added (FMA): within the error of torch's own fp32."""

    exact = False
    cases = _cases(["square", "weight_grad"]) | {
        f"weight_grad one {n}": (
            lambda device, n=n: _inputs([(n,)], "weight_grad", [torch.float16], [torch.float32], device)
        )
        for n in (BLOCK, BLOCK + 3)
    }
    few = (
        "weight_grad one 4096",
        "weight_grad one 4099",
        "square list",
        "square mixed",
        "weight_grad blocks",
        "weight_grad mixed",
        "weight_grad bf16",
    )
    aot = TestExact.aot

    def oracle(self, args):
        return plain64(args)

    def _run64(self, args):
        return plain64(convert(args, lambda t: t.cpu()))


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_nan_and_infinities_pass_through(backend):
    grads = [torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])]
    with fastunlearn.backend(backend):
        (got,) = ops.saliency_accumulate_([torch.zeros(5)], grads)
        assert got.isnan().tolist() == [True, False, False, False, False]
        assert got[1:].tolist() == [float("inf"), float("inf"), 0.0, grads[0][4].item()]
        (got,) = ops.saliency_accumulate_([torch.zeros(5)], [g.half() for g in grads], kind="signed")
        assert got[1:3].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_squares_beyond_fp32(backend):
    """Rounded before they are added (infinite), or added as they are: in vectors and behind the last of them."""
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([-inf, -3e38, 1.0, inf, nan])[:, None].repeat(1, 37)
    grads = torch.tensor([1e30, 2e19, 1e30, 1e30, 0.0])[:, None].expand(5, 37)
    with fastunlearn.backend(backend):
        (got,) = ops.saliency_accumulate_([scores], [grads], kind="square")
    for row, want in zip(got, [(nan, -inf), (inf, 1e38), (inf,), (inf,), (nan,)], strict=True):
        each = torch.stack([torch.isclose(row, torch.tensor(w), rtol=1e-6, atol=0, equal_nan=True) for w in want])
        assert bool(each.any(0).all()), row


def test_every_half_is_widened_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        grads = [every.view(dtype)]
        for isa in (0, 3, 99):
            before = fastunlearn._native._C.set_isa_level(isa)
            try:
                with fastunlearn.backend("native"):
                    assert_equal(
                        ops.saliency_accumulate_([torch.zeros(2**16)], grads, kind="signed"), [grads[0].float() + 0.0]
                    )
            finally:
                fastunlearn._native._C.set_isa_level(before)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_layouts(backend):
    scores, grads = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    want = scores + grads.abs()
    last = torch.channels_last
    with fastunlearn.backend(backend):
        for s, g in [
            (scores.clone(), grads.to(memory_format=last)),
            (scores.to(memory_format=last, copy=True), grads),
            (scores.to(memory_format=last, copy=True), grads.to(memory_format=last)),
        ]:
            before = s.stride()
            ops.saliency_accumulate_([s], [g])
            assert torch.equal(s, want)
            assert s.stride() == before
        wide = torch.zeros(8, 20)
        ops.saliency_accumulate_([wide[:, 3:14]], [torch.ones(8, 11)])
        assert wide.sum() == 88
        assert wide[:, 3:14].eq(1).all()
        # No alignment beyond that of an element.
        raw = torch.zeros(5001)
        ops.saliency_accumulate_([raw[1:]], [torch.ones(5003, dtype=torch.float16)[3:]])
        assert raw[0] == 0
        assert raw[1:].eq(1).all()


def test_missing_gradients_are_skipped():
    scores = [torch.ones(3), torch.ones(4), torch.ones(2, 2)]
    ops.saliency_accumulate_(scores, [None, torch.full((4,), -2.0), None])
    assert [s.unique().tolist() for s in scores] == [[1.0], [3.0], [1.0]]
    assert ops.saliency_accumulate_([], []) == []
    with pytest.raises(ValueError, match="every gradient is None"):
        ops.saliency_accumulate_(scores, [None, None, None])


def test_parameters_and_their_gradients():
    """The lists as a training loop has them: the scores are no part of any graph."""
    model = torch.nn.Linear(5, 3)
    model(torch.ones(2, 5)).sum().backward()
    scores = [torch.zeros_like(p) for p in model.parameters()]
    for backend in ("reference", "native"):
        with fastunlearn.backend(backend):
            ops.saliency_accumulate_(
                scores, [p.grad for p in model.parameters()], list(model.parameters()), "weight_grad"
            )
    want = [2 * (p * p.grad).abs() for p in model.parameters()]
    assert_equal(scores, [w.detach() for w in want])
    assert not any(s.requires_grad for s in scores)


def test_compiled_twice_in_one_graph():
    """Mutation through the library op is seen by what follows it in the graph."""

    def f(grads):
        scores = [torch.zeros_like(g) for g in grads]
        ops.saliency_accumulate_(scores, grads, kind="square")
        ops.saliency_accumulate_(scores, grads, kind="abs")
        return [s * 2 for s in scores]

    grads = [torch.randn(7, 5), torch.randn(11)]
    torch._dynamo.reset()
    assert_equal(torch.compile(f, fullgraph=True, backend="aot_eager")(grads), f(grads))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    numel = (1 << 31) + 70
    scores, grads = torch.zeros(numel, device="cuda"), torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    grads[-5:] = -3
    with fastunlearn.backend("triton"):
        ops.saliency_accumulate_([scores], [grads])
    assert scores[:-5].eq(1).all()
    assert scores[-5:].eq(3).all()


def _call(scores=2, grads=2, **kwargs):
    def build(n):
        return [torch.zeros(3) for _ in range(n)] if isinstance(n, int) else n

    return lambda: ops.saliency_accumulate_(build(scores), build(grads), **kwargs)


_same = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (_call(2, 3), ValueError, "grads: 3 tensors for 2 scores"),
        (_call(kind="max"), ValueError, "kind: want one of 'abs', 'square', 'signed', 'weight_grad', got 'max'"),
        (_call(kind="weight_grad"), ValueError, "weights: needed"),
        (_call(kind="abs", weights=[_same, _same]), ValueError, "weights: only kind="),
        (_call(kind="weight_grad", weights=[_same]), ValueError, "weights: 1 tensors for 2 scores"),
        (_call(kind="weight_grad", weights=[_same, torch.zeros(4)]), ValueError, r"weights\[1\]: shape \(4,\)"),
        (_call([torch.zeros(3, dtype=torch.int64)], 1), TypeError, r"scores\[0\]: want torch.float32, got torch.int64"),
        (_call([torch.zeros(3).bfloat16()], 1), TypeError, "want torch.float32, got torch.bfloat16"),
        (_call(1, [torch.zeros(3, dtype=torch.int32)]), TypeError, r"grads\[0\]: want float32, float16 or bfloat16"),
        (_call(1, [torch.zeros(3, dtype=torch.float64)]), TypeError, "got torch.float64"),
        (_call(2, [torch.zeros(3), torch.zeros(3, 1)]), ValueError, r"grads\[1\]: shape \(3, 1\), but scores\[1\] is \(3,\)"),
        (_call(1, [torch.zeros(3, device="meta")]), ValueError, r"grads\[0\]: on meta, but scores\[0\] is on cpu"),
        (_call([torch.zeros(3), torch.zeros(3, device="meta")], [_same, torch.zeros(3, device="meta")]), ValueError,
         r"scores\[1\]: on meta, the first on cpu"),
        (_call(1, [torch.zeros(3).to_sparse()]), TypeError, "want a dense tensor"),
        (_call([_same, _same]), ValueError, "the same memory twice"),
        (_call(_same, _same), TypeError, "scores: want a list of tensors"),
        (_call([1.0], 1), TypeError, r"scores\[0\]: want a tensor"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert _same.eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("tensors", [1, 3])
def test_autograd_sees_the_change(backend, tensors):
    scores = [torch.zeros(5, 7) for _ in range(tensors)]
    leaf = torch.ones(5, 7, requires_grad=True)
    saved = leaf * scores[-1]
    before = [s._version for s in scores]
    with fastunlearn.backend(backend):
        ops.saliency_accumulate_(scores, [torch.ones(5, 7)] * tensors)
    assert all(s._version > b for s, b in zip(scores, before))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_inference_tensors(backend):
    with torch.inference_mode(), fastunlearn.backend(backend):
        (got,) = ops.saliency_accumulate_([torch.zeros(5)], [-torch.ones(5)])
        assert got.tolist() == [1.0] * 5


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """A list needs a table, which a replay would find stale: refused. One tensor has none."""
    scores = [torch.zeros(5000, device="cuda") for _ in range(2)]
    grads = [torch.ones(5000, device="cuda") for _ in range(2)]
    with fastunlearn.backend("triton"):
        ops.saliency_accumulate_(scores[:1], grads[:1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                ops.saliency_accumulate_(scores, grads)
            ops.saliency_accumulate_(scores[:1], grads[:1])
        graph.replay()
    assert scores[0].eq(2).all()


def test_kinds_match_the_native_numbers():
    assert list(KINDS.items()) == [("abs", 0), ("square", 1), ("signed", 2), ("weight_grad", 3)]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_lazily_negated(backend):
    """What a view is counts, not what lies in the memory that it shares with its opposite."""
    x, w = torch.randn(5, 9), torch.randn(5, 9)
    with fastunlearn.backend(backend):
        for score in (torch.zeros(5, 9), torch._neg_view(torch.zeros(5, 9))):
            ops.saliency_accumulate_([score], [torch._neg_view(x)], kind="signed")
            assert_equal(score.resolve_neg(), -x)
            ops.saliency_accumulate_([score], [x], kind="signed")
            assert not score.any()
        score = torch.zeros(5, 9)
        ops.saliency_accumulate_([score], [x], [torch._neg_view(w)], kind="weight_grad")
        assert_equal(score, (x * w).abs())
