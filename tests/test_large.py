"""The driver of whole-model measurements: a row an arm, kept when a run is repeated, failures told as such."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from benchmarks import large
from fastunlearn.parametrize.compressed_nm import compressed_layers


def case(arm: str, **changes) -> large.Case:
    settings = {
        "model": "smollm2-135m", "arm": arm, "device": "cpu", "dtype": "float32", "batch": 1, "sequence": 8, "checkpointing": False,
        "steps": 1, "layers": 1,
    }  # fmt: skip
    return large.Case(**settings | changes)


@pytest.mark.parametrize("arm", large.ARMS)
def test_a_step_of_every_arm(arm):
    import torch

    run = large.Run(case(arm), torch.device("cpu"))
    before = [p.detach().clone() for p in run.params]
    run.step()
    assert any(not torch.equal(p, old) for p, old in zip(run.params, before))
    assert {"forget", "retain", "optimizer"} <= run.clock.seconds.keys()
    assert ("reference" in run.clock.seconds) == (arm == "a")
    assert all(seconds > 0 for seconds in run.clock.seconds.values())
    if arm in "cd":
        kept = sum(p.numel() for p in run.params)
        assert kept == sum(w.shape.numel() for w in compressed_layers(run.model).values()) // 2


@pytest.mark.serial
def test_rows_are_kept_and_failures_told(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    large.run([case("c")], out)
    first = json.loads(out.read_text())
    row = first["rows"][0]
    assert row["weights"] == large.LABEL
    assert row["tokens_per_second"] > 0 < row["peak_bytes"]
    assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
    # The same again is not measured; what cannot run is a row too.
    large.run([case("c"), case("c", model="nothing")], out)
    second = json.loads(out.read_text())
    assert second["rows"][0] == row
    assert second["rows"][1]["failed"] == "exit status 1"
    assert "there already: smollm2-135m, arm c" in capsys.readouterr().out
