"""Images of a concept: folders, rows and data sets of the hub become latents with the right texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.tiny_diffusion import OBJECTS, draw, prompt, tiny_pipeline

pytest.importorskip("diffusers")
from PIL import Image

from fastunlearn.data.concept_images import ConceptImages
from fastunlearn.families import family_of

TEXTS = [prompt(thing, "Mosaic") for thing in OBJECTS]
INSTEAD = [prompt(thing, "Photo") for thing in OBJECTS]


def pictures():
    return [draw(thing, "Mosaic", np.random.default_rng(i)) for i, thing in enumerate(OBJECTS)]


def encode(images):
    return images.encode(family_of(tiny_pipeline()), 4, seed=0, steps=2, guidance_scale=1.0, progress=False)


def test_a_folder_says_what_each_image_is(tmp_path):
    lines = []
    for i, image in enumerate(pictures()):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": TEXTS[i], "surrogate": INSTEAD[i]}))
    plain = ConceptImages.of_folder(tmp_path, TEXTS[:1], INSTEAD[:1])
    assert (len(plain.images), plain.prompt) == (3, [0, 0, 0])
    with pytest.raises(ValueError, match=r"has no metadata.jsonl, so its images need one prompt; there are 3"):
        ConceptImages.of_folder(tmp_path, TEXTS)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    told = ConceptImages.of_folder(tmp_path, (), INSTEAD)
    assert (told.prompts, told.surrogates, told.prompt) == (TEXTS, INSTEAD, [0, 1, 2])
    encoded = encode(told)
    from_memory = encode(
        ConceptImages.of_rows(
            [
                {"image": image, "text": text, "surrogate": other}
                for image, text, other in zip(map(Image.fromarray, pictures()), TEXTS, INSTEAD)
            ],
            surrogate=True,
        )
    )
    assert torch.equal(encoded.latents, from_memory.latents)
    family = family_of(tiny_pipeline())
    stack = torch.from_numpy(np.stack(pictures())).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoded.latents, family.encode_images(stack), rtol=1e-4, atol=1e-5)
    assert torch.equal(encoded.others.hidden, family.encode(INSTEAD).hidden)
    assert encoded.digest != encode(plain).digest
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "x"}')
    with pytest.raises(ValueError, match=r"line 1: there is no file 9.png"):
        ConceptImages.of_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("not json")
    with pytest.raises(ValueError, match="line 1: want"):
        ConceptImages.of_folder(tmp_path)


def test_files_and_tensors_together(tmp_path):
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in pictures()]
    Image.fromarray(pictures()[0]).save(tmp_path / "0.png")
    Image.fromarray(pictures()[2]).save(tmp_path / "2.png")
    whole = encode(ConceptImages(TEXTS, INSTEAD, images, [0, 1, 2]))
    mixed = ConceptImages(TEXTS, INSTEAD, [str(tmp_path / "0.png"), images[1], tmp_path / "2.png"], [0, 1, 2])
    assert mixed.images[0] == tmp_path / "0.png"
    found = encode(mixed)
    assert torch.equal(found.latents, whole.latents)
    assert found.prompt.tolist() == [0, 1, 2]
    text = encode(ConceptImages(TEXTS[:1], INSTEAD[:1], [str(tmp_path / "0.png")], [0]))
    assert torch.equal(text.latents[0], encode(ConceptImages(TEXTS[:1], INSTEAD[:1], images[:1], [0])).latents[0])


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": Image.fromarray(image), "text": text} for image, text in zip(pictures(), TEXTS)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: made)
    kept = ConceptImages.of_hub("some/name")
    assert (kept.prompts, kept.prompt, kept.surrogates) == (TEXTS, [0, 1, 2], None)
    assert torch.equal(kept.images[1], torch.from_numpy(pictures()[1]).permute(2, 0, 1))
    one = ConceptImages.of_hub("some/name", prompts=TEXTS[:1], surrogates=INSTEAD[:1], limit=2)
    assert (one.prompts, one.surrogates, len(one.images)) == (TEXTS[:1], INSTEAD[:1], 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: made.remove_columns("image"))
    with pytest.raises(ValueError, match="want the columns image and text"):
        ConceptImages.of_hub("some/name")


def test_bad_rows():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    for call, error, words in (
        (lambda: ConceptImages([]), ValueError, "prompts: want at least one text"),
        (
            lambda: ConceptImages(TEXTS, INSTEAD[:1]),
            ValueError,
            "surrogates: want one for each of the 3 prompts, got 1",
        ),
        (lambda: ConceptImages(TEXTS, TEXTS), ValueError, "is its own surrogate"),
        (lambda: ConceptImages(["a Cat"], ["A  cat"]), ValueError, "is its own surrogate"),
        (lambda: ConceptImages(TEXTS, None, [image]), ValueError, "a prompt for each, got 1 with 0"),
        (lambda: ConceptImages.of_rows([{"image": image}]), ValueError, "row 0 wants text, it has image"),
        (
            lambda: ConceptImages.of_rows([{"text": "a"}, {"text": "b", "image": image}]),
            ValueError,
            "1 of 2 have an image",
        ),
        (
            lambda: ConceptImages.of_rows([{"text": "a", "image": 3}]),
            TypeError,
            "the image of row 0 wants to be a file",
        ),
    ):
        with pytest.raises(error, match=words):
            call()
