"""topk_mask: exact selection over all tensors of a model at once.

Peers: torch.kthvalue and numpy's partition (threshold, then compare), torch.topk, and SalUn's two argsorts (a rank for every
score, then rank < k). Yardstick: the sum of the scores, which is one read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.spec import FLOOR, Case, Inputs, Limit, Op, Provider, Target, ours
from fastunlearn import BitMask, ops

SMOL, UNET, XL = shapes.smollm2_135m(), shapes.sd14_unet(), shapes.sdxl_unet()
LLAMA = shapes.llama_31_8b()
SUM = FLOOR + "torch.sum of the scores"
MIXED = [0.01, 0.05, 0.5]

CASES = [
    Case("global, 5 %, SmolLM2-135M", SMOL, options={"density": 0.05}, quick=True, gib=9),
    Case("global, 50 %, SmolLM2-135M", SMOL, options={"density": 0.5}, gib=9),
    Case("global, 1, 5 and 50 %, SmolLM2-135M", SMOL, options={"density": MIXED}, gib=3),
    Case("global, 5 %, many ties, SmolLM2-135M", SMOL, options={"density": 0.05, "ties": True}, gib=9),
    Case("per row, 50 %, SmolLM2-135M", SMOL, options={"density": 0.5, "scope": "row"}, gib=4),
    Case("global, 5 %, SD 1.4 U-Net", UNET, options={"density": 0.05}, gib=8),
    Case("global, 50 %, SDXL U-Net", XL, options={"density": 0.5}, devices=("cuda",), gib=40),
    Case("global, 5 %, Llama-3.1-8B", LLAMA, options={"density": 0.05}, devices=("cuda",), gib=60),
]


def make(case: Case, device: torch.device) -> Inputs:
    """Scores as accumulated gradients are: half-normal, another scale for every tensor; one buffer behind all."""
    generator = torch.Generator(device).manual_seed(0)
    flat = torch.empty(case.numel, device=device)
    scores, at = [], 0
    for _, shape in case.shapes:
        size = torch.Size(shape).numel()
        part = flat[at : at + size].view(shape)
        scale = torch.empty((), device=device).log_normal_(-6, 1, generator=generator)
        part.normal_(generator=generator).abs_().mul_(scale)
        scores.append(part)
        at += size
    if case.options.get("ties"):
        flat.copy_(torch.ceil(flat.mul_(64 / flat.mean())).clamp_(max=255))
    return Inputs(flat=flat, scores=scores, density=case.options["density"], scope=case.options.get("scope", "global"))


def k_of(x: Inputs) -> int:
    return int(x.density * x.case.numel)


def whole(x: Inputs) -> bool:
    """Peers select globally at one density; on a CPU only where they end within a minute."""
    few = x.device.type == "cuda" or x.case.numel < 2e8
    return x.scope == "global" and isinstance(x.density, float) and few


def mine(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.topk_mask(x.scores, density=x.density, scope=x.scope)


def one_by_one(x: Inputs) -> Callable[[], Any] | None:
    if not isinstance(x.density, list):
        return None
    return lambda: [ops.topk_mask(x.scores, density=d, scope=x.scope) for d in x.density]


def compare_with(x: Inputs, value: Tensor | float) -> list[Tensor]:
    return [s >= value for s in x.scores]


def flattened(x: Inputs) -> Tensor:
    return torch.cat([s.flatten() for s in x.scores])


def kthvalue(x: Inputs) -> Callable[[], Any] | None:
    if not whole(x) or x.case.numel >= 2**31:
        return None
    return lambda: compare_with(x, torch.kthvalue(flattened(x), x.case.numel - k_of(x) + 1).values)


def partition(x: Inputs) -> Callable[[], Any] | None:
    if not whole(x):
        return None
    at = x.case.numel - k_of(x)
    return lambda: compare_with(x, float(np.partition(flattened(x).numpy(), at)[at]))


def from_flat(x: Inputs, chosen: Tensor) -> list[Tensor]:
    sizes = [s.numel() for s in x.scores]
    return [part.view(s.shape) for part, s in zip(chosen.split(sizes), x.scores)]


def topk(x: Inputs) -> Callable[[], Any] | None:
    if not whole(x) or x.case.numel >= 2**31:
        return None

    def run() -> list[Tensor]:
        flat = flattened(x)
        chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
        chosen[flat.topk(k_of(x), sorted=False).indices] = True
        return from_flat(x, chosen)

    return run


def argsorts(x: Inputs) -> Callable[[], Any] | None:
    once = x.density == 0.05 and not x.case.options.get("ties")  # half a minute on a CPU, whatever the density
    if not whole(x) or not once or x.case.numel >= 2**30:
        return None

    def run() -> list[Tensor]:
        ranks = torch.argsort(torch.argsort(flattened(x).neg_()))
        return from_flat(x, ranks < k_of(x))

    return run


def per_row_topk(x: Inputs) -> Callable[[], Any] | None:
    if x.scope != "row":
        return None

    def run() -> list[Tensor]:
        out = []
        for s in x.scores:
            rows = s.view(s.shape[0] if s.dim() > 1 else 1, -1)
            chosen = rows.topk(int(x.density * rows.shape[1]), dim=1, sorted=False).indices
            out.append(
                torch.zeros(rows.shape, dtype=torch.bool, device=s.device).scatter_(1, chosen, True).view(s.shape)
            )
        return out

    return run


def verdict(scores: list[Tensor], masks: list[Tensor], k: int, exact: bool) -> str | None:
    """The definition itself: k set, none below one that is not, ties by position; peers by threshold may add ties."""
    low = min(torch.where(m, s, torch.inf).min().item() for s, m in zip(scores, masks))
    high = max(torch.where(m, -torch.inf, s).max().item() for s, m in zip(scores, masks))
    if low < high:
        return f"{low} was chosen, {high} was not"
    count = sum(int(m.sum()) for m in masks)
    ties = sum(int((s == low).sum()) for s in scores)
    if not exact:
        return None if abs(count - k) < ties else f"{count} chosen, want {k} and at most {ties} ties"
    if count != k:
        return f"{count} chosen, want {k}"
    ended = False
    for s, m in zip(scores, masks):
        tied = m[s == low]
        taken = int(tied.sum())
        if (ended and taken) or not bool(tied[:taken].all()):
            return "ties are not taken in order"
        ended |= taken < tied.numel()
    return None


def check(x: Inputs, output: Any, _: Any, exact: bool = True) -> str | None:
    for density, listed in zip(x.density, output) if isinstance(x.density, list) else [(x.density, output)]:
        masks = [m.unpack() if isinstance(m, BitMask) else m for m in listed]
        if x.scope == "global":
            wrong = verdict(x.scores, masks, int(density * x.case.numel), exact)
            if wrong:
                return wrong
        else:
            for s, m in zip(x.scores, masks):
                rows = s.view(s.shape[0] if s.dim() > 1 else 1, -1)
                chosen = m.view(rows.shape)
                k = int(density * rows.shape[1])
                if not bool((chosen.sum(1) == k).all()):
                    return "a row has another count"
                low = torch.where(chosen, rows, torch.inf).amin(1)
                high = torch.where(chosen, -torch.inf, rows).amax(1)
                if bool((low < high).any()):
                    return "a row keeps a lower score than one it drops"
    return None


def by_threshold(x: Inputs, output: Any, expected: Any) -> str | None:
    return check(x, output, expected, exact=False)


def summed(x: Inputs, output: Tensor, _: Any) -> str | None:
    want = sum(s.sum(dtype=torch.float64).item() for s in x.scores)
    return None if abs(output.item() - want) <= 1e-3 * want else f"{output.item()}, want {want}"


OP = Op(
    name="topk",
    cases=CASES,
    make=make,
    expected=lambda x: None,
    check=check,
    limit=lambda x, line: Limit(
        "bytes", x.case.numel * 4 + x.case.numel / 8 * (len(x.density) if isinstance(x.density, list) else 1)
    ),
    providers=[
        *ours("topk_mask", mine),
        Provider("fastunlearn-one-by-one", one_by_one, backend="auto"),
        Provider("torch.kthvalue, compare", kthvalue, check=by_threshold, max_runs=3),
        Provider("numpy partition, compare", partition, devices=("cpu",), check=by_threshold, max_runs=3),
        Provider("torch.topk", topk, check=by_threshold, max_runs=3),
        Provider("SalUn: two argsorts", argsorts, check=by_threshold, max_runs=3),
        Provider("torch.topk, row by row", per_row_topk, check=by_threshold, max_runs=5),
        Provider(SUM, lambda x: x.flat.sum, check=summed),
    ],
    targets=[
        Target(SUM, 2.0, "cpu", "global, 5"),
        Target("torch.kthvalue, compare", 1 / 40, "cpu", "%, SmolLM2"),
        Target("numpy partition, compare", 1 / 8, "cpu", "%, SmolLM2"),
        Target("SalUn: two argsorts", 1 / 200, "cpu", "global, 5 %, SmolLM2"),
        Target("limit", 1.5, "cuda", "global, 5"),
        Target("torch.kthvalue, compare", 1 / 3, "cuda", "global, 5"),
        Target("", 0.02, "cpu", "global, 5", kind="workspace"),
        Target("", 0.02, "cuda", "global, 5", kind="workspace"),
    ],
)
