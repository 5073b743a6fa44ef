"""The study of whole models: what a row is of, which failures are results, which are tried again."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import large, large_processes, large_tables, tables
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
    (tmp_path / "large").mkdir()
    (tmp_path / "plans.json").rename(tmp_path / "large" / "plans.json")
    text = tables.block("plans", tmp_path)
    assert text.count("| smollm2-135m |") == len(asked)
    assert all(f"- {assumed}" in text for assumed in rows["smollm2-135m", "c", 1]["assumptions"])


def _measured(arm, peak, step, **more):
    return {
        **vars(replace(CASE, arm=arm)), "key": arm, "what": large.ARMS[arm], "commit": "abc", "date": "today", "peak_bytes": peak * 2**20,
        "seconds": {"forget": step / 2, "optimizer": step / 2}, "step_seconds": step, "tokens_per_second": 16 / step, "other_load": 0.5,
        "plan": {"peak_bytes": 1.1 * peak * 2**20, "step_seconds": step}, **more,
    }  # fmt: skip


def test_tables_of_what_was_measured(tmp_path):
    meta = {"device": "a machine", "threads": 1, "torch": "2", "weights": large.LABEL}
    rows = [
        _measured("a", 1000, 2.0),
        _measured("c", 400, 1.9),
        {"key": "d", **vars(CASE), "failed": large.OUT_OF_MEMORY},
    ]
    (tmp_path / "large").mkdir()
    assert tables.block("large", tmp_path) == tables.NOT_MEASURED
    (tmp_path / "large" / "here.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    text = tables.block("large", tmp_path)
    assert (
        "| smollm2-135m, float32, 1 + 1 x 8 | (c) ours, 2:4 compressed | 8 | 1.9 | 0.95 | 0.95 | 400 | 440 (+10%) | 1.9 (+0%) |"
        in text
    )
    assert "| smollm2-135m, float32: peak of c over a | 0.400 | <= 0.45 | met |" in text
    assert "| smollm2-135m, float32: step of c over a | 0.950 | <= 0.9 | **missed** |" in text
    assert "step of d over c" not in text
    assert "out of memory" in text
    assert (
        "a machine, 1 thread; torch 2; random weights of the published configuration; other work took 50% to 50%"
        in text
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines[:5]} == {lines[0].count("|")}


def test_one_row_of_all_processes(tmp_path):
    def process(peak, step):
        said = {"peak_bytes": 100, "bytes": {"weights": 12, "gathered": 5}, "seconds": {}, "step_seconds": 1.0}
        return {
            "peak_bytes": peak, "bytes": {"weights": 10}, "seconds": {"forget": step}, "step_seconds": step, "other_load": None,
            "clock": "wall", "link_gbps": 1.0, "plan": said,
        }  # fmt: skip

    row = large_processes.together([process(90, 2.0), process(110, 1.0)])
    assert (row["peak_bytes"], row["step_seconds"], row["bytes of all"]) == (110, 2.0, {"weights": 20})
    assert row["plan"]["bytes of all"] == {"weights": 24}
    row |= {**vars(CASE), "what": "x", "processes": 2, "commit": "abc", "date": "today"}
    meta = {"device": "a machine", "threads": 1, "torch": "2", "weights": large.LABEL}
    text = "\n".join(large_tables.processes({"meta": meta, "rows": [row]}))
    assert "| (b) x | 2 | 0.0 (0.0) | 0 | 9.54e-05 (-9%) | 2 | 1 (-50%) |" in text
