"""hamu_step_: the constrained step of two gradients: their inner products, then the update.

Peers: the same maths in torch, tensor by tensor (three dot products, a combination, an addition), as the authors' code has it, and
its foreach form. Floor: a plain SGD step on the sum of the two gradients, which promises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.ops.gram import lora
from benchmarks.spec import COPY, FLOOR, Case, Inputs, Limit, Op, Provider, Target, close, copied, copy_of, ours
from fastunlearn import ops

SMOL, LLAMA = shapes.smollm2_135m(), shapes.llama_31_8b()
LR, RATIO = 1e-4, 0.5

CASES = [
    Case("SmolLM2-135M", SMOL, quick=True, gib=4),
    Case("SmolLM2-135M", SMOL, torch.bfloat16, gib=4),
    Case("LoRA of rank 8 on Llama-3.1-8B", lora(LLAMA, 8), gib=1),
    Case("half of Llama-3.1-8B", shapes.llama_31_8b_slice(16), torch.bfloat16, devices=("cuda",), gib=60),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(s, generator=generator, device=device).to(case.dtype) for _, s in case.shapes]

    return Inputs(params=draw(), retain=draw(), forget=draw())


def mine(x: Inputs) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        ops.hamu_step_(x.params, x.retain, x.forget, lr=LR, ratio=RATIO, max_grad_norm=1.0, stochastic_rounding=False)
        return x.params

    return run


def _changes(x: Inputs) -> Callable[[], Any]:
    """The closed form of every tensor, numbers on the host as in the op."""

    def run() -> list[Tensor]:
        products = torch.stack(
            [
                torch.stack([(a * b).sum() for a, b in ((r, r), (r, f), (f, f))])
                for r, f in ((r.flatten().float(), f.flatten().float()) for r, f in zip(x.retain, x.forget))
            ]
        ).tolist()
        cr, cf = (min(1.0, 1 / math.sqrt(sum(p[k] for p in products))) for k in (0, 2))
        total = sum(math.sqrt(rr * ff) * cr * cf for rr, _, ff in products)
        s = RATIO / total
        for p, r, f, (rr, rf, ff) in zip(x.params, x.retain, x.forget, products):
            cosine = rf / math.sqrt(rr * ff)
            if cosine <= -s:
                p.add_(r, alpha=-LR * cr)
                continue
            rest = math.sqrt((1 - s * s) / (1 - cosine * cosine))
            change = r.float() * (-LR * cr * rest) + f.float() * (LR * cr * math.sqrt(rr / ff) * (s + rest * cosine))
            p.add_(change.to(p.dtype) if p.dtype == torch.float32 else change)
        return x.params

    return run


def sgd(x: Inputs) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        torch._foreach_add_(x.params, torch._foreach_sub(x.retain, x.forget), alpha=-LR)
        return x.params

    return run


def moved(x: Inputs) -> int:
    # Both gradients twice, the parameters read and written.
    return x.case.numel * x.case.dtype.itemsize * 6


OP = Op(
    name="hamu",
    cases=CASES,
    make=make,
    mutated=lambda x: x.params,
    expected=lambda x: [p.clone() for p in _changes(x)()],
    check=close(1e-6, 1e-6),
    limit=lambda x, line: Limit("bytes", moved(x)),
    providers=[
        *ours("hamu_step_", mine),
        Provider("torch, tensor by tensor", _changes),
        Provider(FLOOR + "SGD on the sum of the two", sgd, check=lambda x, out, want: None),
        Provider(COPY, lambda x: copy_of(moved(x), x.device), check=copied),
    ],
    targets=[Target(COPY, 1 / 0.80, "cpu", "SmolLM2"), Target("limit", 1.25, "cuda", "half of Llama")],
)
