"""The pipeline and the classifiers that the package ships: whole, small, and they do what they say."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastunlearn import pipelines
from fastunlearn.data import canvas
from fastunlearn.evaluation.classifiers import LABELS, Classifier, load_classifiers

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load_pipeline("canvas", device="cpu")


@pytest.fixture(scope="module")
def judges():
    return load_classifiers()


def test_parts_and_size(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert type(pipe.vae).__name__ == "AutoencoderKL"
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    assert type(pipe.tokenizer).__name__ == "CLIPTokenizer"
    assert pipe.unet.dtype == torch.float32  # a CPU's default
    folder = Path(pipelines.pipeline_folder("canvas"))
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 12e6


def test_every_concept_is_one_token_a_word(pipe):
    for name in (*canvas.THEMES, *canvas.OBJECTS):
        assert len(pipe.tokenizer(name, add_special_tokens=False).input_ids) == len(name.split())
    longest = max((canvas.prompt(o, s) for o in canvas.OBJECTS for s in canvas.THEMES), key=len)
    assert len(pipe.tokenizer(longest).input_ids) <= pipe.tokenizer.model_max_length


def test_classifiers_know_drawn_pictures(judges):
    assert {name: judge.labels for name, judge in judges.items()} == LABELS
    rng = np.random.default_rng(123_456)
    pairs = [(s, o) for s in canvas.THEMES for o in canvas.OBJECTS]
    images = torch.from_numpy(np.stack([canvas.draw(o, s, rng) for s, o in pairs]))
    for kind, names in (("style", [s for s, _ in pairs]), ("object", [o for _, o in pairs])):
        found = judges[kind](images).argmax(1).tolist()
        right = sum(judges[kind].labels[i] == name for i, name in zip(found, names, strict=True))
        assert right / len(pairs) >= 0.99


def test_classifier_takes_both_layouts_and_floats(judges):
    image = canvas.draw("Cat", "Clay", np.random.default_rng(0))
    last = judges["style"](image[None])
    first = judges["style"](torch.from_numpy(image).permute(2, 0, 1)[None])
    floats = judges["style"](torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(last, first)
    torch.testing.assert_close(first, floats)
    assert judges["style"].features(image[None]).shape == (1, judges["style"].head.in_features)
    with pytest.raises(ValueError, match=r"images: shape \(64, 64, 3\)"):
        judges["style"](image)


def test_pipeline_draws_what_it_is_asked_for(pipe, judges):
    pairs = [(canvas.THEMES[i % 25], canvas.OBJECTS[(7 * i) % 20]) for i in range(50)]
    images = pipe(
        [canvas.prompt(o, s) for s, o in pairs],
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    styles = judges["style"](images).argmax(1).tolist()
    objects = judges["object"](images).argmax(1).tolist()
    assert sum(canvas.THEMES[i] == s for i, (s, _) in zip(styles, pairs, strict=True)) >= 47
    assert sum(canvas.OBJECTS[i] == o for i, (_, o) in zip(objects, pairs, strict=True)) >= 47


def test_save_and_load_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    again = pipelines.load_pipeline(tmp_path / "copy", device="cpu")
    for (name, a), b in zip(pipe.unet.named_parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_missing_weights_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(pipelines, "_ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not in this installation .*benchmarks\.train_canvas"):
        pipelines.load_pipeline("canvas")
    with pytest.raises(FileNotFoundError, match="no classifiers at"):
        load_classifiers(tmp_path / "none.safetensors")


def test_a_pipeline_without_a_denoiser_is_refused(monkeypatch):
    class Empty:
        components = {"vae": None}

        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> "Empty":
            return cls()

    monkeypatch.setattr(diffusers, "DiffusionPipeline", Empty)
    with pytest.raises(ValueError, match="neither a unet nor a transformer"):
        pipelines.load_pipeline("somewhere/else")


def test_classifier_width():
    assert Classifier(("a", "b"), width=8).head.in_features == 48


def test_a_folder_called_canvas_counts_only_with_a_pipeline_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canvas").mkdir()
    assert pipelines.pipeline_folder("canvas") == str(pipelines._ASSETS / "canvas")
    (tmp_path / "canvas" / "model_index.json").write_text("{}")
    assert pipelines.pipeline_folder("canvas") == "canvas"


def spoilt(tmp_path, gone=(), **index):
    folder = tmp_path / "model"
    parts = {"unet": "config", "vae": "config", "text_encoder": "config", "tokenizer": "x", "scheduler": "x"}
    for part, name in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / f"{name}.json").write_text("{}")
    listed = {part: ["diffusers", "X"] for part in parts} | {"safety_checker": [None, None]} | index
    (folder / pipelines.INDEX).write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | listed))
    for name in gone:
        (shutil.rmtree if (folder / name).is_dir() else os.unlink)(folder / name)
    return folder


@pytest.mark.parametrize(
    ("gone", "index", "words"),
    [
        ((pipelines.INDEX,), {}, "has no model_index.json; want a folder that save_pretrained"),
        (("unet", "vae"), {}, "lacks unet/, vae/, which its model_index.json names"),
        (("vae/config.json",), {}, "lacks vae/config.json"),
        (
            (),
            {"text_encoder": [None, None]},
            r"\(StableDiffusionPipeline\) has no text_encoder; want unet, vae, text_encoder",
        ),
        ((), {"unet": [None, None], "transformer": ["a", "b"]}, "lacks transformer/"),
    ],
)
def test_missing_parts_of_a_folder_are_named(tmp_path, gone, index, words):
    folder = spoilt(tmp_path, gone, **index)
    with pytest.raises(ValueError, match=words):
        pipelines.load_pipeline(folder)


def test_the_canvas_is_known_by_its_name_its_folder_and_a_mark(tmp_path):
    folder = spoilt(tmp_path)
    pipelines.check_folder(folder)
    assert not pipelines.is_canvas(folder)
    pipelines.mark_canvas(folder)
    assert pipelines.is_canvas(folder)
    assert pipelines.is_canvas("canvas")
    assert pipelines.is_canvas(pipelines._ASSETS / "canvas")
    assert not pipelines.is_canvas("stabilityai/sdxl")
