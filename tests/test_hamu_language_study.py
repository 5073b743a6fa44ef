"""The study of HAMU on a language model at its smallest: both arms, times, nothing twice, sums and plot from the rows."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from benchmarks import hamu_language as study
from fastunlearn.checkpoint import save_checkpoint
from tests.test_trainer import rows
from tests.tiny_chat import char_tokenizer, tiny_llama


def test_a_whole_study(tmp_path, monkeypatch):
    some = rows(8)
    forget, plain = some[:4], some[4:]
    again = [{**row, "answer": f"It is {row['answer']}"} for row in forget]
    monkeypatch.setattr(study, "rows_of", lambda: (forget, {"plain": plain, "duplicates": plain + again}))
    save_checkpoint(tmp_path / "base", tiny_llama(), char_tokenizer())
    model = study.learned(tmp_path / "work", str(tmp_path / "base"), 1)
    assert study.learned(tmp_path / "work", "nowhere", 1) == model
    settings = {**study.SETTINGS, "per_device_train_batch_size": 4, "num_train_epochs": 2}
    found = study.Study(tmp_path / "out.json", settings)
    assert study.run(found, str(model), [0], until=0.0) == 2
    assert study.run(found, str(model), [0]) == 0
    for row in found.result["rows"]:
        assert (row["steps"], row["checked"], row["held-out checked"]) == (2, 2, 2 if row["arm"] == "duplicates" else 0)
        assert row["kappa"] == pytest.approx(sum(row["kappas"]) / 2, rel=1e-3)
    for row in study.timed(str(model), 1):
        found.add(row)
    by_name = {row["provider"]: row for row in found.result["rows"] if row["what"] == "time"}
    assert by_name["GradDiff, SGD"]["over GradDiff, SGD"] == 1
    assert by_name["HAMU-Q"]["seconds of a step"] > 0
    monkeypatch.setattr(study, "one_run", None)
    assert study.run(study.Study(tmp_path / "out.json", settings), str(model), [0]) == 0
    with pytest.raises(ValueError, match="is of other settings"):
        study.Study(tmp_path / "out.json", {})
    summary = json.loads((tmp_path / "out.json").read_text())["summary"]
    assert [row["what"] for row in summary] == ["hardness", "hardness", "certificates", "a step", "a step", "a step"]
    assert summary[2]["checked"] == 4
    study.plot(found.result, tmp_path / "out.svg")
    assert b"<svg" in (tmp_path / "out.svg").read_bytes()
