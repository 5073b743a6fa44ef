"""UCE against its normal equations, in its limits, on a pipeline of real classes."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_diffusion import THEMES, prompt, tiny_pipeline

pytest.importorskip("diffusers")

from safetensors.torch import load_file

from fastunlearn.data.concepts import Moments
from fastunlearn.data.prompts import encode_prompts, in_templates, last_features, tokenize
from fastunlearn.methods.uce import UCEConfig, uce, uce_weights
from fastunlearn.parametrize.partial_unet import load_partial_unet, save_partial_unet
from fastunlearn.sampling import sample

FP64 = {"dtype": torch.float64}


def concepts(edits: int = 3, kept: int = 4, width: int = 12):
    return torch.randn(edits, width, **FP64), torch.randn(edits, width, **FP64), torch.randn(kept, width, **FP64)


def edited(old, edit, guide, kept, config):
    moments = Moments(edit.T @ edit, guide.T @ edit, torch.zeros(12, 12, **FP64) if kept is None else kept.T @ kept)
    return uce_weights([old], moments, config)[0]


@pytest.mark.parametrize("lamb", [0.05, 0.5, 10.0])
def test_it_is_the_normal_equations_solution(lamb):
    edit, guide, kept = concepts()
    old = torch.randn(5, 12, **FP64)
    config = UCEConfig(erase_scale=0.7, preserve_scale=2.0, lamb=lamb)
    new = edited(old, edit, guide, kept, config)
    # Equation 7, as it stands.
    left = lamb * old + 0.7 * (old @ guide.T) @ edit + 2.0 * (old @ kept.T) @ kept
    right = lamb * torch.eye(12, **FP64) + 0.7 * edit.T @ edit + 2.0 * kept.T @ kept
    torch.testing.assert_close(new, left @ torch.linalg.inv(right), atol=1e-10, rtol=1e-10)

    # And a stationary point of what it minimises.
    w = new.clone().requires_grad_()
    loss = 0.7 * ((w @ edit.T - old @ guide.T) ** 2).sum() + 2.0 * ((w @ kept.T - old @ kept.T) ** 2).sum()
    (loss + lamb * ((w - old) ** 2).sum()).backward()
    assert w.grad.abs().max() < 1e-9


def test_without_the_old_weights_the_concept_is_mapped_exactly():
    edit, guide, _ = concepts(edits=3, kept=0)
    old = torch.randn(5, 12, **FP64)
    config = UCEConfig(lamb=0.0)
    new = edited(old, edit, guide, None, config)
    torch.testing.assert_close(new @ edit.T, old @ guide.T, atol=1e-10, rtol=1e-10)
    # What is orthogonal to every concept stays.
    other = torch.randn(12, **FP64)
    basis = torch.linalg.qr(edit.T).Q
    other -= basis @ (basis.T @ other)
    torch.testing.assert_close(new @ other, old @ other, atol=1e-10, rtol=1e-10)


def test_preserved_concepts_stay_as_far_as_the_scale_says():
    edit, guide, kept = concepts(edits=2, kept=6)
    old = torch.randn(5, 12, **FP64)

    def moved(scale: float) -> float:
        config = UCEConfig(preserve_scale=scale, lamb=0.1)
        new = edited(old, edit, guide, kept, config)
        return float(((new - old) @ kept.T).norm())

    assert moved(0) > 2 * moved(1) > 20 * moved(1000)


def test_edits_of_a_pipeline():
    pipeline, before = tiny_pipeline(), tiny_pipeline()
    config = UCEConfig(lamb=0.1)
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    edited = uce(pipeline, ["Van Gogh", "Mosaic"], ["Photo"], ["Pop Art"], config)
    assert set(edited) == {n for n in state if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, edited.get(name, state[name])), name
        assert torch.equal(tensor, state[name]) == (name not in edited), name

    def last(text):
        at = int(tokenize(before.tokenizer, [text]).lengths[0]) - 2
        return encode_prompts(before, [text])[0, at].double()

    edit, kept = torch.stack([last("Van Gogh"), last("Mosaic")]), last("Pop Art")[None]
    guide = torch.stack([last("Photo")] * 2)
    name = next(iter(edited))
    old = state[name].double()
    left = 0.1 * old + old @ guide.T @ edit + old @ kept.T @ kept
    right = 0.1 * torch.eye(16, **FP64) + edit.T @ edit + kept.T @ kept
    torch.testing.assert_close(edited[name].double(), left @ torch.linalg.inv(right), atol=1e-5, rtol=1e-4)


def test_all_tokens_of_a_prompt_make_it_draw_its_guide():
    pipeline, before = tiny_pipeline(length=13), tiny_pipeline(length=13)
    uce(pipeline, ["Mosaic"], ["Photo"], [], UCEConfig(lamb=0.0, tokens="all", template=[prompt("Cat", "{}")]))
    options = {"steps": 2, "decode": False}
    after = sample(pipeline, [prompt("Cat", "Mosaic")], [0], **options)
    wanted = sample(before, [prompt("Cat", "Photo")], [0], **options)
    was = sample(before, [prompt("Cat", "Mosaic")], [0], **options)
    # Thirteen positions in sixteen dimensions: every one can be mapped where it should go.
    assert (after - wanted).norm() < 0.01 * (was - wanted).norm()


def test_names_of_unequal_length_are_paired_from_their_end():
    pipeline = tiny_pipeline(length=13)
    edited = uce(pipeline, ["Pop Art"], ["Photo"], [], UCEConfig(lamb=0.0, tokens="all", template=["a {} image"]))
    before = tiny_pipeline(length=13)
    old, new = (
        encode_prompts(before, ["a Photo image"])[0].double(),
        encode_prompts(before, ["a Pop Art image"])[0].double(),
    )
    name = next(iter(edited))
    weight = before.unet.state_dict()[name].double()
    # begin a pop art image end pad ... against begin a photo image end pad ...
    pairs = [(0, 0), (1, 1), (2, 2), (3, 2), *((i + 1, i) for i in range(3, 12))]
    got = torch.stack([edited[name].double() @ new[i] for i, _ in pairs])
    wanted = torch.stack([weight @ old[j] for _, j in pairs])
    # Thirteen rows in sixteen dimensions, solved in fp64, stored in fp32.
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_the_file_is_a_partial_unet(tmp_path):
    pipeline = tiny_pipeline()
    edited = uce(pipeline, ["Mosaic"], ["Photo"])
    size = save_partial_unet(edited, tmp_path / "uce.safetensors", method="uce", edit_concepts=["Mosaic"])
    assert size == (tmp_path / "uce.safetensors").stat().st_size
    fresh = tiny_pipeline()
    assert load_partial_unet(fresh.unet, tmp_path / "uce.safetensors") == {"method": "uce", "edit_concepts": ["Mosaic"]}
    plain = tiny_pipeline()
    plain.unet.load_state_dict(load_file(tmp_path / "uce.safetensors"), strict=False)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, fresh.unet.state_dict()[name])
        assert torch.equal(tensor, plain.unet.state_dict()[name])
    with pytest.raises(FileExistsError):
        save_partial_unet(edited, tmp_path / "uce.safetensors")


def test_files_that_do_not_fit_change_nothing(tmp_path):
    pipeline = tiny_pipeline()
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    good = {"conv_in.bias": torch.ones(8)}
    for wrong in ({"conv_in.weight": torch.ones(2)}, {"absent": torch.ones(8)}):
        save_partial_unet(good | wrong, tmp_path / "wrong.safetensors", overwrite=True)
        with pytest.raises(ValueError, match=f"does not fit this U-Net: {next(iter(wrong))}"):
            load_partial_unet(pipeline.unet, tmp_path / "wrong.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_partial_unet(pipeline.unet, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="there is no file"):
        load_partial_unet(pipeline.unet, tmp_path / "none")
    with pytest.raises(ValueError, match=r"not finite: conv_in\.bias"):
        save_partial_unet({"conv_in.bias": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="none to save"):
        save_partial_unet({}, tmp_path / "nothing.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_bad_input():
    pipeline = tiny_pipeline()
    for edits, guides, message in (
        ([], ["Photo"], "edit_concepts: none given"),
        (["Mosaic"], [], "each of the 1 edit_concepts, got 0"),
        (["Mosaic"], ["Photo", "Mosaic"], "got 2"),
        (["Mosaic", "Photo"], ["Photo"], "'Photo' is its own guide"),
    ):
        with pytest.raises(ValueError, match=message):
            uce(pipeline, edits, guides)
    for options, message in (
        ({"lamb": -1}, "lamb: want a finite number >= 0, got -1"),
        ({"erase_scale": float("nan")}, "erase_scale"),
        ({"tokens": "first"}, "tokens: want last or all"),
        ({"template": ["a cat"]}, "template: want texts with {}"),
    ):
        with pytest.raises(ValueError, match=message):
            UCEConfig(**options)
    assert in_templates(["A", "B"], ["{}", "an {}"]) == ["A", "B", "an A", "an B"]
    assert len(THEMES) == 4


def test_the_last_word_is_the_concepts_own():
    pipeline = tiny_pipeline()
    template = ["A {} image.", "{}", "Photo in {} style.", "Cat {} {}."]
    names = ["Van Gogh", "Mosaic", "style", "Cat image.", ""]
    got = last_features(pipeline, names, template)
    features = encode_prompts(pipeline, in_templates(names, template)).double()
    # Behind the first token, which begins every prompt, every word and full stop is one; an empty name gives what is before it.
    before, own = [1, 0, 2, 1], [2, 1, 1, 3, 0]
    at = [b + o * (1 + text.startswith("Cat")) for text, b in zip(template, before, strict=True) for o in own]
    torch.testing.assert_close(got, features[torch.arange(len(at)), torch.tensor(at)], rtol=0, atol=0)


def test_the_last_word_in_a_template_is_what_moves():
    pipeline = tiny_pipeline()
    for part in (pipeline.unet, pipeline.text_encoder):
        part.double()
    name, old = next((n, w.clone()) for n, w in pipeline.unet.named_parameters() if "attn2.to_v." in n)
    template = ["A Cat image in {} style."]
    c, a = (last_features(pipeline, [text], template) for text in ("Mosaic", "Photo"))
    full_stop = last_features(pipeline, ["A Cat image in Mosaic style."])
    new = uce(pipeline, ["Mosaic"], ["Photo"], config=UCEConfig(lamb=1e-9, template=template))[name]
    torch.testing.assert_close(new @ c.T, old @ a.T, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(new @ full_stop.T, old @ last_features(pipeline, ["A Cat image in Photo style."]).T)
