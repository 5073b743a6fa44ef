"""MaskedAdamW: one step of AdamW on the entries that may move.

Peers: gradients times a float mask, then torch's fused or foreach AdamW; SalUn's step, which also puts the frozen weights
back (w = m w_new + (1 - m) w_old); the same maths over dense states, compiled. No weight decay, with which a masked gradient
alone would not freeze anything. A peer's mask belongs to its memory; so do the moments of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target, compiled, ours, touched_bytes
from fastunlearn import BitMask, optim

SMOL, UNET = shapes.smollm2_135m(), shapes.sd14_unet()
LAYER, LAYERS = shapes.llama_31_8b_slice(1), shapes.llama_31_8b_slice(8)
FUSED = "masked gradient, fused AdamW"
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8

CASES = [
    Case("1 %, SmolLM2-135M", SMOL, options={"density": 0.01}, gib=11),
    Case("5 %, SmolLM2-135M", SMOL, options={"density": 0.05}, quick=True, gib=11),
    Case("50 %, SmolLM2-135M", SMOL, options={"density": 0.5}, gib=11),
    Case("5 %, a layer of Llama-3.1-8B", LAYER, torch.bfloat16, {"density": 0.05}, devices=("cpu",), gib=11),
    Case("5 %, SD 1.4 U-Net", UNET, options={"density": 0.05}, devices=("cuda",), gib=75),
    Case("50 %, SD 1.4 U-Net", UNET, options={"density": 0.5}, devices=("cuda",), gib=80),
    Case("5 %, 8 layers of Llama-3.1-8B", LAYERS, torch.bfloat16, {"density": 0.05}, devices=("cuda",), gib=90),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    params, masks = [], []
    for _, shape in case.shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device).mul_(0.02).to(case.dtype))
        p.grad = torch.randn(shape, generator=generator, device=device).to(case.dtype)
        params.append(p)
        masks.append(BitMask.pack(torch.rand(shape, generator=generator, device=device) < case.options["density"]))
    return Inputs(params=params, masks=masks)


def grads(x: Inputs) -> list[Tensor]:
    return [p.grad for p in x.params]


def mine(x: Inputs) -> Callable[[], Any]:
    optimizer = optim.MaskedAdamW(x.params, x.masks, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)

    def run() -> list[Tensor]:
        optimizer.step()
        return x.params

    return run


def _torch(restore: bool = False, **options: bool) -> Callable[[Inputs], Callable[[], Any]]:
    def build(x: Inputs) -> Callable[[], Any]:
        floats = [m.unpack().to(x.case.dtype) for m in x.masks]
        optimizer = torch.optim.AdamW(x.params, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, **options)
        old = [torch.empty_like(p) for p in x.params] if restore else []

        @torch.no_grad()
        def run() -> list[Tensor]:
            torch._foreach_mul_(grads(x), floats)
            if restore:
                torch._foreach_copy_(old, x.params)
            optimizer.step()
            for p, o, m in zip(x.params, old, floats) if restore else ():
                p.copy_(m * p + (1 - m) * o)
            return x.params

        return run

    return build


def _dense_step(
    p: Tensor, g: Tensor, mask: Tensor, m: Tensor, v: Tensor, correction1: Tensor, correction2: Tensor
) -> None:
    gradient = g.float()
    new_m = m.lerp(gradient, 1 - BETA1)
    new_v = v * BETA2 + gradient * gradient * (1 - BETA2)
    step = LR * (new_m / correction1) / ((new_v / correction2).sqrt() + EPS)
    p.copy_(torch.where(mask, p.float() - step, p.float()))
    m.copy_(torch.where(mask, new_m, m))
    v.copy_(torch.where(mask, new_v, v))


def torch_compile(x: Inputs) -> Callable[[], Any] | None:
    if x.case.shapes is UNET:  # some sixty shapes to compile
        return None
    bools = [m.unpack() for m in x.masks]
    first, second = ([torch.zeros(p.shape, device=x.device) for p in x.params] for _ in range(2))
    fused = compiled(_dense_step)
    steps = 0

    @torch.no_grad()
    def run() -> list[Tensor]:
        nonlocal steps
        steps += 1
        corrections = [torch.full((), 1 - b**steps, device=x.device) for b in (BETA1, BETA2)]
        for p, mask, m, v in zip(x.params, bools, first, second):
            fused(p.data, p.grad, mask, m, v, *corrections)
        return x.params

    return run


@torch.no_grad()
def expected(x: Inputs) -> list[Tensor]:
    """The first step from zero moments: both corrections cancel, and the step is lr g / (|g| + eps)."""
    out = []
    for p, mask in zip(x.params, x.masks):
        g = p.grad.float()
        step = LR * g / (g.abs() + EPS)
        out.append(torch.where(mask.unpack(), p.float() - step, p.float()))
    return out


@torch.no_grad()
def check(x: Inputs, output: Any, want: list[Tensor], slack: float = 0.0) -> str | None:
    # bf16 may round either way (stochastically, too): a place of the larger number. Frozen: every bit.
    places = 2**-7 if x.case.dtype == torch.bfloat16 else 2**-22
    for i, (got, w, mask) in enumerate(zip(output, want, x.masks)):
        off = (got - w).abs()
        if not bool((off <= places * w.abs() + 1e-7 + slack * LR).all()):
            return f"tensor {i} is {off.max().item():.3g} off"
        if bool(off.masked_fill_(mask.unpack(), 0).any()):
            return f"tensor {i}: a frozen entry moved"
    return None


def dense(x: Inputs, output: Any, want: list[Tensor]) -> str | None:
    """torch's optimisers keep moments and compute in the parameters' type: bf16 costs them percents of a step."""
    return check(x, output, want, slack=0.05 if x.case.dtype == torch.bfloat16 else 0.0)


def limit(x: Inputs, line: int) -> Limit:
    """Lines with an entry that moves: parameter read and written, gradient read; moments compact; the mask's bits."""
    item = x.case.dtype.itemsize
    lines = sum(touched_bytes(m.bits, m.cols, item, line) for m in x.masks)
    moving = sum(int(m.count()) for m in x.masks)
    return Limit("bytes", 3 * lines + 16 * moving + sum(m.bits.numel() for m in x.masks))


OP = Op(
    name="adamw",
    cases=CASES,
    make=make,
    mutated=lambda x: [*x.params, *grads(x)],
    expected=expected,
    check=check,
    limit=limit,
    providers=[
        *ours("masked_adamw_", mine),
        Provider(FUSED, _torch(fused=True), check=dense),
        Provider("masked gradient, foreach AdamW", _torch(foreach=True), check=dense, budget=0.7),
        Provider(
            "SalUn: masked gradient, fused AdamW, restore", _torch(restore=True, fused=True), check=dense, budget=0.7
        ),
        Provider("torch.compile, dense states", torch_compile, compiles=True),
    ],
    targets=[
        Target(FUSED, 0.18, "cpu", "1 %, Smol"),
        Target(FUSED, 0.35, "cpu", "5 %, Smol"),
        Target(FUSED, 0.65, "cpu", "50 %, Smol"),
        Target(FUSED, 0.25, "cuda", "5 %, S"),
        Target(FUSED, 0.8, "cuda", "50 %, S"),
        Target("limit", 1 / 0.8, "cuda"),
    ],
)
