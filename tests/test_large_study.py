"""The study of whole models: what a row is of, which failures are results, which are tried again."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import large
from fastunlearn.parametrize.compressed_nm import compressed_layers

CASE = large.Case("smollm2-135m", "b", "cpu", "float32", 1, 8, False, 1, 1)
ROW = {"tokens_per_second": 1.0, "peak_bytes": 2**20, "seconds": {"forget": 0.1}}


@pytest.fixture
def say(monkeypatch):
    """What the next processes of a case do, (status, standard output) each; and the commands they were."""
    answers, commands = [], []

    def run(command, **_):
        commands.append(command)
        status, text = answers.pop(0)
        return subprocess.CompletedProcess(command, status, text)

    monkeypatch.setattr(large.machine, "meta", lambda device: {"commit": "abc", "date": "today", "device": str(device)})
    monkeypatch.setattr(large.subprocess, "run", run)
    return answers, commands


def test_a_row_is_of_its_commit_and_day(say, tmp_path, monkeypatch):
    answers, commands = say
    answers.append((0, f"loading\n{json.dumps(ROW)}\n"))
    large.run([CASE], tmp_path / "out.json")
    monkeypatch.setattr(large.machine, "meta", lambda device: {"commit": "def", "date": "later"})
    result = large.run([CASE], tmp_path / "out.json")
    assert len(commands) == 1
    assert [(row["commit"], row["date"]) for row in result["rows"]] == [("abc", "today")]
    assert result["meta"]["commit"] == "def"


def test_a_failure_is_tried_again(say, tmp_path):
    answers, commands = say
    answers += [(-9, ""), (1, ""), (0, json.dumps(ROW))]
    for failed in ("exit status -9", "exit status 1", None):
        [row] = large.run([CASE], tmp_path / "out.json")["rows"]
        assert row.get("failed") == failed
    assert len(commands) == 3


def test_out_of_memory_is_a_result(say, tmp_path):
    answers, commands = say
    answers.append((1, json.dumps({"failed": "out of memory", "said": "CUDA out of memory."})))
    for _ in range(2):
        [row] = large.run([CASE], tmp_path / "out.json")["rows"]
        assert (row["failed"], row["said"], row["model"]) == ("out of memory", "CUDA out of memory.", CASE.model)
    assert len(commands) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("no more"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
    ],
)  # fmt: skip
def test_a_process_says_that_memory_ran_out(monkeypatch, capsys, error):
    def measure(case):
        assert case == CASE
        raise error

    monkeypatch.setattr(large, "measure", measure)
    assert large.child(json.dumps(vars(CASE))) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] == large.OUT_OF_MEMORY
    assert str(error).startswith(said["said"])


def test_another_error_is_not_memory(monkeypatch):
    def measure(case):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(large, "measure", measure)
    with pytest.raises(RuntimeError, match="shapes differ"):
        large.child(json.dumps(vars(CASE)))


@pytest.mark.parametrize("arm", large.ARMS)
def test_a_step_of_every_arm(arm):
    run = large.Run(replace(CASE, arm=arm), torch.device("cpu"))
    before = [p.detach().clone() for p in run.params]
    run.step()
    assert any(not torch.equal(p, old) for p, old in zip(run.params, before))
    assert {"forget", "retain", "optimizer"} <= run.clock.seconds.keys()
    assert ("reference" in run.clock.seconds) == (arm == "a")
    assert all(seconds > 0 for seconds in run.clock.seconds.values())
    if arm in "cd":
        kept = sum(p.numel() for p in run.params)
        assert kept == sum(w.shape.numel() for w in compressed_layers(run.model).values()) // 2


def test_what_is_measured():
    row = large.measure(replace(CASE, arm="c"))
    assert row["weights"] == large.LABEL
    assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
    assert row["tokens_per_second"] == pytest.approx(2 * 8 / row["step_seconds"])
    assert row["peak_bytes"] > 0


def test_plans_of_large_models(tmp_path, monkeypatch):
    asked = (("smollm2-135m", "a", 1), ("smollm2-135m", "c", 1), ("smollm2-135m", "c", 8), ("smollm2-135m", "c", 64))
    monkeypatch.setattr(large, "PLANS", asked)
    rows = {(r["model"], r["arm"], r["gpus"]): r for r in large.plans(tmp_path / "plans.json")["rows"]}
    assert json.loads((tmp_path / "plans.json").read_text())["rows"] == list(rows.values())
    assert tuple(rows) == asked
    whole, eighth, part = (rows["smollm2-135m", "c", gpus]["bytes"]["weights"] for gpus in (1, 8, 64))
    assert (whole, eighth) == pytest.approx((64 * part, 8 * part))
    assert rows["smollm2-135m", "c", 1]["peak_bytes"] < rows["smollm2-135m", "a", 1]["peak_bytes"]
