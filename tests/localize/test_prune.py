"""`prune`: every method and pattern keeps exactly the pattern, layer by layer, and refuses what it cannot do before it starts."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from fastunlearn.localize import (
    check_prunable,
    find_blocks,
    input_hessians,
    nm_violations,
    parse_pattern,
    prune,
    sparsegpt,
    sparsegpt_sweep,
)
from fastunlearn.localize.patterns import select
from tests.tiny_chat import tiny_llama

TEXT = torch.arange(6 * 40).reshape(6, 40) * 7 % 127 + 1
METHODS = ["magnitude", "wanda", "sparsegpt"]
LAYERS = 2 * 7


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16", "3:4", "50%", "73%"])
@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_pattern(method, pattern):
    model = tiny_llama()
    before = copy.deepcopy(model)
    masks = prune(model, method=method, pattern=pattern, calibration=TEXT)
    read = parse_pattern(pattern)
    assert len(masks) == LAYERS
    for name, mask in masks.items():
        weight, kept = model.get_parameter(name), mask.unpack()
        assert not weight[~kept].any(), name
        assert bool((weight[kept] != 0).all()), name
        if read.m is None:
            assert kept.sum(1).unique().tolist() == [int(read.density * mask.cols)], name
        else:
            assert kept.view(mask.rows, -1, read.m).sum(-1).unique().tolist() == [read.n], name
        moved = not torch.equal(weight[kept], before.get_parameter(name)[kept])
        assert moved == (method == "sparsegpt"), name
    if read.n and read.m:
        assert nm_violations(model, masks, read.n, read.m) == []
    for name, parameter in before.named_parameters():
        assert name in masks or torch.equal(parameter, model.get_parameter(name))


def test_sparsegpt_is_the_sweep_layer_by_layer():
    model = tiny_llama()
    other = copy.deepcopy(model)
    masks = prune(model, method="sparsegpt", pattern="2:4", calibration=TEXT, damping=0.02, block_size=32, batch_size=2)
    for i, block in enumerate(other.model.layers):
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        with torch.no_grad(), input_hessians(layers) as hessians:
            for rows in TEXT.split(2):
                other(input_ids=rows, use_cache=False)
        for name, layer in layers.items():
            weight, mask = sparsegpt_sweep(layer.weight, hessians[name], "2:4", damping=0.02, block_size=32)
            assert masks[f"model.layers.{i}.{name}.weight"].equal(mask)
            assert torch.equal(model.model.layers[i].get_parameter(f"{name}.weight"), weight)
            with torch.no_grad():
                layer.weight.copy_(weight)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_the_model_suffers_less_from_sparsegpt(pattern):
    """Change of the final hidden states on the calibration text."""
    dense = tiny_llama()
    error = {}
    with torch.no_grad():
        wanted = dense.model(input_ids=TEXT, use_cache=False).last_hidden_state
        for method in METHODS:
            model = copy.deepcopy(dense)
            prune(model, method=method, pattern=pattern, calibration=TEXT)
            error[method] = float((model.model(input_ids=TEXT, use_cache=False).last_hidden_state - wanted).norm())
    assert error["sparsegpt"] < 0.97 * error["wanda"]
    assert error["wanda"] < error["magnitude"]


def test_magnitude_by_tensor_and_by_row():
    model = tiny_llama()
    dense = copy.deepcopy(model)
    masks = prune(model, method="magnitude", pattern="60%", scope="tensor")  # no calibration
    for name, mask in masks.items():
        weight = dense.get_parameter(name).detach()
        assert mask.equal(select(weight.abs(), parse_pattern("60%"), "tensor"))
        assert int(mask.count()) == int(0.4 * weight.numel())
    rows = prune(dense, method="magnitude", pattern="60%")
    assert any(not rows[name].equal(masks[name]) for name in masks)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_weights_are_scored_in_fp32(method):
    model = tiny_llama().to(torch.bfloat16)
    masks = prune(model, method=method, pattern="2:4", calibration=TEXT)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert nm_violations(model, masks) == []
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_on_a_gpu(method, pattern, dtype):
    model = tiny_llama().to(dtype)
    other = copy.deepcopy(model).cuda()
    masks = prune(model, method=method, pattern=pattern, calibration=TEXT)
    there = prune(other, method=method, pattern=pattern, calibration=TEXT)
    for name, mask in there.items():
        weight = other.get_parameter(name)
        assert weight.is_cuda
        assert mask.device == weight.device
        assert not weight[~mask.unpack()].any()
        assert int(mask.count()) == int(masks[name].count())
        # Hidden states differ by rounding, and with them a few near-ties.
        agree = float((mask.unpack().cpu() == masks[name].unpack()).float().mean())
        assert agree == 1 if method == "magnitude" else agree > 0.9


def test_any_form_of_calibration():
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    others = [copy.deepcopy(model) for _ in range(4)]
    masks = prune(model, calibration=TEXT, batch_size=2)
    assert [module.training for module in model.modules()] == modes
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t} for t in TEXT.split(2)]
    forms = [
        list(TEXT.split(2)),
        (row for row in rows),
        lambda: [others[2](input_ids=t, use_cache=False) for t in TEXT.split(2)],
        TEXT.int(),
    ]
    for other, form in zip(others, forms):
        again = prune(other, calibration=form, batch_size=2)
        assert same(model.eval(), other.eval())
        assert all(again[name].equal(mask) for name, mask in masks.items())


def test_a_module_that_is_not_of_transformers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

        def forward(self, x, scale=1.0):
            x = x * scale
            for block in self.blocks:
                x = block(x)
            return x

    model = Model()
    x = torch.randn(6, 8)
    results = [
        prune(copy.deepcopy(model), calibration=form, blocks=None, batch_size=6)
        if form is None
        else prune(m := copy.deepcopy(model), calibration=form, blocks=m.blocks, batch_size=6)
        for form in (2 * x, [(x, 2.0)], [{"x": x, "scale": 2.0}])
    ]
    for masks in results:
        assert list(masks) == [f"blocks.{i}.0.weight" for i in range(3)]
        assert all(mask.equal(results[0][name]) for name, mask in masks.items())
    with pytest.raises(ValueError, match="blocks: Model has no config with num_hidden_layers"):
        prune(model, calibration=x)


def test_blocks_of_models():
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    assert find_blocks(model) == list(model.model.layers)
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=8, ffn_dim=16, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=8
    )
    opt = transformers.OPTForCausalLM(config)
    assert find_blocks(opt) == list(opt.model.decoder.layers)
    config = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    t5 = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match=r"blocks: want one list of 2 modules .* found \['decoder.block', 'encoder.block'\]"
    ):
        find_blocks(t5)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match=r"blocks: transformer.h.0 holds no torch.nn.Linear; other layers \(a Conv1D"):
        prune(gpt2, method="magnitude")


def test_other_weights_of_a_block_are_named():
    model = tiny_llama()
    model.model.layers[1].extra = nn.Parameter(torch.ones(3, 4))
    with pytest.warns(
        UserWarning, match=r"1 weights of the blocks belong to no torch.nn.Linear and stay dense: model.layers.1.extra"
    ):
        prune(model, method="magnitude")


def refused(match: str, model: nn.Module | None = None, error: type[Exception] = ValueError, **options) -> None:
    """The error, and not a weight changed."""
    model = tiny_llama() if model is None else model
    before = copy.deepcopy(model)
    if "calibration" not in match:
        checked = {"method": "wanda", "pattern": "2:4"} | {k: v for k, v in options.items() if k != "calibration"}
        with pytest.raises(error, match=match):
            check_prunable(model, **checked)
    with pytest.raises(error, match=match):
        prune(model, **({"calibration": TEXT} | options))
    for (name, a), b in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name


def test_bad_input():
    refused(
        "method: want one of magnitude, wanda, sparsegpt, got 'sparse-gpt'; did you mean 'sparsegpt'",
        method="sparse-gpt",
    )
    refused("pattern: want n:m", pattern="half")
    refused("scope: want 'row' or 'tensor', got 'model'", scope="model")
    refused("scope: 'tensor' is for unstructured magnitude pruning; wanda at 50%", scope="tensor", pattern="50%")
    refused("scope: 'tensor' .* magnitude at 2:4", scope="tensor", method="magnitude")
    refused("calibration: sparsegpt needs text, got None", method="sparsegpt", calibration=None)
    refused(
        r"calibration: want int64 tokens \[rows, length\], got torch.float32 \(2, 3\)", calibration=torch.ones(2, 3)
    )
    refused("damping, block_size, batch_size: .* got -1, 128, 4", damping=-1)
    refused("damping, block_size, batch_size: .* got inf, 128, 4", damping=float("inf"))
    refused(
        "calibration: want it to run every block once a batch; calls of the blocks: \\[0, 0\\]",
        calibration=lambda: None,
    )
    refused(r"calibration: want int64 tokens \[rows, length\], got torch.int64 \(0, 40\)", calibration=TEXT[:0])
    refused("calibration: want tokens or mappings with input_ids, got str", calibration=["text"], error=TypeError)
    padded = {"input_ids": TEXT, "attention_mask": (TEXT > 5).long()}
    refused("calibration: a batch holds padding", calibration=[padded])
    refused(
        r"blocks: want at least one, all part of the model; got 1, not in it: \['Linear'\]", blocks=[nn.Linear(4, 4)]
    )
    refused("blocks: want at least one", blocks=[])
    model = tiny_llama()
    run = model.forward
    refused(
        "calibration: runs the model with a cache",
        model,
        calibration=lambda: run(input_ids=TEXT, use_cache=True),
    )


def test_weights_that_cannot_be_pruned():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    refused(r"model: model.layers.1.mlp.up_proj.weight holds NaN or infinity", model)
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    refused("mlp.up_proj.weight is shared with another layer", model)
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), requires_grad=False)
    refused("up_proj.weight is torch.int8; want plain floating weights", model, TypeError)
    model = tiny_llama()
    model.peft_config = {}
    refused("model: carries a PEFT adapter", model)
    model = tiny_llama()
    model.model.layers[1].mlp.unused = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"calibration: model.layers.1.mlp.unused saw no input"):
        prune(model, calibration=TEXT)
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(TEXT[0, 0])] = float("inf")
    with pytest.raises(
        ValueError, match=r"calibration: model.layers.0.self_attn.q_proj met inputs that are NaN or infinite"
    ):
        prune(model, calibration=TEXT)


def test_m_that_does_not_divide():
    refused(
        re.escape(
            "pattern: m = 5 does not divide the input columns of 14 layers: model.layers.0.self_attn.q_proj (64 columns)"
        ),
        pattern="2:5",
    )
    refused("m = 5 does not divide .* of 14 layers", pattern="2:5", skip_indivisible=True)
    model = tiny_llama()
    model.model.layers[1].mlp.extra = nn.Linear(6, 6)
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _, args, out: out + 0 * model.model.layers[1].mlp.extra(args[0][..., :6]).sum()
    )
    dense = model.model.layers[1].mlp.extra.weight.detach().clone()
    for method in METHODS:
        other = copy.deepcopy(model)
        with pytest.warns(
            UserWarning, match=r"prune: 1 layers stay dense, m = 4 .*: model.layers.1.mlp.extra \(6 columns\)"
        ):
            masks = prune(other, method=method, pattern="2:4", calibration=TEXT, skip_indivisible=True)
        assert len(masks) == LAYERS
        assert torch.equal(other.model.layers[1].mlp.extra.weight, dense)


class Between(nn.Module):
    """What happens between the blocks is `between`; counts its blocks' own forward passes."""

    def __init__(self, between):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.between, self.count = between, 0
        for block in self.blocks:
            block[1].register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1

    def forward(self, x):
        for block in self.blocks:
            x = self.between(block(x))
        return x


