"""linear_divergence: KL to a reference given by its last hidden states, and CE-U, forward and backward, without logits.

Peers: torch from whole logits, and compiled. The limit counts the matrix products that cannot be left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.linear_nll import BF16
from benchmarks.ops.linear_nll import make as make_nll
from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target, close, compiled, ours
from fastunlearn import ops


def case(name: str, kind: str, sequences: int, length: int, width: int, vocabulary: int, **options: Any) -> Case:
    shapes = [("hidden", (sequences, length, width)), ("weight", (vocabulary, width))]
    return Case(f"{kind}, {name}", shapes, options={"kind": kind, "trains": False, "ignored": 0.0}, **options)


CASES = [
    case("SmolLM2-135M, 512 tokens, frozen head", "kl", 8, 64, 576, 49152, quick=True, gib=3, devices=("cpu",)),
    case("SmolLM2-135M, 512 tokens, frozen head", "ce_u", 8, 64, 576, 49152, gib=3, devices=("cpu",)),
    *(
        case("Llama-3.1-8B, 4k tokens, frozen head", kind, 8, 512, 4096, 128256, dtype=BF16, gib=45, devices=("cuda",))
        for kind in ("kl", "ce_u")
    ),
]


def make(case: Case, device: torch.device) -> Inputs:
    x = make_nll(case, device)
    noise = torch.randn(x.hidden.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    x.reference = (x.hidden + 0.3 * noise).to(x.hidden.dtype) if case.options["kind"] == "kl" else None
    x.kind = case.options["kind"]
    return x


def kl(hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    p = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        q = F.linear(reference, weight).float().log_softmax(-1)
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1).sum(-1)


def ce_u(hidden: Tensor, reference: None, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    with torch.no_grad():
        target = logits.scatter(-1, labels[..., None], float("-inf")).softmax(-1)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none").view(labels.shape).sum(-1)


def step(x: Inputs, loss: Callable[..., Tensor]) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        hidden = x.hidden.detach().requires_grad_()
        value = loss(hidden, x.reference, x.weight, x.labels)
        (value * x.factors).sum().backward()
        return [value.detach(), hidden.grad]  # type: ignore[list-item]

    return run


def mine(x: Inputs) -> Callable[[], Any]:
    def loss(hidden: Tensor, reference: Tensor | None, weight: Tensor, labels: Tensor) -> Tensor:
        ref_weight = None if reference is None else weight
        return ops.linear_divergence(hidden, weight, reference, ref_weight, labels, kind=x.kind)[0]

    return step(x, loss)


def eager(x: Inputs) -> Callable[[], Any]:
    return step(x, kl if x.kind == "kl" else ce_u)


def torch_compile(x: Inputs) -> Callable[[], Any]:
    return step(x, compiled(kl if x.kind == "kl" else ce_u))


def products(x: Inputs, line: int) -> Limit:
    vocabulary, width = x.weight.shape
    return Limit("flops", (3 if x.kind == "kl" else 2) * 2 * x.labels.numel() * vocabulary * width)


OP = Op(
    name="linear_divergence",
    cases=CASES,
    make=make,
    expected=lambda x: eager(x)(),
    check=lambda x, got, want: close(2e-2 if x.hidden.dtype == BF16 else 1e-4, 1e-6)(x, got, want),
    limit=products,
    providers=[
        *ours("linear_divergence", mine),
        Provider("torch eager", eager),
        Provider("torch.compile", torch_compile, compiles=True),
    ],
    targets=[
        Target("torch eager", 1.0, "cpu"),
        Target("torch eager", 1.0, "cuda"),
        Target("torch eager", 1 / 8, "cuda", kind="peak"),
    ],
)
