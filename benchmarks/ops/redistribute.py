"""redistribution: SAU's factors for the survivors of a pruned model.

Peers: the same maths in torch, and compiled. Yardstick: a copy that moves as many bytes as the op does: importance and bits twice
(the factors are normalised by a number that is only known when all have been seen), the factors once. A tensor that stays in the
cache between the two reads comes from memory once, and the copy is then too slow a yardstick: SmolLM2's tensors are held to the
limit, which counts every input once, as well. Llama's are too large for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.ops.nm import LLAMA, SMOL
from benchmarks.spec import COPY, Case, Inputs, Limit, Op, Provider, Target, close, compiled, copied, copy_of, ours
from fastunlearn import BitMask, ops

HALF = shapes.llama_31_8b_slice(16)
CASES = [
    Case("SmolLM2-135M", SMOL, options={"density": 0.5}, quick=True, gib=5),
    Case("a tenth left, SmolLM2-135M", SMOL, options={"density": 0.1}, gib=4),
    Case("a layer of Llama-3.1-8B", LLAMA, torch.bfloat16, {"density": 0.5}, gib=8),
    Case("half of Llama-3.1-8B", [s for s in HALF if len(s[1]) == 2], torch.bfloat16, {"density": 0.5}, devices=("cuda",), gib=60),
]  # fmt: skip


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x = Inputs(importance=[], may=[])
    for _, shape in case.shapes:
        x.importance.append(torch.randn(shape, generator=generator, device=device).square_().to(case.dtype))
        x.may.append(torch.rand(shape, generator=generator, device=device) < case.options["density"])
    x.masks = [BitMask.pack(m) for m in x.may]
    x.survivors = sum(int(m.sum()) for m in x.may)
    x.out = [torch.zeros(int(m.sum()), device=device) for m in x.may]
    return x


def plain(importance: Tensor, may: Tensor, beta: float = 1.0, clip: float = 5.0) -> Tensor:
    x = importance.float()
    kept_only = x * may
    kept = kept_only.sum(1)
    scale = beta * (x.sum(1) - kept) / kept * (may.sum(1) / kept)
    factors = (1 + scale[:, None] * x).clamp_(max=clip)
    rms = ((factors * may).square().sum() / may.sum()).sqrt()
    return (factors / rms)[may]


def dense(importance: Tensor, may: Tensor, beta: float = 1.0, clip: float = 5.0) -> Tensor:
    """The same, left in the tensor's shape, 0 where pruned: what a compiler can fuse."""
    x = importance.float()
    kept_only = torch.where(may, x, 0.0)
    kept = kept_only.sum(1)
    scale = beta * (x.sum(1) - kept) / kept * (may.sum(1) / kept)
    factors = torch.where(may, (1 + scale[:, None] * x).clamp(max=clip), 0.0)
    return factors * (factors.square().sum() / may.sum()).rsqrt()


def eager(x: Inputs) -> Callable[[], Any]:
    return lambda: [plain(t, m) for t, m in zip(x.importance, x.may)]


def torch_compile(x: Inputs) -> Callable[[], Any]:
    fused = compiled(dense)
    return lambda: [fused(t, m) for t, m in zip(x.importance, x.may)]


def picked(x: Inputs, output: Any, expected: Any) -> str | None:
    return close(1e-5, 1e-5)(x, [f[m] for f, m in zip(output, x.may)], expected)


def mine(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.redistribution(x.importance, x.masks, out=x.out)


def fresh(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.redistribution(x.importance, x.masks)


def moved(x: Inputs, reads: int) -> int:
    bits = sum(m.bits.numel() for m in x.masks)
    return reads * (x.case.numel * x.case.dtype.itemsize + bits) + 4 * x.survivors


def copy(x: Inputs) -> Callable[[], Any]:
    return copy_of(moved(x, reads=2), x.device)


OP = Op(
    name="redistribute",
    cases=CASES,
    make=make,
    mutated=lambda x: x.out,
    expected=lambda x: [plain(t, m) for t, m in zip(x.importance, x.may)],
    check=close(1e-5, 1e-5),
    limit=lambda x, line: Limit("bytes", moved(x, reads=1)),
    providers=[
        *ours("redistribution", mine),
        Provider("fastunlearn-allocating", fresh, backend="auto"),
        Provider("torch eager", eager),
        Provider("torch.compile, dense results", torch_compile, check=picked, compiles=True),
        Provider(COPY, copy, check=copied),
    ],
    targets=[
        Target(COPY, 1 / 0.80, "cpu"),
        Target("limit", 1 / 0.80, "cpu", "SmolLM2"),
        Target(COPY, 1 / 0.85, "cuda"),
        Target("limit", 1 / 0.85, "cuda", "SmolLM2"),
    ],
)
