"""nm_linear, forward and backward. Peers: torch's dense F.linear, F.linear of a weight expanded in plain torch, cuSPARSELt's 2:4.

The dense layer is what the weight costs where memory is no question: it keeps 16/9 of a 2:4 weight's bytes, and its gradient twice
the values'. The expanded one keeps every layer's dense weight alive until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target, close, ours
from fastunlearn import ops
from fastunlearn.ops import NMTensor

SHAPES = {
    "SmolLM2 up_proj": (1536, 576),
    "Llama-3.1-8B o_proj": (4096, 4096),
    "Llama-3.1-8B up_proj": (14336, 4096),
}
#: tokens, and whether the case trains (forward and backward) or only reads
WORKS = [(1, False), (16, False), (64, False), (512, True), (4096, True)]
CASES = [
    Case(
        f"{tokens} tokens, {'training' if trains else 'forward'}, {model}",
        [("weight", shape)],
        torch.float32 if "Smol" in model else torch.bfloat16,
        {"tokens": tokens, "trains": trains},
        # A CPU multiplies a 16-bit Llama layer by many tokens for seconds.
        devices=("cpu", "cuda") if "Smol" in model or tokens <= 64 else ("cuda",),
        quick="Smol" in model and tokens == 512,
        gib=4,
    )
    for model, shape in SHAPES.items()
    for tokens, trains in WORKS
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, cols = case.shapes[0][1]
    weight = (torch.randn(rows, cols, generator=generator, device=device) * cols**-0.5).to(case.dtype)
    tokens = case.options["tokens"]
    x = torch.randn(tokens, cols, generator=generator, device=device).to(case.dtype)
    grad = torch.randn(tokens, rows, generator=generator, device=device).to(case.dtype)
    tensor = ops.nm_compress(weight, ops.nm_mask(weight.abs(), 2, 4), 2, 4)
    trains = case.options["trains"]
    return Inputs(x=x.requires_grad_(trains), grad=grad, tensor=tensor, dense=tensor.to_dense(), trains=trains)


def _trained(x: Inputs, weight: Tensor, layer: Callable[[], Tensor]) -> Callable[[], Any]:
    """y, and where the case trains the gradients of x and of the weight."""
    if not x.trains:
        return lambda: [layer()]

    def run() -> list[Tensor]:
        y = layer()
        return [y.detach(), *torch.autograd.grad(y, (x.x, weight), x.grad)]

    return run


def dense(x: Inputs) -> Callable[[], Any]:
    weight = x.dense.clone().requires_grad_(x.trains)
    return _trained(x, weight, lambda: F.linear(x.x, weight))


def mine(x: Inputs) -> Callable[[], Any]:
    values = x.tensor.values.clone().requires_grad_(x.trains)
    tensor = NMTensor(values, x.tensor.mask, x.tensor.n, x.tensor.m)
    return _trained(x, values, lambda: ops.nm_linear(x.x, tensor))


def expanded(x: Inputs) -> Callable[[], Any]:
    """By the column of every value, made once."""
    values = x.tensor.values.clone().requires_grad_(x.trains)
    columns = x.tensor.mask.unpack().nonzero()[:, 1].view(values.shape)
    zeros = torch.zeros_like(x.dense)
    return _trained(x, values, lambda: F.linear(x.x, zeros.scatter(1, columns, values)))


def semi_structured(x: Inputs) -> Callable[[], Any] | None:
    """torch.sparse's 2:4, compressed once: forward only, it has no gradient of the weight."""
    if x.trains or x.case.dtype.itemsize != 2:
        return None
    from torch.sparse import to_sparse_semi_structured

    weight = to_sparse_semi_structured(x.dense)
    return lambda: [F.linear(x.x, weight)]


def gathered(x: Inputs, output: Any, expected: Any) -> str | None:
    """A dense gradient counts by its entries on the mask."""
    rtol = 2e-5 if x.case.dtype == torch.float32 else 2e-2
    got = [x.tensor.gather(t) if i == 2 and t.shape == x.tensor.shape else t for i, t in enumerate(output)]
    return close(rtol, 1e-5)(x, got, expected)


def expected(x: Inputs) -> list[Tensor]:
    y, *grads = dense(x)()
    return [y, *grads[:1], *(x.tensor.gather(g) for g in grads[1:])]


def limit(x: Inputs, line: int) -> Limit:
    rows, cols = x.tensor.shape
    tokens = x.x.shape[0]
    if x.trains:
        return Limit("flops", 3 * 2 * tokens * rows * cols)
    return Limit("bytes", x.tensor.nbytes + (x.x.numel() + x.grad.numel()) * x.case.dtype.itemsize)


OP = Op(
    name="nm_linear",
    cases=CASES,
    make=make,
    expected=expected,
    check=gathered,
    limit=limit,
    providers=[
        *ours("nm_linear", mine),
        Provider("torch, dense F.linear", dense),
        Provider("torch, expanded by columns", expanded),
        Provider("torch.sparse, 2:4", semi_structured, devices=("cuda",)),
    ],
    # Training pays for two expansions and a gather, which many tokens hide; few tokens read 9/16 of the bytes.
    targets=[
        Target("torch, dense F.linear", 1.25, "cuda", "512 tokens"),
        Target("torch, dense F.linear", 1.05, "cuda", "4096 tokens"),
        Target("torch, dense F.linear", 1.0, "cuda", "1 tokens, forward, Llama"),
        Target("torch, dense F.linear", 1.0, "cuda", "16 tokens, forward, Llama"),
        Target("torch, expanded by columns", 1.0, "cpu"),
    ],
)
