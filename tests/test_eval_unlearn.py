"""The techniques of eval-unlearn's entry points, found as that package finds them: through importlib.metadata."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import metadata

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.tiny_diffusion import tiny_pipeline

pytest.importorskip("diffusers")
from fastunlearn.methods.uce import uce
from fastunlearn.parametrize.partial_unet import save_partial_unet

GROUP = "eval_unlearn.techniques"
DRAW = {"num_inference_steps": 2, "guidance_scale": 2.0, "device": "cpu"}


@pytest.fixture(scope="module")
def techniques(tmp_path_factory):
    """Name -> class, of an installation whose metadata say what pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("site") / "fastunlearn_as_declared-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastunlearn-as-declared\nVersion: 9\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"][GROUP].items()]
    (folder / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    sys.path.insert(0, str(folder.parent))
    try:
        found = metadata.entry_points(group=GROUP)
        return {entry.name: entry.load() for entry in found if entry.dist.name == "fastunlearn-as-declared"}
    finally:
        sys.path.remove(str(folder.parent))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_every_entry_point_is_there(techniques):
    assert set(techniques) == {"fastunlearn", *(f"fastunlearn_{m}" for m in ("uce", "rece", "speed", "time", "scapre"))}
    assert all(hasattr(kind, "generate") for kind in techniques.values())


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "time", "scapre"])
def test_a_closed_form_draws_one_image_a_prompt(techniques, base, method):
    more = {} if method == "time" else {"preserve_concepts": ["Van Gogh"]}
    given = {"erase_concept": "Cat", "guide_concept": "Tree", "model_id": base, **more, **DRAW}
    technique = techniques[f"fastunlearn_{method}"](**given)
    images = technique.generate(["a Cat image", "a Fish image"], seed=3)
    assert [image.size for image in images] == [(16, 16)] * 2
    # The seed is the images', the first one's and each further one's.
    again = technique.generate(["a Fish image"], seed=4)
    assert np.array_equal(np.asarray(images[1]), np.asarray(again[0]))
    old = dict(tiny_pipeline().unet.named_parameters())
    moved = {n for n, p in technique.pipeline.unet.named_parameters() if not torch.equal(p, old[n])}
    assert moved
    assert all("attn2.to_" in name for name in moved)


def test_uce_is_our_uce(techniques, base):
    technique = techniques["fastunlearn_uce"](erase_concept=["Cat", "Fish"], guide_concept="Tree", lamb=0.1, model_id=base, **DRAW)  # fmt: skip
    mine = tiny_pipeline()
    from fastunlearn.methods.uce import UCEConfig

    uce(mine, ["Cat", "Fish"], ["Tree"], config=UCEConfig(lamb=0.1))
    for name, weight in mine.unet.named_parameters():
        assert torch.equal(weight, dict(technique.pipeline.unet.named_parameters())[name]), name


def test_a_run_is_evaluated(techniques, base, tmp_path):
    pipeline = tiny_pipeline()
    save_partial_unet(uce(pipeline, ["Cat"], ["Tree"]), tmp_path / "unet.safetensors")
    (tmp_path / "metrics.json").write_text(json.dumps({"model": base, "method": "uce"}))
    technique = techniques["fastunlearn"](run=str(tmp_path), **DRAW)
    image = technique.generate(["a Cat image"], seed=0)[0]
    want = pipeline(
        "a Cat image", generator=torch.Generator().manual_seed(0), num_inference_steps=2, guidance_scale=2.0
    )
    assert np.array_equal(np.asarray(image), np.asarray(want.images[0]))
    # What a call is told goes before what the technique was made with.
    other = technique.generate(["a Cat image"], seed=0, guidance_scale=7.0)[0]
    assert not np.array_equal(np.asarray(image), np.asarray(other))


def test_bad_input(techniques, base, tmp_path):
    for given in ("", " , ", [], None):
        with pytest.raises(ValueError, match="erase_concept: want a concept"):
            techniques["fastunlearn_uce"](erase_concept=given, model_id=base, **DRAW)
    with pytest.raises(ValueError, match="time preserves nothing by name"):
        techniques["fastunlearn_time"](erase_concept="Cat", preserve_concepts="Fish", model_id=base, **DRAW)
    with pytest.raises(ValueError, match="lamb: want a finite number"):
        techniques["fastunlearn_uce"](erase_concept="Cat", guide_concept="Tree", lamb=-1, model_id=base, **DRAW)
    with pytest.raises(ValueError, match="run: want the folder"):
        techniques["fastunlearn"](**DRAW)
    with pytest.raises(ValueError, match="is no folder of a run"):
        techniques["fastunlearn"](run=str(tmp_path), **DRAW)
    with pytest.warns(
        UserWarning, match="erase_scal: no setting of this technique, left alone; did you mean erase_scale"
    ):
        techniques["fastunlearn_uce"](erase_concept="Cat", guide_concept="Tree", erase_scal=2, model_id=base, **DRAW)
