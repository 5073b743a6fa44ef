"""topk_mask: every scope, key and dtype against a sort; hostile inputs; ties, NaN, infinities; bad input."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import fastunlearn
from fastunlearn import BitMask, _native, ops
from fastunlearn.ops import topk
from fastunlearn.ops.mask import rows_cols
from fastunlearn.ops.topk import floor_count
from tests.conftest import ROOT
from tests.proof import OpProof, assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:topk_mask. .* NaN:UserWarning")
NAN, INF = float("nan"), float("inf")


def _random(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _with(values: list[float], t: torch.Tensor, share: float) -> torch.Tensor:
    """`t` with a share of its entries replaced by the values, at random places."""
    generator = torch.Generator().manual_seed(7)
    chosen = torch.rand(t.shape, generator=generator) < share
    picks = torch.tensor(values)[torch.randint(len(values), t.shape, generator=generator)]
    return torch.where(chosen, picks.to(t.dtype), t)


def _subnormals(n: int) -> torch.Tensor:
    return (torch.arange(n) % 977 - 400).to(torch.float32) * 2.0**-149


def _bracket_collapse() -> list[torch.Tensor]:
    """The sample sees one value around the k-th place; the k-th value is another."""
    t = torch.zeros(300_000)
    t[::4099] = torch.linspace(-1, 1, t[::4099].numel())
    return [t]


# name -> (scores, arguments of topk_mask)
CASES: dict[str, tuple[list[torch.Tensor], dict]] = {
    "one": ([torch.tensor([0.5])], {"k": 1}),
    "none_of_one": ([torch.tensor([0.5])], {"density": 0.0}),
    "scalar": ([torch.tensor(3.0)], {"density": 1.0}),
    "list": (_random((300, 64), (1000,), (48, 3, 3, 3), (7, 13)), {"density": 0.1}),
    "densities": (_random((300, 200), (500, 111)), {"density": [0.5, 0.0, 0.05, 1.0, 0.1]}),
    "empty_tensors": (_random((0, 4), (40, 9), (4, 0), (100,)), {"density": 0.3}),
    "only_empty": (_random((0, 4), (0,)), {"density": 0.3}),
    "ragged": (_random((501, 3), (77, 1021), (5, 1)), {"density": 0.25}),
    "long_ragged_rows": (_random((3, 70_001), (2, 40_003)), {"density": 0.1}),
    "large": (_random((700, 1024), (300, 999), (4096,)), {"density": [0.5, 0.05]}),
    "large_abs": (_random((700, 1024), (300, 999)), {"density": 0.2, "key": "abs"}),
    "half": (_random((400, 600), (9, 9), dtype=torch.float16), {"density": 0.1}),
    "bfloat16": (_random((400, 600), (9, 9), dtype=torch.bfloat16), {"density": [0.1, 0.5]}),
    "bfloat16_abs": (_random((500, 333), dtype=torch.bfloat16), {"density": 0.1, "key": "abs"}),
    "mixed_dtypes": (_random((30, 40)) + _random((20, 50), dtype=torch.bfloat16), {"density": 0.3}),
    "constant": ([torch.ones(200, 500), torch.ones(77)], {"density": 0.3}),
    "two_values": ([(_random((400, 500))[0] < 0.3).float() + 1], {"density": [0.3, 0.6, 0.9]}),
    "zeros_and_noise": ([_with([0.0, -0.0], *_random((400, 500)), 0.5)], {"density": [0.2, 0.7], "key": "abs"}),
    "ascending": ([torch.arange(250_000.0).view(500, 500)], {"density": 0.1}),
    "descending": ([-torch.arange(250_000.0).view(500, 500)], {"density": 0.1}),
    "bracket_collapse": (_bracket_collapse(), {"k": 40}),
    "scales": ([10.0**i * t for i, t in enumerate(_random(*[(100, 300)] * 12))], {"density": 0.4, "key": "abs"}),
    "huge_and_tiny": ([torch.full((100, 100), 3e38), *_random((300, 301))], {"density": 0.2}),
    "all_nan": ([torch.full((40, 50), NAN)], {"density": 0.5}),
    "many_nan": ([_with([NAN], *_random((300, 400)), 0.8)], {"density": [0.1, 0.5]}),
    "some_nan": ([_with([NAN, -NAN], *_random((300, 400)), 0.01)], {"density": 0.1, "key": "abs"}),
    "infinities": ([_with([INF, -INF], *_random((300, 400)), 0.3)], {"density": [0.1, 0.5, 0.9, 1.0]}),
    "inf_and_nan": ([_with([INF, -INF, NAN], *_random((300, 400)), 0.9)], {"density": [0.1, 0.5, 0.9]}),
    "signed_zeros": ([_with([-0.0, 0.0], torch.zeros(300, 400), 0.5)], {"density": 0.4}),
    "around_zero": (_random((900, 300)), {"density": 0.5}),
    "subnormals": ([_subnormals(120_000)], {"density": [0.05, 0.4, 0.6]}),
    "k_everything": (_random((30, 40), (50,)), {"k": 1250}),
    "tensor": (_random((300, 64), (1000,), (200, 500), (7, 13)), {"density": [0.1, 0.6], "scope": "tensor"}),
    "tensor_k": ([torch.zeros(50, 3), *_random((40, 77))], {"k": 9, "scope": "tensor", "key": "abs"}),
    "row": (_random((60, 64), (1000,), (48, 3, 3, 3), (7, 13)), {"density": [0.1, 0.6, 1.0], "scope": "row"}),
    "row_ties": ([_random((300, 100))[0].round()], {"density": 0.5, "scope": "row"}),
    "row_nan": ([_with([NAN, -INF, 0.0, -0.0], *_random((90, 300)), 0.7)], {"density": [0.5, 0.9], "scope": "row"}),
    "row_n_of_m": ([_random((25, 64))[0].view(-1, 4)], {"k": 2, "scope": "row", "key": "abs"}),
    "row_long": (_random((2, 70_000), (3, 9000)), {"density": 0.2, "scope": "row"}),
    "row_bfloat16": (_random((100, 333), dtype=torch.bfloat16), {"density": 0.2, "scope": "row"}),
}


def plain(scores: list[torch.Tensor], density=None, k=None, scope="global", key="value") -> list[list[torch.Tensor]]:
    """The definition once more, by Python's sort: bool masks for every density and tensor."""
    flat = [t.double().abs().flatten().tolist() if key == "abs" else t.double().flatten().tolist() for t in scores]
    groups: list[list[tuple[int, int]]]
    if scope == "global":
        groups = [[(i, j) for i, values in enumerate(flat) for j in range(len(values))]]
    elif scope == "tensor":
        groups = [[(i, j) for j in range(len(values))] for i, values in enumerate(flat)]
    else:
        groups = []
        for i, t in enumerate(scores):
            rows, cols = rows_cols(t.shape)
            groups += [[(i, r * cols + c) for c in range(cols)] for r in range(rows)]
    out = []
    for d in density if isinstance(density, list) else [density]:
        masks = [torch.zeros(t.numel(), dtype=torch.bool) for t in scores]
        for group in groups:
            kept = k if d is None else int(Fraction(str(d)) * len(group))
            known = [place for place in group if flat[place[0]][place[1]] == flat[place[0]][place[1]]]
            for i, j in sorted(known, key=lambda place: -flat[place[0]][place[1]])[:kept]:
                masks[i][j] = True
        out.append([m.view(t.shape) for m, t in zip(masks, scores)])
    return out


