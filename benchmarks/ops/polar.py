"""polar: the turns between old and edited projections, W_0^T W on its thin core (arXiv 2601.06162, eq. 5 and its step back).

Peer: the factor by torch's singular value decomposition, which is also the check. Random weights at SD 1.5's shapes, a few
projections of each height.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target, close, ours
from fastunlearn import ops

SVD = "singular value decomposition"

CASES = [
    Case("2 of 320 rows", [("w", (2, 320, 320))], quick=True, gib=1),
    Case("2 of 768", [("w", (2, 768, 768))], gib=1),
    Case("SD 1.5: 12 of 768", [("w", (12, 768, 768))], devices=("cuda",), gib=2),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shape = case.shapes[0][1]
    old = torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5
    # Moved a little: singular values of the product from 1e-3 on are left far above rounding by a share of the identity.
    new = old + 0.3 * torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5
    eye = 0.3 * torch.eye(shape[-1], device=device)
    return Inputs(M=old.mT @ new + eye, batch=shape[0], d=shape[-1])


def mine(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.polar(x.M)


def by_svd(M: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(M)
    return U @ Vh


OP = Op(
    name="polar",
    cases=CASES,
    make=make,
    expected=lambda x: by_svd(x.M.double()).float(),
    check=close(1e-3, 1e-3),
    # Nine steps of three products.
    limit=lambda x, line: Limit("flops", {torch.float32: 9 * 3 * 2 * x.batch * x.d**3}),
    providers=[*ours("polar", mine), Provider(SVD, lambda x: lambda: by_svd(x.M))],
    targets=[Target(SVD, 1.0, "cpu"), Target(SVD, 0.2, "cuda")],
)
