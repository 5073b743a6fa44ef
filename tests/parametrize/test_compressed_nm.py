"""CompressedNM: survivors only, the same run as dense with masks, saved as an ordinary model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import fastunlearn
from fastunlearn import BitMask, ops, optim
from fastunlearn.checkpoint import check_masks, check_pattern, load_checkpoint, save_checkpoint
from fastunlearn.ops import NMTensor
from fastunlearn.parametrize import CompressedNM, NMLinear, full_weights
from fastunlearn.parametrize.compressed_nm import compressed_layers, dense_state_dict
from tests.tiny_chat import char_tokenizer, tiny_llama


def pruned(n: int = 2, m: int = 4, dtype: torch.dtype = torch.float32):
    model = tiny_llama()
    masks = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                masks[name] = ops.nm_mask(parameter.abs(), n, m)
                parameter.mul_(masks[name].unpack())
    full_weights(model, masks, others=False)
    return model.to(dtype), masks


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (3, 17), generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed: int) -> torch.Tensor:
    tokens = ids(seed)
    return model(input_ids=tokens, labels=tokens).loss.float()


def test_the_model_is_the_same_and_smaller():
    model, masks = pruned()
    want = model(input_ids=ids()).logits
    dense_bytes = sum(p.nbytes for n, p in model.named_parameters() if n in masks)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressed = CompressedNM(model, masks, 2, 4)
    assert set(compressed.layers) == set(masks) == set(compressed_layers(model))
    assert compressed.dense == {}
    # 32 bits for two of four entries, and one bit for each.
    assert compressed.nbytes == dense_bytes * 17 // 32
    assert torch.equal(model(input_ids=ids()).logits, want)
    for name, tensor in dense_state_dict(model).items():
        assert torch.equal(tensor, start[name]), name
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(masks)
    check_masks(model, masks)
    check_pattern(model, masks, {"pattern": "2:4"})
    with pytest.raises(ValueError, match="stored 2:4"):
        check_pattern(model, masks, {"pattern": "1:4"})
    restored = compressed.restore()
    assert not compressed_layers(restored)
    assert torch.equal(restored(input_ids=ids()).logits, want)
    assert {n for n, p in restored.named_parameters() if p.requires_grad} == set(masks)


def test_only_survivors_have_gradients_and_states():
    model, masks = pruned()
    CompressedNM(model, masks, 2, 4)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.MaskedAdamW(params, lr=1e-3)
    loss_of(model, 0).backward()
    optimizer.step()
    survivors = sum(int(mask.count()) for mask in masks.values())
    assert sum(p.numel() for p in params) == survivors
    assert sum(p.grad.numel() for p in params) == survivors
    assert sum(optimizer.state[p]["exp_avg"].numel() for p in params) == survivors
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def train(model, masks, *, compressed: bool, steps: int = 6, clip: float | None = 1.0, factors=None, seed: int = 0):
    handle = CompressedNM(model, masks, 2, 4) if compressed else None
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = optim.MaskedAdamW(
        named, None if compressed else masks, lr=1e-2, weight_decay=0.1, max_grad_norm=clip, lr_scale=factors, seed=seed
    )
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dense_state_dict(model) if handle else {n: t.detach() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("redistribute", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_same_weights_as_dense_with_masks(clip, redistribute):
    model, masks = pruned()
    factors = None
    if redistribute:
        factors = {n: ops.redistribution(tiny_llama().get_parameter(n).detach().abs(), masks[n]) for n in masks}
    a = train(copy.deepcopy(model), masks, compressed=False, clip=clip, factors=factors)
    b = train(copy.deepcopy(model), masks, compressed=True, clip=clip, factors=factors)
    for name, tensor in a.items():
        # Only the norm that clips is summed in another order.
        torch.testing.assert_close(b[name], tensor, rtol=2e-5, atol=1e-6, msg=name)
        assert name not in masks or not torch.equal(tensor, model.state_dict()[name])


def test_bfloat16_is_as_far_from_the_exact_run_as_dense_is():
    exact_model, masks = pruned(dtype=torch.bfloat16)
    start = copy.deepcopy(exact_model)
    exact = train(exact_model.double().float(), masks, compressed=False)

    def error(compressed: bool, seed: int) -> float:
        got = train(copy.deepcopy(start), masks, compressed=compressed, seed=seed)
        return sum(float((got[n].double() - exact[n].double()).square().sum()) for n in masks) ** 0.5

    for seed in range(3):
        assert error(True, seed) <= 2 * error(False, seed)


def test_hamu_on_compressed_gradients():
    """Inner products, certificate and step of compressed gradients are those of dense ones with masks."""
    model, masks = pruned()
    twin = copy.deepcopy(model)
    CompressedNM(model, masks, 2, 4)

    def gradients(m, seed):
        loss_of(m, seed).backward()
        grads = [p.grad for p in m.parameters() if p.requires_grad]
        m.zero_grad()
        return grads

    outcomes = []
    for m, given in ((model, None), (twin, list(masks.values()))):
        params = [p for p in m.parameters() if p.requires_grad]
        retain, forget = gradients(m, 1), gradients(m, 2)
        outcomes.append(
            (
                ops.gram([retain, forget], masks=given),
                ops.hamu_step_(params, retain, forget, lr=1e-2, share=0.5, masks=given),
            )
        )
    (gram_a, a), (gram_b, b) = outcomes
    torch.testing.assert_close(gram_a, gram_b, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-7)
    got = dense_state_dict(model)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_and_activation_checkpointing(checkpointing):
    model, masks = pruned()
    twin = copy.deepcopy(model)
    CompressedNM(model, masks, 2, 4)
    for m in (model, twin):
        m.train()
        if checkpointing:
            m.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(m, 0).backward()
    layers = compressed_layers(model)
    for name, mask in masks.items():
        want = twin.get_parameter(name).grad[mask.unpack()]
        torch.testing.assert_close(layers[name].weight.grad.flatten(), want, rtol=2e-2, atol=1e-4)


def test_saved_as_an_ordinary_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, masks = pruned()
    CompressedNM(model, masks, 2, 4)
    optimizer = optim.MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss_of(model, 0).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "out", model, char_tokenizer(), masks=masks, pruning={"pattern": "2:4"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    loaded = load_checkpoint(tmp_path / "out", masks="require")
    assert all(loaded.masks[n].equal(mask) for n, mask in masks.items())
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == {"pattern": "2:4"}


def test_state_dicts_of_both_forms_load():
    model, masks = pruned()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in masks:
            other.get_parameter(name).mul_(2)
    target, source = copy.deepcopy(model), copy.deepcopy(other)
    CompressedNM(target, masks, 2, 4)
    target.load_state_dict(other.state_dict())
    assert torch.equal(target(input_ids=ids()).logits, other(input_ids=ids()).logits)
    CompressedNM(source, masks, 2, 4)
    target = copy.deepcopy(model)
    CompressedNM(target, masks, 2, 4)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(input_ids=ids()).logits, other(input_ids=ids()).logits)
    wrong = other.state_dict()
    name = next(iter(masks))
    wrong[name] = torch.ones_like(wrong[name])
    with pytest.raises((ValueError, RuntimeError), match="lie off the mask"):
        target.load_state_dict(wrong)


def test_tied_weights_and_ends_stay_dense():
    model, masks = pruned()
    embeddings = ops.nm_mask(model.lm_head.weight.detach().abs(), 2, 4)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with torch.no_grad():
            model.lm_head.weight.mul_(embeddings.unpack())
        handle = CompressedNM(copy.deepcopy(model), {**masks, name: embeddings}, 2, 4)
        assert set(handle.dense) == {name}
        assert "tied" in handle.dense[name] or "Embedding" in handle.dense[name]
        assert handle.model.lm_head.weight is handle.model.get_input_embeddings().weight
        state = dense_state_dict(handle.model)
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_masks_between_the_two_shapes():
    model, masks = pruned()
    handle = CompressedNM(model, masks, 2, 4)
    name = next(iter(masks))
    kept = masks[name].unpack()
    assert handle.compact_mask(name, masks[name]) is None
    some = kept & (torch.rand(kept.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    compact = handle.compact_mask(name, BitMask.pack(some))
    layer = handle.layers[name]
    assert compact.shape == layer.weight.shape
    spread = NMTensor(compact.unpack().float(), layer.mask, 2, 4).to_dense()
    assert torch.equal(spread.bool(), some)
    with pytest.raises(ValueError, match="bits that the mask of pruning"):
        handle.compact_mask(name, BitMask.ones(kept.shape))
    numbers = torch.rand(kept.shape)
    assert torch.equal(handle.compact(name, numbers), handle.compact(name, numbers[kept]))
    assert handle.compact_mask("model.norm.weight", masks[name]) is masks[name]


def test_on_meta_only_shapes():
    with torch.device("meta"):
        model = tiny_llama_meta()
    real, masks = pruned()
    handle = CompressedNM(model, masks, 2, 4)
    CompressedNM(real, masks, 2, 4)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(layer.weight.is_meta and layer.bits.is_meta for layer in handle.layers.values())


def tiny_llama_meta():
    import transformers

    return transformers.LlamaForCausalLM(tiny_llama().config)


def test_bad_input():
    model, masks = pruned()
    name = next(iter(masks))
    start = copy.deepcopy(model.state_dict())
    for wrong, words in (
        ({"nothing": masks[name]}, "'nothing' is no parameter"),
        ({name: BitMask.ones((3, 4))}, "has a mask of shape"),
        ({**masks, name: BitMask.ones(masks[name].shape)}, "row 0 is the first"),
        ({**masks, name: ops.nm_mask(torch.rand(masks[name].shape), 2, 4)}, "lie off the mask and are not zero"),
        ({}, "none is of a layer that can be compressed"),
        ({"model.norm.weight": BitMask.ones((64,))}, "not of an nn.Linear"),
    ):
        with pytest.raises(ValueError, match=words):
            CompressedNM(model, wrong, 2, 4)
        assert not compressed_layers(model)
    with pytest.raises(ValueError, match="7 does not divide the 64 columns"):
        CompressedNM(model, masks, 3, 7)
    with pytest.raises(TypeError, match="want a BitMask"):
        CompressedNM(model, {name: torch.ones(2)}, 2, 4)
    assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items())


def test_a_layer_with_a_bias():
    layer = nn.Linear(12, 5)
    mask = ops.nm_mask(layer.weight.detach().abs(), 1, 4)
    packed = NMLinear(ops.nm_compress(layer.weight, mask, 1, 4), layer.bias)
    x = torch.randn(3, 12)
    want = nn.functional.linear(x, layer.weight * mask.unpack(), layer.bias)
    torch.testing.assert_close(packed(x), want)
    packed(x).sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((5,), 3.0))
    assert "1:4" in repr(packed)
    assert fastunlearn.explain("nm_linear").last.startswith("native")
