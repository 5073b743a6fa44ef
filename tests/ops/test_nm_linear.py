"""A linear layer with a compressed weight: the closed form, every pattern, every backend, what is kept for the backward pass."""

from __future__ import annotations

import gc
import math
import threading
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastunlearn
from fastunlearn import BitMask, ops
from fastunlearn.ops import NMTensor, _dense_buffer
from tests.ops.test_nm_tensor import make_mask, survivors
from tests.proof import Aot, OpProof, assert_derived, assert_equal


def _inputs(tokens, rows, groups, n, m, dtype=torch.float32, bias=True, device="cpu"):
    cols = groups * m
    generator = torch.Generator().manual_seed(rows * 7 + cols)
    many = tokens if isinstance(tokens, tuple) else (tokens,)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    return {
        "x": random(*many, cols),
        "values": random(rows, groups * n, scale=(groups * n) ** -0.5 if groups * n else 1.0),
        "bias": random(rows) if bias else None,
        "grad": random(*many, rows),
        "bits": make_mask((rows, cols), n, m).bits.to(device),
        "n": n,
        "m": m,
    }


def _case(*args, **kwargs):
    return lambda device: _inputs(*args, device=device, **kwargs)


def _mask(args) -> BitMask:
    return BitMask(args["bits"], (args["bits"].shape[0], args["x"].shape[-1]))


def _dense(args, dtype=None) -> torch.Tensor:
    """The weight, by putting the values where the bits are."""
    with fastunlearn.backend("auto"):
        kept = BitMask(args["bits"].cpu(), _mask(args).shape).unpack()
    w = torch.zeros(kept.shape, dtype=dtype or args["values"].dtype)
    w[kept] = args["values"].detach().cpu().to(w.dtype).flatten()
    return w


