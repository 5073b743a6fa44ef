"""Set before anything imports triton or torch: no GPU means the interpreter; memory that is not written is poisoned."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402
import torch  # noqa: E402

# 300 cases an op in CI, 10,000 by `make fuzz`; an example's time says nothing on a shared machine.
for _name, _examples in {"quick": 30, "ci": 300, "fuzz": 10_000}.items():
    hypothesis.settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,
        derandomize=_name == "ci",
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector, which benchmarks call between any two calls, need not walk through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty holds NaN (or the largest integer): a kernel that leaves an entry unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest):
    """Test processes side by side have one thread each; loops that OpenMP shares out are still shared out among two."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or "native" not in callspec.params.values() or torch.get_num_threads() > 1:
        yield
        return
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def applies(item: pytest.Item) -> bool:
        cls = getattr(item, "cls", None)
        return not hasattr(cls, "has_rung") or cls.has_rung(item.originalname)  # type: ignore[attr-defined]

    absent = [item for item in items if not applies(item)]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if applies(item)]
    if _has_gpu():
        # Triton on CPU tensors is the interpreter, and this process compiles: the same kernels run in test_gpu.
        interpreted = pytest.mark.skip(reason="runs Triton's interpreter, which a process with a GPU does not use")
        for item in items:
            values = getattr(item, "callspec", None) and item.callspec.params.values()  # type: ignore[attr-defined]
            if values and "triton" in values and not item.get_closest_marker("gpu"):
                item.add_marker(interpreted)
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A rung of tests/proof.py runs on every case of its op."""
    cls = metafunc.cls
    if cls is None or not hasattr(cls, "proof_parameters"):
        return
    for name, values in cls.proof_parameters().items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


# How every op and backend fared on a GPU: "op/backend" -> (outcomes, how many tests were collected).
_gpu_outcomes: dict[str, tuple[list[str], int]] = {}
_collected = pytest.StashKey[Counter[str | None]]()
_failed = pytest.StashKey[bool]()


def _gpu_key(item: pytest.Item) -> str | None:
    if hasattr(item.cls, "has_rung") and item.originalname == "test_gpu":  # type: ignore[attr-defined]
        return f"{item.cls.op}/{item.callspec.params['gpu_backend']}"  # type: ignore[attr-defined]
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Notes in the report, which may go to another process, what `pytest_runtest_logreport` wants to know."""
    report = (yield).get_result()
    if report.when != "call":
        return
    item.stash[_failed] = report.failed
    key = _gpu_key(item)
    if key is not None:
        if _collected not in item.session.stash:
            item.session.stash[_collected] = Counter(map(_gpu_key, item.session.items))
        report.gpu_run = [key, item.session.stash[_collected][key]]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    key, collected = getattr(report, "gpu_run", (None, 0))
    if key is not None:
        _gpu_outcomes.setdefault(key, ([], collected))[0].append(report.outcome)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Of several processes (pytest -n) on one GPU, none keeps memory that the others may want, nor a GPU that it has lost.

    A kernel that goes astray takes the GPU from its process for good: another one takes its place.
    """
    if not item.get_closest_marker("gpu") or not hasattr(item.config, "workerinput"):
        return
    try:
        if item.stash.get(_failed, False):
            torch.cuda.synchronize()
        elif torch.cuda.memory_reserved() > 2**30:
            torch.cuda.empty_cache()
    except RuntimeError:
        os._exit(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes fastunlearn/gpu_runs.json anew: the ops and backends all of whose tests have run and passed."""
    path = os.environ.get("FASTUNLEARN_GPU_RUNS")
    if not path or not _gpu_outcomes or hasattr(session.config, "workerinput"):
        return
    from benchmarks.machine import commit

    run = {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit() or "unknown",
        "torch": torch.__version__,
    }
    passed = {
        key: run
        for key, (outcomes, collected) in sorted(_gpu_outcomes.items())
        if set(outcomes) == {"passed"} and len(outcomes) == collected
    }
    Path(path).write_text(json.dumps(passed, indent=2) + "\n")


@pytest.fixture(scope="session")
def simt_module() -> ModuleType:
    """The module whose cuda_* functions are the CUDA kernel bodies compiled for the host (csrc/simt.h)."""
    name = "fastunlearn_simt"
    spec = importlib.util.spec_from_file_location("_fastunlearn_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    cxx = builder.find_compiler()
    if cxx is None:
        pytest.skip("no C++ compiler: the CUDA kernel bodies cannot be compiled for the host")
    folder = ROOT / "build" / f"simt-{sys.implementation.cache_tag}"
    target = folder / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # one of several test processes builds, the others wait and find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder.write_ninja(folder / "build.ninja", target, cxx=cxx, nvcc=None, simt_module=name)
        done = subprocess.run([builder.ninja_binary(), "-C", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, f"the CUDA bodies do not compile for the host:\n{done.stdout[-6000:]}"
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
