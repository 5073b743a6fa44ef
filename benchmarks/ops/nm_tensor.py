"""nm_compress, to_dense, gather of gradients. Peers: masked_select and a masked assignment, an index made once, torch.compile, a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.nm import LLAMA, SMOL
from benchmarks.spec import COPY, FLOOR, Case, Inputs, Limit, Op, Provider, Target, copied, copy_of, equal, ours
from fastunlearn import ops

WORKS = ("compress", "expand", "gather")
CASES = [
    Case(f"{work}, {n}:{m}, {model}", listed, dtype, {"work": work, "n": n, "m": m}, quick=quick, gib=gib)
    for work in WORKS
    for n, m, model, listed, dtype, quick, gib in [
        (2, 4, "SmolLM2-135M", SMOL, torch.float32, work == "expand", 5),
        (2, 4, "a layer of Llama-3.1-8B", LLAMA, torch.bfloat16, False, 6),
        (8, 16, "a layer of Llama-3.1-8B", LLAMA, torch.bfloat16, False, 6),
    ]
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    n, m = case.options["n"], case.options["m"]
    weights = [torch.randn(s, generator=generator, device=device).to(case.dtype) for _, s in case.shapes]
    masks = ops.nm_mask([w.abs() for w in weights], n, m)
    tensors = [ops.nm_compress(w, mask, n, m) for w, mask in zip(weights, masks)]
    return Inputs(weights=weights, masks=masks, bools=[mask.unpack() for mask in masks], tensors=tensors, n=n, m=m)


def _expands(x: Inputs) -> bool:
    return x.case.options["work"] == "expand"


def expected(x: Inputs) -> list[Tensor]:
    if _expands(x):
        return [torch.where(b, w, 0.0) for w, b in zip(x.weights, x.bools)]
    return [w[b].view(w.shape[0], -1) for w, b in zip(x.weights, x.bools)]


def mine(x: Inputs) -> Callable[[], Any]:
    return {
        "compress": lambda: [ops.nm_compress(w, b, x.n, x.m).values for w, b in zip(x.weights, x.masks)],
        "expand": lambda: [t.to_dense() for t in x.tensors],
        "gather": lambda: [t.gather(w) for t, w in zip(x.tensors, x.weights)],
    }[x.case.options["work"]]


def masked(x: Inputs) -> Callable[[], Any]:
    """By a mask of one byte an entry."""
    if _expands(x):
        return lambda: [
            torch.zeros_like(w).masked_scatter_(b, t.values) for w, b, t in zip(x.weights, x.bools, x.tensors)
        ]
    return lambda: [w.masked_select(b).view(w.shape[0], -1) for w, b in zip(x.weights, x.bools)]


def indexed(x: Inputs) -> Callable[[], Any]:
    """By the column of every value, made once: eight bytes for each."""
    columns = [b.nonzero()[:, 1].view(b.shape[0], -1) for b in x.bools]
    if _expands(x):
        return lambda: [torch.zeros_like(w).scatter_(1, c, t.values) for w, c, t in zip(x.weights, columns, x.tensors)]
    return lambda: [w.gather(1, c) for w, c in zip(x.weights, columns)]


def renewed(x: Inputs) -> Callable[[], Any]:
    """What is returned, copied into memory that nobody has touched: what a result of that size costs without any work."""
    made = [t.to_dense() for t in x.tensors] if _expands(x) else [t.values for t in x.tensors]
    return lambda: [t.clone() for t in made]


def moved(x: Inputs) -> int:
    return int(x.case.numel * (x.case.dtype.itemsize * (1 + x.n / x.m) + 1 / 8))


OP = Op(
    name="nm_tensor",
    cases=CASES,
    make=make,
    expected=expected,
    check=equal,
    limit=lambda x, line: Limit("bytes", moved(x)),
    providers=[
        *ours("nm_compress", mine),
        Provider("torch, a mask of bytes", masked, max_runs=10),
        Provider("torch, columns of 64 bits", indexed, max_runs=10),
        Provider(FLOOR + "copy of the result into new memory", renewed),
        Provider(COPY, lambda x: copy_of(moved(x), x.device), check=copied),
    ],
    targets=[Target(COPY, 1 / 0.60, "cpu"), Target(COPY, 1 / 0.85, "cuda")],
)
