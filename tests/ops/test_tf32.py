"""Whether fp32 products in Triton may be TF32, by every way in which torch is told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
import os, torch
from fastunlearn.kernels import block_weight_grad, masked_lora, nm_linear
from fastunlearn.kernels._common import tf32_allowed

matmul = torch.backends.cuda.matmul
for way, want in {
    "pass": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('highest')": False,
    "matmul.allow_tf32 = True": True,
    "matmul.allow_tf32 = False": False,
    "matmul.fp32_precision = 'tf32'": True,
    "matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'": False,
}.items():
    # torch does not take back what was set: each in a process of its own.
    child = os.fork()
    if child == 0:
        exec(way)
        got = (tf32_allowed(), not masked_lora._exact(torch.float32), *(
            m._precision(torch.float32) == "tf32" for m in (block_weight_grad, nm_linear)
        ))
        os._exit(got != (want,) * 4)
    assert os.waitpid(child, 0)[1] == 0, way
"""


def test_every_way_to_allow_tf32():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