class TestNmLinear(OpProof):
    """Outputs: y, dx, dvalues, dbias."""

    op = "nm_linear"
    backends = ("native", "triton")
    exact = False
    differentiable = True
    eps = 2e-6
    cases = {
        "2:4": _case(5, 12, 5, 2, 4),
        "tiles": _case(20, 150, 50, 2, 4),
        # More tokens than one tile has.
        "many tokens": _case(70, 100, 33, 2, 4),
        # More columns, and backward rows, than one program sums up.
        "several parts": _case(3, 300, 75, 4, 8),
        "4:8": _case(9, 70, 17, 4, 8),
        "1:2": _case(4, 70, 67, 1, 2),
        "1:4": _case(5, 84, 33, 1, 4),
        "1:8": _case(5, 72, 9, 1, 8),
        "6:8": _case(5, 72, 9, 6, 8),
        "3:8": _case(4, 70, 17, 3, 8),
        "8:16": _case(5, 70, 9, 8, 16),
        "3:5": _case(5, 67, 29, 3, 5),
        "5:24": _case(5, 20, 7, 5, 24),
        "20:64": _case(5, 20, 3, 20, 64),
        "33:63": _case(5, 20, 4, 33, 63),
        "0:4": _case(5, 12, 5, 0, 4),
        "4:4": _case(5, 12, 5, 4, 4),
        "one token": _case((), 65, 33, 2, 4),
        "batched": _case((2, 3, 5), 12, 5, 2, 4),
        "no bias": _case(7, 12, 5, 2, 4, bias=False),
        "no tokens": _case(0, 12, 5, 2, 4),
        "no rows": _case(5, 0, 5, 2, 4),
        "no columns": _case(5, 12, 0, 2, 4),
        "fp16": _case(20, 70, 33, 2, 4, dtype=torch.float16),
        "fp16 8:16": _case(5, 70, 9, 8, 16, dtype=torch.float16),
        "bf16": _case(20, 70, 33, 2, 4, dtype=torch.bfloat16),
        "bf16 8:16": _case(5, 70, 9, 8, 16, dtype=torch.bfloat16),
        "bf16 3:5": _case(5, 70, 9, 3, 5, dtype=torch.bfloat16),
    }
    few = ("2:4", "3:5", "batched", "no bias", "no tokens", "one token")
    kernel_cases = tuple(name for name in cases if "bf16" not in name)
    aot = [
        Aot(
            f"fastunlearn.kernels.nm_linear:{name}",
            {key: kinds.get(key, "i32") for key in arguments.split()},
            {"KEEP": n, "GROUP": m, "M": 64, "N": 64, "PRECISION": precision, **extra},
            {"num_warps": 4},
        )
        for dtype, n, m, precision in [("bf16", 2, 4, "tf32"), ("fp16", 8, 16, "tf32"), ("fp32", 3, 5, "ieee")]
        for kinds in [{"bits": "*u8", "partial": "*fp32", **dict.fromkeys(("x", "values", "grad", "out"), f"*{dtype}")}]
        for name, arguments, extra in [
            ("product", "x values bits partial tokens rows cols width kept chunk", {"T": 16, "BACKWARD": False}),
            ("product", "x values bits partial tokens rows cols width kept chunk", {"T": 64, "BACKWARD": True}),
            ("gradient_tile", "grad x bits out tokens rows cols width kept", {"T": 32}),
        ]
    ] + [
        Aot(
            "fastunlearn.kernels.nm_linear:finish",
            {"partial": "*fp32", "bias": "*bf16", "out": "*bf16", "parts": "i32", "count": "i64", "size": "i32"},
            {"BIAS": True, "BLOCK": 1024},
        )
    ]  # fmt: skip

    @classmethod
    def proof_parameters(cls):
        return {**super().proof_parameters(), "triton_case": list(cls.kernel_cases)}

    def run(self, args):
        leaves = [args["x"], args["values"], args["bias"]]
        differentiated = args["x"].requires_grad
        if not differentiated:
            leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
        weight = NMTensor._of(leaves[1], _mask(args), args["n"], args["m"])
        y = ops.nm_linear(leaves[0], weight, leaves[2])
        if differentiated:
            return y  # gradcheck differentiates
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], args["grad"])]

    def oracle(self, args):
        x, g = (args[name].cpu().double() for name in ("x", "grad"))
        w = _dense(args, torch.float64)
        tokens = math.prod(x.shape[:-1])
        flat, dy = x.reshape(tokens, w.shape[1]), g.reshape(tokens, w.shape[0])
        kept = BitMask(args["bits"].cpu(), w.shape).unpack()
        y = flat @ w.T + (0 if args["bias"] is None else args["bias"].cpu().double())
        bias = [] if args["bias"] is None else [dy.sum(0)]
        return [y.view(g.shape), (dy @ w).view(x.shape), survivors(dy.T @ flat, kept, args["n"], args["m"]), *bias]

    def _run64(self, args):
        return self.oracle(args)

    def test_reference(self, case):
        args = self.cases[case]("cpu")
        got = self._run("reference", args)
        leaves = [t.detach().clone().requires_grad_() for t in (args["x"], _dense(args))]
        bias = None if args["bias"] is None else args["bias"].clone().requires_grad_()
        y = F.linear(*leaves, bias)
        dx, dw, *db = torch.autograd.grad(y, [t for t in (*leaves, bias) if t is not None], args["grad"])
        kept = BitMask(args["bits"], dw.shape).unpack()
        dense = [y, dx, survivors(dw, kept, args["n"], args["m"]), *db]
        assert_derived(got, dense, self.oracle(args), self.eps)

    def test_fullgraph(self, few_case):
        """The backward pass too: autograd runs what was traced with the forward pass."""
        args = self.cases[few_case]("cpu")
        leaves = {k: args[k].requires_grad_() for k in ("x", "values", "bias") if args[k] is not None}
        weight = NMTensor._of(args["values"], _mask(args), args["n"], args["m"])
        torch._dynamo.reset()
        compiled = torch.compile(ops.nm_linear, fullgraph=True, backend="aot_eager")
        with fastunlearn.backend("native"):
            y = compiled(args["x"], weight, args["bias"])
            got = [y.detach(), *torch.autograd.grad(y, list(leaves.values()), args["grad"])]
        assert fastunlearn.explain(self.op).last == "native:cpu"
        detached = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        assert_equal(got, self._run("native", detached))

    def library_calls(self, args):
        tokens = math.prod(args["x"].shape[:-1])
        x, grad = args["x"].reshape(tokens, args["x"].shape[-1]), args["grad"].reshape(tokens, len(args["bits"]))
        values, pattern = args["values"].requires_grad_(), (args["n"], args["m"])
        yield torch.ops.fastunlearn.nm_linear.default, (x, values, args["bits"], args["bias"], *pattern)
        for given, needs_x in [(x, True), (None, True), (x, False)]:
            yield (
                torch.ops.fastunlearn.nm_linear_backward.default,
                (grad, given, values.detach(), args["bits"], x.shape[1], *pattern, needs_x),
            )


