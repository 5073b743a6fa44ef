"""Choice of backend: by name or not at all, one warning for every reason, `explain` tells the truth."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

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


def test_blocks_of_two_threads_end_in_any_order():
    first, second = fastunlearn.backend("reference"), fastunlearn.backend("native")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _backend.current_backend() == "native"
    second.__exit__(None, None, None)
    assert _backend.current_backend() == "auto"


# In a process of its own: a kernel that is given the address of a fake tensor ends the interpreter.
TRACED = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from fastunlearn import BackendError, BitMask, backend, explain, ops, optim

def run(w, g):
    mask = ops.nm_mask(w, 2, 4)
    packed = BitMask.pack(g > 0)
    s = torch.zeros_like(w)
    ops.saliency_accumulate_([s], [g])
    top = ops.topk_mask([s], density=0.5)[0]
    ops.masked_adamw_([w], [g], [None], [torch.zeros(w.numel())], [torch.zeros(w.numel())], [1])
    ops.masked_sgd_([w], [g], [None], [None], [1])
    return mask.unpack(), packed.bits, packed.prefix_counts(3), top.count(), ops.masked_grad_norm([g], [None]), w

def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 12, generator=generator), torch.randn(6, 12, generator=generator)

want = run(*inputs())
with FakeTensorMode() as mode:
    got = run(torch.rand(6, 12), torch.rand(6, 12))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    layer = torch.nn.Linear(4, 4)
    optimiser = optim.MaskedAdamW(layer.parameters(), None, lr=0.1)
    layer(torch.rand(2, 4)).sum().backward()
    try:
        optimiser.step()
    except BackendError as error:
        assert "fake tensors have no memory" in str(error)
    else:
        raise AssertionError("stepped on fake tensors")
outside = [mode.from_tensor(t) for t in inputs()]
assert ops.nm_mask(outside[0], 2, 4).bits.shape == (6, 2)
for tracing in ("real", "fake", "symbolic"):
    graph = make_fx(lambda w: ops.nm_mask(w, 2, 4).unpack(), tracing_mode=tracing)(inputs()[0])
    assert "fastunlearn.nm_mask" in graph.code, graph.code
    assert torch.equal(graph(inputs()[0]), want[0])
with FlopCounterMode(display=False):
    got = run(*inputs())
assert all(torch.equal(a, b) for a, b in zip(got, want))
assert torch.equal(torch.func.functionalize(lambda w: ops.nm_mask(w, 2, 4).unpack())(inputs()[0]), want[0])
print("done")
"""


def test_tensors_without_memory_never_reach_a_kernel():
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.stdout.strip() == "done", (done.returncode, done.stderr[-3000:])


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


@pytest.mark.parametrize(
    ("archs", "capability", "words"),
    [
        ("80,86,89,90a,100,120", (8, 0), None),
        ("80,86,89,90a,100,120", (8, 7), None),
        ("80,86,89,90a,100,120", (9, 0), None),
        ("80,86,89,90a,100,120", (10, 3), None),
        ("80,86,89,90a,100,120", (12, 1), None),
        ("80,86,89,90a,100,120", (13, 0), None),
        ("80,86,89,90a,100,120", (7, 5), r"sm_120, and this GPU \(sm_75\) is older than all of them.*ARCHS=75"),
        ("80,86,89,90a,100,120", (11, 0), None),
        ("86,120", (9, 0), None),
        ("90a", (9, 0), None),
        ("90a", (10, 0), "has no code among them"),
        ("86", (8, 0), "is older than all of them"),
        ("80,90a", (10, 0), None),
    ],
)
def test_a_gpu_without_code_is_told(archs, capability, words):
    why = _native.no_code_for(archs, capability)
    if words is None:
        assert why is None
    else:
        assert re.search(words, why)


def test_native_code_on_a_gpu_looks_at_its_capability(monkeypatch):
    module = SimpleNamespace(build_info=lambda: {"cuda": True, "cuda_archs": "80,90a"}, cuda_devices=lambda: (1, ""))
    monkeypatch.setattr(_native, "_C", module)
    _native._no_code_for.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0))[index])
    assert "this GPU (sm_75) is older" in _native.unusable(torch.device("cuda:0"))
    assert _native.unusable(torch.device("cuda:1")) is None
    _native._no_code_for.cache_clear()


@pytest.mark.parametrize("info", [{"cuda": False}, {"cuda": False, "abi": _native.ABI - 1}])
def test_a_module_of_other_sources_is_not_used(info):
    code = (
        "import sys, types\n"
        "stale = sys.modules['fastunlearn._C'] = types.ModuleType('fastunlearn._C')\n"
        f"stale.build_info = lambda: {info}\n"
        "import torch, fastunlearn\n"
        "assert fastunlearn._native._C is None\n"
        "print(fastunlearn.explain('bitmask', 'cpu').reason)\n"
        "fastunlearn.BitMask.pack(torch.ones(3, dtype=torch.bool))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fastunlearn._C was built from other sources: rebuild" in done.stdout
    assert "FallbackWarning" in done.stderr