class TestTopk(OpProof):
    op = "topk_mask"
    backends = ("native",)
    cuda_bodies = True
    cases = {
        name: (lambda device, s=scores, a=arguments: ([t.to(device) for t in s], a))
        for name, (scores, arguments) in CASES.items()
    }
    few = ("one", "list", "densities", "empty_tensors", "tensor", "row", "bfloat16", "signed_zeros")

    def run(self, args):
        scores, arguments = args
        return ops.topk_mask(scores, **arguments)

    def oracle(self, args):
        return [[BitMask.pack(m) for m in masks] for masks in plain(args[0], **args[1])]

    def library_calls(self, args):
        scores, a = args
        density = a.get("density")
        densities = density if isinstance(density, list) or density is None else [density]
        rest = (densities, a.get("k"), a.get("scope", "global"), a.get("key", "value"))
        yield torch.ops.fastunlearn.topk_mask.default, (scores, *rest)


@pytest.mark.parametrize("name", CASES)
def test_cuda_bodies_on_hostile_input(name, simt_module):
    """Every path of the CUDA kernels, as compiled for the host: sample, pool, digits of all scores, shared ties."""
    scores, arguments = CASES[name]
    with fastunlearn.backend("native"):
        want = ops.topk_mask(scores, **arguments)
        with _native.host_cuda(simt_module):
            assert_equal(ops.topk_mask(scores, **arguments), want)


