"""The study of HAMU on images at its smallest: every part runs, it goes on where it stopped, its numbers follow from its rows."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("pandas")

from benchmarks import cifar_hamu as study
from benchmarks import cifar_hamu_results as results
from benchmarks import plots, tables
from benchmarks.resnet import ResNet
from tests.data.test_cifar10 import write_cifar10


def test_resnet_20_is_the_paper_s():
    """0.27 million parameters (He et al. 2015, table 6); shortcuts have none."""
    model = ResNet().eval()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) == 20
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 10)
    block = model.blocks[3]
    for p in block.parameters():
        torch.nn.init.zeros_(p)
    # Nothing but the shortcut: every other pixel, new channels are zero on both sides.
    inside = torch.rand(1, 16, 8, 8)
    out = block(inside)
    assert torch.equal(out[:, 8:24], inside[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_a_whole_study(tmp_path, monkeypatch):
    data = write_cifar10(tmp_path / "cifar10", per_class=6)
    out, work = tmp_path / "images.json", tmp_path / "work"
    assert study.run(study.Study("tiny", work, data=data, until=0.0), [0], out) is None
    assert not out.exists()
    first = study.run(study.Study("tiny", work, data=data), [0], out)
    tiny = study.SIZES["tiny"]
    wanted = study.plan(tiny, [0])
    assert [(r["method"], r["rho"], r["seed"], r["batch"]) for r in first["rows"]] == wanted
    assert {batch for *_, batch in wanted} == {tiny.rows, tiny.large}
    for row in first["rows"]:
        ours = row["method"] in results.OURS
        assert ours == ("hardness" in row)
        if ours:
            steps = tiny.steps if row["batch"] == tiny.rows else tiny.large_steps
            assert len(row["kappa"]) == steps
            assert row["hardness"] == pytest.approx(sum(row["kappa"]) / steps, rel=1e-2)
            assert 0 <= row["held"] <= row["checked"] == steps
    # Nothing is done twice.
    monkeypatch.setattr(study.Study, "run", None)
    again = study.run(study.Study("tiny", work, data=data), [0], out)
    assert again["rows"] == json.loads(out.read_text())["rows"]
    folder = tmp_path / "results" / "quality"
    folder.mkdir(parents=True)
    out.replace(folder / "hamu_images.json")
    (picture,) = plots.draw(tmp_path / "results", tmp_path)
    assert picture.name == "hamu-images.svg"
    assert b"<svg" in picture.read_bytes()
    text = tables.block("hamu-images", tmp_path / "results")
    assert text.startswith("Mean hardness:\n\n| method | rho 0 | rho 0.5 | rho 1 | Pearson, every run |")
    assert text.count("\n| fine-tuning |") == 4
    assert tables.block("hamu-language", tmp_path / "results") == tables.NOT_MEASURED


def test_sets_hold_rho_of_the_rest(tmp_path):
    data = write_cifar10(tmp_path / "cifar10", per_class=6)
    s = study.Study("tiny", tmp_path / "work", data=data)
    count = int((s.labels == 0).sum())
    for rho in (0.0, 0.5, 1.0):
        forget, retain = s.sets(rho, 3)
        assert len(forget) == count
        assert sorted([*forget.tolist(), *retain.tolist()]) == list(range(len(s.labels)))
        assert int((s.labels[forget] != 0).sum()) == round(rho * count)


def test_summary_by_hand():
    def row(method, rho, seed, **more):
        return {"method": method, "rho": rho, "seed": seed, "batch": 4, "held": 1, "checked": 1, **more}

    rows = [row("HAMU-Q", rho, seed, hardness=rho + 0.1 * seed) for rho in results.RHOS for seed in (0, 1)]
    rows += [
        row("GradAscent", 0.75, seed, **{"forget change": 1.0, "retain change": change})
        for seed, change in ((0, -0.3), (1, 0.1))
    ]
    rows.append(row("fine-tuning", 0.75, 0, **{"forget change": -1.0, "retain change": -1.0}))
    found = {(r["what"], r["method"]): r for r in results.summary(rows)}
    hardness = found["mean hardness", "HAMU-Q"]
    assert hardness["Pearson, means"] == pytest.approx(1)
    assert hardness["Pearson, every run"] == pytest.approx(
        results.pearson([0, 0, 0.5, 0.5, 1, 1], [0, 0.1, 0.5, 0.6, 1, 1.1])
    )
    assert ("mean hardness", "HAMU-U") not in found
    ascent = found["rho 0.75, batches of 4 images", "GradAscent"]
    assert (ascent["improves one, hurts none"], ascent["in every seed"]) == (True, False)
    assert not found["rho 0.75, batches of 4 images", "fine-tuning"]["improves one, hurts none"]
    assert found["certificates", "both"]["share"] == 1
