"""The canvas pipeline of the package under the evaluator: recognised before, erased after, everything else kept."""

from __future__ import annotations

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


@pytest.mark.parametrize("seed", [0, 1])
def test_uce_erases_a_style_of_the_canvas_pipeline(seed):
    world, pipeline = canvas_world(), load_pipeline("canvas", device="cpu", dtype=torch.float32)
    targets = world.draw_targets(1, 0, seed)
    settings = AnswerSettings(seeds=(7 + seed,), thin=4, bf16=True)
    real = real_features(world)
    none, uce = (
        evaluate(pipeline, world, targets, METHODS.get(name), method=name, settings=settings, real=real)["rows"][0]
        for name in ("none", "uce")
    )
    assert none["style accuracy"] >= 95
    assert none["object accuracy"] >= 95
    assert none["UA"] <= 20
    assert not none["noise"]
    assert uce["UA"] >= 80
    assert uce["IRA"] >= 50
    assert uce["CRA"] >= 50
    assert uce["storage_mib"] < 1
