"""What a test run on a GPU leaves behind, played on a CPU: gpu_runs.json, and the tests after a kernel that went astray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests import sanitize
from tests.conftest import ROOT
from tests.proof import OpProof

pytestmark = pytest.mark.serial

CONFTEST = """
import os
import torch
from tests import conftest

torch.cuda.get_device_name = lambda: "a GPU"

def synchronize():
    if os.path.exists(f"lost {os.getpid()}"):
        raise RuntimeError("an illegal memory access was encountered")

torch.cuda.synchronize = synchronize
conftest._has_gpu = lambda: True
from tests.conftest import *
"""

TESTS = """
import os
import pytest

class Proof:
    def proof_parameters():
        return {"case": ["one", "two", "three"], "gpu_backend": ["native", "triton"]}
    proof_parameters = staticmethod(proof_parameters)
    has_rung = staticmethod(lambda name: True)

def check_gpu():
    assert not os.path.exists(f"lost {os.getpid()}"), "this process has no GPU any more"

class TestGood(Proof):
    op = "good"
    @pytest.mark.gpu
    def test_gpu(self, case, gpu_backend):
        check_gpu()

class TestBad(Proof):
    op = "bad"
    @pytest.mark.gpu
    def test_gpu(self, case, gpu_backend):
        check_gpu()
        if (case, gpu_backend) == ("one", "native"):
            open(f"lost {os.getpid()}", "w").close()
            raise RuntimeError("an illegal memory access was encountered")

class TestLast(Proof):
    op = "unfinished"
    @pytest.mark.gpu
    def test_gpu(self, case, gpu_backend):
        check_gpu()
        if (case, gpu_backend) == ("two", "native") and os.environ.get("INTERRUPT"):
            raise KeyboardInterrupt
"""


def play(folder, *args: str, **environment: str) -> tuple[dict, str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_ops.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    out = folder / "runs.json"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", *args, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FASTUNLEARN_GPU_RUNS": str(out), **environment},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert out.is_file(), done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_several_processes_tell_of_one_run(tmp_path):
    """Each had written its own file over that of the others."""
    runs, said = play(tmp_path, "-n", "2")
    assert sorted(runs) == ["bad/triton", "good/native", "good/triton", "unfinished/native", "unfinished/triton"]
    assert runs["good/native"]["gpu"] == "a GPU"
    # Reported by itself, and as what its process ended in; no test after it fails for it.
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert failed
    assert all("TestBad" in line for line in failed), said
    assert "17 passed" in said


def test_an_op_whose_tests_did_not_all_run_has_not_passed(tmp_path):
    runs, _ = play(tmp_path, "-k", "Last or Good", INTERRUPT="1")
    assert sorted(runs) == ["good/native", "good/triton"]


def test_a_tool_is_ended_with_what_it_has_started(tmp_path, monkeypatch):
    """The CUDA kernels under compute-sanitizer: one op that hangs takes no time from the others."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$2 of $8"\ncase "$8" in hangs) sleep 60 & wait;; fails) exit 3;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    start = time.monotonic()
    assert sanitize.under("memcheck", "good", start + 30) == ("memcheck of good\n", None)
    assert sanitize.under("racecheck", "fails", start + 30) == ("racecheck of fails\n", "exit status 3")
    assert sanitize.under("memcheck", "hangs", time.monotonic() + 1) == ("memcheck of hangs\n", "no time was left")
    assert sanitize.under("memcheck", "late", start - 1) == ("", "no time was left")
    assert time.monotonic() - start < 30


def test_a_case_that_fails_leaves_the_others(monkeypatch, capsys):
    class Mixed(OpProof):
        op = "bitmask"
        cases = dict.fromkeys(("good", "bad", "last"), str)
        ran = 0

        def run(self, args):
            Mixed.ran += 1
            assert Mixed.ran != 2, "wrong"

    monkeypatch.setattr(sanitize, "proofs", lambda: [Mixed])
    assert sanitize.run(["bitmask"], "cpu") == 1
    said = capsys.readouterr().out
    assert "bitmask, bad:" in said
    assert "3 cases, 1 failed" in said


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
def test_make_gpu_test_goes_on_after_what_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *unusable*|*find_spec*) ;; *) echo "ran $*"; exit 1;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run(
        ["make", "gpu-test", f"PYTHON={python}", f"OUT={out}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    ran = {path.name: path.read_text() for path in out.iterdir()}
    assert sorted(ran) == ["gpu-test.log", "other-tests.log", "sanitizer.log"]
    assert all(said.startswith("ran -m ") for said in ran.values())
    assert "tests/ops/test_topk.py" in ran["gpu-test.log"]
