"""Closed-form edits of SDXL, SD 3 and FLUX, on tiny random models of their real classes: which layers, which text, which files."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from safetensors.torch import load_file

from fastunlearn.data.prompts import aligned_features, empty_feature, last_features
from fastunlearn.localize.text_paths import POOLED, SEQUENCE, denoiser_of, text_paths, write_weights
from fastunlearn.methods.scapre import ScaPreConfig, scapre
from fastunlearn.methods.uce import UCEConfig, uce
from fastunlearn.parametrize.edit_lora import edit_lora, save_edit_lora
from fastunlearn.parametrize.partial_unet import load_partial_unet, save_partial_unet
from tests.tiny_diffusion import tiny_flux, tiny_pipeline, tiny_sd3, tiny_xl

MAKE = {"sd3": tiny_sd3, "flux": tiny_flux}
PROMPTS = ["A Cat image in Mosaic style.", ""]


def state(pipeline):
    return {name: tensor.clone() for name, tensor in denoiser_of(pipeline)[0].state_dict().items()}


def theirs(pipeline, kind):
    """What diffusers' own pipeline passes to the denoiser: (sequence, pooled)."""
    if kind == "sd3":
        out = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, device="cpu")
        return out[0], out[2]
    out = pipeline.encode_prompt(PROMPTS, PROMPTS, device="cpu")
    return out[0], out[1]


@pytest.mark.parametrize("kind", MAKE)
def test_streams_are_what_the_pipeline_passes_on(kind):
    pipeline = MAKE[kind]()
    sequence, pooled = text_paths(pipeline)
    want, vector = theirs(pipeline, kind)
    got = torch.cat([stream.encode(PROMPTS) for stream in sequence.streams], 1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pooled.streams[0].encode(PROMPTS)[:, 0], vector)
    assert [stream.length for stream in sequence.streams] == ([16, 256] if kind == "sd3" else [512])
    assert (list(sequence.weights), list(pooled.weights)) == ([SEQUENCE], [POOLED])
    transformer = denoiser_of(pipeline)[0]
    assert sequence.weights[SEQUENCE] is transformer.context_embedder.weight
    assert pooled.weights[POOLED] is transformer.time_text_embed.text_embedder.linear_1.weight


