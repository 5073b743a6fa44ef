"""Layers that make the gradient of what may move: against the dense gradient and a mask, for every kind of mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastunlearn
from fastunlearn import BitMask
from fastunlearn.localize import structured_masks
from fastunlearn.parametrize import MaskedConv2d, MaskedLinear, mask_model
from fastunlearn.parametrize.masked_layers import choose
from tests.proof import assert_equal

KINDS = (
    "tiles of 128",
    "tiles of 64",
    "rows",
    "weights",
    "nothing",
    "everything",
    "rows and weights",
    "tiles and weights",
)


def _mask(kind, rows, cols):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    if kind == "tiles of 128":
        mask[:128, 128:256] = True
    elif kind == "tiles of 64":
        mask[64:128, :64] = mask[192:, 192:] = True
    elif kind == "rows":
        mask[::9] = True
    elif kind == "weights":
        mask = torch.rand(rows, cols, generator=generator) < 0.5
    elif kind == "everything":
        mask[:] = True
    elif kind == "rows and weights":
        mask[::9] = torch.rand(mask[::9].shape, generator=generator) < 0.5
    elif kind == "tiles and weights":
        mask[:64, :64] = torch.rand(64, 64, generator=generator) < 0.5
    return mask


def _grads(layer, x, dy):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    out = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    return out


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", [False, True])
def test_gradients_are_the_dense_ones_on_the_mask(kind, conv, backend):
    torch.manual_seed(0)
    if conv:
        layer, x, dy = nn.Conv2d(36, 260, 3, padding=1), torch.randn(2, 36, 8, 6), torch.randn(2, 260, 8, 6)
        cls, cols = MaskedConv2d, 36 * 9
    else:
        layer, x, dy = nn.Linear(300, 260), torch.randn(2, 21, 300), torch.randn(2, 21, 260)
        cls, cols = MaskedLinear, 300
    mask = _mask(kind, 260, cols).view(layer.weight.shape)
    with fastunlearn.backend(backend):
        masked = cls.of(copy.deepcopy(layer), BitMask.pack(mask))
        got = _grads(masked, x, dy)
        if masked.kind == "tiles":
            op = "conv2d_block_weight_grad" if conv else "block_weight_grad"
            assert fastunlearn.explain(op).last == f"{backend}:cpu"
    want = _grads(layer, x, dy)
    assert_equal(got[0], want[0])
    for g, w in zip((got[1], got[2], got[3]), (want[1], torch.where(mask, want[2], 0.0), want[3])):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)
    assert not bool(got[2][~mask].any())


@pytest.mark.parametrize(
    ("kind", "way", "block", "exact"),
    [
        ("tiles of 128", "tiles", 128, True), ("tiles of 64", "tiles", 64, True), ("rows", "rows", 0, True),
        ("weights", "dense", 0, False), ("everything", "dense", 0, True), ("rows and weights", "rows", 0, False),
        ("tiles and weights", "tiles", 64, False),
    ],
)  # fmt: skip
def test_the_cheapest_way(kind, way, block, exact):
    where = choose(_mask(kind, 260, 300))
    assert (where.kind, where.block, where.off is None) == (way, block, exact)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 70, 3, stride=2, padding=(0, 1)), nn.Conv2d(16, 70, (3, 5), dilation=2, padding="same"),
        nn.Conv2d(16, 70, 2, padding="same"), nn.Conv2d(16, 70, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 72, 3, groups=4, padding="valid"), nn.Conv2d(16, 70, 1, bias=False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["tiles of 64", "rows", "weights"])
def test_every_convolution(layer, kind):
    x = torch.randn(2, 16, 12, 10)
    mask = _mask(kind, layer.weight.shape[0], layer.weight[0].numel()).view(layer.weight.shape)
    mask[0, 0] = True
    masked = MaskedConv2d.of(layer, mask)
    y = layer(x)
    dy = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, layer.weight, dy)
    got_y = masked(x)
    (got,) = torch.autograd.grad(got_y, layer.weight, dy)
    torch.testing.assert_close(got_y, y)
    torch.testing.assert_close(got, torch.where(mask, want, 0.0), rtol=1e-5, atol=1e-4)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 80, 3, padding=1)
        self.norm = nn.GroupNorm(4, 80)
        self.layers = nn.ModuleList([nn.Linear(80, 150), nn.Linear(150, 10)])

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.layers[1](self.layers[0](x).relu())


def _scores(model):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


@pytest.mark.parametrize("granularity", ["weight", "tile", "row", "module"])
def test_a_masked_model_trains_as_masked_gradients_do(granularity):
    torch.manual_seed(0)
    plain, masks = _Net(), None
    masks = structured_masks(_scores(plain), 0.3, granularity=granularity, block=64)
    model = copy.deepcopy(plain)
    before = copy.deepcopy(plain.state_dict())
    done = mask_model(model, masks)
    assert set(model.state_dict()) == set(before)
    assert done.frozen == [name for name, mask in masks.items() if not int(mask.count())]
    assert 0 < done.share <= 1
    optimisers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (plain, model)]
    for step in range(100):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        for m, optimiser in zip((plain, model), optimisers):
            optimiser.zero_grad()
            m(x).square().mean().backward()
            for name, p in m.named_parameters():
                if p.grad is not None:
                    # Norms and biases have their whole gradient: which entries move is the optimiser's matter.
                    p.grad *= masks[name].unpack()
            optimiser.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        off = ~masks[name].unpack()
        assert_equal(p.detach()[off], before[name][off])
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_masks_again_and_what_stays():
    torch.manual_seed(0)
    model = _Net()
    weight = model.layers[0].weight
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    none = BitMask.zeros(weight.shape)
    some = BitMask.pack(_mask("tiles of 64", 150, 80))
    mask_model(model, {"layers.0.weight": some})
    assert type(model.layers[0]) is MaskedLinear
    assert model.layers[0].weight is weight
    model(torch.randn(1, 3, 4, 4))
    assert calls == [1]
    assert type(model.layers[1]) is nn.Linear
    done = mask_model(model, {"layers.0.weight": none, "conv.bias": BitMask.ones((80,))})
    assert done.frozen == ["layers.0.weight"]
    assert not weight.requires_grad
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    assert weight.grad is None
    done = mask_model(model, {"layers.0.weight": some})
    assert weight.requires_grad
    assert done.layers == {"layers.0": "tiles of 64, 17%"}
    assert "gradient: tiles of 64, 17%" in repr(model)
    # Where all of it may move it is torch's own layer again.
    done = mask_model(model, {"layers.0.weight": BitMask.ones(weight.shape)})
    assert done.layers == {"layers.0": "dense"}
    assert type(model.layers[0]) is nn.Linear
    assert model.layers[0].weight is weight
    assert not [name for name, _ in model.layers[0].named_buffers()]


def test_autocast_checkpointing_and_compile():
    torch.manual_seed(0)
    mask = _mask("tiles of 64", 150, 200)
    layer = MaskedLinear(200, 150, mask=mask)
    x = torch.randn(30, 200, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        want = nn.functional.linear(x, layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16
    assert_equal(y, want)
    y.sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    layer.zero_grad()
    layer(x).square().sum().backward()
    grad = layer.weight.grad.clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert_equal(layer.weight.grad, grad)
    layer.zero_grad()
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, grad)


def test_nothing_is_kept_of_a_frozen_weight():
    layer = MaskedLinear(200, 150, mask=_mask("tiles of 64", 150, 200))
    layer.weight.requires_grad_(False)
    kept = []
    x = torch.randn(30, 200, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = layer(x)
    assert x.data_ptr() not in kept
    y.sum().backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (
            {"nothing.weight": BitMask.ones((3, 3))},
            "masks: 1 belong to no parameter of the model, the first is 'nothing.weight'",
        ),
        ({"conv.weight": BitMask.ones((80, 27))}, r"masks: conv.weight has shape \(80, 3, 3, 3\), its mask \(80, 27\)"),
        ({"conv.weight": BitMask.zeros((80, 3, 3, 3))}, "masks: no bit is set in any of them: nothing could move"),
    ],
)
def test_bad_input(masks, words):
    with pytest.raises(ValueError, match=words):
        mask_model(_Net(), masks)


def test_bad_masks_of_a_layer():
    with pytest.raises(ValueError, match="mask: want a mask of the weight's shape"):
        MaskedLinear(3, 4, mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="model: is a single Linear"):
        mask_model(nn.Linear(3, 4), {"weight": BitMask.ones((4, 3))})