BACKENDS = ["reference", "native", "triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_a_dense_masked_layer(dtype):
    """Expanded and multiplied by the same library: not a rounding differs."""
    args = _inputs(40, 96, 33, 2, 4, dtype=dtype)
    leaves = [args[n].clone().requires_grad_() for n in ("x", "values", "bias")]
    with fastunlearn.backend("native"):
        y = ops.nm_linear(leaves[0], NMTensor(leaves[1], _mask(args), 2, 4), leaves[2])
        grads = torch.autograd.grad(y, leaves, args["grad"])
    assert fastunlearn.explain("nm_linear").last == "native:cpu"
    x, w, b = (t.detach().clone().requires_grad_() for t in (args["x"], _dense(args), args["bias"]))
    want = F.linear(x, w, b)
    dx, dw, db = torch.autograd.grad(want, (x, w, b), args["grad"])
    assert_equal([y, *grads], [want, dx, survivors(dw, _mask(args).unpack(), 2, 4), db])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradcheck(backend):
    args = _inputs(3, 5, 4, 3, 5, dtype=torch.float64)
    leaves = [args[n].requires_grad_() for n in ("x", "values", "bias")]
    with fastunlearn.backend(backend):
        assert torch.autograd.gradcheck(lambda x, v, b: ops.nm_linear(x, NMTensor._of(v, _mask(args), 3, 5), b), leaves)
    assert fastunlearn.explain("nm_linear").last == f"{backend}:cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["x", "values", "bias", "x and values", "all"])
def test_only_what_is_wanted(backend, frozen):
    args = _inputs(6, 20, 9, 2, 4)
    leaves = {n: args[n].requires_grad_(n not in frozen and frozen != "all") for n in ("x", "values", "bias")}
    with fastunlearn.backend(backend):
        y = ops.nm_linear(leaves["x"], NMTensor(leaves["values"], _mask(args), 2, 4), leaves["bias"])
        if frozen == "all":
            assert not y.requires_grad
            return
        y.backward(args["grad"])
    _, dx, dvalues, db = TestNmLinear().oracle({k: v.detach() if torch.is_tensor(v) else v for k, v in args.items()})
    for name, want in (("x", dx), ("values", dvalues), ("bias", db)):
        got = leaves[name].grad
        assert (got is None) == (not leaves[name].requires_grad), name
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def _storages(y: torch.Tensor) -> dict[int, int]:
    """Memory that the graph behind y keeps: address -> bytes."""
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y()
    return kept


def test_nothing_dense_is_kept():
    args = _inputs(4, 64, 32, 2, 4)
    x, values = args["x"].requires_grad_(), args["values"].requires_grad_()
    weight = NMTensor(values, _mask(args), 2, 4)
    with fastunlearn.backend("native"):
        kept = _storages(lambda: ops.nm_linear(x, weight, args["bias"]))
        assert sum(kept.values()) == sum(t.untyped_storage().nbytes() for t in (x, values, args["bits"]))
        # Without a gradient of the values x is not kept.
        frozen = _storages(lambda: ops.nm_linear(x, weight.detach(), args["bias"]))
        assert sum(frozen.values()) == sum(t.untyped_storage().nbytes() for t in (values, args["bits"]))
        # F.linear keeps the dense weight.
        dense = _storages(lambda: F.linear(x, weight.to_dense(), args["bias"]))
        assert sum(dense.values()) >= weight.shape.numel() * 4


def test_one_buffer_for_all_layers():
    ops.release_buffers()
    gc.collect()
    big, small = _inputs(4, 96, 32, 2, 4), _inputs(4, 64, 32, 2, 4, dtype=torch.bfloat16)
    held = []
    with fastunlearn.backend("native"):
        for args in (small, big, small, big):
            y = ops.nm_linear(args["x"], NMTensor(args["values"].requires_grad_(), _mask(args), 2, 4))
            y.backward(args["grad"])
            held.append(_dense_buffer._local.__dict__["buffer"])
    assert [b.numel() for b in held] == [64 * 128 * 2, *[96 * 128 * 4] * 3]
    assert len({b.data_ptr() for b in held[1:]}) == 1
    ops.release_buffers()
    assert not _dense_buffer._local.__dict__


def test_compiled_calls_keep_nothing_on_a_gpu(monkeypatch):
    """torch.compile's CUDA graphs refuse memory of theirs that outlives a call."""
    kept = []

    def on_a_gpu(shape, dtype, device, **options):
        with monkeypatch.context() as fake:
            fake.setattr(torch, "empty", lambda *size, device, **kwargs: empty(*size, **kwargs))
            fake.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            fake.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0))
            with dense_buffer(shape, dtype, torch.device("cuda", 0), **options) as buffer:
                kept.append(len(_dense_buffer._cuda))
        return nullcontext(buffer)

    empty, dense_buffer = torch.empty, _dense_buffer.dense_buffer
    monkeypatch.setattr(import_module("fastunlearn.ops.nm_linear"), "dense_buffer", on_a_gpu)
    args = _inputs(4, 64, 32, 2, 4)
    x, values = args["x"], args["values"].requires_grad_()
    ops.release_buffers()
    with fastunlearn.backend("native"):
        y = torch.ops.fastunlearn.nm_linear(x, values, args["bits"], None, 2, 4)
        torch.ops.fastunlearn.nm_linear_backward(args["grad"], x, values, args["bits"], x.shape[1], 2, 4, True)
        assert kept == [0, 0]
        assert_equal(ops.nm_linear(x, NMTensor(values, _mask(args), 2, 4)), y)
    assert kept == [0, 0, 1]
    ops.release_buffers()
    assert not _dense_buffer._cuda