@pytest.mark.parametrize(("between", "dense"), [(lambda x: x, 3), (lambda x: x * 2, 4 * 3)])
def test_later_batches_skip_dense_blocks_where_nothing_lies_between(between, dense):
    torch.manual_seed(0)
    model = Between(between)
    other = copy.deepcopy(model)
    x = torch.randn(8, 8)
    masks = prune(model, calibration=x, blocks=model.blocks, batch_size=2)
    # Statistics of three blocks, outputs of two.
    assert model.count == dense + 4 * 5
    assert all("forward" not in vars(block) for block in model.blocks)
    again = prune(other, calibration=lambda: [other(rows) for rows in x.split(2)], blocks=other.blocks)
    assert all(mask.equal(again[name]) for name, mask in masks.items())


class Scaled(nn.Module):
    """Blocks that hand on their hidden states, and take a scale that is computed by `scales` from the first one's output."""

    def __init__(self, scales):
        super().__init__()

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x, scale=None, other=None):
                if other is not None:
                    scale = other["scales"][0]
                return self.linear(x if scale is None else x * scale).tanh()

        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scales = scales

    def forward(self, x):
        x = self.blocks[0](x)
        args, kwargs = self.scales(x)
        for block in self.blocks[1:]:
            x = block(x, *args, **kwargs)
        return x


