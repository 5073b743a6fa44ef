"""The canvas pipeline of the package under the evaluator: recognised before, erased after, everything else kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
from fastunlearn.evaluation.canvas import AnswerSettings, evaluate, real_features
from fastunlearn.evaluation.worlds import canvas_world
from fastunlearn.methods.recipes import METHODS
from fastunlearn.pipelines import load_pipeline, pipeline_folder


def shipped() -> bool:
    try:
        return bool(pipeline_folder("canvas"))
    except FileNotFoundError:
        return False


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shipped(), reason="the canvas pipeline is not in this checkout")]


def test_uce_erases_a_style_of_the_canvas_pipeline(tmp_path):
    world, pipeline = replace(canvas_world(), real_count=1), load_pipeline("canvas", device="cpu", dtype=torch.float32)
    targets = world.draw_targets(1, 0, 0)
    settings = AnswerSettings(seeds=(7,), steps=6, thin=20, bf16=True)
    real = real_features(world)
    none, uce = (
        evaluate(
            pipeline, world, targets, METHODS.get(name), method=name, settings=settings, real=real, output=tmp_path / "canvas.json"
        )["rows"][-1]
        for name in ("none", "uce")
    )  # fmt: skip
    # What is published was measured on what is shipped.
    published = Path(__file__).parents[2] / "benchmarks" / "results" / "quality" / "canvas.json"
    weights = json.loads((tmp_path / "canvas.json").read_text())["meta"]["weights"]
    assert weights.startswith(json.loads(published.read_text())["meta"]["weights"])
    assert none["style accuracy"] >= 95
    assert none["object accuracy"] >= 95
    assert none["all valid"] >= 85
    # Erased: most of what was recognised is no longer. Kept: what was recognised of the rest, but for a few pictures.
    assert uce["UA"] >= none["UA"] + 75
    assert uce["IRA"] >= none["IRA"] - 15
    assert uce["CRA"] >= none["CRA"] - 15
    assert uce["fid_canvas_features"] <= 2 * none["fid_canvas_features"]
    assert uce["storage_mib"] < 1
