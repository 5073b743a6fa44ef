"""block_weight_grad and conv2d_block_weight_grad: the gradient of a weight on some of its tiles.

Peers: the whole product by BLAS (cuBLAS, cuDNN), which is what a mask of weights costs; the same and then a mask put on it; the tiles one
by one by BLAS. Layers are those of Stable Diffusion's U-Net, values random. The limit counts the operations of the set tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target, close, ours
from fastunlearn import ops
from fastunlearn.reference import block_weight_grad as reference

DENSE, MASKED, ONE_BY_ONE = "dense product", "dense product, masked", "tile by tile, BLAS"
#: [out, in]
LINEAR = {"feed-forward": (10240, 1280), "attention": (1280, 1280)}
#: channels in, out, side of the image
CONV = {"conv 320": (320, 320, 64), "conv 640": (640, 640, 32), "conv 1280": (1280, 1280, 16)}


def _linear(layer: str, tokens: int, density: float, block: int, **kwargs: Any) -> Case:
    name = f"{layer}, T {tokens}, tiles of {block}, {density:.0%}"
    options = {"tokens": tokens, "density": density, "block": block, "conv": None}
    return Case(name, [("weight", LINEAR[layer])], options=options, gib=2, **kwargs)


def _conv(layer: str, images: int, density: float, block: int, **kwargs: Any) -> Case:
    name = f"{layer}, {images} images, tiles of {block}, {density:.0%}"
    channels, out, side = CONV[layer]
    options = {"tokens": images, "density": density, "block": block, "conv": (channels, side)}
    return Case(name, [("weight", (out, channels * 9))], options=options, gib=2, **kwargs)


CPU: dict[str, Any] = {"devices": ("cpu",)}
GPU: dict[str, Any] = {"devices": ("cuda",), "dtype": torch.bfloat16}
CASES = [
    *(_linear("feed-forward", 512, d, block, quick=d == 0.1 and block == 128, **CPU) for block in (128, 64) for d in (0.1, 0.5)),
    *(_linear("attention", 1024, d, block, **CPU) for block in (128, 64) for d in (0.1, 0.3, 0.75, 0.9, 1.0)),
    *(_conv("conv 320", 1, d, block, **CPU) for block in (128, 64) for d in (0.1, 0.5)),
    *(_conv("conv 640", 1, d, 128, **CPU) for d in (0.1, 0.75, 0.9)),
    _conv("conv 1280", 2, 0.1, 64, **CPU),
    *(_linear("feed-forward", 8192, d, block, **GPU) for block in (128, 64) for d in (0.05, 0.1, 0.3, 0.5, 0.9)),
    *(_linear("attention", 8192, 0.1, block, **GPU) for block in (128, 64)),
    *(_conv(layer, images, 0.1, block, **GPU) for layer, images in (("conv 640", 8), ("conv 1280", 32)) for block in (128, 64)),
]  # fmt: skip


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    (_, (rows, cols)), block = case.shapes[0], case.options["block"]
    tokens, conv = case.options["tokens"], case.options["conv"]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    if conv is None:
        x, grad = random(tokens, cols), random(tokens, rows)
    else:
        channels, side = conv
        x, grad = random(tokens, channels, side, side), random(tokens, rows, side, side)
        if device.type == "cuda":
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    shape = (-(-rows // block), -(-cols // block))
    # Exactly the share: a random count would make one case of another.
    order = torch.rand(shape, generator=generator, device=device).flatten().argsort()
    mask = torch.zeros(shape, dtype=torch.bool, device=device).flatten()
    mask[order[: round(case.options["density"] * mask.numel())]] = True
    return Inputs(x=x, grad=grad, mask=mask.view(shape), rows=rows, cols=cols, block=block, conv=conv)


def dense(x: Inputs) -> Callable[[], Any]:
    if x.conv is None:
        return lambda: x.grad.T @ x.x
    weight = x.x.new_zeros(x.rows, x.conv[0], 3, 3)
    return lambda: torch.ops.aten.convolution_backward(
        x.grad, x.x, weight, None, (1, 1), (1, 1), (1, 1), False, [0, 0], 1, [False, True, False]
    )[1].reshape(x.rows, x.cols)


def masked(x: Inputs) -> Callable[[], Any]:
    whole = dense(x)
    on = reference.spread(x.mask, x.block, x.rows, x.cols)
    return lambda: whole().mul_(on)


def one_by_one(x: Inputs) -> Callable[[], Any] | None:
    if x.conv is not None or x.device.type == "cuda":
        return None
    block, places = x.block, x.mask.nonzero().tolist()

    def run() -> Tensor:
        out = x.x.new_zeros(x.rows, x.cols)
        for r, c in places:
            rows, cols = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
            out[rows, cols] = x.grad[:, rows].T @ x.x[:, cols]
        return out

    return run


def mine(x: Inputs) -> Callable[[], Any]:
    if x.conv is None:
        return lambda: ops.block_weight_grad(x.grad, x.x, x.mask, x.block)
    return lambda: ops.conv2d_block_weight_grad(x.grad, x.x, x.mask, 3, x.block, padding=1)


def packed(x: Inputs) -> Callable[[], Any]:
    if x.conv is None:
        return lambda: ops.block_weight_grad(x.grad, x.x, x.mask, x.block, layout="tiles")
    return lambda: ops.conv2d_block_weight_grad(x.grad, x.x, x.mask, 3, x.block, padding=1, layout="tiles")


def expected(x: Inputs) -> Tensor:
    whole = dense(Inputs(**{**vars(x), "x": x.x.float(), "grad": x.grad.float()}))()
    return whole * reference.spread(x.mask, x.block, x.rows, x.cols)


def close_enough(x: Inputs, output: Any, wanted: Any) -> str | None:
    return close(1e-4 if x.case.dtype == torch.float32 else 2e-2, 1e-3)(x, output, wanted)


def on_the_mask(x: Inputs, output: Any, wanted: Any) -> str | None:
    return close_enough(x, output * reference.spread(x.mask, x.block, x.rows, x.cols), wanted)


def as_tiles(x: Inputs, output: Any, wanted: Any) -> str | None:
    return close_enough(x, output, reference.tiled(wanted, x.block)[x.mask])


def limit(x: Inputs, line: int) -> Limit:
    tokens = x.x.shape[0] if x.conv is None else x.x.shape[0] * x.conv[1] ** 2
    return Limit("flops", 2 * tokens * float(x.mask.float().mean()) * x.rows * x.cols)


OP = Op(
    name="block_weight_grad",
    cases=CASES,
    make=make,
    expected=expected,
    check=close_enough,
    limit=limit,
    providers=[
        *ours("block_weight_grad", mine),
        Provider("fastunlearn, layout=tiles", packed, backend="auto", check=as_tiles),
        Provider(DENSE, dense, check=on_the_mask),
        Provider(MASKED, masked),
        Provider(ONE_BY_ONE, one_by_one, devices=("cpu",)),
    ],
    targets=[
        Target(DENSE, 0.6, "cpu", "10%"),
        Target(DENSE, 1.05, "cpu"),
        *(Target(DENSE, 1.25 * d + 0.05, "cuda", f"feed-forward, T 8192, tiles of 128, {d:.0%}") for d in (0.05, 0.1, 0.3, 0.5, 0.9)),
        *(Target(DENSE, 2.2 * d + 0.05, "cuda", f"feed-forward, T 8192, tiles of 64, {d:.0%}") for d in (0.05, 0.1, 0.3, 0.5)),
        *(Target(DENSE, ratio, "cuda", f"{images} images, tiles of {block}, 10%")
          for images in (8, 32) for block, ratio in ((128, 0.175), (64, 0.27))),
    ],
)  # fmt: skip
