"""Choice of backend: by name or not at all, one warning for every reason, `explain` tells the truth."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastunlearn
from fastunlearn import BackendError, BitMask, FallbackWarning, _backend, _native


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_why_missing", "fastunlearn._C is not built")
    for op in _backend._ops.values():
        monkeypatch.setattr(op, "warned", set())


MASK = torch.tensor([True, False, True])


def test_names():
    with pytest.raises(ValueError, match="'auto', 'reference', 'native', 'triton'"):
        fastunlearn.backend("cuda").__enter__()
    with pytest.raises(ValueError, match="no op named 'nothing'; there are: "):
        fastunlearn.explain("nothing")


def test_context_nests_and_restores():
    assert _backend.current_backend() == "auto"
    with fastunlearn.backend("reference"):
        with fastunlearn.backend("native"):
            BitMask.pack(MASK)
            assert fastunlearn.explain("bitmask").last == "native:cpu"
        BitMask.pack(MASK)
        assert fastunlearn.explain("bitmask").last == "reference:cpu"
    assert _backend.current_backend() == "auto"


def test_context_is_left_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), fastunlearn.backend("reference"):
        raise RuntimeError("inside")
    assert _backend.current_backend() == "auto"


def test_environment(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "reference")
    BitMask.pack(MASK)
    row = fastunlearn.explain("bitmask", device="cpu")
    assert row.last == "reference:cpu"
    assert row.reason == "asked for by FASTUNLEARN_BACKEND=reference"
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTUNLEARN_BACKEND must be one of"):
        BitMask.pack(MASK)


def test_missing_native_warns_once_and_says_how(without_native):
    with pytest.warns(
        FallbackWarning, match=r"bitmask runs as plain PyTorch on cpu; native: .*not built: install g\+\+"
    ):
        mask = BitMask.pack(MASK)
    assert torch.equal(mask.unpack(), MASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BitMask.pack(MASK)
    row = fastunlearn.explain("bitmask", device="cpu")
    assert row.backend == "reference"
    assert "not built" in row.reason


def test_missing_native_by_name_raises(without_native):
    with fastunlearn.backend("native"):
        with pytest.raises(BackendError, match=r"'native' was asked for .* cannot serve: .*pip install"):
            BitMask.pack(MASK)
        assert fastunlearn.explain("bitmask", device="cpu").backend == "none"


def test_a_kernel_that_does_not_exist_raises():
    with (
        fastunlearn.backend("triton"),
        pytest.raises(BackendError, match=r"bitmask has no triton kernel \(it has: reference, native\)"),
    ):
        BitMask.pack(MASK)


def test_unsupported_input_falls_back_with_its_reason():
    op = _backend.register("a_test_op", native=("cpu",))
    try:
        with pytest.warns(FallbackWarning, match="native: float64 is not supported"):
            assert _backend.resolve(op, torch.device("cpu"), {"native": "float64 is not supported"}) == "reference"
        with fastunlearn.backend("native"), pytest.raises(BackendError, match="float64 is not supported"):
            _backend.resolve(op, torch.device("cpu"), {"native": "float64 is not supported"})
    finally:
        del _backend._ops["a_test_op"]


def test_triton_without_gpu_says_how_to_get_it():
    code = (
        "import torch, fastunlearn\n"
        "from fastunlearn import _backend\n"
        "op = _backend.register('a_test_op', triton=('cuda',))\n"
        "with fastunlearn.backend('triton'):\n"
        "    _backend.resolve(op, torch.device('cpu'))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "BackendError" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr or "pip install 'triton" in done.stderr