@pytest.mark.gpu
def test_in_a_compiled_step_with_cuda_graphs():
    args = _inputs(128, 512, 128, 2, 4, dtype=torch.bfloat16, device="cuda")
    weight = NMTensor(args["values"], _mask(args), 2, 4)
    compiled = torch.compile(lambda x: ops.nm_linear(x * 2, weight), mode="reduce-overhead")
    with fastunlearn.backend("native"):
        want = ops.nm_linear(args["x"] * 2, weight)
        for _ in range(4):
            torch.testing.assert_close(compiled(args["x"]), want)


def test_outputs_are_no_views_of_the_buffer():
    args = _inputs(4, 64, 32, 2, 4)
    weight = NMTensor(args["values"], _mask(args), 2, 4)
    with fastunlearn.backend("native"):
        first = ops.nm_linear(args["x"], weight)
        before = first.clone()
        ops.nm_linear(args["x"], NMTensor(args["values"] * 2, _mask(args), 2, 4))
    assert_equal(first, before)


def test_after_inference_mode():
    """A buffer that inference mode made would be refused by training."""
    ops.release_buffers()
    args = _inputs(4, 64, 32, 2, 4)
    weight = NMTensor(args["values"].requires_grad_(), _mask(args), 2, 4)
    with fastunlearn.backend("native"):
        with torch.inference_mode():
            want = ops.nm_linear(args["x"], weight).clone()
        y = ops.nm_linear(args["x"], weight)
        y.sum().backward()
    assert_equal(y, want)


def test_threads_do_not_share_a_buffer():
    inputs = [_inputs(4, 64, 32, 2, 4), _inputs(4, 64, 32, 1, 4)]
    with fastunlearn.backend("native"):
        want = [ops.nm_linear(a["x"], NMTensor(a["values"], _mask(a), a["n"], 4)) for a in inputs]
        wrong = []

        def work(a, y):
            weight = NMTensor(a["values"], _mask(a), a["n"], 4)
            wrong.append(sum(not torch.equal(ops.nm_linear(a["x"], weight), y) for _ in range(50)))

        threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, want)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert wrong == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    args = _inputs((3, 7), 24, 10, 2, 4)
    values = args["values"]
    with fastunlearn.backend(backend):
        weight = NMTensor(values, _mask(args), 2, 4)
        want = ops.nm_linear(args["x"], weight)
        assert_equal(ops.nm_linear(args["x"].transpose(0, 1).contiguous().transpose(0, 1), weight), want)
        assert_equal(ops.nm_linear(args["x"], NMTensor(values.t().contiguous().t(), _mask(args), 2, 4)), want)
        assert_equal(ops.nm_linear(torch._neg_view(-args["x"]), weight), want)
        bias = args["bias"]
        assert_equal(ops.nm_linear(args["x"], weight, torch._neg_view(-bias)), ops.nm_linear(args["x"], weight, bias))
        # A gradient of stride 0, as sum() gives.
        x = args["x"].clone().requires_grad_()
        ops.nm_linear(x, weight).sum().backward()
        torch.testing.assert_close(x.grad, _dense(args).sum(0).expand_as(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    args = _inputs(5, 12, 6, 2, 4)
    x, values = args["x"].requires_grad_(), args["values"].requires_grad_()

    def f(x):
        return ops.nm_linear(x, NMTensor._of(values, _mask(args), 2, 4)).square().sum()

    with fastunlearn.backend("native"):
        want = torch.autograd.grad(f(x), (x, values))
        checkpoint(f, x, use_reentrant=reentrant).backward()
    assert_equal([x.grad, values.grad], list(want))


def test_autocast():
    args = _inputs(5, 12, 6, 2, 4)
    x, values, bias = (args[n].requires_grad_() for n in ("x", "values", "bias"))
    with fastunlearn.backend("native"), torch.autocast("cpu", torch.bfloat16):
        y = ops.nm_linear(x, NMTensor(values, _mask(args), 2, 4), bias)
        want = F.linear(x, _dense(args), bias)
    assert y.dtype == torch.bfloat16
    assert_equal(y, want)
    y.sum().backward()
    assert values.grad.dtype == torch.float32


def test_a_step_of_training_is_that_of_the_dense_layer():
    """Ten steps of SGD on the values, and on a dense weight whose gradient is masked."""
    args = _inputs(16, 24, 12, 2, 4)
    kept = _mask(args).unpack()
    values, dense = args["values"].clone().requires_grad_(), _dense(args).requires_grad_()
    weight = NMTensor(values, _mask(args), 2, 4)
    with fastunlearn.backend("native"):
        for _ in range(10):
            ops.nm_linear(args["x"], weight).square().mean().backward()
            F.linear(args["x"], dense).square().mean().backward()
            with torch.no_grad():
                values -= 0.1 * values.grad
                dense -= 0.1 * (dense.grad * kept)
            values.grad = dense.grad = None
    assert_equal(weight.to_dense(), dense)


def test_cusparselt_only_where_the_table_says_so(monkeypatch):
    """It gets the expanded weight; what it would do is done in its place."""
    from fastunlearn.ops.nm_linear import CUSPARSELT

    calls = []

    def multiply(compressed, dense, bias=None, transpose_result=False):
        calls.append(tuple(compressed.shape))
        y = compressed.float() @ dense.float() + (0 if bias is None else bias.float()[:, None])
        return (y.t() if transpose_result else y).to(dense.dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda w: w.clone(), raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply, raising=False)
    assert CUSPARSELT == {}, "nothing was measured yet"
    args = _inputs(32, 48, 8, 2, 4, dtype=torch.bfloat16)
    weight = NMTensor(args["values"], _mask(args), 2, 4)
    with fastunlearn.backend("native"):
        want = ops.nm_linear(args["x"], weight, args["bias"])
        assert not calls
        monkeypatch.setitem(CUSPARSELT, "cpu", 32)
        torch.testing.assert_close(ops.nm_linear(args["x"], weight, args["bias"]), want)
        assert calls == [(48, 32)]
        ops.nm_linear(args["x"][:16], weight)  # fewer tokens than the table asks for
        ops.nm_linear(args["x"].float(), weight.to(torch.float32))
        assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 512])
