"""masked_lora_linear: a frozen layer with a masked adapter, forward and backward, and the forward pass of a few tokens.

Peers: PEFT's layer (no mask: four products, and the yardstick of memory), the eager masked way of SparsePEFT and LoRS, which keeps
W + s (B A) o M and what it is made of for the backward pass, the same compiled, and W_eff beside cuBLAS in plain torch without keeping
it. Floor: the three products of a linear layer alone. The limit of a training step is three products' operations; of the forward
pass of a few tokens the bytes of W and M.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.spec import FLOOR, Case, Inputs, Limit, Op, Provider, Target, compiled, ours
from fastunlearn import BitMask, ops

PRODUCTS = FLOOR + "three products"
#: One layer of each kind, [out, in], from the published configurations.
LAYERS = {
    "SD 1.5 attention": (1280, 1280),
    "SD 1.5 feed-forward": (10240, 1280),
    "SDXL attention": (1280, 1280),
    "SDXL feed-forward": (10240, 1280),
    "SDXL text keys": (1280, 2048),
    "Llama-3.1-8B attention": (4096, 4096),
    "Llama-3.1-8B gate": (14336, 4096),
    "Llama-3.1-8B down": (4096, 14336),
}


def _case(layer: str, tokens: int, rank: int, *, train: bool = True, mask: str = "bits", **kwargs: Any) -> Case:
    shape = LAYERS[layer]
    kind = "step" if train else "forward"
    if mask == "blocks":
        kind += ", a quarter of the blocks"
    dtype = kwargs.pop("dtype", torch.bfloat16)
    options = {"tokens": tokens, "rank": rank, "train": train, "mask": mask}
    name = f"{kind}, {layer}, T {tokens}, r {rank}"
    work = (math.prod(shape) * 12 + tokens * sum(shape) * 6) * dtype.itemsize
    return Case(name, [("weight", shape)], dtype, options, gib=work / 2**30 + 0.5, **kwargs)


GPU = ("cuda",)
CASES = [
    *(
        _case(layer, tokens, rank, devices=GPU)
        for layer in ("SD 1.5 feed-forward", "Llama-3.1-8B attention", "Llama-3.1-8B gate", "Llama-3.1-8B down")
        for tokens in (4096, 8192)
        for rank in (4, 16, 64)
    ),
    _case("SDXL attention", 4096, 16, devices=GPU),
    _case("SDXL text keys", 77 * 4, 16, devices=GPU),
    _case("Llama-3.1-8B attention", 4096, 16, mask="blocks", devices=GPU),
    *(
        _case(layer, tokens, rank, train=False, devices=GPU)
        for layer in ("Llama-3.1-8B attention", "Llama-3.1-8B gate")
        for tokens in (1, 8, 32)
        for rank in (4, 16, 64)
    ),
    _case("SD 1.5 attention", 256, 4, dtype=torch.float32, devices=("cpu",), quick=True),
    _case("SD 1.5 attention", 77, 4, dtype=torch.float32, devices=("cpu",), quick=True),
    _case("SD 1.5 feed-forward", 256, 16, dtype=torch.float32, devices=("cpu",)),
    _case("SD 1.5 attention", 1024, 16, dtype=torch.float32, devices=("cpu",)),
    _case("Llama-3.1-8B attention", 64, 16, dtype=torch.float32, devices=("cpu",)),
    _case("Llama-3.1-8B attention", 8, 16, dtype=torch.float32, devices=("cpu",)),
    _case("Llama-3.1-8B attention", 8, 16, train=False, dtype=torch.float32, devices=("cpu",)),
    _case("SD 1.5 feed-forward", 256, 16, mask="blocks", dtype=torch.float32, devices=("cpu",)),
]
SCALE, BLOCK = 0.5, 128


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    (_, (out, cols)), (tokens, rank) = case.shapes[0], (case.options["tokens"], case.options["rank"])

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(case.dtype)

    x = Inputs(weight=random(out, cols, scale=cols**-0.5), x=random(tokens, cols), grad=random(tokens, out))
    x.A, x.B = random(rank, cols, scale=cols**-0.5), random(out, rank)
    if case.options["mask"] == "blocks":
        x.mask = torch.rand(-(-out // BLOCK), -(-cols // BLOCK), generator=generator, device=device) < 0.25
        x.dense = x.mask.repeat_interleave(BLOCK, 0)[:out].repeat_interleave(BLOCK, 1)[:, :cols].to(case.dtype)
    else:
        may = torch.rand(out, cols, generator=generator, device=device) < 0.5
        x.mask, x.dense = BitMask.pack(may), may.to(case.dtype)
    x.train = case.options["train"]
    for t in (x.x, x.A, x.B):
        t.requires_grad_(x.train)
    return x


def step(x: Inputs, layer: Callable[[Inputs], Tensor]) -> Callable[[], Any]:
    """The forward pass, and for a training step the gradients of the input and the factors."""
    if not x.train:
        return torch.no_grad()(lambda: [layer(x)])

    def run() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x.x, x.A, x.B), x.grad)]

    return run


def mine(x: Inputs) -> Callable[[], Any]:
    return step(x, lambda x: ops.masked_lora_linear(x.x, x.weight, x.A, x.B, x.mask, SCALE, block=BLOCK))


def eager_masked(x: Inputs) -> Callable[[], Any]:
    return step(x, lambda x: F.linear(x.x, x.weight + SCALE * (x.B @ x.A) * x.dense))


def _masked(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    return F.linear(x, weight + SCALE * (B @ A) * mask)


def torch_compile(x: Inputs) -> Callable[[], Any]:
    fused = compiled(_masked)
    return step(x, lambda x: fused(x.x, x.weight, x.A, x.B, x.dense))


def peft(x: Inputs) -> Callable[[], Any]:
    return step(x, lambda x: F.linear(x.x, x.weight) + F.linear(F.linear(x.x, x.A), x.B) * SCALE)


class _Rebuilt(torch.autograd.Function):
    """W_eff in plain torch, made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, A, B, mask)
        return F.linear(x, torch.addmm(weight, B, A, alpha=SCALE).sub_(weight).mul_(mask).add_(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, A, B, mask = ctx.saved_tensors
        dx = grad @ torch.addmm(weight, B, A, alpha=SCALE).sub_(weight).mul_(mask).add_(weight)
        G = (grad.T @ x).mul_(mask)
        return dx, None, (B.T @ G) * SCALE, (G @ A.T) * SCALE, None


def rebuilt(x: Inputs) -> Callable[[], Any]:
    return step(x, lambda x: _Rebuilt.apply(x.x, x.weight, x.A, x.B, x.dense))


def products(x: Inputs) -> Callable[[], Any] | None:
    if not x.train:
        return None
    return lambda: [F.linear(x.x.detach(), x.weight), x.grad @ x.weight, x.grad.T @ x.x.detach()]


def expected(x: Inputs) -> list[Tensor]:
    """In the definition's own words and in fp32."""
    xs, grad, A, B, w = (t.detach().float() for t in (x.x, x.grad, x.A, x.B, x.weight))
    dense = x.dense.float()
    effective = w + SCALE * (B @ A) * dense
    if not x.train:
        return [xs @ effective.T]
    G = grad.T @ xs * dense
    return [xs @ effective.T, grad @ effective, SCALE * B.T @ G, SCALE * G @ A.T]


def close_enough(x: Inputs, output: Any, wanted: Any) -> str | None:
    tolerance = 1e-4 if x.case.dtype == torch.float32 else 3e-2
    for i, (got, want) in enumerate(zip(output, wanted, strict=True)):
        off = ((got.float() - want).norm() / want.norm()).item()
        if not off <= tolerance:
            return f"output {i} is {off:.3g} off"
    return None


def unmasked(x: Inputs, output: Any, wanted: Any) -> str | None:
    """An ordinary adapter computes something else: only its shapes are looked at."""
    return None if [t.shape for t in output] == [t.shape for t in wanted] else "other shapes"


def floor_shapes(x: Inputs, output: Any, wanted: Any) -> str | None:
    return None if output[0].shape == wanted[0].shape else "other shapes"


def limit(x: Inputs, line: int) -> Limit:
    (out, cols), tokens = x.weight.shape, x.x.shape[0]
    if x.train:
        return Limit("flops", 6 * tokens * out * cols)
    mask = x.mask.bits.numel() if isinstance(x.mask, BitMask) else x.mask.numel()
    return Limit("bytes", out * cols * x.case.dtype.itemsize + mask + tokens * (out + cols) * x.case.dtype.itemsize)


EAGER = "eager masked (SparsePEFT, LoRS)"
OP = Op(
    name="masked_lora",
    cases=CASES,
    make=make,
    expected=expected,
    check=close_enough,
    limit=limit,
    providers=[
        *ours("masked_lora_linear", mine, reference=True),
        Provider(EAGER, eager_masked),
        Provider("torch.compile of it", torch_compile, compiles=True),
        Provider("W_eff and matmul, plain torch", rebuilt),
        Provider("PEFT, no mask", peft, check=unmasked),
        Provider(PRODUCTS, products, check=floor_shapes),
    ],
    targets=[
        Target(PRODUCTS, 1.15, "cuda", "T 4096"),
        Target(PRODUCTS, 1.08, "cuda", "T 8192"),
        *(Target("limit", ratio, "cuda", f"forward, {layer}, T {tokens}, r {rank}")
          for rank, ratio in ((4, 1.25), (16, 1.25), (64, 2.0))
          for layer in ("Llama-3.1-8B attention", "Llama-3.1-8B gate")
          for tokens in (1, 8, 32)),
        Target(EAGER, 0.5, "cuda", "step"),
        Target(EAGER, 0.2, "cuda", "step", kind="peak"),
        Target(EAGER, 1.0, "cpu"),
    ],
)  # fmt: skip
