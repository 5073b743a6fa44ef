"""MaskedLoraConfig on a tiny U-Net and a tiny Llama: merged, off, saved, reloaded where nothing else is known, exported."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastunlearn
from fastunlearn import BitMask, ops
from tests.conftest import ROOT

peft = pytest.importorskip("peft")
from peft import PeftModel, get_peft_model  # noqa: E402

from fastunlearn import MaskedLoraConfig  # noqa: E402
from fastunlearn.localize.patterns import nm_violations  # noqa: E402
from fastunlearn.parametrize import export  # noqa: E402
from fastunlearn.parametrize.low_rank import best_factors  # noqa: E402
from fastunlearn.parametrize.masked_lora import PEFT_TYPE, MaskedLoraLayer, base_identity, check_base, masked_layers  # noqa: E402

#: names in the tiny models, shared with the processes that reload
MODELS = """
import torch

def llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()

def unet(seed=0):
    from diffusers import UNet2DConditionModel
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()

def run(model):
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "conv_in") or hasattr(getattr(model, "base_model", None), "conv_in"):
        x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
        return model(x, torch.tensor([3, 70]), text).sample
    return model(torch.randint(0, 64, (2, 7), generator=generator)).logits
"""
exec(MODELS)
llama, unet, run = globals()["llama"], globals()["unet"], globals()["run"]
MAKE = {"llama": llama, "unet": unet}
ATTENTION = {"llama": ["q_proj", "v_proj"], "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]}


def random_masks(model, density=0.4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: BitMask.pack(torch.rand(p.shape, generator=generator) < density)
        for name, p in model.named_parameters()
        if p.dim() in (2, 4) and "embed_tokens" not in name and "lm_head" not in name
    }


def config(model, kind, variant="per_weight", **options):
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": "random", **options}
    if variant == "per_weight":
        return MaskedLoraConfig(masks=random_masks(model), target_modules=ATTENTION[kind], **options)
    if variant == "per_module":
        chosen = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][2:9:3]
        return MaskedLoraConfig(variant="per_module", target_modules=chosen, **options)
    return MaskedLoraConfig(target_modules=ATTENTION[kind], **options)


def adapted(kind, variant="per_weight", **options):
    model = MAKE[kind]()
    return get_peft_model(model, config(model, kind, variant, **options)).eval()


BOTH = pytest.mark.parametrize("kind", ["llama", "unet"])
VARIANTS = pytest.mark.parametrize("variant", ["per_weight", "per_module", "dense"])


@BOTH
@VARIANTS
def test_off_is_the_base_bit_for_bit_and_merged_is_the_masked_forward(kind, variant):
    base = MAKE[kind]()
    want = run(base)
    model = adapted(kind, variant)
    changed = run(model)
    assert not torch.allclose(changed, want, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(model), want)
    model.merge_adapter()
    torch.testing.assert_close(run(model), changed, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model), want)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(run(model), changed)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, MaskedLoraLayer) for m in merged.modules())
    torch.testing.assert_close(run(merged), changed, rtol=1e-4, atol=1e-5)
    weights, masks = dict(merged.named_parameters()), random_masks(base)
    moved = 0
    for name, before in base.named_parameters():
        kept = torch.ones(before.shape, dtype=torch.bool)
        if variant == "per_weight" and name in masks:
            kept = ~masks[name].unpack()
        if variant == "per_weight":
            assert torch.equal(weights[name][kept].view(torch.int32), before[kept].view(torch.int32)), name
        moved += int((weights[name] != before).sum())
    assert moved > 0


@BOTH
@VARIANTS
def test_training_moves_the_adapter_only(kind, variant):
    model = adapted(kind, variant, init_lora_weights="gaussian", lora_dropout=0.1).train()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    target = run(model.eval()).detach() + 1
    torch.testing.assert_close(target - 1, run(MAKE[kind]()).detach(), rtol=1e-4, atol=1e-5)  # B = 0: the base at first
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (run(model) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], before) for name, before in base.items())


def test_full_masks_are_the_dense_variant():
    model = unet()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    parameters = dict(model.named_parameters())
    masks = {f"{n}.weight": BitMask.ones(parameters[f"{n}.weight"].shape) for n in names}
    torch.manual_seed(9)
    masked = get_peft_model(
        unet(), MaskedLoraConfig(masks=masks, r=2, lora_alpha=0.1, init_lora_weights="random")
    ).eval()
    dense = get_peft_model(
        unet(), MaskedLoraConfig(variant="per_module", target_modules=names, r=2, lora_alpha=0.1)
    ).eval()
    factors = {n: p for n, p in masked.named_parameters() if "lora_" in n}
    missing = dense.load_state_dict(factors, strict=False)
    assert not missing.unexpected_keys
    torch.testing.assert_close(run(masked), run(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_a_survivor_mask_keeps_the_pattern(pattern):
    """An ordinary adapter fills the zeros of a pruned model when it is merged; the masked one does not."""
    model = llama()
    masks = {}
    for name, p in model.named_parameters():
        if "proj" in name:
            masks[name] = ops.nm_mask(p.detach().abs(), *pattern)
            p.data.mul_(masks[name].unpack())
    pruned = copy.deepcopy(model)
    tuned = get_peft_model(model, MaskedLoraConfig(masks=masks, r=4, init_lora_weights="random"))
    assert len(list(masked_layers(tuned))) == len(masks)
    merged = tuned.merge_and_unload()
    assert not nm_violations(merged, masks, *pattern)
    assert any(not torch.equal(a, b) for a, b in zip(merged.parameters(), pruned.parameters()))
    ordinary = get_peft_model(pruned, MaskedLoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="random"))
    assert nm_violations(ordinary.merge_and_unload(), masks, *pattern)


RELOAD = (
    MODELS
    + """
