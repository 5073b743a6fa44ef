"""Redistribution factors: the closed form, every layout of the rows, every backend, and what is no importance."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import fastunlearn
from fastunlearn import BitMask, ops
from fastunlearn.ops.mask import rows_cols
from tests.proof import Aot, OpProof, assert_derived, assert_equal

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def closed_form(importance: torch.Tensor, may: torch.Tensor, beta: float, clip: float) -> torch.Tensor:
    """Row by row, in float64, as the definition has it: r = (lost / kept) (I / mean)."""
    flat = importance.double().reshape(rows_cols(importance.shape)).numpy()
    kept_where = may.reshape(rows_cols(may.shape)).numpy()
    factors = []
    for row, m in zip(flat, kept_where):
        survivors = row[m]
        kept, lost = survivors.sum(), row[~m].sum()
        r = lost / kept * (survivors / survivors.mean()) if kept > 0 else np.zeros(len(survivors))
        factors.append(np.minimum(1 + beta * r, clip))
    f = np.concatenate(factors) if factors else np.zeros(0)
    rms = math.sqrt(float(np.mean(f**2))) if len(f) else 1.0
    return torch.from_numpy(f / rms)


def _inputs(
    shapes, density=0.5, dtypes=(torch.float32,), beta=1.0, clip=5.0, device="cpu", seed=0, zeros=0.0, kept=1.0
):
    """`kept`: what the importance of survivors is multiplied by."""
    generator = torch.Generator().manual_seed(seed)
    out = {"importance": [], "may": [], "bits": [], "beta": beta, "clip": clip}
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=generator).square() * 10 ** (i % 5 - 2.0)
        x = torch.where(torch.rand(shape, generator=generator) < zeros, 0.0, x)
        may = torch.rand(shape, generator=generator) < density
        x = torch.where(may, x.double() * kept, x.double()).to(dtypes[i % len(dtypes)])
        out["importance"].append(x.to(device))
        out["may"].append(may.to(device))
        out["bits"].append(_packed(may).bits.to(device))
    out["sizes"] = [int(m.sum()) for m in out["may"]]
    return out


def _case(shapes, **kwargs):
    return lambda device: _inputs(shapes, device=device, **kwargs)


def _packed(may):
    with fastunlearn.backend("auto"):
        return BitMask.pack(may)


def _masks(args):
    return [BitMask(b, x.shape) for b, x in zip(args["bits"], args["importance"])]


class TestRedistribution(OpProof):
    op = "redistribution"
    backends = ("native", "triton")
    exact = False
    cases = {
        "one": _case([(7, 40)]),
        "list": _case([(5, 24), (3, 11), (40,), (1, 1), (6, 2, 3, 3), (12, 64)]),
        "ragged": _case([(33, 77), (50, 129), (9, 1027)]),
        "sparse": _case([(33, 200), (50, 128)], density=0.02),
        "dense": _case([(33, 200), (50, 128)], density=0.98),
        "empty masks": _case([(5, 16), (4, 9)], density=0.0),
        "full masks": _case([(5, 16), (4, 9)], density=1.1),
        "no importance": _case([(20, 30), (6, 64)], zeros=0.95),
        # What their importance is multiplied by has no place in fp32: the factors have.
        "survivors of next to nothing": _case([(7, 40), (9, 136), (33, 7)], kept=1e-43),
        "survivors of almost nothing": _case(
            [(7, 40), (9, 136), (3, 2049)], dtypes=[torch.float32, torch.bfloat16], kept=1e-38
        ),
        "nothing": _case([(0, 8), (3, 0), (0,)]),
        "nothing beside": _case([(0, 8), (4, 8), (3, 0)]),
        "scalar": _case([()], density=1.1),
        "halves": _case([(21, 40), (9, 136), (6, 33)], dtypes=list(FLOATS.values())),
        "fp16": _case([(21, 48), (9, 35)], dtypes=[torch.float16]),
        "bf16": _case([(21, 48), (9, 35)], dtypes=[torch.bfloat16]),
        "weak": _case([(21, 48), (9, 35)], beta=0.3, clip=1.5),
        "off": _case([(21, 48)], beta=0.0),
        "clipped to nothing": _case([(21, 48)], clip=1.0),
        "many tiles": _case([(300, 48), (5, 5000), (2, 9000), (70, 576)]),
        "one long row": _case([(70_001,)], dtypes=[torch.bfloat16]),
        "many units": _case([(2000, 136), (700, 300), (16, 64)]),
        "many small": _case([(16, 24)] * 20),
    }
    few = ("one", "list", "ragged", "empty masks", "full masks", "no importance", "survivors of next to nothing", "nothing",
           "nothing beside", "halves", "bf16", "weak", "many tiles")  # fmt: skip
    aot = [
        Aot(
            f"fastunlearn.kernels.redistribute:{name}",
            signature,
            {"STEPS": 8, "TYPE": kind, "ALIGNED": aligned, "R": r, "C": c, **({"WHOLE": whole} if name == "measure" else {})},
            {"num_warps": 4},
        )
        for kind, aligned, whole, r, c in [
            ("tl.bfloat16", True, False, 1, 4096),
            ("tl.bfloat16", True, True, 1, 4096),
            ("tl.float32", True, True, 4, 1024),
            ("tl.float16", False, True, 256, 16),
        ]
        for name, signature in {
            "measure": {"table": "*i64", "count": "i32", "low": "i32", "high": "i32", "first": "i32", "counts": "*i32",
                        "scales": "*fp64", "partial": "*fp64", "beta": "fp32", "clip": "fp32"},
            "write": {"table": "*i64", "outs": "*i64", "count": "i32", "low": "i32", "high": "i32", "first": "i32",
                      "starts": "*i64", "scales": "*fp64", "normalisers": "*fp32", "clip": "fp32"},
        }.items()
    ] + [
        Aot(
            "fastunlearn.kernels.redistribute:finish",
            {"table": "*i64", "count": "i32", "counts": "*i32", "partial": "*fp64", "starts": "*i64",
             "normalisers": "*fp32", "found": "*i64"},
            {"BLOCK": 1024},
            {"num_warps": 4},
        )
    ]  # fmt: skip

    def run(self, args):
        out = [torch.empty(n, dtype=torch.float32, device=x.device) for n, x in zip(args["sizes"], args["importance"])]
        return ops.redistribution(args["importance"], _masks(args), beta=args["beta"], clip=args["clip"], out=out)

    def oracle(self, args):
        return [
            closed_form(x.cpu(), m.cpu(), args["beta"], args["clip"]) for x, m in zip(args["importance"], args["may"])
        ]

    def _run64(self, args):
        return self.oracle(args)

    def library_calls(self, args):
        numbers = args["beta"], args["clip"]
        yield torch.ops.fastunlearn.redistribution.default, (args["importance"], args["bits"], *numbers)
        out = [torch.zeros(n) for n in args["sizes"]]
        yield torch.ops.fastunlearn.redistribution_out.default, (args["importance"], args["bits"], out, *numbers)


BACKENDS = ["reference", "native", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_out_and_one_tensor(backend):
    args = _inputs([(30, 44), (5, 20), (9,)])
    masks = _masks(args)
    with fastunlearn.backend(backend):
        got = ops.redistribution(args["importance"], masks)
        assert [len(f) for f in got] == args["sizes"]
        assert_derived(got, got, TestRedistribution().oracle(args), factor=0)
        for x, m, f in zip(args["importance"], masks, got):
            alone = ops.redistribution(x, m)
            assert_equal(alone, f)
            assert not alone.requires_grad
        assert_equal(ops.redistribution(args["importance"][0].requires_grad_(), masks[0]), got[0])
        assert ops.redistribution([], []) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Row 0 lost 3 of 4, row 1 nothing, row 2 everything, row 3 has survivors without importance."""
    importance = torch.tensor([[1.0, 3.0, 0.0, 0.0], [1.0, 1.0, 2.0, 5.0], [7.0, 7.0, 7.0, 7.0], [0.0, -0.0, 9.0, 9.0]])
    may = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    mask = BitMask.pack(may)
    with fastunlearn.backend(backend):
        got = ops.redistribution(importance, mask, clip=6.0)
        # Of row 0: lost / kept = 3, importance / mean = 2 and 0.
        want = torch.tensor([6.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        torch.testing.assert_close(got, want / want.square().mean().sqrt())
        assert ops.redistribution(importance, mask, beta=0.0).eq(1).all()
        assert ops.redistribution(importance, BitMask.ones((4, 4))).eq(1).all()
        assert ops.redistribution(importance, BitMask.zeros((4, 4))).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    importance = torch.rand(8, 6, 3, 3)
    mask = BitMask.pack(torch.rand(8, 6, 3, 3) < 0.5)
    with fastunlearn.backend(backend):
        want = ops.redistribution(importance, mask)
        assert_equal(ops.redistribution(importance.to(memory_format=torch.channels_last), mask), want)
        wide = torch.rand(8, 100)
        part = _packed(torch.rand(8, 54) < 0.5)
        assert_equal(ops.redistribution(wide[:, 13:67], part), ops.redistribution(wide[:, 13:67].clone(), part))
        # No alignment beyond that of an element.
        raw = torch.rand(1 + 64 * 40).half()[1:].view(64, 40)
        mask = _packed(torch.rand(64, 40) < 0.5)
        assert_equal(ops.redistribution(raw, mask), ops.redistribution(raw.clone(), mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated(backend):
    below = -torch.rand(30, 44)
    mask = _packed(torch.rand(30, 44) < 0.5)
    with fastunlearn.backend(backend):
        want = ops.redistribution(-below, mask)
        assert_equal(ops.redistribution(torch._neg_view(below), mask), want)
        with pytest.raises(TypeError, match=r"out\[0\]: a lazily negated view"):
            ops.redistribution(-below, mask, out=torch._neg_view(torch.zeros_like(want)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "words"),
    [(math.nan, "1 NaN"), (math.inf, "1 infinite"), (-1.0, "1 negative"), (3e38, "row whose sum is beyond")],
)
@pytest.mark.parametrize("survives", [True, False])
@pytest.mark.parametrize("given_out", [True, False])
@pytest.mark.parametrize("place", [0, 29])
def test_what_is_no_importance(backend, value, words, survives, given_out, place):
    args = _inputs([(4, 30), (3, 30), (5, 16)])
    may = args["may"][1]
    may[1, place] = survives
    args["bits"][1] = _packed(may).bits
    args["importance"][1][1, place] = value
    if value == 3e38:
        args["importance"][1][1, :] = value
    masks = _masks(args)
    out = [torch.zeros(int(m.sum())) for m in args["may"]] if given_out else None
    with fastunlearn.backend(backend), pytest.raises(ValueError, match=rf"importance\[1\].*{words}"):
        ops.redistribution(args["importance"], masks, out=out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_the_wrong_size(backend):
    args = _inputs([(4, 30), (9, 30)])
    memory = torch.full((400,), 7.0)
    n = args["sizes"][1]
    for size in (n - 3, n + 3):
        out = [torch.zeros(args["sizes"][0]), memory[5 : 5 + size]]
        with fastunlearn.backend(backend), pytest.raises(ValueError, match=rf"out\[1\]: want {n} entries.*got {size}"):
            ops.redistribution(args["importance"], _masks(args), out=out)
        assert memory[:5].eq(7).all()
        assert memory[5 + size :].eq(7).all()


@pytest.mark.parametrize("isa", [0, 3, 99])
def test_the_same_bits_whatever_the_threads(isa):
    """Sums are of units, in their order: neither the number of threads nor who does what changes a bit."""
    args = _inputs([(500, 300), (1000, 136), *[(40, 40)] * 9], dtypes=[torch.float32, torch.bfloat16])
    before, threads = fastunlearn._native._C.set_isa_level(isa), torch.get_num_threads()
    try:
        with fastunlearn.backend("native"):
            want = ops.redistribution(args["importance"], _masks(args))
            torch.set_num_threads(1)
            assert_equal(ops.redistribution(args["importance"], _masks(args)), want)
            for x, m, f in zip(args["importance"], _masks(args), want):
                assert_equal(ops.redistribution(x, m), f)
    finally:
        torch.set_num_threads(threads)
        fastunlearn._native._C.set_isa_level(before)


def test_tiles_of_any_size():
    """The Triton kernels at tiles so small that every row has several cells and every tensor several tiles."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this process compiles Triton kernels")
    from fastunlearn.kernels import redistribute as kernels

    args = _inputs([(7, 200), (40, 50), (1, 333), (9, 16)], dtypes=list(FLOATS.values()))
    call = kernels.Call(args["importance"], args["bits"], 1.0, 5.0, tile=64)
    assert call.found.tolist() == [args["sizes"], [0] * 4]
    out = [torch.empty(n) for n in args["sizes"]]
    call.write(out)
    assert_derived(out, out, TestRedistribution().oracle(args), factor=0)


def test_double_runs_as_reference_and_says_so():
    importance, mask = torch.rand(8, 8, dtype=torch.float64), BitMask.pack(torch.rand(8, 8) < 0.5)
    fastunlearn._backend._ops["redistribution"].warned.clear()
    with pytest.warns(fastunlearn.FallbackWarning, match="float64"):
        got = ops.redistribution(importance, mask)
    assert got.dtype == torch.float32
    assert_derived(got, got, closed_form(importance, mask.unpack(), 1.0, 5.0), factor=0)
    with pytest.raises(fastunlearn.BackendError, match="float64"), fastunlearn.backend("native"):
        ops.redistribution(importance, mask)


def test_compiled_without_out():
    """The sizes of the results are known to nobody before the call: unbacked symbols in the graph."""
    args = _inputs([(30, 44), (5, 20)])
    masks = _masks(args)

    def f(importance):
        return [2 * t for t in ops.redistribution(importance, masks)]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(args["importance"])
    assert_equal(got, f(args["importance"]))


@pytest.mark.gpu
def test_warned_of_later():
    args = _inputs([(40, 30), (9, 30)], device="cuda")
    args["importance"][1][0, 0] = math.nan
    out = [torch.zeros(n, device="cuda") for n in args["sizes"]]
    ops.redistribute.check_nan()
    with warnings.catch_warnings(record=True) as said, fastunlearn.backend("triton"):
        warnings.simplefilter("always")
        ops.redistribution(args["importance"], _masks(args), out=out)
        ops.redistribute.check_nan()
    assert any("importance[1]" in str(w.message) for w in said)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.gpu
def test_waits_for_nothing():
    args = _inputs([(40, 30), (9, 30), (300, 48)], dtypes=list(FLOATS.values()), device="cuda")
    masks = _masks(args)
    out = [torch.zeros(n, device="cuda") for n in args["sizes"]]
    with fastunlearn.backend("triton"):
        want = [t.clone() for t in ops.redistribution(args["importance"], masks, out=out)]  # compiles
        for t in out:
            t.zero_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.redistribution(args["importance"], masks, out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_equal(out, want)


def _ends_in_importance(rows, cols, device):
    """No importance and nothing pruned in all rows but the last three: factors of 1 there, before they are normalised."""
    x = torch.zeros(rows, cols, dtype=torch.float16, device=device)
    bits = torch.full((rows, cols // 8), 0xFF, dtype=torch.uint8, device=device)
    tail = torch.rand(3, cols, generator=torch.Generator().manual_seed(1)).half()
    may = torch.rand(3, cols, generator=torch.Generator().manual_seed(2)) < 0.5
    x[-3:], bits[-3:] = tail.to(device), _packed(may).bits.to(device)
    out = torch.zeros((rows - 3) * cols + int(may.sum()), device=device)
    ops.redistribution(x, BitMask(bits, x.shape), out=out)
    raw = closed_form(tail, may, 1.0, 5.0)
    raw = raw / raw.min() * _smallest(tail, may)
    ones = (rows - 3) * cols
    rms = math.sqrt((float(raw.square().sum()) + ones) / (len(raw) + ones))
    assert torch.allclose(out[ones:].cpu().double(), raw / rms, rtol=1e-4, atol=0)
    first, last = out[:ones].aminmax()
    assert first == last
    assert first.item() == pytest.approx(1 / rms, rel=1e-4)


def _smallest(importance, may):
    """The smallest factor before they are normalised."""
    best = math.inf
    for row, m in zip(importance.double(), may):
        kept, lost = row[m], row[~m].sum()
        best = min(best, float(torch.clamp(1 + lost / kept.sum() * kept / kept.mean(), max=5.0).min()))
    return best


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_last_rows_decide(backend):
    """The case below in small."""
    with fastunlearn.backend(backend):
        _ends_in_importance(19, 256, "cpu")


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """Entries and survivors past 2^31: nothing is a repetition of what a truncated offset would read or write."""
    with fastunlearn.backend("triton"):
        _ends_in_importance((1 << 16) + 3, 1 << 15, "cuda")


X, M = torch.ones(4, 8), BitMask.ones((4, 8))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.redistribution([X], M), TypeError, "want one tensor and one BitMask or a list of each"),
        (lambda: ops.redistribution(X, torch.ones(4, 8).bool()), TypeError, "one BitMask"),
        (lambda: ops.redistribution([X], [torch.ones(4, 8).bool()]), TypeError, r"mask\[0\]: want a BitMask, got Tensor"),
        (lambda: ops.redistribution([X, X], [M]), ValueError, "1 masks for 2 tensors"),
        (lambda: ops.redistribution([1.0], [M]), TypeError, r"importance\[0\]: want a tensor, got float"),
        (lambda: ops.redistribution(X.int(), M), TypeError, "want a dense floating tensor, got torch.int32"),
        (lambda: ops.redistribution(X.to_sparse(), M), TypeError, "want a dense floating tensor"),
        (lambda: ops.redistribution(X[:3], M), ValueError, r"mask\[0\]: shape \(4, 8\), but importance\[0\] is \(3, 8\)"),
        (lambda: ops.redistribution(X.to("meta"), M), ValueError, r"mask\[0\]: on cpu, but importance\[0\] is on meta"),
        (lambda: ops.redistribution(X, M, beta=1.5), ValueError, r"beta: want a number in \[0, 1\], got 1.5"),
        (lambda: ops.redistribution(X, M, beta=-0.1), ValueError, "beta: want"),
        (lambda: ops.redistribution(X, M, beta=math.nan), ValueError, "beta: want"),
        (lambda: ops.redistribution(X, M, beta=True), TypeError, "beta: want a number"),
        (lambda: ops.redistribution(X, M, clip=0.9), ValueError, r"clip: want a number in \[1, 1e\+06\]"),
        (lambda: ops.redistribution(X, M, clip=math.inf), ValueError, "clip: want"),
        (lambda: ops.redistribution(X, M, clip="5"), TypeError, "clip: want a number"),
        (lambda: ops.redistribution([X], [M], out=[]), ValueError, "out: 0 tensors for 1 of importance"),
        (lambda: ops.redistribution(X, M, out=torch.zeros(32).half()), TypeError, r"out\[0\]: want a contiguous float32"),
        (lambda: ops.redistribution(X, M, out=torch.zeros(64)[::2]), TypeError, "strides"),
        (lambda: ops.redistribution(X, M, out=torch.zeros(32, device="meta")), ValueError, r"out\[0\]: on meta"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
