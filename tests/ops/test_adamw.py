"""Masked AdamW and SGD steps: against double precision, on every backend, frozen entries to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastunlearn
from fastunlearn import BitMask, ops
from fastunlearn.reference import stochastic
from tests.proof import Aot, OpProof, assert_equal, convert

BACKENDS = ["reference", "native", "triton"]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = {
    "list": [(5, 7), (16,), (33, 200), (), (4, 3, 3, 3)],
    "one": [(1,)],
    "empty": [(0,), (3, 0), (70,)],
    "nothing": [(0, 4)],
    "blocks": [(1024,), (2047,), (3, 1025)],
    "units": [(40_000,), (7, 9_999)],
}


def inputs(shapes, density, params="fp32", grads="fp32", device="cpu", seed=0, **extras):
    """Arguments of both ops. Gradients of frozen entries are NaN: nothing may read them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    out = {"params": [], "grads": [], "masks": [], "first": [], "second": [], "scales": [], "masters": [], **extras}
    for i, shape in enumerate(shapes):
        may = torch.rand(shape, generator=generator) < (density if i != 1 or density in (0, 1) else 1 - density)
        count = int(may.sum())
        p = normal(shape).to(FLOATS[params])
        out["params"].append(p)
        out["grads"].append(normal(shape).to(FLOATS[grads]).masked_fill(~may, float("nan")))
        out["masks"].append(may)
        out["first"].append(normal(count))
        out["second"].append(torch.rand(count, generator=generator))
        out["scales"].append(torch.rand(count, generator=generator) * 2)
        out["masters"].append(p[may].float() + 1e-4)
    for name in ("scales", "masters"):
        if not extras.get(f"with_{name}"):
            out[name] = None
    out["clip"] = torch.tensor(0.5) if extras.get("with_clip") else None
    out["steps"] = [3 + i for i in range(len(shapes))]
    return convert(out, lambda t: t.to(device))


ADAM = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}


def shared(args):
    return {
        "lr_scales": args["scales"],
        "masters": args["masters"],
        "grad_scale": args["clip"],
        "maximize": bool(args.get("maximize")),
        "stochastic_rounding": bool(args.get("stochastic", True)),
        "seed": 7,
    }


def copies(args):
    return convert(args, torch.clone)


def step_adamw(a):
    ops.masked_adamw_(a["params"], a["grads"], a["masks"], a["first"], a["second"], a["steps"], **ADAM, **shared(a))
    return [a["params"], a["first"], a["second"], a["masters"]]


def run_adamw(args):
    return step_adamw(copies(args))


def step_sgd(a):
    ops.masked_sgd_(a["params"], a["grads"], a["masks"], a["first"], a["steps"], **SGD, **shared(a))
    return [a["params"], a["first"], a["masters"]]


def run_sgd(args):
    return step_sgd(copies(args))


def dense64(args, i):
    """(mask, parameter, gradient, factor on the learning rate) where something may move, in double precision."""
    may = args["masks"][i]
    p = args["params"][i][may].double() if args["masters"] is None else args["masters"][i].double()
    sign = (-1 if args.get("maximize") else 1) * (1 if args["clip"] is None else float(args["clip"]))
    s = torch.ones_like(p) if args["scales"] is None else args["scales"][i].double()
    return may, p, args["grads"][i][may].double() * sign, s


def put(args, i, may, p):
    full = args["params"][i].double()
    full[may] = p
    return full


def adamw64(args):
    out = [[], [], [], None if args["masters"] is None else []]
    beta1, beta2 = ADAM["betas"]
    for i, step in enumerate(args["steps"]):
        may, p, g, s = dense64(args, i)
        m = beta1 * args["first"][i].double() + (1 - beta1) * g
        v = beta2 * args["second"][i].double() + (1 - beta2) * g * g
        direction = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + ADAM["eps"])
        p = p - ADAM["lr"] * s * (direction + ADAM["weight_decay"] * p)
        for column, value in zip(out, (put(args, i, may, p), m, v, p)):
            if column is not None:
                column.append(value)
    return out