import sys
import fastunlearn
from peft import PeftModel
kind, folder, known = sys.argv[1:]
if known == "known":
    from fastunlearn import MaskedLoraConfig
model = PeftModel.from_pretrained({"llama": llama, "unet": unet}[kind](), folder).eval()
torch.save(run(model).detach(), folder + "/out.pt")
"""
)


def _reload(kind, folder, known="known"):
    return subprocess.run(
        [sys.executable, "-c", RELOAD, kind, str(folder), known], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("unet", "per_weight"),
        *(
            pytest.param(*pair, marks=pytest.mark.thorough)
            for pair in (("llama", "per_weight"), ("unet", "per_module"))
        ),
    ],
)
def test_reloaded_in_a_clean_process(tmp_path, kind, variant):
    model = adapted(kind, variant)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["peft_type"] == PEFT_TYPE
    assert "masks" not in said
    done = _reload(kind, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), run(model))
    # Where fastunlearn's adapter is not known the masks are not dropped: nothing is loaded.
    unknown = _reload(kind, tmp_path, "unknown")
    assert unknown.returncode != 0
    assert PEFT_TYPE in unknown.stderr


@BOTH
@VARIANTS
def test_reloaded(tmp_path, kind, variant):
    model = adapted(kind, variant, rank_pattern={"q_proj": 2, "to_k": 5})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MAKE[kind](), tmp_path).eval()
    assert torch.equal(run(again), run(model))
    for (name, a), (other, b) in zip(masked_layers(model), masked_layers(again)):
        assert name == other
        assert (a.mask("default") is None) == (variant != "per_weight")
        assert a.mask("default") is None or a.mask("default").equal(b.mask("default"))
        if variant != "per_module":
            assert a.r["default"] == b.r["default"] == {"q_proj": 2, "to_k": 5}.get(name.rsplit(".")[-1], 3)
    # In another type the base is compared by what rounding leaves.
    half = PeftModel.from_pretrained(MAKE[kind]().to(torch.bfloat16), tmp_path)
    assert next(masked_layers(half))[1].base_layer.weight.dtype == torch.bfloat16


def test_another_base_is_refused(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for other weights than this model's \\(their hash differs"):
        PeftModel.from_pretrained(llama(seed=1), tmp_path)
    with pytest.raises(ValueError, match="sampled entries differ"):
        PeftModel.from_pretrained(llama(seed=1).to(torch.bfloat16), tmp_path)
    one = llama()
    one.model.layers[0].self_attn.q_proj.weight.data[3, 4] += 1e-6
    with pytest.raises(ValueError, match="hash differs"):
        PeftModel.from_pretrained(one, tmp_path)
    with pytest.raises(ValueError, match=r"the adapter has \d+ modules that this model has not"):
        PeftModel.from_pretrained(unet(), tmp_path)


def test_base_identity_sees_names_shapes_types_and_bits():
    w = torch.arange(12.0).view(3, 4)
    known = base_identity({"a": w})["sha256"]
    others = [{"b": w}, {"a": w.view(4, 3)}, {"a": w.half()}, {"a": w + 1e-6}, {"a": -0.0 * w}]
    assert known not in {base_identity(o)["sha256"] for o in others}
    assert known == base_identity({"a": w.t().contiguous().t()})["sha256"]


def test_every_weight_of_the_base_is_looked_at():
    """Also those whose names come late, where the element type differs and a hash says nothing."""
    weights = {f"{part}.{i}.to_k": torch.randn(4, 4) for part in ("attn1", "attn2") for i in range(40)}
    known = base_identity(weights)
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    check_base(half, known)
    for name in weights:
        with pytest.raises(ValueError, match=r"base: the adapter was made for other weights .*1 of 80 sampled"):
            check_base(half | {name: half[name] + 1}, known)
    with pytest.raises(ValueError, match="base: the adapter was made for other weights"):
        check_base(half, known | {"probe": known["probe"][:16]})


def test_two_adapters():
    model = adapted("llama")
    one = run(model)
    model.add_adapter("second", config(llama(), "llama", "dense"))
    assert torch.equal(run(model), one)
    model.base_model.set_adapter(["default", "second"])
    both = run(model)
    model.set_adapter("second")
    two = run(model)
    assert not torch.allclose(one, two)
    model.base_model.set_adapter(["default", "second"])
    merged = run(model.merge_and_unload(adapter_names=["default", "second"]))
    torch.testing.assert_close(both, merged, rtol=1e-4, atol=1e-5)


def test_diffusers_own_way_of_adding():
    base = unet()
    want = run(base)
    model = unet()
    model.add_adapter(config(model, "unet"))
    assert not torch.allclose(run(model), want)
    model.disable_adapters()
    assert torch.equal(run(model), want)


def test_gradient_checkpointing():
    results = []
    for on in (False, True):
        model = adapted("llama").train()
        if on:
            model.base_model.model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        run(model).square().mean().backward()
        results.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# ---- exports --------------------------------------------------------------------------------------------------------------


@BOTH
@VARIANTS
def test_factors_and_sparse_delta(tmp_path, kind, variant, capsys):
    model = adapted(kind, variant)
    want = run(copy.deepcopy(model).merge_and_unload())
    export.save_factors(model, tmp_path / "factors.safetensors")
    assert torch.equal(run(export.apply_factors(MAKE[kind](), tmp_path / "factors.safetensors")), want)
    count = export.save_sparse_delta(model, tmp_path / "delta.safetensors")
    assert torch.equal(run(export.apply_sparse_delta(MAKE[kind](), tmp_path / "delta.safetensors")), want)
    layers = [layer for _, layer in masked_layers(model)]
    movable = sum(
        layer.weight.numel() if layer.mask("default") is None else int(layer.mask("default").count())
        for layer in layers
    )
    assert 0.9 * movable < count <= movable
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.save_factors(model, tmp_path / "factors.safetensors")
    with pytest.raises(ValueError, match="made for other weights"):
        export.apply_factors(MAKE[kind](seed=1), tmp_path / "factors.safetensors")
    with pytest.raises(ValueError, match="want a file of format"):
        export.load_factors(tmp_path / "delta.safetensors")


def pipeline(model):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    vae = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=model, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.mark.parametrize("variant", ["per_module", "dense"])
def test_a_plain_lora_file_that_diffusers_loads(tmp_path, variant):
    model = adapted("unet", variant)
    export.save_lora(model, tmp_path / "lora.safetensors")
    pipe = pipeline(unet())
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(run(pipe.unet.eval()), run(model), rtol=1e-4, atol=1e-5)


def test_a_masked_adapter_is_no_plain_lora_file(tmp_path, capsys):
    model = adapted("unet")
    with pytest.raises(ValueError, match="has a mask, which a plain LoRA file cannot hold"):
        export.save_lora(model, tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())
    # What saves like PEFT's own adapter is no file that a plain loader takes for one either.
    model.save_pretrained(tmp_path / "adapter")
    errors = [export.save_low_rank(model, tmp_path / f"{r}.safetensors", r)[""] for r in (1, 4, 8, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3
    assert errors[-1] < 1e-5
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert f"{errors[0]:.2%} of the change is lost" in said[0]
    pipe = pipeline(unet())
    pipe.load_lora_weights(tmp_path, weight_name="64.safetensors")
    torch.testing.assert_close(run(pipe.unet.eval()), run(model), rtol=1e-3, atol=1e-4)
    delta = dict(masked_layers(model))["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"].get_delta_weight(
        "default"
    )
    A, B = best_factors(delta, 2)
    best = torch.linalg.svdvals(delta)[2:].norm() / delta.norm()
    assert float((delta - B @ A).norm() / delta.norm()) == pytest.approx(float(best), rel=1e-4)


# ---- bad input ------------------------------------------------------------------------------------------------------------


def _masks(**changed):
    masks = random_masks(llama())
    return {**masks, **changed}


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskedLoraConfig(r=0), "r: want a rank of at least 1"),
        (lambda: MaskedLoraConfig(r=-3), "r: want a rank of at least 1"),
        (lambda: MaskedLoraConfig(rank_pattern={"a": 0}), "rank_pattern: 'a' wants"),
        (lambda: MaskedLoraConfig(lora_dropout=1.0), r"lora_dropout: want a number in \[0, 1\)"),
        (lambda: MaskedLoraConfig(lora_alpha=float("nan")), "lora_alpha: want"),
        (lambda: MaskedLoraConfig(variant="per_wieght"), "variant: 'per_wieght' is unknown; did you mean per_weight"),
        (lambda: MaskedLoraConfig(variant="per_weight"), "masks: variant per_weight wants"),
        (lambda: MaskedLoraConfig(variant="dense", masks={}), "variant dense is an ordinary adapter"),
        (lambda: MaskedLoraConfig(variant="per_module", target_modules="to_q"), "wants the list of chosen modules"),
        (lambda: MaskedLoraConfig(init_lora_weights="zero"), "init_lora_weights: 'zero' is unknown"),
        (lambda: MaskedLoraConfig(bias="some"), "bias: want none, all or lora_only"),
        (lambda: MaskedLoraConfig(masks=_masks(**{Q: BitMask.ones((8, 8))}), target_modules=["q_proj"]),
         r"the mask of 'model.layers.0.self_attn.q_proj' is \(8, 8\), its weight \(32, 32\)"),
        (lambda: MaskedLoraConfig(masks=_masks(**{"model.layers.0.self_attn.q_prj.weight": BitMask.ones((8, 8))})),
         "masks: 1 belong to no parameter of the model.*did you mean model.layers.0.self_attn.q_proj"),
        (lambda: MaskedLoraConfig(masks={Q: BitMask.zeros((32, 32))}), "no bit is set in any target module"),
        (lambda: MaskedLoraConfig(masks={Q: BitMask.ones((32, 32))}, target_modules=["v_proj"]), "has no mask; give one"),
        (lambda: MaskedLoraConfig(target_modules=["qproj"]), "no module 'qproj'; did you mean q_proj"),
        (lambda: MaskedLoraConfig(variant="per_module", target_modules=["model.layers.0.self_attn.q"]), "has no module"),
    ],
)  # fmt: skip
def test_bad_values(make, words):
    model = llama()
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, make())
    assert not any(isinstance(m, MaskedLoraLayer) for m in model.modules())


def test_bad_types():
    with pytest.raises(TypeError, match="masks: want parameter name -> BitMask, got list"):
        MaskedLoraConfig(masks=[1])
    with pytest.raises(TypeError, match="want a BitMask, got Tensor"):
        MaskedLoraConfig(masks={"a": torch.ones(2)})
    with pytest.raises(TypeError, match=r"'model\.norm' is a LlamaRMSNorm; masked adapters go on Linear and Conv2d"):
        get_peft_model(llama(), MaskedLoraConfig(target_modules=["model.norm"]))
    with pytest.raises(ValueError, match="carries no masked adapter"):
        export.save_factors(llama(), "nowhere")
    with pytest.raises(ValueError, match="'other' is on no layer of the model"):
        export.save_factors(adapted("llama"), "nowhere", adapter="other")
    with pytest.raises(ValueError, match="rank: want at least 1"):
        export.save_low_rank(adapted("llama"), "nowhere", 0)


def test_import_of_the_package_stays_light():
    code = "import sys, fastunlearn; assert 'peft' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert fastunlearn.MaskedLoraConfig is MaskedLoraConfig


@BOTH
def test_tiles(tmp_path, kind):
    """A mask of tiles is the mask of their entries: forward, gradients, merged, saved and reloaded."""

    def tiled(block):
        model, generator = MAKE[kind](), torch.Generator().manual_seed(4)
        masks = {}
        for name, p in model.named_parameters():
            if p.dim() in (2, 4) and "embed_tokens" not in name and "lm_head" not in name:
                rows, cols = p.shape[0], p[0].numel()
                tiles = torch.rand(-(-rows // 8), -(-cols // 8), generator=generator) < 0.5
                full = tiles.repeat_interleave(8, 0).repeat_interleave(8, 1)[:rows, :cols].reshape(p.shape)
                masks[name] = tiles if block else BitMask.pack(full)
        torch.manual_seed(7)
        options = {"r": 3, "init_lora_weights": "random", "target_modules": ATTENTION[kind]}
        return get_peft_model(model, MaskedLoraConfig(masks=masks, block=8 if block else None, **options)).eval()

    tiles, entries = tiled(True), tiled(False)
    torch.testing.assert_close(run(tiles), run(entries), rtol=1e-4, atol=1e-5)
    run(tiles).square().mean().backward()
    run(entries).square().mean().backward()
    both = zip(tiles.named_parameters(), entries.named_parameters())
    for (name, a), (_, b) in both:
        if "lora_" in name:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    tiles.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MAKE[kind](), tmp_path).eval()
    assert torch.equal(run(again), run(tiles))
    export.save_factors(tiles, tmp_path / "factors.safetensors")
    want = run(tiles.merge_and_unload())
    torch.testing.assert_close(want, run(entries.merge_and_unload()), rtol=1e-4, atol=1e-5)
    assert torch.equal(run(export.apply_factors(MAKE[kind](), tmp_path / "factors.safetensors")), want)


def test_tiles_that_do_not_fit():
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(TypeError, match="with block=8 want bool"):
        MaskedLoraConfig(masks={name: BitMask.ones((32, 32))}, block=8)
    with pytest.raises(ValueError, match="block: want a side of at least 1"):
        MaskedLoraConfig(masks={name: torch.ones(4, 4, dtype=torch.bool)}, block=0)
    with pytest.raises(ValueError, match=r"is \(3, 4\), its weight \(32, 32\), \[4, 4\] tiles of 8"):
        get_peft_model(llama(), MaskedLoraConfig(masks={name: torch.ones(3, 4, dtype=torch.bool)}, block=8))


EXPORTED = (
    MODELS
    + """