def test_auto_reads_few_tokens_directly(tokens):
    args = _inputs(tokens, 512, 128, 2, 4, dtype=torch.bfloat16, device="cuda")
    y = ops.nm_linear(args["x"], NMTensor(args["values"], _mask(args), 2, 4), args["bias"])
    direct = tokens <= 64
    assert fastunlearn.explain("nm_linear").last == ("triton:cuda" if direct else "native:cuda")
    w = _dense(args).cuda()
    same = F.linear(args["x"], w, args["bias"])
    assert_derived(y, same, F.linear(args["x"].double(), w.double(), args["bias"].double()))


ARGS = _inputs(5, 12, 5, 2, 4)
WEIGHT = NMTensor(ARGS["values"], _mask(ARGS), 2, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.nm_linear(torch.zeros(3, 21), WEIGHT), ValueError, r"x: want \[..., 20\] for a weight of shape \(12, 20\), got \(3, 21\)"),
        (lambda: ops.nm_linear(torch.zeros(()), WEIGHT), ValueError, r"x: want \[..., 20\]"),
        (lambda: ops.nm_linear(torch.zeros(3, 20).long(), WEIGHT), TypeError, "x: want a floating tensor"),
        (lambda: ops.nm_linear([1.0], WEIGHT), TypeError, "x: want a tensor, got list"),
        (lambda: ops.nm_linear(torch.zeros(3, 20), ARGS["values"]), TypeError, "nm_weight: want an NMTensor, got Tensor"),
        (lambda: ops.nm_linear(torch.zeros(3, 20).half(), WEIGHT), ValueError, "nm_weight: torch.float32, but x is torch.float16"),
        (lambda: ops.nm_linear(torch.zeros(3, 20), WEIGHT, torch.zeros(11)), ValueError, r"bias: want shape \(12,\), got \(11,\)"),
        (lambda: ops.nm_linear(torch.zeros(3, 20), WEIGHT, torch.zeros(12).half()), ValueError, "bias: torch.float16, but x"),
        (lambda: ops.nm_linear(torch.zeros(3, 20), WEIGHT.to("meta")), ValueError, "nm_weight: on meta, but x is on cpu"),
        (lambda: ops.nm_linear(torch.zeros(3, 2), ops.nm_compress(torch.zeros(8), make_mask((8,), 2, 4), 2, 4)), ValueError, "two dimensions"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
