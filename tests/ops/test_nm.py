"""N:M masks: the order inside a group, every layout, every backend."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import fastunlearn
from fastunlearn import ops
from fastunlearn.localize.patterns import parse_pattern, select
from fastunlearn.ops.mask import rows_cols
from tests.proof import OpProof, assert_equal

FLOATS_ONLY = [torch.float32]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PATTERNS = [(2, 4), (4, 8), (1, 2), (1, 4), (7, 8), (3, 5), (8, 16), (5, 32), (3, 64), (0, 4), (4, 4), (0, 1), (1, 1)]


def _scores(shape, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    """Few distinct values, so that groups have ties; both zeros and both infinities among them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).round()
    x = torch.where(x == 0, torch.where(torch.arange(x.numel()).view(shape) % 3 == 0, -0.0, 0.0), x)
    return torch.where(x.abs() > 4, x * math.inf, x).to(dtype).to(device)


def _case(shape, n, m, dtype=torch.float32):
    return lambda device: {"scores": _scores(shape, dtype, device), "n": n, "m": m}


def plain(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The definition in a loop: sorted() of Python, keys (is NaN, -score, column)."""
    rows, cols = rows_cols(scores.shape)
    flat = scores.double().reshape(rows, cols).tolist()
    kept = np.zeros((rows, cols), dtype=bool)
    for r, row in enumerate(flat):
        for g in range(0, cols, m):
            order = sorted(
                range(g, g + m), key=lambda c: (math.isnan(row[c]), 0.0 if math.isnan(row[c]) else -row[c], c)
            )
            kept[r, order[:n]] = True
    return torch.from_numpy(np.packbits(kept, axis=1, bitorder="little"))


LIST = [(9, 480), (30, 96), (1, 48), (0, 48), (5, 2, 4, 12), (48,), (3, 0), (200, 240)]


class TestNmMask(OpProof):
    op = "nm_mask"
    backends = ("native",)
    cuda_bodies = True
    cases = {
        **{f"{n}:{m}": _case((13, 3 * m), n, m) for n, m in PATTERNS},
        **{f"{n}:{m} {name}": _case((9, 7 * m), n, m, t) for n, m in [(2, 4), (4, 8), (8, 16), (3, 6)] for name, t in FLOATS.items()},
        "many blocks 2:4": _case((301, 260), 2, 4),
        "many blocks 4:8": _case((101, 520), 4, 8, torch.bfloat16),
        "many blocks 8:16": _case((70, 272), 8, 16),
        "many blocks 3:5": _case((101, 305), 3, 5),
        "long row": _case((1, 140_004), 2, 4),
        "conv": _case((6, 4, 3, 3), 2, 4),
        "vector": _case((20,), 2, 4),
        "one entry": _case((1, 1), 1, 1),
        "scalar": _case((), 1, 1),
        "no rows": _case((0, 8), 2, 4),
        "no columns": _case((3, 0), 2, 4),
    }  # fmt: skip
    few = ("2:4", "4:8", "1:2", "3:5", "8:16", "5:32", "3:64", "2:4 fp16", "4:8 bf16", "many blocks 2:4",
           "many blocks 4:8", "many blocks 8:16", "conv", "no rows", "no columns")  # fmt: skip

    def run(self, args):
        return ops.nm_mask(args["scores"], args["n"], args["m"])

    def oracle(self, args):
        return plain(args["scores"], args["n"], args["m"])

    def library_calls(self, args):
        flat = args["scores"].reshape(rows_cols(args["scores"].shape))
        yield torch.ops.fastunlearn.nm_mask.default, (flat, args["n"], args["m"])


class TestList(OpProof):
    """All tensors of a list in one call: of any shapes and element types, empty ones among them."""

    op = "nm_mask"
    backends = ("native",)
    cuda_bodies = True
    cases = {
        f"{n}:{m} {name}": (
            lambda device, n=n, m=m, d=d: {
                "scores": [_scores(s, d[i % len(d)], device, i) for i, s in enumerate(LIST)],
                "n": n,
                "m": m,
            }
        )
        for n, m in [(2, 4), (1, 2), (3, 8), (8, 16), (3, 16), (3, 6), (20, 48), (5, 12), (0, 4), (4, 4)]
        for name, d in {"fp32": FLOATS_ONLY, "mixed": list(FLOATS.values())}.items()
    }
    few = ("2:4 fp32", "2:4 mixed", "8:16 mixed", "3:16 fp32", "20:48 mixed", "0:4 mixed")

    def run(self, args):
        return ops.nm_mask(args["scores"], args["n"], args["m"])

    def oracle(self, args):
        return [plain(s, args["n"], args["m"]) for s in args["scores"]]

    def library_calls(self, args):
        flat = [s.reshape(rows_cols(s.shape)) for s in args["scores"]]
        yield torch.ops.fastunlearn.nm_masks.default, (flat, args["n"], args["m"])


@pytest.mark.parametrize("m", [32, 64])
def test_wide_groups_of_a_list(m, simt_module):
    for dtype in FLOATS.values():
        scores = [_scores((37, 3 * m), dtype, seed=1), _scores((1, m), dtype, seed=2), _scores((600, m), dtype, seed=3)]
        for n in (1, m // 2, m - 1):
            want = [plain(s, n, m) for s in scores]
            with fastunlearn.backend("native"):
                assert_equal([mask.bits for mask in ops.nm_mask(scores, n, m)], want)
                with fastunlearn._native.host_cuda(simt_module):
                    assert_equal([mask.bits for mask in ops.nm_mask(scores, n, m)], want)


def test_list_arguments():
    assert ops.nm_mask([], 2, 4) == []
    with pytest.raises(ValueError, match=r"scores\[1\]: 6 columns are no multiple"):
        ops.nm_mask([torch.zeros(4, 8), torch.zeros(4, 6)], 2, 4)
    with pytest.raises(TypeError, match=r"scores\[1\]: want a tensor, got float"):
        ops.nm_mask([torch.zeros(4, 8), 1.0], 2, 4)
    with pytest.raises(ValueError, match=r"scores\[1\]: on meta, the first on cpu"):
        ops.nm_mask([torch.zeros(4, 8), torch.zeros(4, 8, device="meta")], 2, 4)
    with pytest.raises(TypeError, match="want a tensor or a list of tensors, got dict"):
        ops.nm_mask({"a": torch.zeros(4, 8)}, 2, 4)
    with pytest.raises(ValueError, match="n: want"):
        ops.nm_mask([], 5, 4)


@pytest.mark.gpu
def test_nan_is_told_later_and_one_tensor_can_be_captured():
    scores = torch.randn(64, 64, device="cuda")
    bad = scores.clone()
    bad[3, 5] = math.nan
    ops.nm.check_nan()
    with warnings.catch_warnings(record=True) as said, fastunlearn.backend("native"):
        warnings.simplefilter("always")
        ops.nm_mask([scores, bad], 2, 4)
        ops.nm.check_nan()
    assert any("hold NaN" in str(w.message) for w in said)
    with fastunlearn.backend("native"):
        ops.nm_mask(scores, 2, 4)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                ops.nm_mask([scores, bad], 2, 4)
            captured = ops.nm_mask(scores, 2, 4)
        scores.neg_()
        graph.replay()
        assert_equal(captured, ops.nm_mask(scores, 2, 4))


@pytest.mark.gpu
def test_waits_for_nothing():
    scores = [
        _scores(s, d, "cuda")
        for s, d in [((64, 64), torch.float32), ((9, 480), torch.float16), ((7, 64), torch.float32)]
    ]
    with fastunlearn.backend("native"):
        want = ops.nm_mask(scores, 2, 4)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = ops.nm_mask(scores, 2, 4)
            alone = ops.nm_mask(scores[0], 2, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_equal([m.bits for m in got], [m.bits for m in want])
    assert_equal(alone, want[0])


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("m", [2, 4, 8])
def test_every_order_of_a_group(m, dtype):
    """All m^m groups of m values that include NaN, both zeros and infinities."""
    pool = torch.tensor([math.nan, -math.inf, -0.0, 0.0, -1.0, math.inf, 3.0, 3.0], dtype=dtype)[: max(m, 4)]
    if m == 8:
        picks = torch.randint(8, (20_000, 8))
    else:
        picks = torch.cartesian_prod(*[torch.arange(len(pool))] * m)
    scores = pool[picks]
    for n in range(1, m):
        with pytest.warns(RuntimeWarning, match="hold NaN"), fastunlearn.backend("native"):
            mask = ops.nm_mask(scores, n, m)
        assert torch.equal(mask.bits, plain(scores, n, m))


@pytest.mark.parametrize("isa", [0, 3, 99])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("m", [3, 5, 7, 12, 16, 17, 31, 32, 33, 48, 63, 64])
def test_ties_of_wide_groups(m, dtype, isa):
    """Few values a group, so that the n-th largest is almost always shared; more groups than a register has lanes."""
    before = fastunlearn._native._C.set_isa_level(isa)
    try:
        for pool in ([0.0, -0.0, 1.0], [math.nan, -math.inf, 2.0, math.inf], [-1.0, 1e-40, 0.0, 3.0, -3.0]):
            values = torch.tensor(pool).to(dtype)[torch.randint(len(pool), (5, 7 * m))]
            with warnings.catch_warnings(), fastunlearn.backend("native"):
                warnings.simplefilter("ignore", RuntimeWarning)
                for n in {1, m // 2, m - 1}:
                    assert torch.equal(ops.nm_mask(values, n, m).bits, plain(values, n, m))
    finally:
        fastunlearn._native._C.set_isa_level(before)


@pytest.mark.parametrize("backend", ["native", "reference", "bodies"])
def test_nan_is_told_and_never_preferred(backend, request):
    scores = torch.tensor([[math.nan, -math.inf, math.nan, -1.0, 5.0, 4.0, 3.0, math.nan]])
    bodies = backend == "bodies"
    host = fastunlearn._native.host_cuda(request.getfixturevalue("simt_module")) if bodies else nullcontext()
    with host, fastunlearn.backend("native" if bodies else backend):
        with pytest.warns(RuntimeWarning, match="exactly 2 of 4 are kept"):
            mask = ops.nm_mask(scores, 2, 4)
        assert mask.unpack().tolist() == [[False, True, False, True, True, True, False, False]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ops.nm_mask(scores, 4, 4).density == 1.0
            assert ops.nm_mask(scores.nan_to_num(), 2, 4).density == 0.5


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: x.to_sparse(), TypeError, "want a dense tensor, got torch.sparse_coo"),
        (lambda x: x.to_sparse_csr(), TypeError, "want a dense tensor, got torch.sparse_csr"),
        (lambda x: x.to("meta"), ValueError, "on meta, which holds no values"),
    ],
)
def test_what_has_no_memory_is_refused(make, error, words, several):
    scores = make(_scores((4, 8)))
    with pytest.raises(error, match=(r"scores\[0\]: " if several else "scores: ") + words):
        ops.nm_mask([scores] if several else scores, 2, 4)


def test_dtensor_is_refused(tmp_path):
    """Its data_ptr() is 0."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    scores = _scores((4, 8))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(scores, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(
            TypeError, match=r"scores: want a plain tensor, got a DTensor.*to_local\(\).*full_tensor\(\)"
        ):
            ops.nm_mask(sharded, 2, 4)
        with pytest.raises(TypeError, match=r"scores\[1\]: want a plain tensor, got a DTensor"):
            ops.nm_mask([scores, sharded], 2, 4)
        with pytest.raises(TypeError, match="want a plain tensor, got a DTensor"):
            select(sharded, parse_pattern("2:4"))
        assert_equal(ops.nm_mask(sharded.to_local(), 2, 4), ops.nm_mask(scores, 2, 4))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["native", "reference", "bodies"])