def test_words_of_t5():
    stream = text_paths(tiny_flux())[0].streams[0]
    features = stream.encode(["Van Gogh", ""])
    torch.testing.assert_close(last_features(stream, ["Van Gogh"])[0], features[0, 1].double())
    torch.testing.assert_close(empty_feature(stream)[0], features[1, 0].double())
    c, a, padding = aligned_features(stream, ["Van Gogh"], ["Photo"])
    photo = stream.encode(["Photo"])[0].double()
    # Names end together: both words stand for the one.
    torch.testing.assert_close(a[:3], photo[[0, 0, 1]])
    assert padding.tolist() == [False] * 3 + [True] * (len(c) - 3)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_edits_are_their_normal_equations(kind, tokens):
    pipeline = MAKE[kind]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    old = state(pipeline)
    names, guides = ["Van Gogh", "Mosaic"], ["Photo", "Cat"]
    want = {}
    for path in text_paths(pipeline):
        (name,) = path.weights
        if tokens == "last":
            c, a = (torch.cat([last_features(s, texts) for s in path.streams]) for texts in (names, guides))
        else:
            c, a = (torch.cat(t) for t in list(zip(*(aligned_features(s, names, guides) for s in path.streams)))[:2])
        eye = torch.eye(c.shape[1], dtype=torch.float64)
        want[name] = old[name] @ (0.3 * eye + a.T @ c) @ torch.linalg.inv(0.3 * eye + c.T @ c)
    edit = scapre(pipeline, names, guides, config=ScaPreConfig(lamb=0.3, tokens=tokens))
    assert set(edit.weights) == {SEQUENCE, POOLED}
    for name, tensor in denoiser_of(pipeline)[0].state_dict().items():
        torch.testing.assert_close(tensor, want.get(name, old[name]), rtol=1e-8, atol=1e-9)
        assert torch.equal(tensor, old[name]) == (name not in edit.weights)
    assert all(0 <= value < 0.9 for value in edit.forget.values())
    other = MAKE[kind]()
    for part in other.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    same = uce(other, names, guides, (), UCEConfig(lamb=0.3, tokens=tokens))
    for name, tensor in same.items():
        torch.testing.assert_close(tensor, edit.weights[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", MAKE)
def test_the_denoiser_takes_the_concept_for_its_guide(kind):
    """With lamb near 0 and few tokens what the transformer makes of the concept's text is what it made of the guide's."""
    pipeline, before = MAKE[kind](), MAKE[kind]()
    for pipe in (pipeline, before):
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.double()
    scapre(pipeline, ["Mosaic"], "Photo", config=ScaPreConfig(lamb=1e-10, tokens="last"))

    def out(pipe, name):
        sequence, pooled = text_paths(pipe)
        word = last_features(sequence.streams[-1], [name])[:, None]
        extra = {"pooled_projections": last_features(pooled.streams[0], [name])}
        if kind == "sd3":
            x = torch.linspace(-1, 1, 4 * 64, dtype=torch.float64).view(1, 4, 8, 8)
        else:
            x = torch.linspace(-1, 1, 4 * 16, dtype=torch.float64).view(1, 16, 4)
            extra |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(1, 3)}
        with torch.no_grad():
            return pipe.transformer(
                hidden_states=x, encoder_hidden_states=word, timestep=torch.tensor([0.5], dtype=torch.float64), **extra
            ).sample

    gap = (out(before, "Mosaic") - out(before, "Photo")).norm()
    assert gap > 1e-6
    assert (out(pipeline, "Mosaic") - out(before, "Photo")).norm() < 1e-4 * gap


@pytest.mark.parametrize("kind", [*MAKE, "xl"])
def test_files_in_the_layout_of_uce_and_a_lora(kind, tmp_path):
    make = {**MAKE, "xl": tiny_xl}[kind]
    pipeline, plain = make(), make()
    denoiser, part = denoiser_of(pipeline)
    edit = scapre(pipeline, ["Mosaic"], "Photo", config=ScaPreConfig(tokens="last"))
    save_partial_unet(edit.weights, tmp_path / "edit.safetensors", method="scapre")
    # UCE's and ESD's code: names of the denoiser's modules + ".weight", loaded with strict=False.
    stored = load_file(tmp_path / "edit.safetensors")
    modules = dict(denoiser.named_modules())
    assert all(isinstance(modules[name.removesuffix(".weight")], torch.nn.Linear) for name in stored)
    found = denoiser_of(plain)[0].load_state_dict(stored, strict=False)
    assert not found.unexpected_keys
    again = make()
    assert load_partial_unet(denoiser_of(again)[0], tmp_path / "edit.safetensors") == {"method": "scapre"}
    for other in (plain, again):
        for name, tensor in denoiser_of(other)[0].state_dict().items():
            assert torch.equal(tensor, denoiser.state_dict()[name])
    pytest.importorskip("peft")
    factors, errors = edit_lora(edit.old, edit.weights, 4, prefix=part)
    # One word in one or two runs of tokens: an edit of rank two at most.
    assert max(errors.values()) < 1e-4
    save_edit_lora(factors, tmp_path / "pytorch_lora_weights.safetensors")
    fresh = make()
    fresh.load_lora_weights(tmp_path)
    fresh.fuse_lora(components=[part])
    fresh.unload_lora_weights()
    merged = denoiser_of(fresh)[0].state_dict()
    for name, weight in edit.weights.items():
        scale = (weight - edit.old[name]).abs().max()
        assert (merged[name] - weight).abs().max() < 1e-3 * scale + 1e-6


def test_sd3_without_t5():
    pipeline = tiny_sd3(t5=False)
    assert len(text_paths(pipeline)[0].streams) == 1
    edit = scapre(pipeline, ["Mosaic"], "Photo")
    # Columns that only T5 writes to see zeros: nothing moves there.
    moved = edit.weights[SEQUENCE] - edit.old[SEQUENCE]
    assert moved[:, :24].abs().max() > 1e-4
    assert moved[:, 24:].abs().max() < 1e-6


def test_bad_input():
    with pytest.raises(ValueError, match="mode: the authors' code edits U-Nets, FluxPipeline has a transformer"):
        scapre(tiny_flux(), ["Mosaic"], mode="official")
    with pytest.raises(ValueError, match="concepts: ' ' has no token"):
        scapre(tiny_flux(), ["Mosaic", " "])
    flux = tiny_flux()
    flux.text_encoder_2 = None
    with pytest.raises(ValueError, match="FluxPipeline has no text_encoder_2; want one of Stable Diffusion"):
        text_paths(flux)
    flux = tiny_flux()
    flux.transformer.context_embedder = torch.nn.Linear(20, 32)
    with pytest.raises(ValueError, match=r"context_embedder\.weight takes text of width 20, the text encoders give 32"):
        text_paths(flux)
    strange = tiny_flux()
    strange.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear is not known; of the transformers those of SD 3 and FLUX are"):
        text_paths(strange)
    blind = tiny_pipeline()
    blind.unet = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has no layers that read text"):
        scapre(blind, ["Mosaic"])
    sick = tiny_pipeline()
    paths = text_paths(sick)
    name, weight = next(iter(paths[0].weights.items()))
    with pytest.raises(FloatingPointError, match="came out with NaN or infinite entries; raise lamb"):
        write_weights(paths, {name: weight * float("inf")})
    assert weight.isfinite().all()
