"""linear_nll: losses of sequences from hidden states and the head's weight, forward and backward, each sequence with a factor of
its own.

Peers: torch from whole logits, compiled, and Liger's fused linear cross entropy where it is installed (Triton: on a GPU). The
limit counts the matrix products that cannot be left out: two with a frozen head (logits, gradient of the hidden states), three
with one that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target, close, compiled, ours
from fastunlearn import ops

BF16 = torch.bfloat16


def case(name: str, sequences: int, length: int, width: int, vocabulary: int, trains: bool, **options: Any) -> Case:
    shapes = [("hidden", (sequences, length, width)), ("weight", (vocabulary, width))]
    extra = {"trains": trains, "ignored": options.pop("ignored", 0.0)}
    return Case(f"{name}, {'trained' if trains else 'frozen'} head", shapes, options=extra, **options)


CASES = [
    case("SmolLM2-135M, 1k tokens", 8, 128, 576, 49152, False, quick=True, gib=3, devices=("cpu",)),
    case("SmolLM2-135M, 1k tokens", 8, 128, 576, 49152, True, gib=3, devices=("cpu",)),
    case("SmolLM2-135M, 480 tokens", 8, 60, 576, 49152, True, quick=True, gib=2, devices=("cpu",)),
    case("SmolLM2-135M, half of 1k tokens ignored", 8, 128, 576, 49152, False, ignored=0.5, gib=3, devices=("cpu",)),
    case("vocabulary of 128k, 512 tokens", 4, 128, 576, 128256, False, gib=4, devices=("cpu",)),
    case("Llama-3.1-8B, 8k tokens", 16, 512, 4096, 128256, False, dtype=BF16, quick=True, gib=40, devices=("cuda",)),
    case("Llama-3.1-8B, 8k tokens", 16, 512, 4096, 128256, True, dtype=BF16, quick=True, gib=45, devices=("cuda",)),
    case("Llama-3.1-8B, half of 8k tokens ignored", 16, 512, 4096, 128256, False, dtype=BF16, ignored=0.5, gib=40, devices=("cuda",)),
    case("Llama-3.1-8B, 1k tokens", 8, 128, 4096, 128256, True, dtype=BF16, gib=12, devices=("cuda",)),
]  # fmt: skip


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    (_, shape), (_, (vocabulary, width)) = case.shapes
    x = Inputs(trains=case.options["trains"])
    x.hidden = torch.randn(shape, generator=generator, device=device).to(case.dtype)
    # Logits of unit variance times three: a model that is sure of some tokens.
    x.weight = (3 * width**-0.5 * torch.randn(vocabulary, width, generator=generator, device=device)).to(case.dtype)
    x.labels = torch.randint(vocabulary, shape[:-1], generator=generator, device=device)
    x.labels[torch.rand(shape[:-1], generator=generator, device=device) < case.options["ignored"]] = -100
    x.factors = torch.rand(shape[0], generator=generator, device=device) / shape[0]
    return x


def from_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(-1)


def step(x: Inputs, nll: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    """Forward and backward: values and gradients."""

    def run() -> list[Tensor]:
        hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_(x.trains)
        value = nll(hidden, weight, x.labels)
        (value * x.factors).sum().backward()
        return [value.detach(), hidden.grad, *([weight.grad] if x.trains else [])]  # type: ignore[list-item]

    return run


def mine(x: Inputs) -> Callable[[], Any]:
    return step(x, lambda h, w, y: ops.linear_nll(h, w, y)[0])


def eager(x: Inputs) -> Callable[[], Any]:
    return step(x, from_logits)


def torch_compile(x: Inputs) -> Callable[[], Any]:
    return step(x, compiled(from_logits))


def liger(x: Inputs) -> Callable[[], Any]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return step(x, lambda h, w, y: loss(w, h.flatten(0, 1), y.flatten()).view(y.shape).sum(-1))


def products(x: Inputs, line: int) -> Limit:
    """2 n V d operations each."""
    vocabulary, width = x.weight.shape
    counted = int((x.labels != -100).sum())
    return Limit("flops", (3 if x.trains else 2) * 2 * counted * vocabulary * width)


OP = Op(
    name="linear_nll",
    cases=CASES,
    make=make,
    expected=lambda x: eager(x)(),
    check=lambda x, got, want: close(2e-2 if x.hidden.dtype == BF16 else 1e-4, 1e-6)(x, got, want),
    limit=products,
    providers=[
        *ours("linear_nll", mine),
        Provider("torch eager", eager),
        Provider("torch.compile", torch_compile, compiles=True),
        Provider("Liger fused linear cross entropy", liger, devices=("cuda",)),
    ],
    targets=[
        Target("torch eager", 1.0, "cpu", "frozen"),
        Target("torch eager", 1.0, "cpu", "trained"),
        Target("torch eager", 1.0, "cuda", "frozen"),
        Target("torch eager", 1.25, "cuda", "trained"),
        Target("Liger fused linear cross entropy", 1.0, "cuda", "frozen"),
        Target("torch eager", 1 / 8, "cuda", "8k", kind="peak"),
    ],
)