def sgd64(args):
    out = [[], [], None if args["masters"] is None else []]
    for i in range(len(args["steps"])):
        may, p, g, s = dense64(args, i)
        g = g + SGD["weight_decay"] * p
        b = SGD["momentum"] * args["first"][i].double() + (1 - SGD["dampening"]) * g
        p = p - SGD["lr"] * s * b
        for column, value in zip(out, (put(args, i, may, p), b, p)):
            if column is not None:
                column.append(value)
    return out


def _cases():
    cases = {
        f"{shapes} {density}": lambda device, s=shapes, d=density: inputs(SHAPES[s], d, device=device)
        for shapes in SHAPES
        for density in (0.0, 0.05, 0.5, 1.0)
    }
    more = {
        "scaled": {"with_scales": True},
        "clipped": {"with_clip": True, "maximize": True},
        "fp16": {"params": "fp16", "grads": "fp16"},
        "bf16": {"params": "bf16", "grads": "bf16"},
        "bf16 nearest": {"params": "bf16", "grads": "fp32", "stochastic": False},
        "bf16 masters": {"params": "bf16", "grads": "bf16", "with_masters": True, "with_scales": True},
        "fp16 masters": {"params": "fp16", "grads": "bf16", "with_masters": True},
    }
    shapes = SHAPES["list"] + SHAPES["blocks"]
    for name, extras in more.items():
        for density in (0.1, 0.6):
            cases[f"{name} {density}"] = lambda device, e=extras, d=density: inputs(shapes, d, device=device, **e)
    return cases


FEW = (
    "list 0.5", "one 1.0", "one 0.0", "empty 0.5", "nothing 0.0", "blocks 0.05", "blocks 1.0", "scaled 0.6", "clipped 0.1",
    "fp16 0.6", "bf16 0.6", "bf16 nearest 0.1", "bf16 masters 0.6", "fp16 masters 0.1",
)  # fmt: skip


def _aot(kernel):
    signature = {
        "table": "*i64", "hyper": "*fp32", "keys": "*i32", "grad_scale": "*fp32", "block_tensor": "*i32", "first_block": "*i64"
    }  # fmt: skip
    kinds = [
        ("tl.float32", "tl.float32", False, False, False),
        ("tl.bfloat16", "tl.bfloat16", False, True, True),
        ("tl.float16", "tl.float32", True, True, False),
    ]
    return [
        Aot(
            f"fastunlearn.kernels.adamw:{kernel}",
            signature,
            {
                "P": p, "G": g, "HAS_MASTER": master, "HAS_SCALE": scale, "STOCHASTIC": stochastic, "HAS_FIRST": True,
                "BLOCK_SIZE": 1024,
            },
        )
        for p, g, master, scale, stochastic in kinds
    ]  # fmt: skip


class Masked(OpProof):
    """A list of which nothing may move runs no kernel."""

    def _run(self, backend, args, device="cpu"):
        if any(m.any() for m in args["masks"]):
            return super()._run(backend, args, device)
        with fastunlearn.backend(backend):
            return self.run(args)


class TestAdamW(Masked):
    op = "masked_adamw_"
    backends = ("native", "triton")
    cuda_bodies = True
    exact = False
    cases = _cases()
    few = FEW
    aot = _aot("masked_adamw_kernel")
    kernel = staticmethod(run_adamw)
    plain = staticmethod(adamw64)

    def run(self, args):
        return self.kernel(args)

    def _run64(self, args):
        return self.plain(convert(args, lambda t: t.cpu()))

    def _compare(self, out, args):
        super()._compare(out, args)
        for got, before, may in zip(out[0], args["params"], args["masks"]):
            assert_equal(got[~may], before[~may])

    def library_calls(self, args):
        a, empty = copies(args), [torch.empty(0) for _ in args["params"]]
        bits = [BitMask.pack(m).bits for m in a["masks"]]
        scales, masters = a["scales"] or empty, a["masters"] or empty
        steps = torch.tensor(a["steps"])
        yield (
            torch.ops.fastunlearn.masked_adamw_.default,
            (a["params"], a["grads"], bits, a["first"], a["second"], steps, 1e-2, 0.9, 0.99, 1e-8, 0.1, False, scales,
             masters, a["clip"], True, 3),
        )  # fmt: skip


