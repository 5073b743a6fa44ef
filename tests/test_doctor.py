"""`fastunlearn doctor` and the command line."""

from __future__ import annotations

import json

import fastunlearn
from fastunlearn import _backend
from fastunlearn.cli import main
from fastunlearn.cli.doctor import collect, render


def test_doctor_lists_every_op(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for row in fastunlearn.explain():
        assert row.op in out
    block = out.split("```")[1]
    assert fastunlearn.__version__ in block
    assert "torch " in block
    assert "gpu: " in block


def test_doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {o["op"] for o in facts["ops"]} == {row.op for row in fastunlearn.explain()}


def test_what_never_ran_on_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(_backend, "gpu_runs", dict)
    assert all(k["gpu_run"] is None for k in collect()["gpu_kernels"])
    assert "never run on a GPU" in render(collect())
    run = {"gpu": "NVIDIA X", "date": "2030-01-02", "commit": "abc1234"}
    monkeypatch.setattr(_backend, "gpu_runs", lambda: {"bitmask/native": run})
    assert "passed its tests on NVIDIA X (2030-01-02, abc1234)" in render(collect())


def test_doctor_without_native_code(monkeypatch):
    from fastunlearn import _native

    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_why_missing", "fastunlearn._C is not built")
    text = render(collect())
    assert "native: none: fastunlearn._C is not built" in text


def test_command_line(capsys):
    assert main([]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert fastunlearn.__version__ in capsys.readouterr().out
    assert main(["nothing"]) == 2
    assert "no command 'nothing'" in capsys.readouterr().err