SCALES = [
    lambda x: ((x.square().mean(0) + 0.01,), {}),
    lambda x: ((), {"scale": x.square().mean(0) + 0.01}),
    lambda x: ((), {"other": {"scales": [x.square().mean(0) + 0.01, None]}}),
]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_arguments_computed_from_a_block_are_those_of_the_dense_model(method, scales):
    torch.manual_seed(0)
    model = Scaled(scales)
    other = copy.deepcopy(model)
    x = torch.randn(64, 8)
    masks = prune(model, method=method, calibration=x, blocks=model.blocks, batch_size=16)
    again = prune(other, method=method, calibration=lambda: [other(r) for r in x.split(16)], blocks=other.blocks)
    assert same(model, other)
    assert all(mask.equal(again[name]) for name, mask in masks.items())


def test_a_model_that_needs_its_blocks_runs_with_them():
    def scales(x):
        assert x.abs().max() <= 1, "no output of a block"
        return (), {}

    model = Scaled(scales)
    assert len(prune(model, calibration=9 * torch.randn(64, 8), blocks=model.blocks, batch_size=16)) == 3
    assert all("forward" not in vars(block) for block in model.blocks)


def test_a_hessian_without_a_factor_is_damped_more():
    model = tiny_llama()
    other = copy.deepcopy(model)
    row = TEXT[:1]  # 40 tokens for 64 and 128 columns
    with pytest.warns(UserWarning, match="positive definite") as told:
        masks = prune(model, method="sparsegpt", calibration=row, damping=0)
    messages = [str(w.message) for w in told if "positive definite" in str(w.message)]
    assert (
        "prune: the Hessian of model.layers.0.self_attn.q_proj is not positive definite with damping 0; trying 0.001"
        in messages
    )
    assert nm_violations(model, masks) == []
    prune(other, method="sparsegpt", calibration=row, damping=0.001)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, other.model.layers[0].self_attn.q_proj.weight)


def test_a_failure_leaves_the_block_whole_and_names_the_layer(monkeypatch):
    model = tiny_llama()
    dense = copy.deepcopy(model)
    factor, calls = sparsegpt.inverse_factor, []

    def fail(hessian):
        calls.append(hessian)
        if len(calls) > 7 + 4:
            raise sparsegpt.NotPositiveDefinite("hessian: no")
        return factor(hessian)

    monkeypatch.setattr(sparsegpt, "inverse_factor", fail)
    name = "model.layers.1.mlp.gate_proj"
    with (
        pytest.warns(UserWarning, match=rf"the Hessian of {name} .* damping 0.01, 0.1; trying 1"),
        pytest.raises(ValueError, match=rf"calibration: the Hessian of {name} .* damping 0.01, 0.1, 1; give a larger"),
    ):
        prune(model, method="sparsegpt", calibration=TEXT)
    assert len(calls) == 7 + 4 + 3
    assert same(model.model.layers[1], dense.model.layers[1])
    assert not same(model.model.layers[0], dense.model.layers[0])
