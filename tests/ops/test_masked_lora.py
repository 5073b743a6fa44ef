"""A frozen layer with a masked adapter: the closed form, every mask, every backend, what is kept for the backward pass."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastunlearn
from fastunlearn import BitMask, ops
from fastunlearn.ops import _masked_lora_cpu as cpu
from fastunlearn.ops.mask import rows_cols
from tests.proof import Aot, OpProof, assert_compiled, assert_derived, assert_equal, convert

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _packed(may):
    with fastunlearn.backend("auto"):
        return BitMask.pack(may)


def _inputs(tokens, out, cols, rank, mask="bits", block=32, dtype=torch.float32, factors=None, bias=True, device="cpu"):
    generator = torch.Generator().manual_seed(out * 7 + cols + rank)

    def random(*shape, scale=1.0, kind=dtype):
        return (torch.randn(shape, generator=generator) * scale).to(kind).to(device)

    args = {
        "x": random(*((tokens,) if isinstance(tokens, int) else tokens), cols),
        "weight": random(out, cols, scale=cols**-0.5 if cols else 1.0),
        "A": random(rank, cols, scale=cols**-0.5 if cols else 1.0, kind=factors or dtype),
        "B": random(out, rank, kind=factors or dtype),
        "grad": random(*((tokens,) if isinstance(tokens, int) else tokens), out),
        "bias": random(out) if bias else None,
        "block": block,
        "scaling": 0.6,
    }
    density = {"full": 1.1, "empty": -0.1, "sparse": 0.05}.get(mask, 0.5)
    shape = (-(-out // block), -(-cols // block)) if "blocks" in mask else (out, cols)
    may = torch.rand(shape, generator=generator) < density
    args["mask"] = None if mask == "none" else (may if "blocks" in mask else _packed(may).bits).to(device)
    return args


def _case(*args, **kwargs):
    return lambda device: _inputs(*args, device=device, **kwargs)


def _mask(args, shape=None):
    mask = args["mask"]
    if mask is None or mask.dtype == torch.bool:
        return mask
    return BitMask(mask, shape if shape is not None else args["weight"].shape)


def _dense(args):
    """The mask as a bool tensor [out, in]."""
    mask, (out, cols) = args["mask"], rows_cols(args["weight"].shape)
    if mask is None:
        return torch.ones(out, cols, dtype=torch.bool)
    if mask.dtype == torch.uint8:
        return BitMask(mask.cpu(), (out, cols)).unpack()
    return mask.cpu().repeat_interleave(args["block"], 0)[:out].repeat_interleave(args["block"], 1)[:, :cols]


#: run-time arguments of the kernels, for compiling them ahead of time
ARGUMENTS = {
    "effective": "W A B mask out rows cols rank width scale",
    "small": "x W A B mask partial tokens rows cols rank width scale chunk",
    "contract": "G grad x A B mask partial_A partial_B tokens rows cols rank stride width chunk",
}


class _Proof(OpProof):
    """The weight is frozen: finite differences of what trains only."""

    def test_gradient(self, few_case):
        args = convert(self.cases[few_case]("cpu"), lambda t: t.double() if t.is_floating_point() else t)
        names = [name for name in ("x", "A", "B", "bias") if args[name] is not None]

        def f(*values):
            return self.run({**args, **dict(zip(names, values))})

        with fastunlearn.backend("reference"):
            leaves = [args[name].requires_grad_() for name in names]
            assert torch.autograd.gradcheck(f, leaves, fast_mode=True)

    def test_fullgraph(self, few_case):
        """The forward pass in one graph, and the gradients through it."""
        args = self.cases[few_case]("cpu")
        names = [name for name in ("x", "A", "B", "bias") if args[name] is not None]

        def both(f):
            leaves = [args[name].detach().requires_grad_() for name in names]
            out = [f({**args, **dict(zip(names, leaves))})]
            return [*out, *torch.autograd.grad(out[0], leaves, args["grad"])]

        torch._dynamo.reset()
        for backend in ("reference", "native"):
            with fastunlearn.backend(backend):
                got = both(torch.compile(self.run, fullgraph=True, backend="aot_eager"))
                # A convolution without a mask is traced as two of torch's.
                assert fastunlearn.explain(self.op).last == f"{backend}:cpu" or args["mask"] is None
                assert_equal(got, both(self.run))
                merge = torch.compile(self.merge, fullgraph=True, backend="aot_eager")
                assert_equal(merge(args), self.merge(args))

    def merge(self, args):
        return ops.masked_lora_weight(
            args["weight"], args["A"], args["B"], _mask(args), args["scaling"], block=args["block"]
        )


class TestMaskedLoraLinear(_Proof):
    """Outputs: y, dx, dA, dB, dbias, and the merged weight."""

    op = "masked_lora_linear"
    backends = ("native", "triton")
    exact = False
    differentiable = True
    eps = 2e-6
    cases = {
        "bits": _case(50, 24, 40, 4),
        # Few tokens go another way through the Triton kernels than many.
        "many tokens": _case(150, 150, 200, 5),
        "many tokens, wide rank": _case(140, 300, 330, 70),
        "ragged": _case(3, 133, 77, 3),
        "one token": _case((1,), 65, 129, 1),
        "batched": _case((2, 3, 5), 24, 40, 4),
        "blocks": _case(50, 96, 64, 4, mask="blocks"),
        "ragged blocks": _case(70, 150, 203, 5, mask="blocks", block=16),
        "few tokens, blocks": _case(9, 150, 203, 5, mask="blocks"),
        "many blocks": _case(150, 300, 330, 17, mask="blocks", block=16),
        "many blocks, wide rank": _case(140, 300, 170, 70, mask="blocks", block=32),
        "few tokens, blocks of 16": _case(9, 150, 203, 20, mask="blocks", block=16),
        "few tokens, blocks of 32": _case(9, 150, 203, 30, mask="blocks", block=32),
        "fp16, blocks of 16": _case(40, 150, 203, 70, mask="blocks", block=16, dtype=torch.float16),
        "no mask": _case(50, 24, 40, 4, mask="none"),
        "full": _case(50, 24, 40, 4, mask="full"),
        "empty": _case(50, 24, 40, 4, mask="empty"),
        "sparse": _case(50, 24, 120, 4, mask="sparse"),
        "no bias": _case(7, 24, 40, 4, bias=False),
        "no tokens": _case(0, 24, 40, 4),
        "no rows": _case(5, 0, 40, 4),
        "no columns": _case(5, 24, 0, 4),
        "fp16": _case(130, 144, 200, 5, dtype=torch.float16),
        "fp16, few tokens": _case(20, 144, 200, 5, dtype=torch.float16),
        "fp16, fp32 factors": _case(130, 144, 200, 5, dtype=torch.float16, factors=torch.float32),
        "bf16": _case(130, 144, 200, 5, dtype=torch.bfloat16),
        "bf16, few tokens": _case(20, 144, 200, 128, dtype=torch.bfloat16),
        "bf16, fp32 factors": _case(130, 144, 200, 5, dtype=torch.bfloat16, factors=torch.float32),
        "rank 128": _case(40, 48, 64, 128),
    }
    few = ("bits", "ragged", "batched", "blocks", "no mask", "no bias", "no tokens")
    kernel_cases = ("bits", "many tokens", "many tokens, wide rank", "ragged", "one token", "blocks", "ragged blocks",
                    "few tokens, blocks", "many blocks", "many blocks, wide rank", "few tokens, blocks of 16",
                    "few tokens, blocks of 32", "fp16, blocks of 16", "no mask", "full", "empty", "no tokens", "no rows", "no columns",
                    "fp16", "fp16, few tokens", "fp16, fp32 factors", "rank 128")  # fmt: skip
    # As `weight`, `multiply` and `gradients` launch them where there are 227 KiB of shared memory.
    aot = [
        Aot(
            f"fastunlearn.kernels.masked_lora:{name}",
            {
                **dict.fromkeys(ARGUMENTS[name].split(), "i32"),
                **{key: f"*{dtype}" for key in ("W", "out", "x", "G", "grad") if key in ARGUMENTS[name].split()},
                **dict.fromkeys("AB", f"*{factors}"),
                **{key: "*fp32" for key in ("partial", "partial_A", "partial_B") if key in ARGUMENTS[name].split()},
                "mask": "*u8",
                **({"scale": "fp32"} if "scale" in ARGUMENTS[name] else {}),
            },
            {"R": R, "M": M, "N": N, "KIND": kind, "BLOCK": 128 if kind == 2 else 1, "PRECISION": "tf32", **extra},
            {"num_warps": warps, "num_stages": 2 if (name, dtype, R) == ("small", "fp32", 128) else 3},
            archs,
            unaligned=R == 16,
        )
        for name, dtype, factors, R, M, N, kind, warps, archs, extra in [
            ("effective", "bf16", "bf16", 16, 64, 128, 1, 4, (80, 90, 100), {"STEP": 16}),
            ("effective", "bf16", "fp32", 64, 128, 128, 1, 8, (80, 90, 100), {"STEP": 32}),
            ("effective", "fp32", "fp32", 128, 64, 128, 2, 8, (80, 90, 100), {"STEP": 16, "PRECISION": "tf32x3"}),
            ("small", "bf16", "bf16", 16, 64, 64, 1, 4, (80, 90, 100), {"T": 16, "BACKWARD": False}),
            ("small", "fp16", "fp32", 128, 64, 64, 1, 4, (80, 90, 100), {"T": 16, "BACKWARD": True}),
            ("small", "fp32", "fp32", 128, 64, 64, 1, 4, (90, 100), {"T": 16, "BACKWARD": True}),
            ("small", "fp32", "fp32", 16, 32, 32, 2, 8, (80, 90), {"T": 64, "BACKWARD": False, "PRECISION": "ieee"}),
            ("contract", "bf16", "fp32", 16, 128, 64, 1, 8, (80, 90, 100), {"T": 32, "FUSED": False}),
            ("contract", "bf16", "bf16", 64, 256, 64, 1, 8, (90, 100), {"T": 32, "FUSED": False}),
            ("contract", "fp32", "fp32", 32, 128, 64, 1, 8, (90, 100), {"T": 32, "FUSED": False}),
            ("contract", "fp32", "fp32", 32, 64, 32, 2, 8, (80, 90), {"T": 32, "FUSED": True, "PRECISION": "ieee"}),
            ("contract", "bf16", "bf16", 16, 128, 64, 2, 8, (80, 90, 100), {"T": 32, "FUSED": True}),
            ("contract", "fp16", "fp16", 64, 256, 64, 1, 8, (80, 90, 100), {"T": 32, "FUSED": True}),
            ("effective", "bf16", "bf16", 16, 64, 64, 3, 4, (80, 90, 100), {"STEP": 16, "BLOCK": 16}),
            ("small", "fp16", "fp16", 32, 32, 32, 3, 4, (80, 90, 100), {"T": 16, "BACKWARD": True, "BLOCK": 16}),
            ("contract", "bf16", "bf16", 32, 64, 32, 3, 8, (80, 90, 100), {"T": 32, "FUSED": False, "BLOCK": 16}),
            ("contract", "bf16", "fp32", 64, 128, 32, 3, 8, (80, 90, 100), {"T": 32, "FUSED": True, "BLOCK": 32}),
        ]
    ] + [
        Aot(
            "fastunlearn.kernels.masked_lora:finish",
            {"partial": "*fp32", "bias": "*bf16", "out": "*bf16", "parts": "i32", "count": "i64", "size": "i32", "scale": "fp32"},
            {"BIAS": True, "BLOCK": 1024},
        )
    ]  # fmt: skip

    @classmethod
    def proof_parameters(cls):
        return {**super().proof_parameters(), "triton_case": list(cls.kernel_cases)}

    def run(self, args):
        leaves = {name: args[name] for name in ("x", "A", "B", "bias")}
        if not args["x"].requires_grad:
            leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in leaves.items()}
        mask = _mask(args)
        y = ops.masked_lora_linear(
            leaves["x"], args["weight"].detach(), leaves["A"], leaves["B"], mask, args["scaling"], leaves["bias"],
            block=args["block"],
        )  # fmt: skip
        if args["x"].requires_grad:
            return y  # gradcheck differentiates
        wanted = [t for t in leaves.values() if t is not None]
        return [y.detach(), *torch.autograd.grad(y, wanted, args["grad"]), self.merge(args)]

    def oracle(self, args):
        x, w, A, B, g = (args[name].cpu().double() for name in ("x", "weight", "A", "B", "grad"))
        m, s = _dense(args).double(), args["scaling"]
        effective = w + s * (B @ A) * m
        tokens = math.prod(x.shape[:-1])
        flat, dy = x.reshape(tokens, w.shape[1]), g.reshape(tokens, w.shape[0])
        G = (dy.T @ flat) * m
        y = flat @ effective.T + (0 if args["bias"] is None else args["bias"].cpu().double())
        bias = [] if args["bias"] is None else [dy.sum(0)]
        return [y.view(g.shape), (dy @ effective).view(x.shape), s * B.T @ G, s * G @ A.T, *bias, effective]

    def _run64(self, args):
        return self.oracle(args)

    def test_reference(self, case):
        args = self.cases[case]("cpu")
        got = self._run("reference", args)
        # The definition in torch, whose products round as many times in 16 bits.
        x, A, B, w = (args[n].detach().clone() for n in ("x", "A", "B", "weight"))
        for t in (x, A, B):
            t.requires_grad_()
        bias = None if args["bias"] is None else args["bias"].clone().requires_grad_()
        effective = w + (args["scaling"] * (B.float() @ A.float()) * _dense(args)).to(w.dtype)
        y = F.linear(x, effective, bias)
        grads = torch.autograd.grad(y, [t for t in (x, A, B, bias) if t is not None], args["grad"])
        assert_derived(got, [y, *grads, effective], self.oracle(args), self.eps)

    def library_calls(self, args):
        flat = args["x"].reshape(math.prod(args["x"].shape[:-1]), args["x"].shape[-1])
        dy = args["grad"].reshape(math.prod(args["grad"].shape[:-1]), args["grad"].shape[-1])
        a, b = args["A"].requires_grad_(), args["B"].requires_grad_()
        numbers = (args["scaling"], args["block"])
        forward = (flat, args["weight"], a, b, args["mask"], args["bias"], *numbers)
        yield torch.ops.fastunlearn.masked_lora_linear.default, forward
        backward = (dy, flat, args["weight"], a.detach(), b.detach(), args["mask"], *numbers)
        yield torch.ops.fastunlearn.masked_lora_linear_backward.default, (*backward, True)
        yield torch.ops.fastunlearn.masked_lora_linear_backward.default, (*backward, False)
        yield (
            torch.ops.fastunlearn.masked_lora_weight.default,
            (args["weight"], a.detach(), b.detach(), args["mask"], *numbers),
        )


def _conv_inputs(shape, rank, mask="bits", block=16, device="cpu", images=2, size=9, dtype=torch.float32, **options):
    out, inside, high, wide = shape
    cols = inside * high * wide
    args = _inputs(1, out, cols, rank, mask, block, dtype, device=device)
    groups = options.get("groups", 1)
    generator = torch.Generator().manual_seed(5)
    args["x"] = torch.randn(images, inside * groups, size, size + 2, generator=generator).to(dtype).to(device)
    args["weight"] = args["weight"].view(shape)
    args["options"] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    y = F.conv2d(args["x"].cpu().float(), args["weight"].cpu().float(), **args["options"])
    args["grad"] = torch.randn(y.shape, generator=generator).to(dtype).to(device)
    return args


def _conv_case(*args, **kwargs):
    return lambda device: _conv_inputs(*args, device=device, **kwargs)


class TestMaskedLoraConv2d(_Proof):
    op = "masked_lora_conv2d"
    backends = ("native", "triton")
    exact = False
    differentiable = True
    eps = 2e-6
    cases = {
        "3x3": _conv_case((7, 5, 3, 3), 2, padding=1),
        "1x1": _conv_case((20, 12, 1, 1), 4),
        "tiles": _conv_case((150, 23, 3, 3), 6, padding=1, size=4),
        "strided": _conv_case((10, 6, 3, 3), 3, stride=2, padding=(1, 0)),
        "dilated": _conv_case((10, 6, 3, 3), 3, dilation=2, padding=2),
        "grouped": _conv_case((12, 3, 3, 3), 3, groups=4, padding=1),
        "blocks": _conv_case((40, 6, 3, 3), 3, mask="blocks", padding=1),
        "no mask": _conv_case((10, 6, 3, 3), 3, mask="none", padding=1),
        "no mask, grouped": _conv_case((12, 3, 3, 3), 3, mask="none", groups=4, stride=2),
        "same": _conv_case((10, 6, 3, 2), 3, padding="same", size=5),
        "no images": _conv_case((7, 5, 3, 3), 2, padding=1, images=0),
        "fp16": _conv_case((20, 6, 3, 3), 3, padding=1, dtype=torch.float16),
        "bf16": _conv_case((20, 6, 3, 3), 3, padding=1, dtype=torch.bfloat16),
    }
    few = ("3x3", "1x1", "strided", "grouped", "blocks", "no mask, grouped")
    aot = TestMaskedLoraLinear.aot[:1]

    def run(self, args):
        leaves = [args[name] for name in ("x", "A", "B", "bias")]
        if not args["x"].requires_grad:
            leaves = [t.detach().requires_grad_() for t in leaves]
        x, A, B, bias = leaves
        weight = args["weight"].detach()
        mask = _mask(args)
        y = ops.masked_lora_conv2d(x, weight, A, B, mask, args["scaling"], bias, **args["options"], block=args["block"])
        if args["x"].requires_grad:
            return y
        return [y.detach(), *torch.autograd.grad(y, leaves, args["grad"]), self.merge(args)]

    def oracle(self, args):
        x, A, B, bias, w = (args[n].detach().cpu().double().clone() for n in ("x", "A", "B", "bias", "weight"))
        for t in (x, A, B, bias):
            t.requires_grad_()
        effective = w + args["scaling"] * (B @ A * _dense(args)).view(w.shape)
        y = F.conv2d(x, effective, bias, **args["options"])
        return [y, *torch.autograd.grad(y, (x, A, B, bias), args["grad"].cpu().double()), effective]

    def _run64(self, args):
        return self.oracle(args)

    def test_reference(self, case):
        args = self.cases[case]("cpu")
        leaves = [args[n].detach().clone().requires_grad_() for n in ("x", "A", "B", "bias")]
        x, A, B, bias = leaves
        w = args["weight"]
        effective = w + (args["scaling"] * (B.float() @ A.float()) * _dense(args)).to(w.dtype).view(w.shape)
        y = F.conv2d(x, effective, bias, **args["options"])
        torch_ = [y, *torch.autograd.grad(y, leaves, args["grad"]), effective]
        assert_derived(self._run("reference", args), torch_, self.oracle(args), self.eps)

    def library_calls(self, args):
        if args["mask"] is None:
            # Without a mask it is two convolutions of torch's.
            args = _conv_inputs((12, 3, 3, 3), 3, groups=4, stride=2)
        options = [list(args["options"][n]) if isinstance(args["options"][n], tuple) else [args["options"][n]] * 2
                   for n in ("stride", "padding", "dilation")] + [args["options"]["groups"]]  # fmt: skip
        a, b = args["A"].requires_grad_(), args["B"].requires_grad_()
        inputs = (args["weight"], a, b, args["mask"])
        tail = (args["scaling"], args["block"], *options)
        yield torch.ops.fastunlearn.masked_lora_conv2d.default, (args["x"], *inputs, args["bias"], *tail)
        factors = (args["weight"], a.detach(), b.detach(), args["mask"])
        yield (
            torch.ops.fastunlearn.masked_lora_conv2d_backward.default,
            (args["grad"], args["x"], *factors, *tail, True, True),
        )


BACKENDS = ["reference", "native", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_masked_entries_are_the_weights_bit_for_bit(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the raw bits of bf16")
    args = _inputs(1, 90, 150, 8, dtype=dtype)
    args["weight"][::3] = -0.0
    args["B"][::7] = math.inf
    for mask in (args["mask"], torch.rand(6, 10) < 0.5):
        args["mask"], args["block"] = mask, 16
        with fastunlearn.backend(backend):
            merged = ops.masked_lora_weight(args["weight"], args["A"], args["B"], _mask(args), 0.7, block=16)
        kept = ~_dense(args)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert_equal(merged.view(bits)[kept], args["weight"].view(bits)[kept])
        assert not torch.equal(merged[~kept], args["weight"][~kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_out_gives_no_gradient_even_where_it_is_infinite(backend):
    args = _inputs(70, 40, 64, 4)
    may = torch.zeros(40, 64, dtype=torch.bool)
    may[:, 8:] = True
    x = args["x"].clone()
    x[:, :8] = math.inf
    A, B = args["A"].requires_grad_(), args["B"].requires_grad_()
    with fastunlearn.backend(backend):
        y = ops.masked_lora_linear(x, args["weight"], A, B, _packed(may))
        dA, dB = torch.autograd.grad(y, (A, B), torch.ones_like(y))
    assert dA[:, :8].eq(0).all()
    assert dA.isfinite().all()
    assert dB.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["bits", "none", "blocks"])
def test_merged_is_the_masked_forward(backend, mask):
    args = _inputs(70, 64, 96, 4, mask=mask)
    with fastunlearn.backend(backend):
        y = ops.masked_lora_linear(
            args["x"], args["weight"], args["A"], args["B"], _mask(args), 0.6, args["bias"], block=32
        )
        merged = ops.masked_lora_weight(args["weight"], args["A"], args["B"], _mask(args), 0.6, block=32)
    torch.testing.assert_close(y, F.linear(args["x"], merged, args["bias"]), rtol=1e-5, atol=1e-5)


def test_full_mask_is_an_ordinary_adapter():
    args = _inputs(50, 40, 64, 4, mask="full")
    results = []
    for mask in (_mask(args), None, torch.ones(2, 2, dtype=torch.bool)):
        A, B = (args[n].clone().requires_grad_() for n in "AB")
        y = ops.masked_lora_linear(args["x"], args["weight"], A, B, mask, 0.6, block=32)
        results.append([y, *torch.autograd.grad(y, (A, B), args["grad"])])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["bits", "none", "blocks"])
def test_dropout_is_on_the_adapters_input(backend, mask):
    args = _inputs(50, 64, 96, 4, mask=mask)
    x, A, B = (args[n].clone().requires_grad_() for n in ("x", "A", "B"))
    with fastunlearn.backend(backend):
        torch.manual_seed(3)
        y = ops.masked_lora_linear(x, args["weight"], A, B, _mask(args), 0.6, args["bias"], dropout=0.4, block=32)
        got = [y, *torch.autograd.grad(y, (x, A, B), args["grad"])]
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    want = F.linear(x, args["weight"], args["bias"]) + 0.6 * F.linear(dropped, B @ A * _dense(args))
    for g, w in zip(got, [want, *torch.autograd.grad(want, (x, A, B), args["grad"])]):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    conv = _conv_inputs((12, 4, 3, 3), 3, mask=mask, padding=1)
    torch.manual_seed(3)
    with fastunlearn.backend(backend):
        y = ops.masked_lora_conv2d(
            conv["x"], conv["weight"], conv["A"], conv["B"], _mask(conv), 0.6, None, padding=1, dropout=0.4, block=16
        )
    torch.manual_seed(3)
    delta = (conv["B"] @ conv["A"] * _dense(conv)).view(conv["weight"].shape)
    want = F.conv2d(conv["x"], conv["weight"], padding=1) + 0.6 * F.conv2d(F.dropout(conv["x"], 0.4), delta, padding=1)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    args = _inputs(50, 64, 96, 4)
    x, A, B = (args[n].clone().requires_grad_() for n in ("x", "A", "B"))

    def layer(x):
        return torch.relu(ops.masked_lora_linear(x, args["weight"], A, B, _mask(args), 0.6, dropout=0.2))

    torch.manual_seed(1)
    y = layer(x)
    want = [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]
    torch.manual_seed(1)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert_equal([y, x.grad, A.grad, B.grad], want)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_nothing_of_the_weights_size_is_kept(backend):
    args = _inputs(30, 64, 96, 4)
    A, B, x = (args[n].requires_grad_() for n in ("A", "B", "x"))
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with fastunlearn.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.masked_lora_linear(x, args["weight"], A, B, _mask(args), 0.6)
    own = {t.data_ptr() for t in (args["weight"], A, B, x, args["mask"])}
    assert {t.untyped_storage().data_ptr() for t in kept} <= own
    # With factors that do not train, x is not kept either.
    kept.clear()
    with fastunlearn.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.masked_lora_linear(x, args["weight"], A.detach(), B.detach(), _mask(args), 0.6)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    assert y.requires_grad
    del y
    gc.collect()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["bits", "none"])
def test_autocast(dtype, mask):
    args = _inputs(50, 64, 96, 4, mask=mask)
    A, B = (args[n].requires_grad_() for n in "AB")
    with torch.autocast("cpu", dtype=dtype):
        y = ops.masked_lora_linear(args["x"], args["weight"], A, B, _mask(args), 0.6, args["bias"])
    assert y.dtype == dtype
    effective = (args["weight"] + 0.6 * (B @ A) * _dense(args)).to(dtype)
    want = F.linear(args["x"].to(dtype), effective, args["bias"].to(dtype))
    torch.testing.assert_close(y, want, rtol=3e-2, atol=3e-2)
    dA, dB = torch.autograd.grad(y, (A, B), args["grad"].to(dtype))
    assert dA.dtype == dB.dtype == torch.float32
    torch.testing.assert_close(dA, self_dA(args, A, B), rtol=3e-2, atol=3e-1)
    conv = _conv_inputs((12, 4, 3, 3), 3, mask=mask, padding=1)
    with torch.autocast("cpu", dtype=dtype):
        y = ops.masked_lora_conv2d(
            conv["x"], conv["weight"], conv["A"].requires_grad_(), conv["B"], _mask(conv), padding=1
        )
    assert y.dtype == dtype
    assert torch.autograd.grad(y.sum(), conv["A"])[0].dtype == torch.float32


def self_dA(args, A, B):
    G = args["grad"].T @ args["x"] * _dense(args)
    return 0.6 * B.detach().T @ G


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    args = _inputs(30, 64, 96, 4)
    wide = torch.randn(96, 30)
    with fastunlearn.backend(backend):
        want = ops.masked_lora_linear(wide.T.contiguous(), args["weight"], args["A"], args["B"], _mask(args))
        assert_equal(ops.masked_lora_linear(wide.T, args["weight"], args["A"], args["B"], _mask(args)), want)
        turned = [args[n].T.contiguous().T for n in ("weight", "A", "B")]
        assert_equal(ops.masked_lora_linear(wide.T, *turned, _mask(args)), want)
        conv = _conv_inputs((12, 4, 3, 3), 3, padding=1)
        options = {"padding": 1, "block": 16}
        want = ops.masked_lora_conv2d(conv["x"], conv["weight"], conv["A"], conv["B"], _mask(conv), **options)
        last = {"memory_format": torch.channels_last}
        got = ops.masked_lora_conv2d(
            conv["x"].to(**last), conv["weight"].to(**last), conv["A"], conv["B"], _mask(conv), **options
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous(**last)
        one = ops.masked_lora_conv2d(conv["x"][0], conv["weight"], conv["A"], conv["B"], _mask(conv), **options)
        torch.testing.assert_close(one, want[0], rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time():
    """Triton's partial sums are added in one order."""
    args = _inputs(140, 300, 330, 20, device="cuda" if torch.cuda.is_available() else "cpu")
    runs = []
    for _ in range(2):
        with fastunlearn.backend("triton"):
            runs.append(TestMaskedLoraLinear().run(args))
    assert_equal(*runs)


