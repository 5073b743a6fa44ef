"""The cost study: shapes of the real models, what is scaled by what, rows on a tiny pipeline, the README's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from benchmarks import cost, cost_tables, shapes, tables
from benchmarks import random_pipelines as pipelines
from benchmarks.__main__ import write_json
from fastunlearn.evaluation.worlds import Target, canvas_concepts, unlearncanvas_concepts
from tests.tiny_diffusion import OBJECTS, SEED_STYLE, THEMES, prompt, tiny_pipeline


def test_the_random_networks_have_the_real_shapes():
    from diffusers import UNet2DConditionModel

    for name, want in (("sd15", shapes.sd14_unet()), ("sdxl", shapes.sdxl_unet())):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**pipelines.unet_config(name))
        assert {n: tuple(p.shape) for n, p in unet.named_parameters()} == dict(want)
        with torch.device("meta"):
            cut = UNet2DConditionModel(**pipelines.unet_config(name, 2, 128))
        assert cut.config.block_out_channels == (320, 640)
        assert cut.config.sample_size == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [(("sd3",), "unknown"), (("sd15", 5), "has 4"), (("sd15", 0), "has 4"), (("sd15", None, 500), "multiple of 64"), (("sdxl", 1, 12), "multiple of 8")],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(options: tuple[Any, ...], words: str):
    with pytest.raises(ValueError, match=words):
        pipelines.unet_config(*options)


def test_every_word_is_a_token():
    world = unlearncanvas_concepts()
    tokenizer = pipelines.word_tokenizer(world.prompts())
    ids = tokenizer("A Dogs image in Van Gogh style.").input_ids
    assert len(ids) == len(set(ids)) == 10
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    assert tokenizer("Dogs", padding="max_length").input_ids[3:] == [tokenizer.eos_token_id] * 74
    assert len({tuple(tokenizer(text).input_ids) for text in world.prompts()}) == len(world.prompts())


@pytest.mark.parametrize(
    ("method", "whole", "short"),
    [
        # 64 of 128 + 64 images by 10 steps, batches of 8; the canvas' own settings say 100 steps.
        ("spare", cost.Counts(100, 192, 10, 64), cost.Counts(6, 16, 5, 8)),
        ("lora", cost.Counts(100, 192, 10, 64), cost.Counts(6, 16, 5, 8)),
        ("esd", cost.Counts(100, 0, 10, 64), cost.Counts(6, 0, 5, 8)),
        ("finetune", cost.Counts(100, 192, 10, 64), cost.Counts(6, 16, 5, 8)),
        ("pecker", cost.Counts(50_000, 0, 0, 20), cost.Counts(6, 0, 0, 2)),
    ],
)
def test_counts_of_the_canvas(tmp_path: Path, method: str, whole: cost.Counts, short: cost.Counts):
    case = cost.Case("canvas", method, "cpu", steps=6)
    settings = cost.settings_of(case, "style")
    config = cost._config(case, settings, str(tmp_path))
    assert cost.Counts.of(case, config) == whole
    cut = cost._config(case, settings | cost.shortened(case, config), str(tmp_path))
    assert cost.Counts.of(case, cut) == short


def test_epochs_are_counted_in_steps(tmp_path: Path):
    """SPARE's own settings on SD 1.5: 100 epochs over 64 images in batches of 4; SalUn's as UnlearnCanvas has them."""
    for method, steps, images in (("spare", 1600, 192), ("salun", 30, 120), ("ablation", 200, 328), ("esd", 1000, 0)):
        case = cost.Case("sd15", method, "cpu")
        counts = cost.Counts.of(case, cost._config(case, cost.settings_of(case, "style"), str(tmp_path)))
        assert (counts.steps, counts.images) == (steps, images), method


@pytest.mark.parametrize(
    "wrong", [{"shapes": "sd3"}, {"method": "ucee"}, {"steps": 1}, {"images": 0}, {"blocks": 2}, {"pixels": 64}]
)
def test_bad_cases_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"shapes|method|steps|blocks"):
        cost.Case(**{"shapes": "canvas", "method": "uce", "device": "cpu"} | wrong)


def test_parts_are_scaled_by_their_own_counts():
    clock = cost.Clock(torch.device("cpu"))
    clock.start, clock.made, clock.began, clock.steps = 10.0, 14.0, 17.0, [9.0, 0.5, 0.25, 0.75]
    whole, short = cost.Counts(100, 192, 10, 64), cost.Counts(4, 16, 5, 8)
    took = cost.Cost(8.5, 1.0)
    # 4 s of drawing: 12 times the images, twice the steps; preparation as it is, or of 8 times the images; 0.5 s a step.
    row = cost._scaled(cost.Case("canvas", "lora", "cpu"), clock, took, whole, short)
    assert row["seconds"] == pytest.approx(4 * 24 + 3 + 100 * 0.5)
    assert row["measured"] == {"seconds": 8.5, "steps": 4, "images": 16, "passes": 8, "sampling_steps": 5}
    assert not row["whole"]
    row = cost._scaled(cost.Case("canvas", "spare", "cpu"), clock, took, whole, short)
    assert row["seconds"] == pytest.approx(4 * 24 + 3 * 8 + 100 * 0.5)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch):
    """The study on the tiny pipeline and its world in place of the canvas."""
    world = canvas_concepts()
    world.themes, world.objects, world.seed_theme, world.prompt, world.surrogate_theme = (
        THEMES,
        OBJECTS,
        SEED_STYLE,
        prompt,
        SEED_STYLE,
    )
    monkeypatch.setattr(cost, "canvas_concepts", lambda: world)
    monkeypatch.setattr(cost, "build", lambda case, world: tiny_pipeline())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("methods", [("uce", "esd"), pytest.param(cost.METHODS, marks=pytest.mark.thorough)])
def test_rows_are_written_one_by_one_and_kept(
    tmp_path: Path, methods: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "cost.json"
    cases = [cost.Case("canvas", method, "cpu", steps=3, images=2, sampling_steps=2) for method in methods]
    result = cost.run(cases, out, write_json)
    assert [row["method"] for row in result["rows"]] == [m for m in cost.METHODS if m in methods]
    assert not result["left_out"]
    assert json.loads(out.read_text())["rows"] == result["rows"]
    for row in result["rows"]:
        assert row["seconds"] > 0
        assert row["storage_mib"] >= 0
        assert {"machine", "torch", "commit", "date", "other_load", "peak_mib", "settings"} <= set(row)
        assert row["whole"] == (row["method"] in ("uce", "time", "rece", "speed", "scapre"))
        if not row["whole"]:
            assert row["measured"]["steps"] == 3
            assert 0 < row["step_seconds"] < row["measured"]["seconds"] < row["seconds"]
    again = cost.run(cases, out, write_json)
    assert again["rows"] == result["rows"]
    assert capsys.readouterr().out.count("there already") == len(methods)


def test_what_a_method_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> Any:
        raise ValueError("a pipeline of another kind\nand more")

    monkeypatch.setattr(cost, "build", refuse)
    result = cost.run([cost.Case("canvas", "uce", "cpu")], tmp_path / "cost.json", write_json)
    assert result["rows"] == []
    assert result["left_out"][0]["why"] == "ValueError: a pipeline of another kind"


def test_the_table(tmp_path: Path):
    common = {
        "shapes": "canvas", "cut": "", "kind": "style", "target": "Dots", "weights": "its own", "network_parameters": 4_800_000,
        "machine": "a CPU", "torch": "2.11", "commit": "abc", "date": "today", "peak_mib": 120.4, "storage_mib": 0.5, "bf16": False,
        "other_load": 0.5, "settings": {},
    }  # fmt: skip
    rows = [
        {**common, "method": "uce", "whole": True, "seconds": 1.234},
        {
            **common, "method": "esd", "whole": False, "seconds": 9000.0, "steps": 1000, "images": 0, "step_seconds": 0.01234,
            "measured": {"steps": 5, "images": 0},
        },
    ]  # fmt: skip
    left_out = [{"shapes": "canvas", "cut": "", "machine": "a CPU", "method": "pecker", "why": "ValueError: no"}]
    write_json(tmp_path / "quality" / "cost.json", {"meta": {}, "rows": rows, "left_out": left_out})
    text = tables.block("cost", tmp_path)
    assert (
        "The canvas pipeline, U-Net of 4.8 M parameters, its own weights, fp32; a CPU; torch 2.11, commit abc:" in text
    )
    assert "bf16" not in text
    assert "| uce | **1.23** | - | all | 120 | 0.5 | 50% |" in text
    assert "| esd | **2.5 h** | 12.3 | 5 of 1,000 steps | 120 | 0.5 | 50% |" in text
    assert "Not there: pecker (ValueError: no)." in text
    rows[1]["bf16"] = True
    write_json(tmp_path / "quality" / "cost.json", {"meta": {}, "rows": rows, "left_out": []})
    assert "fp32 (bf16 passes: esd); a CPU" in tables.block("cost", tmp_path)
    assert cost_tables.block(tmp_path / "nothing.json") == tables.NOT_MEASURED


def test_targets_are_drawn_from_every_world():
    for world in (canvas_concepts(), unlearncanvas_concepts()):
        (target,) = world.draw_targets(1, 0, 0)
        assert isinstance(target, Target)
        assert target.kind == "style"
