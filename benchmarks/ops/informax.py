"""informax: mutual information of all rows of all cross-attention projections with every concept, five samples of each kind.

Peers: the same maths in torch, and compiled. Yardstick: ROWS rows of the loop of the authors' code (row by row, one concept). Random
weights at the real shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.spectral import SD, XL
from benchmarks.spec import FLOOR, Case, Inputs, Limit, Op, Provider, Target, compiled, ours
from fastunlearn import ops

SAMPLES = 5
ROWS = 256
OFFICIAL = f"{FLOOR}{ROWS} rows and one concept, one by one"

CASES = [
    Case("SD 1.5, 50 concepts", SD, options={"concepts": 50}, quick=True, gib=2),
    Case("SD 1.5, 1000 concepts", SD, options={"concepts": 1000}, devices=("cuda",), gib=8),
    Case("SDXL, 1000 concepts", XL, options={"concepts": 1000}, devices=("cuda",), gib=40),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    d, m = case.shapes[0][1][1], case.options["concepts"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = Inputs(weights=[normal(*shape) * d**-0.5 for _, shape in case.shapes], rows=sum(s[0] for _, s in case.shapes))
    x.d = d
    # Near one another: every count occurs.
    x.positives = 0.3 * normal(m, 1, d) + normal(m, SAMPLES, d)
    x.negatives = normal(1, SAMPLES, d)
    return x


def mine(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.informax(x.weights, x.positives, x.negatives)


def _counted(weights: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Mutual information by the four joint frequencies, a tensor operation each, as the code has them."""
    m, n, d = positives.shape
    samples = torch.cat([positives, negatives.expand(m, -1, -1)], 1).reshape(-1, d)
    a = (weights @ samples.T).view(-1, m, 2 * n)
    z = a > a.median(-1, keepdim=True).values
    y = torch.arange(2 * n, device=a.device) < n
    total = torch.zeros_like(a[..., 0])
    for zz in (z, ~z):
        for yy in (y, ~y):
            joint = (zz & yy).float().mean(-1)
            total += joint * (joint.clamp_min(1e-30) / (zz.float().mean(-1) * yy.float().mean())).log()
    return total.amax(1)


def eager(x: Inputs) -> Callable[[], Any]:
    return lambda: _counted(torch.cat(x.weights), x.positives, x.negatives)


def torch_compile(x: Inputs) -> Callable[[], Any]:
    fused = compiled(_counted)
    return lambda: fused(torch.cat(x.weights), x.positives, x.negatives)


def one_by_one(x: Inputs) -> Callable[[], Any]:
    rows = torch.cat(x.weights)[:: x.rows // ROWS][:ROWS]
    return lambda: torch.cat([_counted(row[None], x.positives[:1], x.negatives) for row in rows])


def finite(x: Inputs, output: Any, expected: Any) -> str | None:
    good = output.shape == (ROWS,) and bool(((output >= -1e-6) & (output <= math.log(2) + 1e-6)).all())
    return None if good else "no mutual information"


OP = Op(
    name="informax",
    cases=CASES,
    make=make,
    expected=lambda x: _counted(torch.cat(x.weights), x.positives, x.negatives),
    # Near ties of the median fall either way in another order of summation: of the largest over many concepts little is seen.
    check=lambda x, output, expected: None if (output - expected).abs().gt(1e-5).float().mean() < 1e-3 else "differs",
    limit=lambda x, line: Limit(
        "flops", {torch.float32: 2 * x.rows * x.d * (x.positives.shape[0] * SAMPLES + SAMPLES)}
    ),
    providers=[
        *ours("informax", mine, reference=True),
        Provider("torch eager", eager),
        Provider("torch.compile", torch_compile, compiles=True, devices=("cuda",)),
        Provider(OFFICIAL, one_by_one, check=finite),
    ],
    targets=[Target("torch eager", 1.0, "cpu"), Target("torch eager", 0.5, "cuda")],
)
