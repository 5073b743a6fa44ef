"""Compressed N:M tensors: what is stored, where, and back, bit for bit; masks that are none."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import pytest
import torch

import fastunlearn
from fastunlearn import BitMask, _native, ops
from fastunlearn.ops import NMTensor
from fastunlearn.ops.mask import rows_cols
from tests.proof import OpProof, assert_equal

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERNS = [(2, 4), (4, 8), (1, 2), (1, 4), (3, 8), (7, 8), (3, 5), (3, 6), (8, 16), (5, 32), (33, 64), (3, 64), (0, 4), (4, 4),
            (0, 1), (1, 1), (2, 9), (11, 31)]  # fmt: skip


def make_mask(shape, n, m, seed=0) -> BitMask:
    rows, cols = rows_cols(shape)
    scores = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    with fastunlearn.backend("auto"):
        return BitMask(ops.nm_mask(scores, n, m).bits, shape)


def _inputs(shape, n, m, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    weight, other = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2))
    return {"weight": weight, "other": other, "bits": make_mask(shape, n, m).bits.to(device), "n": n, "m": m}


def _case(*args):
    return lambda device: _inputs(*args, device=device)


def dense_mask(args) -> torch.Tensor:
    return BitMask(args["bits"].cpu(), args["weight"].shape).unpack()


def survivors(weight: torch.Tensor, kept: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Row by row, by the columns of its set bits."""
    rows, cols = rows_cols(weight.shape)
    out = weight.new_zeros(rows, cols // m * n)
    for r, (values, here) in enumerate(zip(weight.reshape(rows, cols), kept.reshape(rows, cols))):
        out[r] = values[torch.nonzero(here).flatten()]
    return out


class TestNmCompress(OpProof):
    """Outputs: the values, the dense tensor again, another tensor's entries gathered."""

    op = "nm_compress"
    backends = ("native",)
    cuda_bodies = True
    cases = {
        **{f"{n}:{m}": _case((13, 3 * m), n, m) for n, m in PATTERNS},
        **{f"{n}:{m} {name}": _case((9, 56 * m), n, m, t) for n, m in [(2, 4), (3, 8), (8, 16), (3, 6)] for name, t in FLOATS.items()},
        **{f"many blocks {n}:{m} {name}": _case((61, 104 * m), n, m, t)
           for n, m in [(2, 4), (4, 8), (1, 8), (8, 16), (3, 5)] for name, t in FLOATS.items() if name != "fp64"},
        "ragged rows 2:4": _case((301, 260), 2, 4, torch.bfloat16),
        "ragged rows 1:2": _case((101, 134), 1, 2, torch.float16),
        "long row": _case((1, 140_004), 2, 4),
        "several pieces": _case((3, 66_000 * 3), 3, 6, torch.bfloat16),
        "several pieces of a power of two": _case((5, 131_072), 2, 4, torch.bfloat16),
        "conv": _case((6, 4, 3, 3), 2, 4),
        "vector": _case((20,), 2, 4),
        "one entry": _case((1, 1), 1, 1),
        "scalar": _case((), 1, 1),
        "no rows": _case((0, 8), 2, 4),
        "no columns": _case((3, 0), 2, 4),
    }  # fmt: skip
    few = (*(f"{n}:{m}" for n, m in PATTERNS), "2:4 fp16", "2:4 bf16", "2:4 fp64", "3:8 bf16", "8:16 fp16", "3:6 bf16",
           "many blocks 2:4 bf16", "many blocks 3:5 fp32", "ragged rows 1:2", "conv", "vector", "scalar", "no rows",
           "no columns")  # fmt: skip

    def run(self, args):
        mask = BitMask(args["bits"], args["weight"].shape)
        tensor = ops.nm_compress(args["weight"], mask, args["n"], args["m"])
        return [tensor.values, tensor.to_dense(), tensor.gather(args["other"])]

    def oracle(self, args):
        weight, other, kept = args["weight"].cpu(), args["other"].cpu(), dense_mask(args)
        n, m = args["n"], args["m"]
        return [survivors(weight, kept, n, m), torch.where(kept, weight, 0.0), survivors(other, kept, n, m)]

    def library_calls(self, args):
        flat, n, m = args["weight"].reshape(rows_cols(args["weight"].shape)), args["n"], args["m"]
        yield torch.ops.fastunlearn.nm_gather.default, (flat, args["bits"], n, m, False)
        values = survivors(flat, BitMask(args["bits"], flat.shape).unpack(), n, m).requires_grad_()
        yield torch.ops.fastunlearn.nm_expand.default, (values, args["bits"], flat.shape[1], n, m)


class TestToDense(OpProof):
    """The values' gradient is the dense one, gathered."""

    op = "nm_compress"
    differentiable = True
    cases = {f"{n}:{m}": _case((5, 2 * m), n, m) for n, m in [(2, 4), (3, 5), (8, 16)]}

    def run(self, args):
        mask = BitMask(args["bits"], args["weight"].shape)
        values = args["weight"].view(-1)[: mask.rows * mask.cols // args["m"] * args["n"]].view(mask.rows, -1)
        return NMTensor(values, mask, args["n"], args["m"]).to_dense() + 0 * args["other"]

    def library_calls(self, args):
        mask = dense_mask(args)
        values = survivors(args["weight"], mask, args["n"], args["m"]).requires_grad_()
        yield (
            torch.ops.fastunlearn.nm_expand.default,
            (values, args["bits"], mask.shape[1], args["n"], args["m"]),
        )


BACKENDS = ["native", "reference", "bodies"]


@pytest.fixture
def on(request):
    """Runs what is inside on a backend, or on the CUDA bodies."""

    def enter(backend):
        if backend != "bodies":
            return nullcontext(), fastunlearn.backend(backend)
        return _native.host_cuda(request.getfixturevalue("simt_module")), fastunlearn.backend("native")

    return enter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (8, 16), (3, 5)])
