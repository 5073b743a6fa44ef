"""`fastunlearn export`: every format written from every kind of run, and loaded by the other tool; compared by what the model then says."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.tiny_chat import char_tokenizer, tiny_llama
from tests.tiny_diffusion import tiny_flux, tiny_pipeline, tiny_v2, tiny_xl

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastunlearn import BitMask, MaskedLoraConfig
from fastunlearn.checkpoint import save_checkpoint
from fastunlearn.cli import export as command
from fastunlearn.exporting import export_run
from fastunlearn.ops.mask import load_masks
from fastunlearn.parametrize.lora_files import kohya_metadata, kohya_name
from fastunlearn.parametrize.low_rank import LowRank
from fastunlearn.parametrize.partial_unet import read_partial_unet, save_partial_unet

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the models that runs start from."""
    top = tmp_path_factory.mktemp("bases")
    for name, make in {"sd": tiny_pipeline, "sd2": tiny_v2, "xl": tiny_xl, "flux": tiny_flux}.items():
        make().save_pretrained(top / name)
    save_checkpoint(top / "llama", tiny_llama(), char_tokenizer())
    return top


@torch.no_grad()
def drawn(network):
    """What a denoiser says to a fixed input."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if not hasattr(network.config, "cross_attention_dim"):
        ids = torch.zeros(4, 3), torch.zeros(5, 3)
        given = {"encoder_hidden_states": random(1, 5, 32), "pooled_projections": random(1, 16), "timestep": torch.tensor([0.3])}  # fmt: skip
        return network(hidden_states=random(1, 4, 4), img_ids=ids[0], txt_ids=ids[1], return_dict=False, **given)[0]
    more = {}
    if network.config.addition_embed_type == "text_time":
        more = {"added_cond_kwargs": {"text_embeds": random(1, 8), "time_ids": torch.ones(1, 6)}}
    text = random(1, 5, network.config.cross_attention_dim)
    return network(random(1, 2, 8, 8), torch.tensor([7]), text, return_dict=False, **more)[0]


@torch.no_grad()
def said(model):
    return model(torch.tensor([[5, 9, 70, 33, 2, 110]])).logits


def masks_of(network, names, density=0.5):
    generator = torch.Generator().manual_seed(1)
    weights = {f"{n}.weight": network.get_submodule(n).weight for n in names}
    return {n: BitMask.pack(torch.rand(w.shape, generator=generator) < density) for n, w in weights.items()}


def layers_of(network):
    return [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def adapted(network, *, masked, targets=None, r=3):
    torch.manual_seed(2)
    names = layers_of(network) if targets is None else targets
    given = {"masks": masks_of(network, names)} if masked else {"variant": "per_module", "target_modules": names}
    return get_peft_model(network, MaskedLoraConfig(r=r, lora_alpha=1.5, init_lora_weights="random", **given)).eval()


def adapter_run(folder, base, make, **options):
    """A run that left an adapter -> what the network says with it."""
    pipeline = make()
    model = adapted(pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer, **options)
    model.save_pretrained(folder / "adapter")
    (folder / "metrics.json").write_text(json.dumps({"method": "spare", "model": str(base), "erase_concept": "Cat"}))
    return drawn(model)


KEYS = ("attn2.to_k.weight", "attn2.to_v.weight")


def edit_run(folder, base, make, rank=2, more=()):
    """A run that left weights that moved, by a change of that rank -> what the network says with them."""
    pipeline = make()
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    parameters, generator = dict(network.named_parameters()), torch.Generator().manual_seed(3)
    moved = {}
    for name, weight in parameters.items():
        if name.endswith(KEYS) or name in more or name == "context_embedder.weight":
            factors = (
                [torch.randn(n, rank, generator=generator) for n in weight.shape[:2]] if weight.dim() == 2 else None
            )
            change = factors[0] @ factors[1].T if factors else torch.randn(weight.shape, generator=generator)
            weight.data += 0.1 * change
            moved[name] = weight.data
    folder.mkdir(exist_ok=True)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    save_partial_unet(moved, folder / f"{part}.safetensors", method="uce")
    (folder / "metrics.json").write_text(json.dumps({"method": "uce", "model": str(base)}))
    return drawn(network)


def loaded(pipeline, path):
    """The denoiser of a pipeline behind diffusers' own loader."""
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    return (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).eval()