@pytest.mark.parametrize(("entries", "tensors"), [(134_515_008, 211), (859_520_964, 686), (8_030_261_248, 291)])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_workspace_on_a_gpu(entries, tensors, dtype, size, simt_module):
    """At most 2 % of the scores for one density: SmolLM2-135M, SD 1.4's U-Net, Llama-3.1-8B."""
    tiles = entries // (8 * simt_module.topk_tile_bytes()) + tensors
    taken = simt_module.topk_workspace_cuda(1, 1, entries, tiles, _native.DTYPES[dtype], True)
    assert 0 < taken <= 0.02 * entries * size


@pytest.mark.parametrize(
    ("what", "dtype", "density"),
    [
        ("normal", torch.bfloat16, 0.3),
        pytest.param("products", torch.bfloat16, 0.5, marks=pytest.mark.thorough),
        pytest.param("normal", torch.float16, 0.5, marks=pytest.mark.thorough),
    ],
)
def test_ordinary_scores_are_read_once_on_a_gpu(what, dtype, density, simt_module, monkeypatch):
    """The entries inside the bracket fit their pool, also where ties widen it: no digits are counted over the scores."""
    scores = torch.randn(2048, 4096).abs()
    if what == "products":  # as Wanda's |w| times the norm of an input
        scores *= torch.rand(4096) + 0.5
    scores = scores.to(dtype)
    calls = []

    class Kept(topk.CudaCall):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            calls.append(self)

    monkeypatch.setattr(topk, "CudaCall", Kept)
    with fastunlearn.backend("native"):
        want = ops.topk_mask([scores], density)
        with _native.host_cuda(simt_module):
            assert_equal(ops.topk_mask([scores], density), want)
    (call,) = calls
    # csrc/topk_device.cuh: the workspace starts with the problem, which starts with its mode (0: from the pool).
    assert call.workspace[:4].view(torch.int32).item() == 0


@pytest.mark.parametrize("k", [1, 40_000, 90_000, 100_001, 149_999])
def test_brackets_around_zero_on_a_gpu(k, simt_module):
    """-0.0 and 0.0 are one value at either end of a bracket; few values of 16 bits share 16 bits with their place."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t = torch.where(torch.arange(150_000) % 3 == 0, -0.0, 0.0).to(dtype)
        t[::5] = -torch.rand(30_000).to(dtype) * 1e-6
        t[1::5] = torch.linspace(-2, 2, 30_000).to(dtype)
        with fastunlearn.backend("native"):
            want = ops.topk_mask([t], k=k)
            with _native.host_cuda(simt_module):
                assert_equal(ops.topk_mask([t], k=k), want)


@given(st.integers(8192, 300_000), st.integers(0, 2**31), st.sampled_from([0.001, 0.05, 0.3, 0.5, 0.97]), st.booleans())
def test_any_large_scores(n, seed, density, ties):
    """Above the size where the bracket comes from a sample."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(n, generator=generator) * torch.rand(n, generator=generator)
    if ties:
        t = (t * 20).round() / 20
    k = floor_count(density, n)
    want = torch.zeros(n, dtype=torch.bool)
    want[t.sort(descending=True, stable=True).indices[:k]] = True
    with fastunlearn.backend("native"):
        assert torch.equal(ops.topk_mask([t], density)[0].unpack(), want)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_densities_nest(scope):
    scores = [*_random((300, 100)), torch.randint(0, 4, (100, 33)).float()]
    masks = ops.topk_mask(scores, [0.05, 0.1, 0.5], scope=scope)
    for small, big in itertools.pairwise(masks):
        for a, b in zip(small, big):
            assert (a & b).equal(a)
    for d, row in zip([0.05, 0.1, 0.5], masks):
        assert_equal(row, ops.topk_mask(scores, d, scope=scope))


def test_exactly_k():
    scores = [torch.zeros(300, 700), *_random((100, 100))]
    for k in (0, 1, 17, 5000, 200_000, 220_000):
        assert sum(int(m.count()) for m in ops.topk_mask(scores, k=k)) == k


@pytest.mark.parametrize(
    ("density", "n", "k"), [(0.1, 30, 3), (0.29, 100, 29), (1 / 3, 3, 1), (0.7, 10, 7), (0.999, 10, 9), (1.0, 7, 7)]
)
def test_floor_without_rounding(density, n, k):
    assert floor_count(density, n) == k