def test_lazily_negated(backend, request):
    """A view that shares memory with its opposite: what it is counts, not what lies there."""
    scores = _scores((24, 40))
    lazy = torch._neg_view(scores)
    bodies = backend == "bodies"
    host = fastunlearn._native.host_cuda(request.getfixturevalue("simt_module")) if bodies else nullcontext()
    with host, fastunlearn.backend("native" if bodies else backend):
        assert_equal(ops.nm_mask(lazy, 2, 4), ops.nm_mask(-scores, 2, 4))
        assert_equal(ops.nm_mask([scores, lazy.t()], 4, 8)[1], ops.nm_mask((-scores).t(), 4, 8))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_layouts(backend):
    with fastunlearn.backend(backend):
        scores = _scores((24, 40))
        assert_equal(ops.nm_mask(scores.t(), 2, 4), ops.nm_mask(scores.t().contiguous(), 2, 4))
        assert_equal(ops.nm_mask(scores[:, 4:36], 4, 8), ops.nm_mask(scores[:, 4:36].clone(), 4, 8))
        assert_equal(ops.nm_mask(scores[1:].requires_grad_(), 2, 4), ops.nm_mask(scores[1:].clone(), 2, 4))
        conv = _scores((6, 4, 3, 3)).to(memory_format=torch.channels_last)
        assert_equal(ops.nm_mask(conv, 2, 4), ops.nm_mask(conv.contiguous(), 2, 4))
        # No alignment beyond that of an element.
        shifted = _scores((1 + 16 * 40,), torch.float16)[1:].view(16, 40)
        assert_equal(ops.nm_mask(shifted, 4, 8), ops.nm_mask(shifted.clone(), 4, 8))