import sys
import fastunlearn
from fastunlearn.parametrize import export
kind, folder, *forms = sys.argv[1:]
for form in forms:
    model = {"llama": llama, "unet": unet}[kind]()
    if form == "factors":
        export.apply_factors(model, folder + "/factors.safetensors")
    elif form == "delta":
        export.apply_sparse_delta(model, folder + "/delta.safetensors")
    elif form == "merged":
        model = type(model).from_pretrained(folder + "/merged").eval()
    else:
        model.load_lora_adapter(folder, weight_name=form + ".safetensors", prefix="unet")
    torch.save(run(model).detach(), folder + f"/{form}.pt")
"""
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("unet", "dense"),
        *(
            pytest.param(*pair, marks=pytest.mark.thorough)
            for pair in (("llama", "per_weight"), ("unet", "per_weight"))
        ),
    ],
)
def test_every_export_in_a_clean_process(tmp_path, kind, variant, capsys):
    model = adapted(kind, variant)
    want = run(model)
    export.save_factors(model, tmp_path / "factors.safetensors")
    export.save_sparse_delta(model, tmp_path / "delta.safetensors")
    forms = {"factors": 1e-5, "delta": 1e-5, "merged": 1e-5}
    if kind == "unet":
        # Of full rank nothing is lost; a plain loader knows no masks.
        export.save_low_rank(model, tmp_path / "low_rank.safetensors", 64)
        forms["low_rank"] = 1e-4
        if variant == "dense":
            export.save_lora(model, tmp_path / "lora.safetensors")
            forms["lora"] = 1e-5
        else:
            with pytest.raises(ValueError, match="mask"):
                export.save_lora(model, tmp_path / "lora.safetensors")
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path / "merged")
    words = [sys.executable, "-c", EXPORTED, kind, str(tmp_path), *forms]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for form, off in forms.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{form}.pt"), want, rtol=10 * off, atol=off, msg=form)


def test_files_whose_ranks_or_masks_do_not_fit(tmp_path):
    """Factors of another rank than the adapter, bits of another shape than the weight: nothing is loaded."""
    from safetensors.torch import load_file, save_file

    adapted("llama").save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    whole = load_file(path)
    for part, change in (("lora_A", lambda t: t[:2]), ("lora_mask_bits", lambda t: t[:, :1])):
        name = next(key for key in whole if part in key)
        save_file(whole | {name: change(whole[name]).contiguous()}, path, {"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|shape"):
            PeftModel.from_pretrained(llama(), tmp_path / "a")