@given(st.integers(1, 10**9), st.integers(0, 10**9))
def test_floor_of_a_quotient(n, k):
    k = k % (n + 1)
    assert floor_count(k / n, n) == k
    assert floor_count(0.999 * k / n, n) <= k


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads):
    scores = [*_random((400, 999), (64, 4096)), torch.randint(0, 9, (700, 300)).float()]
    want = ops.topk_mask(scores, [0.05, 0.5], key="abs")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(ops.topk_mask(scores, [0.05, 0.5], key="abs"), want)
    finally:
        torch.set_num_threads(before)


def test_flushing_of_subnormals_changes_nothing():
    scores = [_subnormals(120_000)]
    want = ops.topk_mask(scores, 0.3)
    assert torch.set_flush_denormal(True)
    try:
        with fastunlearn.backend("native"):
            assert_equal(ops.topk_mask(scores, 0.3), want)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("isa", [0, 3, 99])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_flushing_of_subnormal_halves_changes_nothing(isa, scope):
    scores = [(torch.randn(2048, 1024) * 2e-5).half().abs()]
    with fastunlearn.backend("reference"):
        want = ops.topk_mask(scores, 0.1, scope=scope)
    before = _native._C.set_isa_level(isa)
    assert torch.set_flush_denormal(True)
    try:
        with fastunlearn.backend("native"):
            assert_equal(ops.topk_mask(scores, 0.1, scope=scope), want)
    finally:
        torch.set_flush_denormal(False)
        _native._C.set_isa_level(before)


def test_masks_share_an_allocation():
    """One allocation for all bits: every mask starts on 16 bytes, and a change of one is none of another."""
    with fastunlearn.backend("native"):
        first, second = ops.topk_mask(_random((7, 13), (1000,)), 0.3)
    assert first.bits.untyped_storage().data_ptr() == second.bits.untyped_storage().data_ptr()
    assert (second.bits.data_ptr() - first.bits.data_ptr()) % 16 == 0
    assert (first.bits.shape, second.bits.shape) == ((7, 2), (1, 125))
    kept = second.clone()
    first.bits.fill_(255)
    assert second.equal(kept)


@pytest.mark.gpu
def test_refused_while_a_cuda_graph_is_captured():
    scores = [torch.rand(1000, device="cuda")]
    with fastunlearn.backend("native"):
        ops.topk_mask(scores, 0.1)
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(RuntimeError, match="while a CUDA graph is captured"),
        ):
            ops.topk_mask(scores, 0.1)


def test_non_contiguous():
    t = _random((300, 401))[0]
    assert_equal(
        ops.topk_mask([t.t(), t[:, ::2]], 0.2), ops.topk_mask([t.t().contiguous(), t[:, ::2].contiguous()], 0.2)
    )


def test_scores_with_a_gradient():
    t = torch.randn(30, 40, requires_grad=True)
    assert not ops.topk_mask([t], 0.1)[0].bits.requires_grad


def test_float64_is_compared_as_float64():
    t = torch.tensor([[1.0, 1.0 + 2.0**-50, 1.0 + 2.0**-40]], dtype=torch.float64)
    with pytest.warns(fastunlearn.FallbackWarning, match="float64") if not _OP_warned() else warnings.catch_warnings():
        assert ops.topk_mask([t], k=1)[0].unpack().tolist() == [[False, False, True]]
    with pytest.raises(fastunlearn.BackendError, match="float64"), fastunlearn.backend("native"):
        ops.topk_mask([t], k=1)


def _OP_warned() -> bool:
    from fastunlearn.ops.topk import _OP

    return any("float64" in reason for reason in _OP.warned)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_nan_is_warned_of(backend):
    t = torch.tensor([1.0, NAN, 3.0, NAN])
    with fastunlearn.backend(backend):
        with pytest.warns(UserWarning, match="2 of 4 scores are NaN and never selected$"):
            assert ops.topk_mask([t], k=1)[0].unpack().tolist() == [False, False, True, False]
        with pytest.warns(UserWarning, match="only 2 of the 3 entries asked for"):
            assert ops.topk_mask([t], k=3)[0].unpack().tolist() == [True, False, True, False]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.topk_mask([torch.tensor([1.0, INF, -INF])], k=1)