def test_every_rank_and_few_tokens_in_one_kernel():
    from fastunlearn.kernels import masked_lora as kernels

    cpu = torch.device("cpu")
    half = [kernels.few_tokens(cpu, r, torch.bfloat16) for r in (1, 16, 17, 64, 128, 129)]
    assert half == [64, 64, 32, 32, 16, 0]
    # Exact products of more ranks are cuBLAS'.
    assert [kernels.few_tokens(cpu, r, torch.float32) for r in (16, 32, 33, 128)] == [64, 32, 0, 0]


class _Recorder:
    """In the place of a kernel: launches as what is compiled for them."""

    TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}

    def __init__(self, name, kernel, arch, out):
        self.name, self.kernel, self.arch, self.out = name, kernel, arch, out

    def __getitem__(self, grid):
        def launch(*args, **constants):
            names = [n for n in self.kernel.arg_names if n not in constants]
            signature = {
                n: self.TYPES[a.dtype] if isinstance(a, torch.Tensor) else "fp32" if isinstance(a, float) else "i32"
                for n, a in zip(names, args, strict=True)
            }
            options = {o: constants.pop(o) for o in ("num_warps", "num_stages") if o in constants}
            kernel = f"fastunlearn.kernels.masked_lora:{self.name}"
            spec = Aot(kernel, signature, constants, options, (self.arch,))
            if self.name != "finish" and spec not in self.out:
                self.out.append(spec)

        return launch


