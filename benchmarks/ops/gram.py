"""gram: the inner products of two (or more) lists of gradients, tensor by tensor.

Peers: a dot product of each pair in torch (in the gradients' own type, and in fp32 as the op sums), one matrix product a tensor.
Yardstick: one sum of every gradient, which reads as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.shapes import Shapes
from benchmarks.spec import COPY, FLOOR, Case, Inputs, Limit, Op, Provider, Target, compiled, copied, copy_of, ours
from fastunlearn import ops

READ = FLOOR + "one sum of every gradient"
SMOL, UNET, LLAMA = shapes.smollm2_135m(), shapes.sd14_unet(), shapes.llama_31_8b()


def lora(of: Shapes, rank: int) -> Shapes:
    """A and B of every linear layer of the decoder."""
    out: Shapes = []
    for name, shape in of:
        if len(shape) == 2 and ".layers." in name:
            out += [(name + ".A", (rank, shape[1])), (name + ".B", (shape[0], rank))]
    return out


CASES = [
    Case("2 groups, SmolLM2-135M", SMOL, options={"groups": 2}, quick=True, gib=3),
    Case("2 groups, SmolLM2-135M", SMOL, torch.bfloat16, {"groups": 2}, gib=3),
    Case("5 groups, SmolLM2-135M", SMOL, options={"groups": 5}, gib=5),
    Case("2 groups, LoRA of rank 8 on Llama-3.1-8B", lora(LLAMA, 8), options={"groups": 2}, gib=1),
    Case("2 groups, SD 1.4 U-Net", UNET, options={"groups": 2}, gib=14),
    Case("2 groups, Llama-3.1-8B", LLAMA, torch.bfloat16, {"groups": 2}, devices=("cuda",), gib=60),
]


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x = Inputs()
    x.groups = [
        [torch.randn(s, generator=generator, device=device).to(case.dtype) for _, s in case.shapes]
        for _ in range(case.options["groups"])
    ]
    return x


def pairwise(x: Inputs, dot: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    n = len(x.groups)
    out = []
    for tensors in zip(*x.groups):
        square: list[list[Any]] = [[None] * n for _ in range(n)]
        for i in range(n):
            for j in range(i + 1):
                square[i][j] = square[j][i] = dot(tensors[i], tensors[j])
        out.append(torch.stack([torch.stack(row) for row in square]))
    return torch.stack(out)


def exact(x: Inputs) -> Tensor:
    return pairwise(x, lambda a, b: (a.float() * b.float()).sum(dtype=torch.float64))


def check(x: Inputs, output: Any, expected: Tensor) -> str | None:
    # Against the norms: an inner product of two directions may be any small number.
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    worst = ((output.double() - expected).abs() / (norms[:, :, None] * norms[:, None, :])).max().item()
    return None if worst <= 1e-5 else f"{worst:.3g} off, in units of the norms"


def ungated(x: Inputs, output: Any, expected: Any) -> str | None:
    """A yardstick, or a peer whose sums are not good enough to be used."""
    return None


def mine(x: Inputs) -> Callable[[], Any]:
    return lambda: ops.gram(x.groups)


def eager(x: Inputs) -> Callable[[], Any]:
    return lambda: pairwise(x, lambda a, b: torch.dot(a.flatten().float(), b.flatten().float()))


def own_type(x: Inputs) -> Callable[[], Any] | None:
    if x.case.dtype == torch.float32:
        return None
    return lambda: pairwise(x, lambda a, b: torch.dot(a.flatten(), b.flatten()))


def matrix(x: Inputs) -> Callable[[], Any]:
    def run() -> Tensor:
        out = []
        for tensors in zip(*x.groups):
            rows = torch.stack([t.flatten().float() for t in tensors])
            out.append(rows @ rows.T)
        return torch.stack(out)

    return run


def _three(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.float(), b.float()
    rr, rf, ff = (a * a).sum(), (a * b).sum(), (b * b).sum()
    return torch.stack([torch.stack([rr, rf]), torch.stack([rf, ff])])


def torch_compile(x: Inputs) -> Callable[[], Any] | None:
    if len(x.groups) != 2 or x.case.shapes == UNET:  # some sixty shapes to compile
        return None
    fused = compiled(_three)
    return lambda: torch.stack([fused(a, b) for a, b in zip(*x.groups)])


def read(x: Inputs) -> Callable[[], Any]:
    return lambda: [t.sum() for group in x.groups for t in group]


def moved(x: Inputs) -> int:
    return x.case.numel * x.case.dtype.itemsize * len(x.groups)


OP = Op(
    name="gram",
    cases=CASES,
    make=make,
    expected=exact,
    check=check,
    limit=lambda x, line: Limit("bytes", moved(x)),
    providers=[
        *ours("gram", mine),
        # Sums in fp32 or less over 1e7 entries are wrong in the fourth digit: timed all the same, as the most that they could be.
        Provider("torch dot, fp32 sums", eager, check=ungated),
        Provider("torch dot, own type", own_type, check=ungated),
        Provider("torch matmul of the stacked, fp32 sums", matrix, check=ungated),
        Provider("torch.compile, fp32 sums", torch_compile, check=ungated, compiles=True),
        Provider(READ, read, check=ungated),
        Provider(COPY, lambda x: copy_of(moved(x), x.device), check=copied),
    ],
    targets=[
        Target(COPY, 1 / 0.80, "cpu", "2 groups, S"),
        Target("limit", 1.15, "cuda", "2 groups, Llama-3.1-8B"),
    ],
)