@pytest.mark.parametrize(("name", "make"), [("sd", tiny_pipeline), ("sd2", tiny_v2), ("xl", tiny_xl)])
def test_an_adapter_without_masks_is_held_by_every_format(bases, tmp_path, capsys, name, make):
    want = adapter_run(tmp_path, bases / name, make, masked=False)
    assert not torch.allclose(want, drawn(make().unet), **CLOSE)
    # kohya-ss, through diffusers' converter: every linear layer and convolution there is.
    kohya = export_run(tmp_path, "kohya", tmp_path / "kohya.safetensors")
    assert "exact" in capsys.readouterr().out
    torch.testing.assert_close(drawn(loaded(make(), kohya)), want, **CLOSE)
    tensors = load_file(kohya)
    alpha = next(tensor for key, tensor in tensors.items() if key.endswith(".alpha"))
    assert (alpha.dtype, float(alpha)) == (torch.float32, 1.5)
    assert any("input_blocks_4" in key or "input_blocks_3_1" in key for key in tensors) == (name == "xl")
    folder = export_run(tmp_path, "diffusers", tmp_path / "lora")
    assert folder.name == "pytorch_lora_weights.safetensors"
    torch.testing.assert_close(drawn(loaded(make(), folder)), want, **CLOSE)
    export_run(tmp_path, "peft", tmp_path / "peft")
    torch.testing.assert_close(drawn(PeftModel.from_pretrained(make().unet, tmp_path / "peft").eval()), want, **CLOSE)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    partial = export_run(tmp_path, "partial", tmp_path / "partial.safetensors")
    unet = make().unet
    assert not unet.load_state_dict(load_file(partial), strict=False).unexpected_keys
    torch.testing.assert_close(drawn(unet), want, **CLOSE)


