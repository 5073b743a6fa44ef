"""nm_mask: n of m consecutive input columns. Peers: a topk of every group (as Wanda's code does), ranks by comparison, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.shapes import Shapes
from benchmarks.spec import COPY, Case, Inputs, Limit, Op, Provider, Target, compiled, copied, copy_of, equal, ours
from fastunlearn import BitMask, ops


def matrices(listed: Shapes) -> Shapes:
    """What is pruned: the linear layers of the decoder blocks."""
    return [(name, shape) for name, shape in listed if ".layers." in name and len(shape) == 2]


SMOL, LLAMA = matrices(shapes.smollm2_135m()), matrices(shapes.llama_31_8b_slice(1))
CASES = [
    Case("2:4, SmolLM2-135M", SMOL, options={"n": 2, "m": 4}, quick=True, gib=3),
    Case("4:8, SmolLM2-135M", SMOL, options={"n": 4, "m": 8}, gib=4),
    Case("2:4, a layer of Llama-3.1-8B", LLAMA, torch.bfloat16, {"n": 2, "m": 4}, gib=6),
    Case("8:16, a layer of Llama-3.1-8B", LLAMA, torch.bfloat16, {"n": 8, "m": 16}, gib=12),
    Case("16:32, a layer of Llama-3.1-8B", LLAMA, torch.bfloat16, {"n": 16, "m": 32}, gib=20),
    Case("8:16, SmolLM2-135M", SMOL, options={"n": 8, "m": 16}, gib=6),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    scores = [torch.randn(s, generator=generator, device=device).abs_().to(case.dtype) for _, s in case.shapes]
    return Inputs(scores=scores, n=case.options["n"], m=case.options["m"])


def ranked(s: Tensor, n: int, m: int) -> Tensor:
    """Kept: fewer than n of the group are higher, or as high and further left; the definition."""
    g = s.view(-1, m)
    rank = torch.zeros(g.shape, dtype=torch.int8, device=s.device)
    for j in range(m):
        other = g[:, j : j + 1]
        earlier = torch.arange(m, device=s.device) > j
        rank += (other > g) | ((other == g) & earlier)
    return (rank < n).view(s.shape)


def unrolled(s: Tensor, n: int, m: int) -> Tensor:
    """The same for a compiler: columns by name, so that it fuses everything into one pass."""
    columns, kept = s.view(-1, m).unbind(1), []
    for i, c in enumerate(columns):
        beats = [(o >= c if j < i else o > c).to(torch.int8) for j, o in enumerate(columns) if j != i]
        kept.append(sum(beats[1:], beats[0]) < n)
    return torch.stack(kept, 1).view(s.shape)


def mine(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.nm_mask(x.scores, x.n, x.m)


def one_by_one(x: Inputs) -> Callable[[], Any]:
    return lambda: [ops.nm_mask(s, x.n, x.m) for s in x.scores]


def moved(x: Inputs) -> int:
    return int(x.case.numel * (x.case.dtype.itemsize + 1 / 8))


def copy(x: Inputs) -> Callable[[], Any]:
    return copy_of(moved(x), x.device)


def group_topk(x: Inputs) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        out = []
        for s in x.scores:
            chosen = s.view(-1, x.m).topk(x.n, dim=1).indices
            out.append(torch.zeros(s.shape, dtype=torch.bool, device=s.device).view(-1, x.m).scatter_(1, chosen, True))
        return out

    return run


def torch_compile(x: Inputs) -> Callable[[], Any] | None:
    if x.m > 16:  # the compiler takes minutes over a thousand comparisons
        return None
    fused = compiled(unrolled)
    return lambda: [fused(s, x.n, x.m) for s in x.scores]


def unpacked(x: Inputs, output: Any, expected: Any) -> str | None:
    bools = [(m.unpack() if isinstance(m, BitMask) else m).view(s.shape) for m, s in zip(output, x.scores)]
    return equal(x, bools, expected)


def best_kept(x: Inputs, output: Any, expected: Any) -> str | None:
    """For peers that break ties anywhere: the same scores are kept."""
    for got, want, s in zip(output, expected, x.scores):
        groups = [torch.where(m.view(-1, x.m), s.view(-1, x.m), 0).sort(1).values for m in (got, want)]
        if not torch.equal(*groups):
            return "other scores are kept"
    return None


OP = Op(
    name="nm",
    cases=CASES,
    make=make,
    expected=lambda x: [ranked(s, x.n, x.m) for s in x.scores],
    check=unpacked,
    limit=lambda x, line: Limit("bytes", moved(x)),
    providers=[
        *ours("nm_mask", mine),
        Provider("fastunlearn-one-by-one", one_by_one, backend="auto"),
        Provider("torch.topk of groups", group_topk, check=best_kept, max_runs=5),
        Provider("torch.compile, ranks", torch_compile, compiles=True),
        Provider(COPY, copy, check=copied),
    ],
    targets=[Target(COPY, 1 / 0.80, "cpu"), Target(COPY, 1 / 0.85, "cuda")],
)
