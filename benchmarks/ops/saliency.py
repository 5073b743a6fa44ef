"""saliency_accumulate_: s += |g| and its relatives over lists of tensors.

Peers: the same line in torch, its foreach form and torch.compile. Yardstick: a copy that moves as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.spec import COPY, Case, Inputs, Limit, Op, Provider, Target, close, compiled, copied, copy_of, ours
from fastunlearn import ops

SMOL, UNET, XL = shapes.smollm2_135m(), shapes.sd14_unet(), shapes.sdxl_unet()
LLAMA = shapes.llama_31_8b_slice(16)

CASES = [
    Case("abs, SmolLM2-135M", SMOL, options={"kind": "abs"}, quick=True, gib=3),
    Case("square, SmolLM2-135M", SMOL, options={"kind": "square"}, gib=3),
    Case("weight_grad, SmolLM2-135M", SMOL, options={"kind": "weight_grad"}, gib=4),
    Case("abs, SmolLM2-135M", SMOL, torch.bfloat16, {"kind": "abs"}, gib=3),
    Case("abs, SD 1.4 U-Net", UNET, options={"kind": "abs"}, gib=14),
    Case("abs, SDXL U-Net", XL, torch.bfloat16, {"kind": "abs"}, devices=("cuda",), gib=45),
    Case("abs, half of Llama-3.1-8B", LLAMA, torch.bfloat16, {"kind": "abs"}, devices=("cuda",), gib=70),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x = Inputs(kind=case.options["kind"], weights=None)
    x.grads = [torch.randn(s, generator=generator, device=device).to(case.dtype) for _, s in case.shapes]
    x.scores = [torch.rand(s, generator=generator, device=device) for _, s in case.shapes]
    if x.kind == "weight_grad":
        x.weights = [torch.randn(s, generator=generator, device=device).to(case.dtype) for _, s in case.shapes]
    return x


def one(kind: str, s: Tensor, g: Tensor, w: Tensor | None) -> Tensor:
    if kind == "abs":
        return s.add_(g.abs())
    if kind == "square":
        return s.addcmul_(g.float(), g.float())
    return s.add_((g.float() * w.float()).abs())  # type: ignore[union-attr]


def eager(x: Inputs) -> Callable[[], Any]:
    weights = x.weights or [None] * len(x.grads)

    def run() -> list[Tensor]:
        for s, g, w in zip(x.scores, x.grads, weights):
            one(x.kind, s, g, w)
        return x.scores

    return run


def foreach(x: Inputs) -> Callable[[], Any] | None:
    if x.case.dtype != torch.float32:  # the foreach operations do not mix types
        return None

    def run() -> list[Tensor]:
        if x.kind == "abs":
            torch._foreach_add_(x.scores, torch._foreach_abs(x.grads))
        elif x.kind == "square":
            torch._foreach_addcmul_(x.scores, x.grads, x.grads)
        else:
            torch._foreach_add_(x.scores, torch._foreach_abs(torch._foreach_mul(x.grads, x.weights)))
        return x.scores

    return run


def torch_compile(x: Inputs) -> Callable[[], Any] | None:
    if x.case.shapes in (UNET, XL):  # some sixty shapes to compile
        return None
    fused = compiled(one)
    weights = x.weights or [None] * len(x.grads)

    def run() -> list[Tensor]:
        for s, g, w in zip(x.scores, x.grads, weights):
            fused(x.kind, s, g, w)
        return x.scores

    return run


def mine(x: Inputs) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        ops.saliency_accumulate_(x.scores, x.grads, x.weights, kind=x.kind)
        return x.scores

    return run


def moved(x: Inputs) -> int:
    read = 4 + x.case.dtype.itemsize * (2 if x.weights else 1)
    return x.case.numel * (read + 4)


def copy(x: Inputs) -> Callable[[], Any]:
    return copy_of(moved(x), x.device)


OP = Op(
    name="saliency",
    cases=CASES,
    make=make,
    mutated=lambda x: x.scores,
    expected=lambda x: [s.clone() for s in eager(x)()],
    check=close(1e-6, 1e-6),
    limit=lambda x, line: Limit("bytes", moved(x)),
    providers=[
        *ours("saliency_accumulate_", mine),
        Provider("torch eager", eager),
        Provider("torch foreach", foreach),
        Provider("torch.compile", torch_compile, compiles=True),
        Provider(COPY, copy, check=copied),
    ],
    targets=[Target(COPY, 1 / 0.80, "cpu"), Target(COPY, 1 / 0.85, "cuda")],
)
