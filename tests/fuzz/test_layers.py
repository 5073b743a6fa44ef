"""Any layer: compressed weights, masked adapters, gradients of chosen tiles; values and gradients against float64."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from fastunlearn import ops
from fastunlearn.ops import NMTensor
from tests.fuzz.draws import FLOATS, WIDE, Draw, fuzz, near, on, packed
from tests.ops.test_block_weight_grad import _kept
from tests.ops.test_nm_tensor import make_mask

#: rounding of a product of that many terms of size 1, and of the result, in units of the type
EPS = {torch.float32: 6e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-14}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, terms: int) -> None:
    """By the worst entry: sums of `terms` products of normal numbers, rounded to the type a few times."""
    scale = float(want.abs().max()) if want.numel() else 0.0
    near(got, want, EPS[dtype] * (3 + math.sqrt(terms)) * max(scale, 1.0))


def dtype_of(draw: Draw) -> torch.dtype:
    """The interpreter multiplies the raw bits of bf16."""
    if draw.backend == "triton":
        return draw.pick((torch.float32, torch.float16))
    return draw.pick(WIDE if draw.backend == "reference" else FLOATS)


def lead(draw: Draw) -> tuple[int, ...]:
    return draw.pick(((), (0,), (1,), (5,), (2, 3), (70,)))


@fuzz("nm_linear", backends=("native", "reference", "triton"))
def test_nm_linear(draw: Draw) -> None:
    m = draw.pick((1, 2, 4, 4, 8, 5, 16, 24))
    n, dtype = draw.pick((0, m // 2, m // 2, m)), dtype_of(draw)
    rows, cols, many = draw.pick((0, 1, 7, 16, 40)), draw.pick((0, 1, 2, 5, 9)) * m, lead(draw)
    bits = make_mask((rows, cols), n, m, draw.integer(0, 99))
    x, values, bias, grad = (
        draw.tensor(s, dtype) for s in ((*many, cols), (rows, cols // m * n), (rows,), (*many, rows))
    )
    leaves = [t.detach().requires_grad_() for t in (x, values.contiguous(), bias)]

    def run():
        y = ops.nm_linear(leaves[0], NMTensor._of(leaves[1], bits, n, m), leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    got, tokens = on(draw.backend, run), math.prod(many)
    kept = bits.unpack()
    w = torch.zeros(rows, cols, dtype=torch.float64)
    w[kept] = values.double().flatten()
    flat, dy = x.double().reshape(tokens, cols), grad.double().reshape(tokens, rows)
    want = [
        (flat @ w.T + bias.double()).view(*many, rows), (dy @ w).view(x.shape), (dy.T @ flat)[kept].view(values.shape), dy.sum(0),
    ]  # fmt: skip
    for g, r, terms in zip(got, want, (cols, rows, tokens, tokens)):
        close(g, r, dtype, terms)


def _adapter(draw: Draw, out: int, width: int) -> tuple[torch.Tensor, object, int]:
    """(which entries, the mask in one of its forms, block)"""
    block = draw.pick((16, 32, 64))
    form = draw.pick(("none", "bits", "blocks"))
    if form == "none":
        return torch.ones(out, width, dtype=torch.bool), None, block
    if form == "bits":
        may = draw.mask((out, width))
        return may, packed(may), block
    tiles = draw.mask((-(-out // block), -(-width // block)))
    return tiles.repeat_interleave(block, 0)[:out].repeat_interleave(block, 1)[:, :width], tiles, block


@fuzz("masked_lora_linear", "masked_lora_weight", backends=("native", "reference", "triton"))
def test_masked_lora_linear(draw: Draw) -> None:
    dtype, many = dtype_of(draw), lead(draw)
    out, cols, rank = draw.pick((0, 1, 7, 40, 65)), draw.pick((0, 1, 9, 33, 64)), draw.pick((1, 3, 8, 17))
    may, mask, block = _adapter(draw, out, cols)
    scale, s = max(cols, 1) ** -0.5, draw.pick((0.0, 1.0, -0.6))
    x, bias, B, grad = (draw.tensor(shape, dtype) for shape in ((*many, cols), (out,), (out, rank), (*many, out)))
    weight, A = (draw.lay((draw.values(shape, "normal") * scale).to(dtype)) for shape in ((out, cols), (rank, cols)))
    leaves = [t.detach().requires_grad_() for t in (x, A, B, bias)]

    def run():
        y = ops.masked_lora_linear(leaves[0], weight, leaves[1], leaves[2], mask, s, leaves[3], block=block)
        merged = ops.masked_lora_weight(weight, leaves[1].detach(), leaves[2].detach(), mask, s, block=block)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad), merged]

    got, tokens = on(draw.backend, run), math.prod(many)
    wide = [t.detach().double() for t in leaves]
    effective = weight.double() + s * (wide[2] @ wide[1]) * may
    flat, dy = wide[0].reshape(tokens, cols), grad.double().reshape(tokens, out)
    G = (dy.T @ flat) * may
    want = [
        (flat @ effective.T + wide[3]).view(*many, out), (dy @ effective).view(x.shape), s * wide[2].T @ G, s * G @ wide[1].T,
        dy.sum(0), effective,
    ]  # fmt: skip
    for g, r, terms in zip(got, want, (cols * rank, out * rank, out * tokens, cols * tokens, tokens, rank)):
        close(g, r, dtype, terms)
    assert torch.equal(got[-1][~may], weight[~may])


def _geometry(draw: Draw, channels: int) -> dict:
    groups = draw.pick((1, 1, 2)) if channels % 2 == 0 else 1
    return {
        "stride": draw.pick((1, 2, (2, 1))), "padding": draw.pick((0, 1, (1, 0))), "dilation": draw.pick((1, 1, (1, 2))),
        "groups": groups,
    }  # fmt: skip


@fuzz("masked_lora_conv2d", backends=("native", "reference", "triton"))
def test_masked_lora_conv2d(draw: Draw) -> None:
    dtype = dtype_of(draw)
    images, channels, out, rank = draw.pick((0, 1, 2)), draw.pick((1, 2, 6)), draw.pick((2, 8, 18)), draw.integer(1, 4)
    kernel, options = draw.pick(((1, 1), (3, 3), (1, 3))), _geometry(draw, channels)
    size = (draw.integer(6, 9), draw.integer(6, 9))
    inner = channels // options["groups"] * math.prod(kernel)
    may, mask, block = _adapter(draw, out, inner)
    if isinstance(mask, ops.BitMask):
        mask = ops.BitMask(mask.bits, (out, channels // options["groups"], *kernel))
    weight = draw.lay((draw.values((out, channels // options["groups"], *kernel), "normal") * inner**-0.5).to(dtype))
    A = (draw.values((rank, inner), "normal") * inner**-0.5).to(dtype)
    x, B, bias = (draw.tensor(s, dtype) for s in ((images, channels, *size), (out, rank), (out,)))
    leaves = [t.detach().requires_grad_() for t in (x, A, B, bias)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    effective = weight.double() + 0.6 * (wide[2] @ wide[1] * may).view(weight.shape)
    y = F.conv2d(wide[0], effective, wide[3], **options)
    grad = draw.tensor(y.shape, dtype)
    want = [y.detach(), *torch.autograd.grad(y, wide, grad.double())]

    def run():
        y = ops.masked_lora_conv2d(
            leaves[0], weight, leaves[1], leaves[2], mask, 0.6, leaves[3], block=block, **options
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    places = images * y.shape[2] * y.shape[3]
    for g, r, terms in zip(
        on(draw.backend, run), want, (inner * rank, out * inner, out * places, inner * places, places)
    ):
        close(g, r, dtype, terms)


@fuzz("block_weight_grad", backends=("native", "reference", "triton"))
def test_block_weight_grad(draw: Draw) -> None:
    dtype, many = dtype_of(draw), draw.pick(((0,), (1,), (5,), (2, 3), (70,), (300,)))
    rows, cols = draw.pick((0, 1, 7, 64, 130)), draw.pick((0, 1, 9, 65, 128))
    block = draw.pick((64, 128) if draw.backend == "triton" else (1, 5, 16, 33, 64, 128))
    if (rows // block) * (cols // block) > 500:
        block = 16
    mask = draw.mask((-(-rows // block), -(-cols // block)))
    grad, x = draw.tensor((*many, rows), dtype), draw.tensor((*many, cols), dtype)
    layout = draw.pick(("dense", "tiles"))
    got = on(draw.backend, lambda: ops.block_weight_grad(grad, x, mask, block, layout=layout))
    tokens = math.prod(many)
    dense = grad.double().reshape(tokens, rows).T @ x.double().reshape(tokens, cols)
    close(got, _kept(dense, {"block": block, "mask": mask, "layout": layout}), dtype, tokens)


@fuzz("conv2d_block_weight_grad", backends=("native", "reference", "triton"))
def test_conv2d_block_weight_grad(draw: Draw) -> None:
    dtype = dtype_of(draw)
    images, channels, out = draw.pick((0, 1, 2)), draw.pick((1, 2, 6)), draw.pick((2, 8, 18))
    kernel, options = draw.pick(((1, 1), (3, 3), (1, 3))), _geometry(draw, channels)
    block = draw.pick((64, 128) if draw.backend == "triton" else (5, 16, 64))
    x = draw.tensor((images, channels, draw.integer(6, 9), draw.integer(6, 9)), dtype)
    weight = torch.zeros(out, channels // options["groups"], *kernel, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.double(), weight, **options)
    grad = draw.tensor(y.shape, dtype)
    (dense,) = torch.autograd.grad(y, weight, grad.double())
    mask = draw.mask((-(-out // block), -(-weight[0].numel() // block)))
    layout = draw.pick(("dense", "tiles"))
    got = on(draw.backend, lambda: ops.conv2d_block_weight_grad(grad, x, mask, kernel, block, layout=layout, **options))
    want = _kept(dense.flatten(1), {"block": block, "mask": mask, "layout": layout})
    close(got, want, dtype, images * y.shape[2] * y.shape[3])