def test_a_masked_adapter_is_approximated_or_merged(bases, tmp_path, capsys):
    want = adapter_run(tmp_path, bases / "sd", tiny_pipeline, masked=True)
    lost = []
    for rank in (None, 8, 64):
        path = export_run(tmp_path, "kohya", tmp_path / f"{rank}.safetensors", rank=rank)
        lines = capsys.readouterr().out.splitlines()
        assert "of the change is lost (most in " in lines[0]
        assert ("--to partial and --to merged lose nothing" in " ".join(lines)) == (rank != 64)
        lost.append(float((drawn(loaded(tiny_pipeline(), path)) - want).norm()))
    assert lost[0] > lost[1] > lost[2]
    assert lost[2] < 1e-3 * float(want.norm())
    # Where nothing knows of masks, PEFT loads the approximation; the masked adapter itself it refuses.
    export_run(tmp_path, "peft", tmp_path / "peft", rank=64)
    torch.testing.assert_close(
        drawn(PeftModel.from_pretrained(tiny_pipeline().unet, tmp_path / "peft").eval()), want, rtol=1e-3, atol=1e-3
    )
    # Whole: as weights, and as a pipeline.
    unet = tiny_pipeline().unet
    partial = export_run(tmp_path, "partial", tmp_path / "weights")
    assert partial.name == "unet.safetensors"
    unet.load_state_dict(load_file(partial), strict=False)
    torch.testing.assert_close(drawn(unet), want, **CLOSE)
    merged = export_run(tmp_path, "merged", tmp_path / "merged")
    again = StableDiffusionPipeline.from_pretrained(merged).unet.eval()
    assert all(torch.equal(weight, unet.state_dict()[name]) for name, weight in again.state_dict().items())
    torch.testing.assert_close(drawn(again), want, **CLOSE)
    # An adapter's own folder will do, and finds beside it what it is of.
    again = export_run(tmp_path / "adapter", "partial", tmp_path / "again.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(load_file(again).values(), load_file(partial).values()))


@pytest.mark.parametrize(("name", "make"), [("sd", tiny_pipeline), ("xl", tiny_xl), ("flux", tiny_flux)])
def test_an_edit_of_low_rank_is_held_by_factors(bases, tmp_path, capsys, name, make):
    run = tmp_path / "run"
    want = edit_run(run, bases / name, make)
    path = export_run(run, "diffusers", tmp_path / "lora.safetensors", rank=2)
    assert "rank 2 of " in (out := capsys.readouterr().out)
    assert "0.00% of the change is lost" in out
    torch.testing.assert_close(drawn(loaded(make(), path)), want, rtol=1e-3, atol=1e-4)
    if name == "flux":
        with pytest.raises(
            ValueError, match=r"kohya holds no run of an image transformer.*peft or diffusers or partial"
        ):
            export_run(run, "kohya", tmp_path / "kohya.safetensors")
        return
    # The default rank is more than such an edit needs.
    path = export_run(run, "kohya", tmp_path / "kohya.safetensors", dtype=torch.float16)
    assert load_file(path)[next(iter(k for k in load_file(path) if "lora_up" in k))].dtype == torch.float16
    torch.testing.assert_close(drawn(loaded(make(), path)), want, rtol=1e-2, atol=1e-2)
    # A file alone, as ESD's and UCE's code write them.
    given = export_run(run / "unet.safetensors", "diffusers", tmp_path / "of_file.safetensors", model=bases / name)
    torch.testing.assert_close(drawn(loaded(make(), given)), want, rtol=1e-3, atol=1e-4)


def test_a_strangers_file_may_say_anything_of_itself(tmp_path):
    weights = {"conv_in.bias": torch.randn(8)}
    about = {"path": "/x", "overwrite": True, "weights": 1, "method": "mine"}
    save_file(weights, tmp_path / "unet.safetensors", metadata={"fastunlearn": json.dumps(about)})
    out = export_run(tmp_path / "unet.safetensors", "partial", tmp_path / "out.safetensors")
    assert read_partial_unet(out)[1] == {"method": "mine"}
    assert torch.equal(load_file(out)["conv_in.bias"], weights["conv_in.bias"])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": [1], "peft_type": "LORA"}))
    save_file({"base_model.model.conv_in.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nothing in the run says what it was made from"):
        export_run(tmp_path, "merged", tmp_path / "merged")


def test_what_factors_cannot_hold(bases, tmp_path):
    want = edit_run(tmp_path, bases / "sd", tiny_pipeline, more=("conv_norm_out.weight",))
    for to in ("kohya", "diffusers"):
        with pytest.raises(ValueError, match=rf"to: {to} cannot hold this run \(1 modules changed .* as conv_norm_out\); peft or partial"):  # fmt: skip
            export_run(tmp_path, to, tmp_path / "lora.safetensors")
    # PEFT keeps such a module whole.
    export_run(tmp_path, "peft", tmp_path / "peft")
    model = PeftModel.from_pretrained(tiny_pipeline().unet, tmp_path / "peft").eval()
    torch.testing.assert_close(drawn(model), want, rtol=1e-3, atol=1e-4)


def test_names_of_a_real_sdxl():
    """Of the U-Net of stable-diffusion-xl-base-1.0."""
    config = {"addition_embed_type": "text_time", "layers_per_block": 2}
    config["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    for module, name in {
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block_1_transformer_blocks_9_ff_net_2",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v": "output_blocks_2_1_transformer_blocks_9_attn2_to_v",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0": "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "up_blocks.2.resnets.0.conv2": "output_blocks_6_0_out_layers_3",
        "add_embedding.linear_2": "label_emb_0_2",
        "conv_out": "out_2",
    }.items():
        assert kohya_name(module, config) == f"lora_unet_{name}"
    with pytest.raises(ValueError, match="no name for 'something_else'"):
        kohya_name("something.else", config)
    with pytest.raises(ValueError, match="layers_per_block=\\[1, 2\\]"):
        kohya_name("conv_in", config | {"layers_per_block": (1, 2)})


@pytest.mark.parametrize(
    ("config", "version", "v2"),
    [
        ({"cross_attention_dim": 768}, "sd_v1", "False"),
        ({"cross_attention_dim": 1024}, "sd_v2", "True"),
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "sdxl_base_v1-0", "False"),
        ({"cross_attention_dim": [16, 32]}, None, None),
    ],
)
def test_a_kohya_file_says_which_stable_diffusion_it_is_of(config, version, v2):
    """By ss_v2 the web UI tells SD 2.x from 1.x, and hides what is of the other one."""
    about = kohya_metadata({"conv_in": LowRank(torch.zeros(2, 4), torch.zeros(4, 2), 1.0, (4, 4))}, config)
    assert (about.get("ss_base_model_version"), about.get("ss_v2")) == (version, v2)


def test_a_run_whose_model_is_elsewhere_asks_for_it(bases, tmp_path, monkeypatch):
    """A run says what it was made from as it was told: a folder's name, from where it was run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit_run(tmp_path / "run", "sd", tiny_pipeline)
    adapted(tiny_llama(), masked=True, targets=PROJECTIONS).save_pretrained(tmp_path / "language" / "adapter")
    (tmp_path / "language" / "metrics.json").write_text(json.dumps({"model": "./llama"}))
    for run, to in (("run", "diffusers"), ("language", "merged")):
        with pytest.raises(
            ValueError, match=r"model: the run was made from '.*', which is no folder here.*give its name"
        ):
            export_run(tmp_path / run, to, tmp_path / "out")
    monkeypatch.chdir(bases)
    export_run(tmp_path / "run", "diffusers", tmp_path / "out")
    export_run(tmp_path / "language", "merged", tmp_path / "merged")


# ---- language models ------------------------------------------------------------------------------------------------------

PROJECTIONS = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize("kind", ["masked", "plain", "peft"])
def test_an_adapter_of_a_language_model(bases, tmp_path, capsys, kind):
    if kind == "peft":
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(), config).eval()
    else:
        model = adapted(tiny_llama(), masked=kind == "masked", targets=PROJECTIONS, r=2)
    want = said(model)
    run = tmp_path / "run"
    save_checkpoint(run, model, char_tokenizer())
    with pytest.raises(ValueError, match="diffusers holds no run of a language model; want peft or merged"):
        export_run(run, "diffusers", tmp_path / "no")
    out = tmp_path / "peft"
    with pytest.raises(ValueError, match="nothing in the run says what it was made from"):
        export_run(run, "merged", tmp_path / "merged")
    given = {} if kind == "peft" else {"model": bases / "llama", "rank": 64 if kind == "masked" else None}
    export_run(run, "peft", out, **given)
    assert ("lost" in capsys.readouterr().out) == (kind == "masked")
    torch.testing.assert_close(said(PeftModel.from_pretrained(tiny_llama(), out).eval()), want, rtol=1e-3, atol=1e-3)
    export_run(run, "merged", tmp_path / "merged", model=bases / "llama")
    torch.testing.assert_close(said(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want, rtol=1e-4, atol=1e-3)  # fmt: skip
    if kind != "peft":
        save_checkpoint(tmp_path / "other", tiny_llama(seed=4), char_tokenizer())
        with pytest.raises(ValueError, match="made for other weights"):
            export_run(run, "merged", tmp_path / "again", model=tmp_path / "other")


def test_a_whole_language_model(bases, tmp_path, capsys):
    model = tiny_llama()
    torch.manual_seed(5)
    for name in PROJECTIONS:
        model.get_submodule(name).weight.data += 0.1 * torch.randn(model.get_submodule(name).weight.shape)
    model.model.norm.weight.data *= 1.5
    run = tmp_path / "run"
    save_checkpoint(run, model, char_tokenizer(), files={"metrics.json": json.dumps({"model": str(bases / "llama")})})
    want = said(model)
    export_run(run, "peft", tmp_path / "peft", rank=64)
    assert "1 other modules (as model.norm) are kept whole" in capsys.readouterr().out
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft").eval()
    torch.testing.assert_close(said(again), want, rtol=1e-3, atol=2e-3)
    export_run(run, "merged", tmp_path / "merged", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    # What the output layer shares with the embedding no adapter holds.
    model.model.embed_tokens.weight.data[3] += 1
    save_checkpoint(run, model, char_tokenizer(), overwrite=True)
    with pytest.raises(ValueError, match=r"to: peft cannot hold this run \(model.embed_tokens changed.*merged can"):
        export_run(run, "peft", tmp_path / "tied")
    with pytest.raises(ValueError, match="there is nothing to export"):
        export_run(bases / "llama", "peft", tmp_path / "same", model=bases / "llama")


def test_a_pruned_model_stays_pruned(bases, tmp_path, capsys):
    model = tiny_llama()
    masks = masks_of(model, PROJECTIONS)
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask.unpack()
    save_checkpoint(tmp_path / "base", model, char_tokenizer(), masks=masks, pruning={"method": "random"})
    torch.manual_seed(6)
    config = MaskedLoraConfig(r=2, masks=masks, init_lora_weights="random")
    run = get_peft_model(model, config).eval()
    save_checkpoint(tmp_path / "run", run, char_tokenizer())
    export_run(tmp_path / "run", "merged", tmp_path / "merged", model=tmp_path / "base")
    kept = load_masks(tmp_path / "merged" / "masks.safetensors")
    assert all(mask.equal(kept[name]) for name, mask in masks.items())
    torch.testing.assert_close(said(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), said(run), rtol=1e-4, atol=1e-3)  # fmt: skip
    capsys.readouterr()
    export_run(tmp_path / "run", "peft", tmp_path / "peft", model=tmp_path / "base")
    assert "fill its zeros; --to merged keeps them" in capsys.readouterr().out
    # A model that was pruned and trained whole.
    export_run(tmp_path / "merged", "merged", tmp_path / "copy")
    assert (tmp_path / "copy" / "pruning.json").is_file()


# ---- the command, bad input -----------------------------------------------------------------------------------------------


def test_the_command(bases, tmp_path, capsys):
    edit_run(tmp_path / "run", bases / "sd", tiny_pipeline)
    words = [
        str(tmp_path / "run"),
        "--to",
        "kohya",
        "--output",
        str(tmp_path / "k.safetensors"),
        "rank=1",
        "dtype=bfloat16",
    ]
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert "a higher rank= loses less" in out
    assert f"{tmp_path / 'k.safetensors'}: " in out
    assert command.main(words) == 2
    assert "exists; overwrite=true replaces it" in capsys.readouterr().err
    assert command.main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--to", "difusers"], "to: 'difusers' is unknown; did you mean diffusers?"),
        (["--to", "onnx"], "known: diffusers, kohya, merged, partial, peft"),
        (["--to", "peft", "rank=0"], "rank: want at least 1"),
        (["--to", "peft", "--output", "{run}"], "holds the run itself"),
        (["--to", "peft", "--output", "{run}/metrics.json"], "is a file; want a folder"),
        (["--to", "diffusers", "--output", "{full}"], "holds something already (notes.txt)"),
        (["--to", "merged", "--output", "{full}", "--overwrite"], "holds something that is no pipeline"),
        (["--to", "merged", "--output", "x.safetensors"], "merged is a folder, not a file"),
        (["--to", "peft", "--run", "{empty}"], "is no folder of a run"),
        (["--to", "peft", "--run", "{gone}"], "is not there"),
        (["--to", "peft", "--run", "{pecker}"], "PECKER's one-step generator"),
        (["--to", "diffusers", "--model", "{xl}"], "the run is of another one"),
        (["--to", "partial", "--run", "{broken}"], "is no safetensors file"),
    ],
)
def test_bad_input_is_one_line(bases, tmp_path, capsys, words, error):
    places = {name: tmp_path / name for name in ("run", "full", "empty", "pecker", "broken")}
    for name, folder in places.items():
        folder.mkdir()
        if name == "run":
            edit_run(folder, bases / "sd", tiny_pipeline)
    (places["full"] / "notes.txt").write_text("mine")
    (places["pecker"] / "pecker.json").write_text("{}")
    (places["broken"] / "unet.safetensors").write_bytes(b"\x08\0\0\0")
    places |= {"gone": tmp_path / "gone", "xl": bases / "xl"}
    filled = [word.format(**places) for word in words]
    filled += [] if "--run" in filled else ["--run", str(places["run"])]
    filled += [] if "--output" in filled else ["--output", str(tmp_path / "out")]
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert command.main(filled) == 2
    # Behind what others say while they load.
    assert error in capsys.readouterr().err.splitlines()[-1]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_dora_and_other_adapters_are_refused_by_plain_files(bases, tmp_path):
    config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True)
    get_peft_model(tiny_pipeline().unet, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "metrics.json").write_text(json.dumps({"model": str(bases / "sd")}))
    with pytest.raises(ValueError, match=r"to: kohya cannot hold this run \(.*DoRA.*; peft or partial or merged can"):
        export_run(tmp_path, "kohya", tmp_path / "k.safetensors")
    export_run(tmp_path, "merged", tmp_path / "merged")
    assert (tmp_path / "merged" / "model_index.json").is_file()
    # An adapter of PEFT's own with a scaling that is not 1.
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    model = get_peft_model(tiny_pipeline().unet, config).eval()
    model.save_pretrained(tmp_path / "plain" / "adapter")
    path = export_run(tmp_path / "plain", "kohya", tmp_path / "k.safetensors", model=bases / "sd")
    torch.testing.assert_close(drawn(loaded(tiny_pipeline(), path)), drawn(model), **CLOSE)
    with pytest.raises(ValueError, match="rank: the adapter has its own"):
        export_run(tmp_path / "plain", "kohya", tmp_path / "r.safetensors", model=bases / "sd", rank=2)


def test_a_cut_off_adapter(bases, tmp_path):
    adapter_run(tmp_path, bases / "sd", tiny_pipeline, masked=False, targets=["conv_in"])
    save_file({}, tmp_path / "other.safetensors")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is missing or no safetensors file"):
        export_run(tmp_path, "kohya", tmp_path / "k.safetensors")