BAD = {
    "lone_tensor": ((torch.ones(3),), {"density": 0.5}, TypeError, r"wrap it: topk_mask\(\[scores\]"),
    "generator": ((iter([torch.ones(3)]),), {"density": 0.5}, TypeError, "scores: want a list"),
    "empty_list": (([],), {"density": 0.5}, ValueError, "at least one tensor"),
    "not_a_tensor": (([[1.0]],), {"density": 0.5}, TypeError, r"scores\[0\]: want a tensor"),
    "integers": (
        ([torch.ones(3), torch.ones(3, dtype=torch.int32)],),
        {"density": 0.5},
        TypeError,
        r"scores\[1\].*int32",
    ),
    "mixed_devices": (
        ([torch.ones(3), torch.ones(3, device="meta")],),
        {"k": 1},
        ValueError,
        r"scores\[1\] is on meta",
    ),
    "neither": (([torch.ones(3)],), {}, ValueError, "exactly one"),
    "both": (([torch.ones(3)],), {"density": 0.5, "k": 1}, ValueError, "exactly one"),
    "density_above": (([torch.ones(3)],), {"density": 1.01}, ValueError, r"\[0, 1\], got 1.01"),
    "density_below": (([torch.ones(3)],), {"density": [0.5, -0.1]}, ValueError, r"\[0, 1\], got -0.1"),
    "density_nan": (([torch.ones(3)],), {"density": NAN}, ValueError, r"\[0, 1\], got nan"),
    "density_text": (([torch.ones(3)],), {"density": "0.1"}, TypeError, "density: want a number"),
    "no_densities": (([torch.ones(3)],), {"density": []}, ValueError, "at least one"),
    "k_beyond": (([torch.ones(3), torch.ones(2)],), {"k": 6}, ValueError, "k=6 for 5"),
    "k_beyond_tensor": (([torch.ones(3), torch.ones(2)],), {"k": 3, "scope": "tensor"}, ValueError, r"scores\[1\]"),
    "k_beyond_row": (([torch.ones(3, 4)],), {"k": 5, "scope": "row"}, ValueError, "a row of"),
    "k_below": (([torch.ones(3)],), {"k": -1}, ValueError, "at least 0"),
    "k_float": (([torch.ones(3)],), {"k": 1.5}, TypeError, "k: want an int"),
    "scope": (([torch.ones(3)],), {"k": 1, "scope": "layer"}, ValueError, "scope: want"),
    "key": (([torch.ones(3)],), {"k": 1, "key": "square"}, ValueError, "key: want"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    positional, named, error, match = BAD[name]
    with pytest.raises(error, match=match):
        ops.topk_mask(*positional, **named)


_OUT_OF_MEMORY = """
import resource
import torch
from fastunlearn import _native
counts = 4_000_000
ks, bits, scores = torch.full((counts,), 3), torch.zeros(8, dtype=torch.uint8), torch.rand(64)
tensors = torch.tensor([scores.data_ptr(), 1, 64, 0])
out = torch.full((counts,), bits.data_ptr())
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), size + (16 << 20)))
try:
    _native._C.topk_select_cpu(tensors.data_ptr(), 1, 0, False, counts, ks.data_ptr(), out.data_ptr())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux does")
def test_out_of_memory_is_an_error():
    done = subprocess.run([sys.executable, "-c", _OUT_OF_MEMORY], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "topk_mask: out of memory for its workspace"), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("FASTUNLEARN_SLOW") != "1", reason="takes 6 GB of memory: FASTUNLEARN_SLOW=1 runs it"
)
def test_more_entries_than_a_32_bit_number():
    torch.use_deterministic_algorithms(False)
    n = 2**31 + 2**20
    t = torch.zeros(n, dtype=torch.bfloat16)
    t[::1_000_003] = 1.0
    t[-5] = 2.0
    places = torch.arange(0, n, 1_000_003)
    with fastunlearn.backend("native"):
        many, few = (m[0].bits.flatten() for m in ops.topk_mask([t], [2**30 / n, 1000 / n]))
    got = few.nonzero().flatten()
    bits = (few[got].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).nonzero()
    assert (got[bits[:, 0]] * 8 + bits[:, 1]).tolist() == [*places[:999].tolist(), n - 5]
    # The ties at zero fill up from the front.
    assert int(BitMask(many.unsqueeze(0), (n,)).count()) == 2**30


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_lazily_negated(backend, scope):
    """What a view is counts, not what lies in the memory that it shares with its opposite."""
    x, y = torch.randn(5, 9), torch.randn(7, 8).half()
    with fastunlearn.backend(backend):
        for a, b in ((x, x.flip(0)), (x, y)):  # one dtype, two
            lazy = ops.topk_mask([torch._neg_view(a), torch._neg_view(b)], k=4, scope=scope)
            for got, want in zip(lazy, ops.topk_mask([-a, -b], k=4, scope=scope)):
                assert_equal(got, want)
