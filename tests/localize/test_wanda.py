"""Wanda to N:M: the scores of the formula, block by block on pruned activations, and a pattern that is checked exactly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastunlearn.localize import input_norms, nm_violations, prune, wanda_scores
from tests.tiny_chat import tiny_llama

TEXT = torch.arange(2 * 40).reshape(2, 40) * 7 % 127 + 1


def naive(model: nn.Module, run, n: int, m: int) -> dict[str, np.ndarray]:
    """Runs the whole model anew for every block; keeps the n best of m by sorting in numpy."""
    masks = {}
    for i, block in enumerate(model.model.layers):
        seen: dict[str, list[torch.Tensor]] = {}
        handles = [
            layer.register_forward_hook(
                lambda _, args, out, name=name, seen=seen: seen.setdefault(name, []).append(args[0])
            )
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        run(model)
        for handle in handles:
            handle.remove()
        for name, inputs in seen.items():
            weight = block.get_parameter(f"{name}.weight")
            norm = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double().norm(dim=0).numpy()
            scores = weight.detach().abs().double().numpy() * norm
            groups = scores.reshape(len(scores), -1, m)
            keep = np.zeros(groups.shape, bool)
            np.put_along_axis(keep, np.argsort(-groups, axis=-1, kind="stable")[..., :n], True, axis=-1)
            masks[f"model.layers.{i}.{name}.weight"] = keep.reshape(scores.shape)
            with torch.no_grad():
                weight.mul_(torch.from_numpy(keep.reshape(scores.shape)))
    return masks


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_prune_is_the_naive_computation(n, m):
    model = tiny_llama()
    before, other = copy.deepcopy(model.state_dict()), copy.deepcopy(model)

    def run(model):
        with torch.no_grad():
            for rows in (TEXT, TEXT[:1, :17]):
                model(input_ids=rows, use_cache=False)

    masks = prune(model, method="wanda", pattern=(n, m), calibration=lambda: run(model))
    expected = naive(other, run, n, m)
    assert set(masks) == set(expected)
    assert len(masks) == 2 * 7
    for name, mask in masks.items():
        assert np.array_equal(mask.unpack().numpy(), expected[name]), name
        assert mask.density == n / m
    for name, tensor in model.state_dict().items():
        kept = before[name] * masks[name].unpack() if name in masks else before[name]
        assert torch.equal(tensor, kept), name
    assert nm_violations(model, masks, n, m) == []


def test_a_block_sees_what_the_pruned_blocks_before_it_give():
    """Against one-shot scores, where every block sees the dense model's activations."""
    model = tiny_llama()
    dense = copy.deepcopy(model)
    names = {name: layer for name, layer in dense.model.layers[1].named_modules() if isinstance(layer, nn.Linear)}
    with torch.no_grad(), input_norms(names) as norms:
        dense(input_ids=TEXT, use_cache=False)
    masks = prune(model, calibration=TEXT)
    from fastunlearn import ops

    same = [
        ops.nm_mask(wanda_scores(layer.weight, norms[name]), 2, 4).equal(masks[f"model.layers.1.{name}.weight"])
        for name, layer in names.items()
    ]
    assert not all(same)


def test_pruning_under_autocast_uses_the_pruned_weights():
    """Autocast caches bf16 copies of weights that require gradients; block 1 must not see block 0 as it was."""
    model = tiny_llama()
    other = copy.deepcopy(model)
    assert all(parameter.requires_grad for parameter in model.parameters())

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=TEXT, use_cache=False)

    with torch.autocast("cpu", torch.bfloat16):
        masks = prune(model, calibration=TEXT)
    with torch.no_grad():
        expected = naive(other, run, 2, 4)
    agree = [np.mean(mask.unpack().numpy() == expected[name]) for name, mask in masks.items()]
    assert min(agree) == 1.0


def test_blocks_may_return_tuples_and_take_other_arguments():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, scale, *, shift):
            return torch.tanh(self.linear(x)) * scale + shift, "cache"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = block(x, i + 1.0, shift=0.1 * i)[0]
            return x

    model = Model()
    x = torch.randn(5, 8)
    second = copy.deepcopy(model)
    masks = prune(model, calibration=x, blocks=model.blocks, batch_size=5)
    assert list(masks) == [f"blocks.{i}.linear.weight" for i in range(3)]
    with torch.no_grad():
        for i in range(3):
            names = {"linear": second.blocks[i].linear}
            with input_norms(names) as norms:
                second(x)
            scores = wanda_scores(second.blocks[i].linear.weight, norms["linear"])
            assert torch.equal(model.blocks[i].linear.weight != 0, masks[f"blocks.{i}.linear.weight"].unpack())
            top = scores.view(8, 2, 4).topk(2, -1).indices.sort(-1).values
            kept = masks[f"blocks.{i}.linear.weight"].unpack().view(8, 2, 4).nonzero()[:, 2].view(8, 2, 2)
            assert torch.equal(top, kept)
            second.blocks[i].linear.weight.copy_(model.blocks[i].linear.weight)


def test_scores_and_norms():
    linear = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -6.0]]))
    with input_norms({"l": linear, "unused": nn.Linear(1, 1)}) as norms:
        linear(torch.tensor([[3.0, 1.0, 0.0]]))
        linear(torch.tensor([[[4.0, 2.0, 0.0], [0.0, 2.0, 0.0]]]))
    assert set(norms) == {"l"}
    assert norms["l"].tolist() == [5.0, 3.0, 0.0]
    assert wanda_scores(linear.weight, norms["l"]).tolist() == [[5.0, 6.0, 0.0], [0.0, 15.0, 0.0]]
    linear(torch.ones(1, 3))
    assert norms["l"].tolist() == [5.0, 3.0, 0.0]  # the hooks are gone


def test_nm_violations_sees_both_kinds():
    model = tiny_llama()
    masks = prune(model, calibration=TEXT)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    outside = (~masks[name].unpack()).nonzero()[5]
    with torch.no_grad():
        weight[tuple(outside)] = 1e-30
    assert nm_violations(model, masks) == [
        f"{name}: 1 groups of 4 with more than 2 nonzeros, 1 nonzeros outside the mask"
    ]
    group = slice(int(outside[1]) // 4 * 4, int(outside[1]) // 4 * 4 + 4)
    with torch.no_grad():
        weight[outside[0], group] = 0
        weight[tuple(outside)] = 1e-30
    assert nm_violations(model, masks) == [
        f"{name}: 0 groups of 4 with more than 2 nonzeros, 1 nonzeros outside the mask"
    ]
    with pytest.raises(ValueError, match="the model has no parameter of that name and shape"):
        nm_violations(model, {"nobody": masks[name]})


def test_bad_input():
    with pytest.raises(ValueError, match=r"input_norm: .* got weight \(2, 3\), norm \(2,\)"):
        wanda_scores(torch.ones(2, 3), torch.ones(2))
