"""The gradient of a weight on chosen tiles: any mask against the dense product, every backend, both layouts, linear and convolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastunlearn
from fastunlearn import ops
from fastunlearn.reference import block_weight_grad as reference
from tests.proof import Aot, OpProof, assert_derived, assert_equal, convert


def _mask(rows, cols, block, density, seed=0):
    shape = (-(-rows // block), -(-cols // block))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) < density


def _linear(tokens, rows, cols, block=64, density=0.5, dtype=torch.float32, packed=False, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    many = tokens if isinstance(tokens, tuple) else (tokens,)
    return {
        "grad": torch.randn(*many, rows, generator=generator).to(dtype).to(device),
        "x": torch.randn(*many, cols, generator=generator).to(dtype).to(device),
        "mask": _mask(rows, cols, block, density, seed).to(device),
        "block": block,
        "layout": "tiles" if packed else "dense",
    }


def _case(*args, **kwargs):
    return lambda device: _linear(*args, device=device, **kwargs)


class _Proof(OpProof):
    backends = ("native", "triton")
    exact = False
    kernel_cases = ()

    @classmethod
    def proof_parameters(cls):
        return {**super().proof_parameters(), "triton_case": list(cls.kernel_cases)}

    def test_reference(self, case):
        """Rounded once to the inputs' type."""
        args = self.cases[case]("cpu")
        got, want = self._run("reference", args), self.oracle(args)
        assert_derived(got, want.to(got.dtype), want)

    def test_fullgraph(self, few_case):
        # As many tiles as the mask has: a size that no compiler knows.
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            super().test_fullgraph(few_case)


class TestBlockWeightGrad(_Proof):
    op = "block_weight_grad"
    cases = {
        "tiles of 64": _case(70, 192, 128),
        "tiles of 128": _case(33, 256, 384, block=128),
        "ragged": _case(65, 150, 333),
        "ragged 128": _case(40, 200, 300, block=128),
        "packed": _case(70, 192, 128, packed=True),
        "packed, ragged": _case(65, 150, 333, packed=True),
        "batched": _case((2, 3, 5), 100, 130),
        # Few tiles: several programs add up to one of them.
        "few tiles": _case(1500, 130, 130, density=0.2, seed=3),
        "few tiles, packed": _case(1500, 130, 130, density=0.2, seed=3, packed=True),
        "many tokens": _case(5000, 70, 70, density=0.6, seed=1),
        "empty rows": _case(20, 200, 200, density=0.1, seed=5),
        "no tile": _case(20, 100, 100, density=0),
        "no tile, packed": _case(20, 100, 100, density=0, packed=True),
        "every tile": _case(20, 100, 150, density=1.1),
        "every tile, packed": _case(20, 100, 150, density=1.1, packed=True),
        "most tiles": _case(20, 300, 300, density=0.85, seed=2),
        "most tiles, even": _case(20, 320, 320, density=0.85, seed=2),
        "no tokens": _case(0, 100, 100),
        "no rows": _case(5, 0, 100),
        "one entry": _case(1, 1, 1, density=1.1),
        "fp16": _case(70, 150, 200, dtype=torch.float16),
        "fp16, split": _case(1500, 100, 130, density=0.3, dtype=torch.float16, seed=1),
        "bf16": _case(70, 150, 200, dtype=torch.bfloat16),
        "bf16, split": _case(3000, 100, 130, density=0.3, dtype=torch.bfloat16, seed=1),
    }
    few = ("tiles of 64", "packed, ragged", "batched", "no tile", "no tokens", "no tile, packed")
    kernel_cases = tuple(name for name in cases if "bf16" not in name)
    aot = [
        Aot(
            f"fastunlearn.kernels.block_weight_grad:{name}",
            {**dict.fromkeys(arguments.split(), "i32"), "grad": f"*{dtype}", "x": f"*{dtype}", "places": "*i32",
             "out": f"*{dtype}", "partial": "*fp32" if split else f"*{dtype}"},
            {"T": step * wide, "BLOCK": block, "SPLIT": split, "PACKED": packed, "PRECISION": precision, **extra},
            {"num_warps": 8 if block == 128 else 4, "num_stages": 3},
            stack=0 if name == "convolution" and dtype != "fp32" else None,
        )
        for name, wide, arguments, extra in [
            ("linear", 2, "grad x places out partial tokens rows cols grad_stride x_stride chunk tiles", {}),
            ("convolution", 1, "grad x places out partial tokens rows cols chunk tiles grad_n grad_c grad_y grad_x x_n x_c x_y x_x "
             "height width out_height out_width stride_y stride_x padding_y padding_x dilation_y dilation_x", {"KY": 3, "KX": 3}),
        ]
        for dtype, step, precision, block, split, packed in [
            ("bf16", 32, "tf32", 128, False, False), ("bf16", 32, "tf32", 64, True, False),
            ("fp16", 32, "tf32", 64, False, True), ("fp32", 16, "ieee", 128, False, False),
        ]
    ] + [
        Aot(
            "fastunlearn.kernels.block_weight_grad:finish",
            {"partial": "*fp32", "places": "*i32", "out": "*bf16", "parts": "i32", "tiles": "i32", "rows": "i32", "cols": "i32"},
            {"BLOCK": 128, "STEP": 16, "PACKED": False},
        )
    ]  # fmt: skip

    def run(self, args):
        return ops.block_weight_grad(args["grad"], args["x"], args["mask"], args["block"], layout=args["layout"])

    def oracle(self, args):
        grad, x = (args[n].double().flatten(0, -2) for n in ("grad", "x"))
        dense = torch.einsum("tr,tc->rc", grad, x)
        return _kept(dense, args)

    def library_calls(self, args):
        grad, x = (args[n].flatten(0, -2) for n in ("grad", "x"))
        packed = args["layout"] == "tiles"
        yield (
            torch.ops.fastunlearn.block_weight_grad.default,
            (grad, x, args["mask"], args["block"], [], packed),
        )
        n = int(args["mask"].sum())
        out = torch.zeros(n, args["block"], args["block"]) if packed else torch.zeros(grad.shape[1], x.shape[1])
        yield (
            torch.ops.fastunlearn.block_weight_grad_.default,
            (grad, x, args["mask"], args["block"], [], packed, out),
        )


