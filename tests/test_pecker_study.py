"""The study of class forgetting at its smallest: every part runs, a second call does nothing again, rows hold what they must."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("pandas")

from benchmarks import pecker, pecker_results, tables
from tests.data.test_cifar10 import write_cifar10


@pytest.fixture
def study(tmp_path):
    return pecker.Study("tiny", tmp_path / "work", "cpu", data=write_cifar10(tmp_path / "cifar10", per_class=6))


def test_a_whole_study(study, tmp_path, monkeypatch):
    out = tmp_path / "pecker_tiny.json"
    methods = ["sfd", "pecker, tile 10%", "gradient_ascent", "retrain"]
    result = pecker.run(study, methods, [0], out)
    assert [row["method"] for row in result["rows"]] == methods
    assert set(result["before"]) == {"teacher", "generator"}
    assert 0 <= result["meta"]["judge accuracy, test"] <= 1
    for row in result["rows"]:
        assert 0 <= row["UA"] <= 100
        assert row["fid_classifier_features"] >= 0
        assert [point["iteration"] for point in row["curve"]] == ([] if row["method"] == "retrain" else [1, 2])
        assert (row["commit"], row["date"]) == (result["meta"]["commit"], result["meta"]["date"])
        assert row["date"]
    assert 0 < result["rows"][1]["gradient_products"] < 1
    assert result["rows"][0]["gradient_products"] is None
    assert json.loads(out.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    # Nothing is done twice, and a run that is there is not made again.
    monkeypatch.setattr(pecker.Study, "run", None)
    again = pecker.run(pecker.Study("tiny", tmp_path / "work", "cpu", data=tmp_path / "cifar10"), methods, [0], out)
    assert again["rows"] == json.loads(out.read_text())["rows"]
    other = pecker.Study("tiny", tmp_path / "work", "cpu", data=tmp_path / "cifar10")
    other.size = dataclasses.replace(other.size, steps=1)
    with pytest.raises(ValueError, match="holds runs of another size"):
        pecker.run(other, methods, [0], out)
    pecker_results.plot(again, out.with_suffix(".svg"))
    assert b"<svg" in out.with_suffix(".svg").read_bytes()
    (tmp_path / "quality").mkdir()
    out.rename(tmp_path / "quality" / "pecker_small.json")
    lines = tables.block("pecker-small", tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| teacher",
        "| generator",
        f"| {again['rows'][0]['method']}",
    ]
    assert len({line.count(" | ") for line in lines[:5]}) == 1


@pytest.mark.thorough
def test_seconds_hold_the_mask(study, monkeypatch):
    from fastunlearn import PECKERTrainer

    localize = PECKERTrainer.localize

    def slow(self, iteration=0):
        time.sleep(2.0)
        localize(self, iteration)

    monkeypatch.setattr(PECKERTrainer, "localize", slow)
    row = study.run("pecker", 0)
    assert row["curve"][0]["seconds"] > 2.0
    assert row["seconds"] > 2.0


@pytest.mark.parametrize(("killed_at", "goes_on"), [pytest.param(1, False, marks=pytest.mark.thorough), (3, True)])
def test_seconds_of_a_killed_run_count_once(study, monkeypatch, killed_at, goes_on):
    from fastunlearn import PECKERTrainer

    study.size = dataclasses.replace(study.size, steps=4)
    step = PECKERTrainer.training_step

    def killed(self, *given, **named):
        if self.args.method == "sfd" and self.state.global_step == killed_at:
            raise RuntimeError("killed")
        return step(self, *given, **named)

    monkeypatch.setattr(PECKERTrainer, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        study.run("sfd", 0)
    monkeypatch.setattr(PECKERTrainer, "training_step", step)
    # What comes after the last checkpoint took long; the seconds before it count.
    file = study.work / "sfd-0" / "curve.json"
    curve = json.loads(file.read_text())
    assert [row["iteration"] for row in curve] == list(range(1, killed_at + 1))
    curve[-1]["seconds"] = 1e6
    if goes_on:
        curve[1]["seconds"] = 1e3
    file.write_text(json.dumps(curve))
    row = study.run("sfd", 0)
    assert [point["iteration"] for point in row["curve"]] == [1, 2, 3, 4]
    assert (1e3 if goes_on else 0) < row["curve"][2]["seconds"] < row["seconds"] < (2e3 if goes_on else 1e3)


def test_gradient_ascent_forgets_at_full_strength(study, tmp_path):
    args = study.config(tmp_path, 0, **pecker.RUNS["gradient_ascent"])
    assert (args.method, args.k_forget) == ("gradient_ascent", 1.0)


def test_rates_by_a_factor(study, tmp_path):
    one, two = (study.config(tmp_path, 0, **pecker.RUNS[f"pecker{name}"]) for name in ("", ", twice the rate"))
    assert (two.learning_rate, two.pseudo_learning_rate) == (2 * one.learning_rate, 2 * one.pseudo_learning_rate)
    assert pecker.RUNS["pecker, twice the rate"]["rate_factor"] == 2.0


def test_every_checkpoint_has_a_measurement():
    assert all(size.save_every % size.every == 0 for size in pecker.SIZES.values())


def test_others_may_join(study, tmp_path, monkeypatch):
    row = {"UA": 100.0, "kept_accuracy": 90.0, "fid_classifier_features": 1.0, "seconds": 1.0, "curve": [], "seed": 0}
    monkeypatch.setitem(pecker.OTHERS, "theirs", lambda s, seed: {"method": "theirs", **row, "same": s is study})
    monkeypatch.setattr(pecker.Study, "before", lambda self: {})
    result = pecker.run(study, ["theirs"], [0], tmp_path / "out.json")
    assert result["rows"][0]["same"] is True


def test_where_the_target_is_reached():
    def curve(*points):
        return [{"iteration": i, "seconds": i / 10, "UA": ua, "fid_x": fid} for i, ua, fid in points]

    sfd = {"method": "sfd", "seed": 0, "curve": curve((10, 50, 9), (20, 99.5, 12), (30, 99.5, 10))}
    fast = {"method": "pecker", "seed": 0, "curve": curve((10, 99.2, 10.4), (20, 99, 30), (30, 99, 30))}
    never = {"method": "row", "seed": 0, "curve": curve((10, 98, 5), (20, 100, 10.6))}
    other = {"method": "pecker", "seed": 1, "curve": curve((10, 99, 9))}
    got = pecker_results.summary({"meta": {"fid": "fid_x"}, "rows": [sfd, fast, never, other]})
    assert [(r["method"], r["iteration"], r["iteration_over_sfd"]) for r in got] == [
        ("sfd", 30, 1.0),
        ("pecker", 10, 10 / 30),
        ("row", None, None),
    ]
    assert got[1]["seconds_over_sfd"] == pytest.approx(1 / 3)
    # SFD's own level: UA of 97.6 less one point.
    for row in (sfd, fast, never):
        for point in row["curve"]:
            point["UA"] -= 1.9
    got = pecker_results.summary(
        {"meta": {"fid": "fid_x"}, "rows": [sfd, fast, {**never, "curve": curve((20, 96.7, 10.4))}]}
    )
    assert [(r["iteration"], r["level iteration"], r["level iteration_over_sfd"]) for r in got] == [
        (None, 30, 1.0), (None, 10, 10 / 30), (None, 20, 20 / 30),
    ]  # fmt: skip


def test_the_model_is_small_enough():
    for size in ("cifar10", "small"):
        unet = pecker.Study.unet(type("Shape", (), {"size": pecker.SIZES[size]}))
        assert sum(p.numel() for p in unet.parameters()) <= 10_000_000


def test_no_data_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        pecker.main(
            [
                "run",
                "--size",
                "tiny",
                "--work",
                str(tmp_path / "w"),
                "--data",
                str(tmp_path),
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "o.json"),
            ]
        )
    assert stopped.value.code == 2
    assert "there is no" in capsys.readouterr().err
