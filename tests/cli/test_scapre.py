"""`fastunlearn scapre` on a tiny pipeline on disk: what it writes, what a dry run tells, what it refuses."""

from __future__ import annotations

import json
import os

import pytest
import torch

pytest.importorskip("diffusers")
from safetensors.torch import load_file

from fastunlearn.cli import scapre
from tests.cli.test_diffusion import canvas as canvas
from tests.cli.test_diffusion import folder as folder
from tests.tiny_diffusion import tiny_pipeline


def test_the_canvas_by_names(canvas, tmp_path, capsys):
    out = tmp_path / "out"
    assert scapre.main(["--concepts", "mosaic", "pop art", "--output", str(out), "lora_rank=4"]) == 0
    assert sorted(os.listdir(out)) == ["_samples", "metrics.json", scapre.LORA, "unet.safetensors"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["concepts"] == ["Mosaic", "Pop Art"]
    assert metrics["anchors"] == ["Photo", "Photo"]
    assert len(metrics["settings"]["template"]) == 3
    assert set(metrics["predicted"]) == {"forget", "retain", "condition"}
    changed, before = load_file(out / "unet.safetensors"), tiny_pipeline().unet.state_dict()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in changed.items())
    said = capsys.readouterr().out
    assert "projections" in said
    assert "error of the edit up to" in said


def test_a_file_of_concepts_and_a_dry_run(folder, tmp_path, capsys):
    names = tmp_path / "concepts.txt"
    names.write_bytes(b"\xef\xbb\xbfMosaic -> Photo\r\n# two of them\r\n\r\nVan Gogh\r\n")
    words = ["--model", str(folder), "--concepts", str(names)]
    assert scapre.main([*words, "--dry_run", "relevance=gaussian", "geometry=0.2"]) == 0
    said = capsys.readouterr().out
    assert "relevance of rows" in said
    assert "turned by the geometry step" in said
    assert os.listdir(tmp_path) == ["concepts.txt"]
    out = tmp_path / "out"
    for said in (["dry_run=True"], ["--dry-run=yes"], ["--dry_run", "1"]):
        assert scapre.main([*words, "--output", str(out), *said]) == 0
    assert os.listdir(tmp_path) == ["concepts.txt"]
    capsys.readouterr()
    assert scapre.main([*words, "--output", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["concepts"] == ["Mosaic", "Van Gogh"]
    assert metrics["anchors"] == ["Photo", ""]
    assert metrics["predicted"]["retain"] is None
    assert scapre.main([*words, "--output", str(out)]) == 2
    assert "out" in capsys.readouterr().err
    assert scapre.main([*words, "--output", str(tmp_path / "others"), "--anchors", "Tree"]) == 0
    assert json.loads((tmp_path / "others" / "metrics.json").read_text())["anchors"] == ["Photo", "Tree"]
    assert scapre.main([*words, "--output", str(tmp_path / "no"), "--anchors", "Tree", "Cat"]) == 2
    assert "some names say themselves what they become" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--concepts", "nothing.txt", "--output", "o"], "nothing.txt"),
        (["--concepts", "Mosaic", "--output", "o", "lora_rank=0"], "lora_rank: want at least 1"),
        (["--concepts", "Mosaic", "--preserve", "Mosaic", "--output", "o"], "preserve: 'Mosaic' is to be erased, too"),
        (["--concepts", "Mosaic", "mode=paper", "--output", "o"], "anchors: none given, and so V* = 0"),
        (["--concepts", "Mosaic", "--output", "o", "mode=official", "--preserve", "Cat"], "mode official has no preserve set"),
        (["--concepts", "Mosaic"], "missing: --output or --output_dir (or --dry_run)"),
        (["--concepts", "Mosaic", "dry_run=no"], "missing: --output or --output_dir (or --dry_run)"),
    ],
)  # fmt: skip
def test_bad_input(folder, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    try:
        status = scapre.main(["--model", str(folder), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