def _kept(dense, args):
    """Tile by tile, by slices."""
    block, mask = args["block"], args["mask"]
    tiles, out = [], torch.zeros_like(dense)
    for r, c in mask.nonzero().tolist():
        here = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
        out[here] = dense[here]
        tile = dense.new_zeros(block, block)
        tile[: out[here].shape[0], : out[here].shape[1]] = dense[here]
        tiles.append(tile)
    if args["layout"] == "dense":
        return out
    return torch.stack(tiles) if tiles else dense.new_zeros(0, block, block)


def _conv(
    images, channels, outputs, size, kernel=3, block=64, density=0.5, dtype=torch.float32, packed=False, device="cpu", seed=0,
    channels_last=False, **options,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    groups = options.get("groups", 1)
    x = torch.randn(images, channels, *size, generator=generator)
    weight = torch.zeros(outputs, channels // groups, *kernel)
    y = F.conv2d(x, weight, **options)
    grad = torch.randn(y.shape, generator=generator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return {
        "grad": grad.to(dtype).to(device).contiguous(memory_format=layout),
        "x": x.to(dtype).to(device).contiguous(memory_format=layout),
        "mask": _mask(outputs, weight[0].numel(), block, density, seed).to(device),
        "block": block,
        "layout": "tiles" if packed else "dense",
        "kernel": kernel,
        "options": options,
    }


def _conv_case(*args, **kwargs):
    return lambda device: _conv(*args, device=device, **kwargs)


class TestConv2dBlockWeightGrad(_Proof):
    op = "conv2d_block_weight_grad"
    cases = {
        "3 x 3": _conv_case(2, 16, 80, (7, 9), padding=1),
        "1 x 1": _conv_case(3, 130, 70, (5, 6), kernel=1),
        "stride 2": _conv_case(2, 20, 70, (9, 8), padding=1, stride=2),
        "all options": _conv_case(2, 9, 66, (11, 14), kernel=(3, 5), padding=(2, 1), stride=(2, 1), dilation=(1, 2)),
        "tiles of 128": _conv_case(2, 16, 140, (6, 6), block=128, padding=1),
        "packed": _conv_case(2, 16, 80, (7, 9), padding=1, packed=True),
        "few tiles": _conv_case(4, 16, 80, (20, 20), padding=1, density=0.2, seed=2),
        "many places": _conv_case(3, 8, 20, (48, 48), padding=1, density=0.6),
        "channels last": _conv_case(2, 16, 80, (7, 9), padding=1, channels_last=True),
        "no images": _conv_case(0, 16, 80, (7, 9), padding=1),
        "no tile": _conv_case(2, 16, 80, (7, 9), padding=1, density=0),
        "every tile": _conv_case(2, 16, 80, (7, 9), padding=1, density=1.1),
        "groups": _conv_case(2, 16, 80, (7, 9), padding=1, groups=4),
        "fp16": _conv_case(2, 16, 80, (7, 9), padding=1, dtype=torch.float16),
        "bf16": _conv_case(2, 16, 80, (7, 9), padding=1, dtype=torch.bfloat16),
    }
    few = ("3 x 3", "all options", "packed", "groups", "no images")
    kernel_cases = tuple(name for name in cases if "bf16" not in name)
    aot = TestBlockWeightGrad.aot[4:5]

    def run(self, args):
        return ops.conv2d_block_weight_grad(
            args["grad"], args["x"], args["mask"], args["kernel"], args["block"], layout=args["layout"], **args["options"]
        )  # fmt: skip

    def oracle(self, args):
        x, grad = args["x"].double(), args["grad"].double()
        weight = torch.zeros(grad.shape[1], x.shape[1] // args["options"].get("groups", 1), *args["kernel"]).double()
        weight.requires_grad_()
        (dense,) = torch.autograd.grad(F.conv2d(x, weight, **args["options"]), weight, grad)
        return _kept(dense.flatten(1), args)

    def library_calls(self, args):
        def two(name, default):
            value = args["options"].get(name, default)
            return value if isinstance(value, tuple) else (value, value)

        flat = [
            *args["kernel"],
            *two("stride", 1),
            *two("padding", 0),
            *two("dilation", 1),
            args["options"].get("groups", 1),
        ]
        yield (
            torch.ops.fastunlearn.block_weight_grad.default,
            (args["grad"], args["x"], args["mask"], args["block"], flat, args["layout"] == "tiles"),
        )


BACKENDS = ("reference", "native", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_out_is_written_on_tiles_only(backend, density):
    args = _linear(40, 150, 200, density=density, seed=1)
    proof = TestBlockWeightGrad()
    with fastunlearn.backend(backend):
        want = proof.run(args)
        out = torch.full((150, 200), 7.0)
        assert ops.block_weight_grad(args["grad"], args["x"], args["mask"], 64, out=out) is out
        on = reference.spread(args["mask"], 64, 150, 200)
        assert_equal(out, torch.where(on, want, 7.0))
        tiles = torch.full((int(args["mask"].sum()), 64, 64), torch.nan)
        ops.block_weight_grad(args["grad"], args["x"], args["mask"], 64, out=tiles, layout="tiles")
        assert_equal(tiles, proof.run({**args, "layout": "tiles"}))


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_tiles_are_found_once_a_mask(backend, density):
    """Finding them waits for a GPU."""
    args = _linear(40, 150, 200, density=density, seed=1)
    tiles = torch.zeros(int(args["mask"].sum()), 64, 64)
    with fastunlearn.backend(backend), torch.profiler.profile() as profile:
        for step in range(2):
            with torch.profiler.record_function(f"step {step}"):
                ops.block_weight_grad(args["grad"], args["x"], args["mask"], 64, out=tiles, layout="tiles")
    names = [event.name for event in sorted(profile.events(), key=lambda event: event.time_range.start)]
    waits = {"aten::nonzero", "aten::_local_scalar_dense"}
    assert waits & set(names[: names.index("step 1")])
    assert not waits & set(names[names.index("step 1") :])


@pytest.mark.parametrize("packed", [False, True])
def test_out_in_a_compiled_call(packed):
    args = _linear(40, 150, 200, seed=1)
    n = int(args["mask"].sum())
    compiled = torch.compile(ops.block_weight_grad, fullgraph=True, backend="aot_eager")
    for made in (0.0, 7.0):
        out, want = (torch.full((n, 64, 64) if packed else (150, 200), made) for _ in range(2))
        for run, into in ((compiled, out), (ops.block_weight_grad, want)):
            run(args["grad"], args["x"], args["mask"], 64, out=into, layout="tiles" if packed else "dense")
        assert_equal(out, want)
    if packed:
        with pytest.raises(ValueError, match=rf"out: want shape \({n}, 64, 64\)"):
            compiled(args["grad"], args["x"], args["mask"], 64, out=torch.zeros(n + 1, 64, 64), layout="tiles")


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_out(backend):
    args = _conv(2, 16, 80, (7, 9), padding=1, seed=1)
    proof = TestConv2dBlockWeightGrad()
    with fastunlearn.backend(backend):
        want = proof.run(args)
        out = torch.zeros(80, 16, 3, 3)
        made = ops.conv2d_block_weight_grad(args["grad"], args["x"], args["mask"], 3, 64, padding=1, out=out)
        assert made is out
        assert_equal(out.flatten(1), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_is_written_to(backend):
    """Its tiles are found again."""
    args = _linear(40, 150, 200)
    proof = TestBlockWeightGrad()
    with fastunlearn.backend(backend):
        proof.run(args)
        args["mask"].logical_not_()
        torch.testing.assert_close(proof.run(args).double(), proof.oracle(args), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_off_the_mask_nothing_is_read_into_it(backend):
    """NaN in columns and rows that no tile covers."""
    args = _linear(40, 192, 192, seed=1)
    args["mask"] = torch.tensor([[True, False, False], [False] * 3, [False] * 3])
    want = TestBlockWeightGrad().oracle(args)
    args["grad"][:, 64:] = torch.nan
    args["x"][:, 64:] = torch.inf
    with fastunlearn.backend(backend):
        got = TestBlockWeightGrad().run(args)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend):
    args = _linear(40, 100, 100, density=1.1)
    args["mask"][0, 0] = False
    args["x"][3, 70] = torch.inf
    args["grad"][5, 80] = torch.nan
    with fastunlearn.backend(backend):
        got = TestBlockWeightGrad().run(args)
    assert_equal(got.isfinite(), TestBlockWeightGrad().oracle(args).isfinite())


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_memory(backend):
    args = _linear(40, 100, 130)
    proof = TestBlockWeightGrad()
    with fastunlearn.backend(backend):
        want = proof.run(args)
        for f in (
            lambda t: t.t().contiguous().t(),
            lambda t: torch._neg_view(-t),
            lambda t: t.repeat(1, 2)[:, : t.shape[1]],
        ):
            assert_equal(proof.run({**args, "x": f(args["x"]), "grad": f(args["grad"])}), want)
        # A gradient of stride 0, as sum() gives.
        ones = torch.ones(1).expand(40, 100)
        got = proof.run({**args, "grad": ones})
        torch.testing.assert_close(got, proof.run({**args, "grad": ones.contiguous()}))


def test_steps_are_those_that_are_compiled_without_spills():
    """What `aot` names is what a launch takes."""
    pytest.importorskip("triton")
    from fastunlearn.kernels import block_weight_grad as kernels

    for spec in TestBlockWeightGrad.aot[:-1]:
        name = spec.kernel.partition(":")[2]
        dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}[spec.signature["x"]]
        options = kernels._options(f"block_weight_grad.{name}", torch.zeros(1, dtype=dtype), spec.constexprs["BLOCK"])
        assert options == {k: (spec.constexprs | spec.options)[k] for k in options}


def test_threads_do_not_change_the_bits():
    args = _linear(5000, 300, 300, density=0.3, seed=1)
    threads = torch.get_num_threads()
    out = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with fastunlearn.backend("native"):
                out.append(TestBlockWeightGrad().run(args))
    finally:
        torch.set_num_threads(threads)
    assert_equal(out[1:], [out[0], out[0]])


def test_float64_is_plain_torch():
    args = convert(_linear(40, 100, 130), lambda t: t.double() if t.is_floating_point() else t)
    with pytest.warns(fastunlearn.FallbackWarning, match="float64"):
        got = TestBlockWeightGrad().run(args)
    torch.testing.assert_close(got, TestBlockWeightGrad().oracle(args))
    with fastunlearn.backend("native"), pytest.raises(fastunlearn.BackendError, match="float64"):
        TestBlockWeightGrad().run(args)


def test_no_gradient_flows():
    args = _linear(40, 100, 130)
    args["x"].requires_grad_()
    assert not TestBlockWeightGrad().run(args).requires_grad


G, X, M = torch.zeros(5, 100), torch.zeros(5, 130), torch.zeros(2, 3, dtype=torch.bool)
CG, CX, CM = torch.zeros(2, 10, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.block_weight_grad([1.0], X, M, 64), TypeError, "grad_out: want a tensor, got list"),
        (lambda: ops.block_weight_grad(G, X.long(), M, 64), TypeError, "x: want a dense floating tensor"),
        (lambda: ops.block_weight_grad(G.half(), X, M, 64), ValueError, "grad_out: torch.float16, but x is torch.float32"),
        (lambda: ops.block_weight_grad(G, X.to("meta"), M, 64), ValueError, "grad_out: on cpu, but x is on meta"),
        (lambda: ops.block_weight_grad(G[:4], X, M, 64), ValueError, r"grad_out: want \[..., rows\] with x's leading sizes \(5,\)"),
        (lambda: ops.block_weight_grad(G, X, M), ValueError, r"block_mask: a weight of shape \(100, 130\) has \(1, 2\) tiles of 128"),
        (lambda: ops.block_weight_grad(G, X, M.int(), 64), TypeError, "block_mask: want a torch.bool tensor, got torch.int32"),
        (lambda: ops.block_weight_grad(G, X, [[True]], 64), TypeError, "block_mask: want a torch.bool tensor, got list"),
        (lambda: ops.block_weight_grad(G, X, M, 0), ValueError, "block: want a whole number of at least 1, got 0"),
        (lambda: ops.block_weight_grad(G, X, M, 64, layout="sparse"), ValueError, "layout: want dense or tiles, got 'sparse'"),
        (lambda: ops.block_weight_grad(G, X, M, 64, out=torch.zeros(3, 3)), ValueError, r"out: want shape \(100, 130\), got \(3, 3\)"),
        (lambda: ops.block_weight_grad(G, X, M, 64, out=torch.zeros(130, 100).t()), ValueError, "out: want row-major memory"),
        (lambda: ops.block_weight_grad(G, X, M, 64, out=torch.zeros(100, 130).half()), TypeError, "out: want a tensor of torch.float32"),
        (lambda: ops.block_weight_grad(G, X, M, 64, out=torch.zeros(1, 64, 64), layout="tiles"), ValueError, r"out: want shape \(0, 64, 64\)"),
        (lambda: ops.conv2d_block_weight_grad(CG[0], CX, CM, 3, 64, padding=1), ValueError, "grad_out: want four dimensions"),
        (lambda: ops.conv2d_block_weight_grad(CG, CX, CM, 3, 64), ValueError, r"grad_out: this convolution of x .* gives \[2, out, 2, 2\]"),
        (lambda: ops.conv2d_block_weight_grad(CG, CX, CM, 3, 64, padding=1, groups=2), ValueError, "groups: want a divisor of 3 and 10"),
        (lambda: ops.conv2d_block_weight_grad(CG, CX, CM, (3,), 64, padding=1), ValueError, "kernel_size: want one or two whole numbers"),
        (lambda: ops.conv2d_block_weight_grad(CG, CX, CM, 3, 64, padding="same"), ValueError, "padding: want one or two whole numbers"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