def test_every_bit_is_kept(n, m, name, backend, on):
    """Any bits at all, payloads of NaN, -0.0 and subnormals among them."""
    kind = INTEGERS[FLOATS[name].itemsize]
    raw = torch.randint(-(1 << 15), 1 << 15, (24, 16 * m)).to(kind) << (kind.itemsize * 8 - 16)
    mask = make_mask(raw.shape, n, m)
    host, chosen = on(backend)
    with host, chosen:
        tensor = ops.nm_compress(raw.view(FLOATS[name]), mask, n, m)
        dense = tensor.to_dense()
    kept = mask.unpack()
    assert torch.equal(tensor.values.view(kind), survivors(raw, kept, n, m))
    assert torch.equal(dense.view(kind), torch.where(kept, raw, 0))
    assert tensor.values.shape == (24, 16 * n)


def test_bytes():
    weight = torch.randn(64, 256, dtype=torch.bfloat16)
    tensor = ops.nm_compress(weight, make_mask(weight.shape, 2, 4), 2, 4)
    assert tensor.nbytes * 16 == weight.nbytes * 9
    assert (tensor.shape, tensor.dtype, tensor.device) == (weight.shape, weight.dtype, weight.device)
    assert not tensor.requires_grad
    assert repr(tensor) == "NMTensor(shape=(64, 256), 2:4, dtype=torch.bfloat16, device=cpu)"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 1), (8, 16), (3, 5), (5, 24), (20, 64)])
@pytest.mark.parametrize("groups", [8, 5])
def test_a_mask_that_is_none_is_refused(n, m, groups, backend, on):
    """By one bit more or less anywhere; the first row is named, also where others are wrong too."""
    shape = (37, groups * m)
    weight = torch.randn(shape)
    kept = make_mask(shape, n, m).unpack()
    for row, col in [(0, 0), (0, shape[1] - 1), (17, shape[1] // 2), (36, shape[1] - 1)]:
        wrong = kept.clone()
        wrong[row, col] ^= True
        wrong[36, 0] ^= (row, col) != (36, 0)
        mask = BitMask.pack(wrong)
        host, chosen = on(backend)
        with host, chosen:
            with pytest.raises(ValueError, match=rf"mask: row {row} is the first .*of {m} columns.*not {n} set bits"):
                ops.nm_compress(weight, mask, n, m)
            with pytest.raises(ValueError, match=rf"mask: row {row} is the first"):
                NMTensor(torch.zeros(37, groups * n), mask, n, m)
            assert ops.nm_compress(weight, BitMask.pack(kept), n, m).values.shape == (37, groups * n)


def test_right_density_and_wrong_groups():
    mask = BitMask.pack(torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1, 0]]).bool())
    assert mask.density == 0.5
    with pytest.raises(ValueError, match="row 1 is the first"):
        ops.nm_compress(torch.zeros(2, 8), mask, 2, 4)


def test_results_that_are_asked_for_in_huge_pages():
    """From four megabytes on, in both directions."""
    dense = torch.randn(2050, 1024)
    mask = ops.nm_mask(dense.abs(), 2, 4)
    with fastunlearn.backend("native"):
        tensor = ops.nm_compress(dense, mask, 2, 4)
        again = tensor.to_dense()
    assert tensor.values.nbytes > _native._HUGE
    assert_equal(tensor.values, dense[mask.unpack()].view(2050, 512))
    assert_equal(again, torch.where(mask.unpack(), dense, 0.0))