class TestSGD(TestAdamW):
    op = "masked_sgd_"
    aot = _aot("masked_sgd_kernel")
    kernel = staticmethod(run_sgd)
    plain = staticmethod(sgd64)

    def library_calls(self, args):
        a, empty = copies(args), [torch.empty(0) for _ in args["params"]]
        bits = [BitMask.pack(m).bits for m in a["masks"]]
        scales, masters = a["scales"] or empty, a["masters"] or empty
        steps = torch.tensor(a["steps"])
        yield (
            torch.ops.fastunlearn.masked_sgd_.default,
            (a["params"], a["grads"], bits, a["first"], steps, 1e-2, 0.9, 0.0, 0.1, True, False, scales, masters, a["clip"],
             True, 3),
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_entry_keeps_every_bit(backend):
    """Also where the parameter is NaN with a payload, a subnormal or -0, in all types."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    may = torch.arange(2**16) % 3 == 0
    with fastunlearn.backend(backend):
        for params in (patterns.view(torch.bfloat16), patterns.view(torch.float16)):
            before = params.view(torch.int16).clone()
            state = [torch.zeros(int(may.sum())) for _ in range(2)]
            after = params.clone()
            ops.masked_adamw_([after], [torch.full((2**16,), torch.inf)], [may], [state[0]], [state[1]], [1])
            assert torch.equal(after.view(torch.int16)[~may], before[~may])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_gives_the_same_bits_everywhere(backend):
    """With zero gradients and no decay a master-free bf16 parameter is on its grid and stays; an SGD step that is exact in
    fp32 is then rounded by the counter alone, so that all backends must agree to the bit."""
    n = 70_000
    start = (torch.arange(n) % 251).float().add(256).bfloat16()
    may = torch.rand(n) < 0.3
    grad = -torch.ones(n)
    with fastunlearn.backend(backend):
        param = start.clone()
        ops.masked_sgd_([param], [grad], [may], [None], [5], lr=0.25, seed=11)
    key = stochastic.rounding_keys([11], [5], [0])[0]
    want = stochastic.to_bfloat16(start.float() + 0.25, stochastic.counter_random(torch.arange(n), key))
    assert_equal(param, torch.where(may, want, start))


@pytest.mark.parametrize("isa", [0, 3, 99])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nearest_rounding_is_torchs(dtype, density, isa):
    """Ties, subnormals, overflow, infinities: the written value is torch's own rounding of the fp32 result."""
    exponents = torch.arange(-30, 20).float().exp2()
    fractions = 1 + torch.arange(64) / 32 * 2.0 ** -torch.tensor([5, 10, 11, 12]).unsqueeze(1)
    x = (exponents.view(-1, 1, 1) * fractions).flatten()
    x = torch.cat([x, -x, torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 3.39e38, float("inf"), float("nan")])])
    may = torch.rand(len(x)) < density
    param = torch.zeros(len(x), dtype=dtype)
    before = fastunlearn._native._C.set_isa_level(isa)
    try:
        with fastunlearn.backend("native"):
            ops.masked_sgd_([param], [-x], [may], [None], [1], lr=1.0, stochastic_rounding=False)
    finally:
        fastunlearn._native._C.set_isa_level(before)
    assert_equal(param, torch.where(may, x.to(dtype), 0))