def test_bodies_of_unaligned_memory(simt_module):
    for dtype in FLOATS.values():
        scores = _scores((1 + 33 * 20,), dtype)[1:].view(33, 20)
        with fastunlearn._native.host_cuda(simt_module), fastunlearn.backend("native"):
            mask = ops.nm_mask(scores, 2, 4)
        assert torch.equal(mask.bits, plain(scores, 2, 4))


def test_double_runs_as_reference_and_says_so():
    scores = _scores((8, 8), torch.float64)
    fastunlearn._backend._ops["nm_mask"].warned.clear()
    with pytest.warns(fastunlearn.FallbackWarning, match="float64"):
        mask = ops.nm_mask(scores, 2, 4)
    assert torch.equal(mask.bits, plain(scores, 2, 4))
    with pytest.raises(fastunlearn.BackendError, match="float64"), fastunlearn.backend("native"):
        ops.nm_mask(scores, 2, 4)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """Past 2^31 entries nothing is a repetition of what a truncated offset would read."""
    rows, cols = (1 << 16) + 3, 1 << 15
    scores = torch.zeros(rows, cols, dtype=torch.float16, device="cuda")
    scores[-3:] = _scores((3, cols), torch.float16, "cuda")
    with fastunlearn.backend("native"):
        mask = ops.nm_mask(scores, 2, 4)
    assert torch.equal(mask.bits[-3:].cpu(), plain(scores[-3:].cpu(), 2, 4))
    assert (mask.bits[:-3] == 0x33).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.nm_mask(torch.zeros(4, 6), 2, 4), ValueError, "6 columns are no multiple of m = 4.*to 8"),
        (lambda: ops.nm_mask(torch.zeros(4, 8), 5, 4), ValueError, "n: want 0 <= n <= m = 4"),
        (lambda: ops.nm_mask(torch.zeros(4, 8), -1, 4), ValueError, "n: want"),
        (lambda: ops.nm_mask(torch.zeros(4, 8), 0, 0), ValueError, "m: want a group of 1 to 64"),
        (lambda: ops.nm_mask(torch.zeros(4, 65), 2, 65), ValueError, "m: want a group of 1 to 64"),
        (lambda: ops.nm_mask(torch.zeros(4, 8, dtype=torch.int32), 2, 4), TypeError, "floating tensor, got torch.int32"),
        (lambda: ops.nm_mask(torch.zeros(4, 8), 2.0, 4), TypeError, "n: want an int"),
        (lambda: ops.nm_mask([[1.0, 2.0]], 1, 2), TypeError, "want a tensor, got list"),
        (lambda: ops.nm_mask(torch.zeros(()), 1, 2), ValueError, "1 columns are no multiple"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
