"""token_moments: second moments of the text of many concepts, in float64.

Peers: the sum of outer products as UCE's code takes it, one token after another (TOKENS of them), and one product in float32, whose
error is the reason for float64. Random features at the real widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.spec import FLOOR, Case, Inputs, Limit, Op, Provider, Target, close, ours
from fastunlearn import ops

TOKENS = 256
ONE_BY_ONE = f"{FLOOR}{TOKENS} tokens, one by one"
SINGLE = "one product in float32"

CASES = [
    Case("SD 1.5, 50 concepts of 75 tokens", [("c", (50 * 75, 768))], quick=True, gib=1),
    Case("SD 1.5, 1000 concepts of 75 tokens", [("c", (1000 * 75, 768))], gib=3),
    Case("SDXL, 1000 concepts of 75 tokens", [("c", (1000 * 75, 2048))], devices=("cuda",), gib=6),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    tokens, d = case.shapes[0][1]
    return Inputs(c=torch.randn(tokens, d, generator=generator, device=device), tokens=tokens, d=d)


def mine(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.token_moments(x.c)


def one_by_one(x: Inputs) -> Callable[[], Any]:
    def run() -> Any:
        out = torch.zeros(x.d, x.d, dtype=torch.float64, device=x.device)
        for row in x.c[:TOKENS].double():
            out += torch.outer(row, row)
        return out

    return run


def first(x: Inputs, output: Any, expected: Any) -> str | None:
    return close(1e-12, 0)(x, output, ops.token_moments(x.c[:TOKENS]))


OP = Op(
    name="moments",
    cases=CASES,
    make=make,
    expected=lambda x: x.c.double().T @ x.c.double(),
    check=close(1e-6, 0),
    limit=lambda x, line: Limit("flops", {torch.float64: 2 * x.tokens * x.d**2}),
    providers=[
        *ours("token_moments", mine),
        Provider(SINGLE, lambda x: lambda: x.c.T @ x.c, check=close(1e-4, 0)),
        Provider(ONE_BY_ONE, one_by_one, check=first),
    ],
    targets=[Target(SINGLE, 4.0, "cpu"), Target(SINGLE, 2.0, "cuda")],
)
