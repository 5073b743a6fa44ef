"""Metrics, card and curves: whole files, cards the Hub can read that tell no texts, pictures with what the log holds."""

from __future__ import annotations

import json
import math
import os
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastunlearn.report.card import hub_name, metrics_table, model_card
from fastunlearn.report.curves import draw_curves, series
from fastunlearn.report.files import plain, write_bytes, write_json


def test_json_is_plain_and_whole(tmp_path):
    class Kind(str, Enum):  # noqa: UP042 (as transformers' enums are)
        A = "a"

    data = {
        1: torch.tensor(2.5), "n": np.float32(0.5), "nan": math.nan, "inf": torch.tensor([1.0, math.inf]), "k": Kind.A,
        "p": Path("x/y"), "t": (1, True, None), "ä": "ü",
    }  # fmt: skip
    path = tmp_path / "new" / "a.json"
    write_json(path, data)
    assert type(plain(Kind.A)) is str
    assert str(plain({"k": Kind.A})) == "{'k': 'a'}"
    text = path.read_text(encoding="utf-8")
    assert '"ä": "ü"' in text
    assert text.endswith("}\n")
    assert json.loads(text) == {
        "1": 2.5, "n": 0.5, "nan": None, "inf": [1.0, None], "k": "a", "p": "x/y", "t": [1, True, None], "ä": "ü",
    }  # fmt: skip
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"data: JSON holds no object"):
        write_json(path, {"a": object()})
    with pytest.raises(FileExistsError, match=r"a.json exists"):
        write_json(path, {}, overwrite=False)
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left"):
        write_bytes(path, b"new", overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


BEFORE = {"forget": {"exact_recall": 1.0, "answer_probability": 0.99, "rows": 6}, "text": {"perplexity": 26.81}}
AFTER = {"forget": {"exact_recall": 0.05, "answer_probability": 0.0123, "rows": 6}, "text": {"perplexity": 27.5}}


def card(**changes):
    arguments = {
        "base_model": "meta-llama/Llama-3.2-1B", "method": "SAU", "objective": "NPO", "forget_rows": 6, "retain_rows": 1054,
        "settings": {"learning_rate": 1e-5, "trainable_params_regex": "a|b"}, "before": BEFORE, "after": AFTER,
        "pruning": {"method": "wanda", "pattern": "2:4", "density": 0.5}, "versions": {"torch": "2.13"},
        "command": "fastunlearn sau --model x", "steps": 12,
    }  # fmt: skip
    return model_card(**(arguments | changes))


def test_the_card_is_what_the_hub_reads():
    text = card()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "meta-llama/Llama-3.2-1B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["machine-unlearning", "fastunlearn", "sparse"],
    }
    assert "forget 6 rows and to keep 1,054 others" in body
    assert "| forget | exact recall (answer, character for character) | 100.0% | 5.0% |" in body
    assert "| text | perplexity on other text | 26.81 | 27.5 |" in body
    assert "Pattern: 2:4. Pruned by wanda. 50.0% of the pruned layers' weights are left." in body
    assert "| learning_rate | 1e-05 |" in body
    assert "| trainable_params_regex | a\\|b |" in body
    assert "SAU with the objective NPO, 12 steps" in body
    assert "```\nfastunlearn sau --model x\n```" in body
    assert "What this does not show" in body
    assert "torch 2.13" in body


def test_the_card_parses_for_huggingface_hub():
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(card()).data
    assert data.base_model == "meta-llama/Llama-3.2-1B"
    assert "machine-unlearning" in data.tags


def test_a_local_base_model_is_no_hub_name():
    text = card(base_model="/home/me/model", pruning=None, retain_rows=0, command=None, versions=None, steps=None)
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert "base_model" not in front
    assert front["tags"] == ["machine-unlearning", "fastunlearn"]
    assert "`/home/me/model`" in text
    assert "no retain set" in text
    assert "## Sparsity" not in text
    assert hub_name("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [hub_name(n) for n in ("a/b", "./a", "a", "a/b/c", "../b")] == ["a/b", None, None, None, None]


def test_what_was_not_measured_is_said():
    assert "| forget | exact recall (answer, character for character) | 100.0% | not measured |" in metrics_table(
        BEFORE, {}
    )


HISTORY = [
    {"step": i, "loss": 1.0, "forget_loss": 13.8 * 0.9**i, "retain_loss": 0.1, "learning_rate": 1e-5, "capacity": 0.6, "grad_norm": 2.0}
    for i in range(1, 20)
] + [{"step": 19, "train_runtime": 3.0}]  # fmt: skip


def test_series_leaves_out_what_is_no_number():
    history = [
        {"step": 1, "a": 1.0},
        {"step": 2},
        {"step": 3, "a": math.nan},
        {"step": 4, "a": "x"},
        {"step": 5, "a": 2},
    ]
    assert series(history, "a") == ([1.0, 5.0], [1.0, 2.0])


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    draw_curves(HISTORY, tmp_path / "all.png", title="SAU")
    picture = imread(tmp_path / "all.png")
    dense = [{k: v for k, v in e.items() if k != "capacity"} for e in HISTORY]
    draw_curves(dense, tmp_path / "dense.png")
    # A panel less: a lower picture of the same width.
    lower = imread(tmp_path / "dense.png")
    assert picture.shape[1] == lower.shape[1]
    assert picture.shape[0] > lower.shape[0] > 300
    # The red line of the forget loss falls from left to right.
    red = (picture[..., 0] > 0.6) & (picture[..., 1] < 0.2) & (picture[..., 2] < 0.25)
    rows, columns = np.nonzero(red)
    left, right = rows[columns < np.quantile(columns, 0.1)], rows[columns > np.quantile(columns, 0.9)]
    assert len(rows) > 500
    assert left.mean() < right.mean()
    draw_curves(HISTORY[:1], tmp_path / "all.png")
    assert not np.array_equal(imread(tmp_path / "all.png"), picture)
    assert sorted(os.listdir(tmp_path)) == ["all.png", "dense.png"]
    with pytest.raises(ValueError, match=r"history: no loss"):
        draw_curves([{"step": 1, "loss": 2.0}], tmp_path / "x.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"curves need matplotlib: pip install 'fastunlearn\[llm\]'"):
        draw_curves(HISTORY, tmp_path / "x.png")