def test_rounding_is_unbiased():
    n = 1 << 20
    key = stochastic.rounding_keys([1], [1], [0])[0]
    random = stochastic.counter_random(torch.arange(n), key)
    for share in (0.01, 0.25, 0.5, 0.9):
        x = torch.full((n,), 1 + share * 2**-7)
        up = (stochastic.to_bfloat16(x, random).float() > 1).double().mean().item()
        assert abs(up - share) < 5 * (share * (1 - share) / n) ** 0.5 + 2**-16
    # Neighbours, and the same entry in the next step, are uncorrelated.
    later = stochastic.counter_random(torch.arange(n), stochastic.rounding_keys([1], [2], [0])[0])
    for a, b in ((random[1:], random[:-1]), (random, later)):
        x, y = ((a & 0xFFFF).double() - 32767.5), ((b & 0xFFFF).double() - 32767.5)
        assert abs((x * y).mean() / (x.std() * y.std())) < 5 / n**0.5


def test_random_numbers_past_32_bits():
    key = [123, 456]
    index = torch.tensor([5, 5 + 2**32, 5 + 2**33])
    values = stochastic.counter_random(index, key)
    assert len(set(values.tolist())) == 3
    assert bool((values >= 0).all())
    assert bool((values < 2**32).all())


@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_rounding_keeps_what_is_not_finite(special):
    random = torch.tensor([0xFFFF])
    assert_equal(stochastic.to_bfloat16(torch.tensor([special]), random), torch.tensor([special], dtype=torch.bfloat16))


def test_keys_differ_in_every_part():
    keys = stochastic.rounding_keys([0, 1, 0, 0], [1, 1, 2, 1], [0, 0, 0, 1])
    assert len(np.unique(keys.view(np.uint64))) == 4


def _call(**changes):
    args = {
        "params": [torch.zeros(4)], "grads": [torch.zeros(4)], "masks": [None], "exp_avgs": [torch.zeros(4)],
        "exp_avg_sqs": [torch.zeros(4)], "steps": [1],
    }  # fmt: skip
    ops.masked_adamw_(**{**args, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"params": torch.zeros(4)}, TypeError, "params: want a list"),
        ({"params": [torch.zeros(4, dtype=torch.int32)]}, TypeError, r"params\[0\].*int32"),
        ({"params": [torch.zeros(4, dtype=torch.complex64)]}, TypeError, r"params\[0\].*complex64"),
        ({"grads": []}, ValueError, "grads: want 1 entries"),
        ({"grads": [torch.zeros(5)]}, ValueError, r"grads\[0\].*\(5,\)"),
        ({"grads": [torch.zeros(4).to_sparse()]}, TypeError, "sparse"),
        ({"grads": [torch.zeros(4, dtype=torch.float64)]}, TypeError, r"grads\[0\].*float64"),
        ({"masks": [torch.ones(5, dtype=torch.bool)]}, ValueError, r"masks\[0\].*\(5,\)"),
        ({"masks": [torch.ones(4)]}, TypeError, "bool"),
        ({"masks": [3]}, TypeError, r"masks\[0\].*int"),
        ({"exp_avgs": [torch.zeros(3)]}, ValueError, r"exp_avgs\[0\].*\(4,\)"),
        ({"exp_avg_sqs": [torch.zeros(4).bfloat16()]}, TypeError, r"exp_avg_sqs\[0\].*float32"),
        ({"steps": [0]}, ValueError, "steps: count from 1"),
        ({"lr_scales": [torch.zeros(3)]}, ValueError, r"lr_scales\[0\]"),
        ({"grad_scale": torch.zeros(2)}, ValueError, "grad_scale"),
        ({"params": [torch.zeros(8)[::2]]}, ValueError, "gaps"),
        ({"grads": [torch.zeros(4, device="meta")]}, ValueError, r"grads\[0\].*meta"),
    ],
)
def test_bad_input(changes, error, words):
    with pytest.raises(error, match=words):
        _call(**changes)