@pytest.mark.parametrize(
    ("arch", "kilobytes"),
    [pytest.param(86, 99, marks=pytest.mark.thorough), (80, 163), pytest.param(90, 227, marks=pytest.mark.thorough)],
)
def test_launches_fit_into_shared_memory(monkeypatch, arch, kilobytes):
    """What the kernels are launched with, for the types and ranks that take the most."""
    from fastunlearn.kernels import masked_lora as kernels

    specs = []
    for name in ("effective", "small", "contract", "finish"):
        monkeypatch.setattr(kernels, name, _Recorder(name, getattr(kernels, name), arch, specs))
    monkeypatch.setattr(kernels, "shared_memory", lambda device: kilobytes * 1024)
    fp32, bf16, side = torch.float32, torch.bfloat16, 256
    thorough = arch != 80
    masks = [(torch.zeros(side, side // 8, dtype=torch.uint8), 128)]
    if thorough:
        masks += [(torch.zeros(side // b, side // b, dtype=torch.bool), b) for b in (128, 32, 16)]
    cases = [(fp32, fp32, 128), (bf16, fp32, 128), (bf16, bf16, 128)]
    if thorough:
        cases += [(fp32, fp32, 64), (bf16, fp32, 64), (bf16, bf16, 64), (fp32, fp32, 32)]
    for tf32 in (True, False) if thorough else (True,):
        monkeypatch.setattr(kernels, "tf32_allowed", lambda tf32=tf32: tf32)
        for dtype, factors, rank in cases:
            for mask, block in masks:
                w, x = torch.zeros(side, side, dtype=dtype), torch.zeros(16, side, dtype=dtype)
                adapter = (
                    torch.zeros(rank, side, dtype=factors),
                    torch.zeros(side, rank, dtype=factors),
                    mask,
                    1.0,
                    block,
                )
                kernels.weight(w, *adapter, dtype)
                if kernels.few_tokens(w.device, rank, dtype):
                    kernels.multiply(x, w, *adapter)
                    kernels.multiply(x, w, *adapter, backward=True)
                    kernels.gradients(*adapter, grad=x, x=x)
                kernels.gradients(*adapter, G=w)
    assert_compiled(specs)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 1024])
@pytest.mark.parametrize(("dtype", "tf32"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)])
def test_what_is_added_up_afterwards_is_no_larger_than_a_16_bit_weight(monkeypatch, block, dtype, tf32):
    from fastunlearn.kernels import masked_lora as kernels

    names, sizes = kernels.contract.arg_names, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **constants: sizes.extend(
                dict(zip(names, args))[n].numel() for n in ("partial_A", "partial_B")
            )

    monkeypatch.setattr(kernels, "contract", Recorder())
    monkeypatch.setattr(kernels, "_finish", lambda partial, out, scale: out)
    monkeypatch.setattr(kernels, "tf32_allowed", lambda: tf32)
    rows, cols = 2048, 1024
    mask = torch.zeros(rows // block, cols // block, dtype=torch.bool)
    for rank in (4, 16, 32, 64, 128):
        A, B = torch.zeros(rank, cols, dtype=dtype), torch.zeros(rows, rank, dtype=dtype)
        kernels.gradients(A, B, mask, 1.0, block, G=torch.zeros(rows, cols, dtype=dtype))
        x, grad = torch.zeros(16, cols, dtype=dtype), torch.zeros(16, rows, dtype=dtype)
        kernels.gradients(A, B, mask, 1.0, block, grad=grad, x=x)
    assert sizes
    assert 4 * max(sizes) <= 2 * rows * cols


def test_rank_beyond_the_kernels():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = _inputs(5, 16, 200, 130, device=device)
    with pytest.raises(fastunlearn.BackendError, match="rank 130"), fastunlearn.backend("triton"):
        ops.masked_lora_linear(args["x"], args["weight"], args["A"], args["B"], _mask(args))
    blocks = torch.ones(1, 9, dtype=torch.bool, device=device)
    with pytest.raises(fastunlearn.BackendError, match="block 24"), fastunlearn.backend("triton"):
        ops.masked_lora_linear(args["x"], args["weight"], args["A"][:4], args["B"][:, :4], blocks, block=24)
    args = _inputs(5, 16, 200, 130)
    with fastunlearn.backend("native"):
        y = ops.masked_lora_linear(args["x"], args["weight"], args["A"], args["B"], _mask(args), 0.6, args["bias"])
    torch.testing.assert_close(y.double(), TestMaskedLoraLinear().oracle(args)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [3, 16, 20])
def test_threads_do_not_change_the_bits(rank):
    """Columns are summed in strips, whoever sums them."""
    args = _inputs(64, 300, 700, rank)
    G = torch.randn(300, 700)
    threads, results = torch.get_num_threads(), []
    adapter = cpu.Adapter(args["A"], args["B"], args["mask"], 0.6, 1)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            sums = cpu.contract(G.clone(), adapter) if rank <= cpu._THIN else ()
            results.append([cpu.weight(args["weight"], adapter, torch.float32), *sums])
    finally:
        torch.set_num_threads(threads)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def test_second_derivatives_are_refused():
    args = _inputs(5, 16, 20, 3)
    A = args["A"].requires_grad_()
    y = ops.masked_lora_linear(args["x"], args["weight"], A, args["B"], _mask(args))
    (dA,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dA.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["bits", "blocks"])
def test_offsets_beyond_two_to_the_31(mask):
    """The last rows of a weight of more than 2^31 entries."""
    out, cols, rank = (1 << 16) + 5, 1 << 15, 4
    weight = torch.zeros(out, cols, dtype=torch.float16, device="cuda")
    A = torch.randn(rank, cols, device="cuda").half()
    B = torch.zeros(out, rank, dtype=torch.float16, device="cuda")
    B[-5:] = 1
    x = torch.randn(8, cols, device="cuda").half() / 100
    m = torch.ones(-(-out // 128), cols // 128, dtype=torch.bool, device="cuda")
    m = BitMask.ones(weight.shape, "cuda") if mask == "bits" else m
    A.requires_grad_(), B.requires_grad_()
    with fastunlearn.backend("triton"):
        y = ops.masked_lora_linear(x, weight, A, B, m)
        dA, dB = torch.autograd.grad(y, (A, B), torch.ones_like(y))
    assert y[:, :-5].eq(0).all()
    torch.testing.assert_close(
        y[:, -5:].float(), (x.float() @ A.float().sum(0))[:, None].expand(8, 5), rtol=2e-2, atol=2e-2
    )
    torch.testing.assert_close(dB.float()[-1], A.float() @ x.float().sum(0), rtol=2e-2, atol=2e-1)
    torch.testing.assert_close(dA.float()[0], 5 * x.float().sum(0), rtol=2e-2, atol=2e-2)


X, W, A4, B4, M4 = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8), torch.ones(4, 3), BitMask.ones((4, 8))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.masked_lora_linear(1, W, A4, B4), TypeError, "x: want a tensor, got int"),
        (lambda: ops.masked_lora_linear(X, W.int(), A4, B4), TypeError, "weight: want a dense floating tensor"),
        (lambda: ops.masked_lora_linear(X[:, :7], W, A4, B4), ValueError, r"x: want \[..., 8\]"),
        (lambda: ops.masked_lora_linear(X, W[0], A4, B4), ValueError, r"weight: want \[out, in\], got \(8,\)"),
        (lambda: ops.masked_lora_linear(X, W, A4[:, :7], B4), ValueError, r"lora_A: want \[rank, 8\]"),
        (lambda: ops.masked_lora_linear(X, W, A4[:0], B4[:, :0]), ValueError, "rank of at least 1"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4[:, :2]), ValueError, r"lora_B: want \(4, 3\)"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, BitMask.ones((8, 4))), ValueError, r"mask: shape \(8, 4\), but weight"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, torch.ones(4, 8)), TypeError, "mask: want a BitMask of weight.shape"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, torch.ones(4, 8).bool()), ValueError, "a block mask of a weight"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, M4, math.nan), ValueError, "scaling: want"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, M4, math.inf), ValueError, "scaling: want a finite number"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, M4, "1"), TypeError, "scaling: want a number"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, M4, bias=torch.ones(3)), ValueError, r"bias: want \(4,\), got \(3,\)"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, M4, dropout=1.0), ValueError, r"dropout: want a number in \[0, 1\)"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, M4, block=0), ValueError, "block: want at least 1"),
        (lambda: ops.masked_lora_linear(X, W, A4, B4, M4, block=1.5), TypeError, "block: want an int"),
        (lambda: ops.masked_lora_linear(X.half(), W, A4, B4, M4), TypeError, "x: torch.float16, but weight is torch.float32"),
        (lambda: ops.masked_lora_linear(X, W, A4.to("meta"), B4), ValueError, "lora_A: on meta, but weight is on cpu"),
        (lambda: ops.masked_lora_linear(X, W.clone().requires_grad_(), A4, B4), ValueError, "requires a gradient"),
        (lambda: ops.masked_lora_conv2d(X, W, A4, B4), ValueError, r"weight: want \[out, in / groups"),
        (lambda: ops.masked_lora_conv2d(X, W[:, :, None, None], A4, B4), ValueError, r"x: want \[n, 8, height, width\]"),
        (
            lambda: ops.masked_lora_conv2d(torch.ones(1, 8, 3, 3), W[:, :, None, None], A4, B4, padding="odd"),
            ValueError,
            "padding: want numbers, 'same' or 'valid'",
        ),
        (
            lambda: ops.masked_lora_conv2d(torch.ones(1, 8, 3, 3), W[:, :, None, None], A4, B4, stride=1.5),
            TypeError,
            "stride: want an int or two of them",
        ),
        (lambda: ops.masked_lora_weight(W, A4, B4[:3]), ValueError, "lora_B: want"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