@pytest.mark.parametrize("isa", [0, 3, 99])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (8, 16), (3, 5)])
def test_nothing_outside_is_written(n, m, size, isa, simt_module):
    """Bits that changed after they were checked lead to wrong values, not to memory of others."""
    rows, cols = 7, 40 * m
    kept = cols // m * n
    kind = INTEGERS[size]
    before = _native._C.set_isa_level(isa)
    try:
        for fill in (0, 255, None):
            bits = torch.randint(256, (rows, (cols + 7) // 8)).to(torch.uint8) if fill is None else None
            bits = torch.full((rows, (cols + 7) // 8), fill, dtype=torch.uint8) if bits is None else bits
            for module, suffix, extra in [(_native._C, "cpu", ()), (simt_module, "cuda", (0, 0))]:
                dense = torch.full((rows * cols + 128,), 7, dtype=kind)
                values = torch.full((rows * kept + 128,), 7, dtype=kind)
                from_, to = dense[64:].data_ptr(), values[64:].data_ptr()
                where = (bits.data_ptr(), rows, cols, n, m, size)
                getattr(module, f"nm_gather_{suffix}")(from_, *where, to, *((0,) if extra else ()), *extra)
                assert (values[:64] == 7).all()
                assert (values[64 + rows * kept :] == 7).all()
                getattr(module, f"nm_expand_{suffix}")(to, *where, from_, *extra)
                assert (dense[:64] == 7).all()
                assert (dense[64 + rows * cols :] == 7).all()
    finally:
        _native._C.set_isa_level(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_larger_than_the_cache(dtype):
    weight = torch.randn(2064, 4100).to(dtype)
    mask = make_mask(weight.shape, 2, 4)
    for flat in (weight, weight[:, :4096].contiguous()):
        mask = make_mask(flat.shape, 2, 4)
        with fastunlearn.backend("native"):
            assert torch.equal(ops.nm_compress(flat, mask, 2, 4).to_dense(), torch.where(mask.unpack(), flat, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, on):
    weight = torch.randn(24, 40)
    mask = make_mask((24, 40), 2, 4)
    host, chosen = on(backend)
    with host, chosen:
        want = ops.nm_compress(weight, mask, 2, 4)
        assert_equal(ops.nm_compress(weight.t().contiguous().t(), mask, 2, 4).values, want.values)
        assert_equal(ops.nm_compress(torch._neg_view(-weight), mask, 2, 4).values, want.values)
        conv = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
        bits = make_mask(conv.shape, 2, 4)
        assert_equal(ops.nm_compress(conv, bits, 2, 4).to_dense(), torch.where(bits.unpack(), conv, 0.0))
        spread = NMTensor(want.values.t().contiguous().t(), mask, 2, 4)
        assert_equal(spread.to_dense(), want.to_dense())
        # No alignment beyond that of an entry.
        for dtype in FLOATS.values():
            shifted = torch.randn(1 + 16 * 40).to(dtype)[1:].view(16, 40)
            part = BitMask(mask.bits[:16], (16, 40))
            tensor = ops.nm_compress(shifted, part, 2, 4)
            assert_equal(tensor.to_dense(), torch.where(part.unpack(), shifted, 0.0))
            odd = torch.cat([tensor.values.flatten()[:1], tensor.values.flatten()])[1:].view(tensor.values.shape)
            assert_equal(NMTensor(odd, part, 2, 4).to_dense(), tensor.to_dense())


def test_gradcheck_of_the_native_expansion():
    mask = make_mask((4, 24), 3, 8)
    values = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    with fastunlearn.backend("native"):
        assert torch.autograd.gradcheck(lambda v: NMTensor(v, mask, 3, 8).to_dense(), values)
    assert fastunlearn.explain("nm_compress").last == "native:cpu"


def test_to_and_clone():
    tensor = ops.nm_compress(torch.randn(8, 16), make_mask((8, 16), 2, 4), 2, 4)
    half = tensor.to(torch.float16)
    assert_equal(half.to_dense(), tensor.to_dense().half())
    assert half.mask.bits is tensor.mask.bits
    assert tensor.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert tensor.to("meta").device.type == "meta"
    tensor.values.requires_grad_()
    assert tensor.requires_grad
    assert not tensor.detach().requires_grad
    tensor.to(torch.float64).to_dense().sum().backward()
    assert_equal(tensor.values.grad, torch.ones_like(tensor.values))
    copy = tensor.clone()
    copy.values.detach().zero_()
    assert tensor.values.abs().sum() > 0
    again = pickle.loads(pickle.dumps(tensor.detach()))
    assert_equal(again.to_dense(), tensor.detach().to_dense())


def test_survives_safetensors(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    made = {
        "a": ops.nm_compress(torch.randn(6, 20).bfloat16(), make_mask((6, 20), 2, 4), 2, 4),
        "conv": ops.nm_compress(torch.randn(4, 5, 3, 3), make_mask((4, 5, 3, 3), 3, 5), 3, 5),
    }
    tensors = {key: t for name, tensor in made.items() for key, t in tensor.state(name).items()}
    assert len(tensors) == 4
    save_file(tensors, tmp_path / "x.safetensors", {name: tensor.metadata() for name, tensor in made.items()})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        read, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for name, tensor in made.items():
        again = NMTensor.from_state(read, said[name], name)
        assert (again.n, again.m, again.shape) == (tensor.n, tensor.m, tensor.shape)
        assert_equal([again.values, again.mask], [tensor.values, tensor.mask])
    with pytest.raises(ValueError, match=r"tensors: no b\.values; there are: a\.bits"):
        NMTensor.from_state(read, said["a"], "b")
    with pytest.raises(ValueError, match="metadata: want what"):
        NMTensor.from_state(read, "2:4", "a")
    with pytest.raises(ValueError, match="mask: row 0 is the first"):
        NMTensor.from_state({**read, "a.bits": torch.zeros_like(read["a.bits"])}, said["a"], "a")
    with pytest.raises(ValueError, match=r"a\.bits has bits set behind its 20 columns"):
        NMTensor.from_state({**read, "a.bits": read["a.bits"] | 128}, said["a"], "a")


def test_fullgraph_of_a_tensor_made_outside():
    tensor = ops.nm_compress(torch.randn(8, 16), make_mask((8, 16), 2, 4), 2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t, g: (t.to_dense() * 2, t.gather(g), t.to(torch.float64).values), fullgraph=True, backend="aot_eager")  # fmt: skip
    g = torch.randn(8, 16)
    got = compiled(tensor, g)
    assert_equal(got, [tensor.to_dense() * 2, tensor.gather(g), tensor.values.double()])


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    rows, cols = (1 << 16) + 3, 1 << 15
    weight = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    weight[-3:] = torch.randn(3, cols).bfloat16()
    with fastunlearn.backend("native"):
        mask = ops.nm_mask(weight, 2, 4)
        tensor = ops.nm_compress(weight, mask, 2, 4)
        dense = tensor.to_dense()
    kept = BitMask(mask.bits[-3:], (3, cols)).unpack()
    assert_equal(tensor.values[-3:], survivors(weight[-3:].cpu(), kept.cpu(), 2, 4))
    assert_equal(dense[-3:], torch.where(kept, weight[-3:], 0.0))
    assert not dense[:-3].any()


MASK = make_mask((4, 8), 2, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.nm_compress(torch.zeros(4, 6), BitMask.ones((4, 6)), 2, 4), ValueError, "6 columns are no multiple of m = 4.*to 8"),
        (lambda: ops.nm_compress(torch.zeros(4, 8), MASK, 5, 4), ValueError, "n: want 0 <= n <= m = 4"),
        (lambda: ops.nm_compress(torch.zeros(4, 8), MASK, 2, 65), ValueError, "m: want a group of 1 to 64"),
        (lambda: ops.nm_compress(torch.zeros(4, 8), MASK, 2.0, 4), TypeError, "n: want an int"),
        (lambda: ops.nm_compress(torch.zeros(4, 8), torch.ones(4, 8), 2, 4), TypeError, "mask: want a BitMask, got Tensor"),
        (lambda: ops.nm_compress(torch.zeros(4, 8).long(), MASK, 2, 4), TypeError, "weight: want a floating tensor"),
        (lambda: ops.nm_compress(torch.zeros(4, 8).to(torch.float8_e4m3fn), MASK, 2, 4), TypeError, "want float64, float32, float16 or bfloat16"),
        (lambda: ops.nm_compress([1.0], MASK, 2, 4), TypeError, "weight: want a tensor, got list"),
        (lambda: ops.nm_compress(torch.zeros(4, 8).to_sparse(), MASK, 2, 4), TypeError, "weight: want a dense tensor"),
        (lambda: ops.nm_compress(torch.zeros(8, 8), MASK, 2, 4), ValueError, r"weight: shape \(8, 8\), but the mask is of shape \(4, 8\)"),
        (lambda: ops.nm_compress(torch.zeros(4, 8, device="meta"), MASK, 2, 4), ValueError, "weight: on meta, but the mask is on cpu"),
        (lambda: ops.nm_compress(torch.zeros(4, 8, device="meta"), MASK.to("meta"), 2, 4), ValueError, "holds no values"),
        (lambda: NMTensor(torch.zeros(4, 3), MASK, 2, 4), ValueError, r"has values of shape \(4, 4\), got \(4, 3\)"),
        (lambda: NMTensor(torch.zeros(4, 4, device="meta"), MASK, 2, 4), ValueError, "mask: on cpu, but values are on meta"),
        (lambda: NMTensor(torch.zeros(4, 4), MASK.bits, 2, 4), TypeError, "mask: want a BitMask"),
        (lambda: NMTensor(torch.zeros(4, 4), MASK, 2, 4).gather(torch.zeros(8, 4)), ValueError, "dense: shape"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
