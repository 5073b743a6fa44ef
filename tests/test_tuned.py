"""The table of launch options by GPU: what is shipped fits the kernels, what is not there changes nothing, and how it is made."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import harness, tune
from benchmarks.spec import Case, Inputs, Limit, Op, Provider, equal
from fastunlearn import _tuned
from fastunlearn._tuned import asked, trying, tuned

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ENTRY = {"options": {"num_warps": 8}, "ms": 1.0, "default_ms": 2.0}


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch):
    """A table with one GPU, on a machine that seems to have it."""
    triton = pytest.importorskip("triton")
    made = {"A GPU": {"triton": triton.__version__, "kernels": {"polar.symmetric": {"768": ENTRY}}}}
    monkeypatch.setattr(_tuned, "table", lambda: made)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    _tuned._kernels.cache_clear()
    yield made
    _tuned._kernels.cache_clear()


def options(device: torch.device = GPU, key: str = "768", kernel: str = "polar.symmetric") -> dict[str, int]:
    return tuned(kernel, key, device, num_warps=4, num_stages=3)


def test_an_entry_of_this_gpu_is_taken(shipped: dict[str, Any]):
    assert options() == {"num_warps": 8, "num_stages": 3}


@pytest.mark.parametrize("other", [{"device": CPU}, {"key": "64"}, {"kernel": "polar.other"}])
def test_defaults_hold_where_nothing_was_measured(shipped: dict[str, Any], other: dict[str, Any]):
    assert options(**other) == {"num_warps": 4, "num_stages": 3}


def test_defaults_hold_on_another_gpu_and_with_another_triton(shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    shipped["A GPU"]["triton"] = "1.0.0"
    assert options() == {"num_warps": 4, "num_stages": 3}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "B GPU")
    _tuned._kernels.cache_clear()
    assert options() == {"num_warps": 4, "num_stages": 3}


def test_a_trial_goes_before_the_table_and_ends(shipped: dict[str, Any]):
    with asked() as heard, trying("polar.symmetric", {"num_warps": 2}):
        assert options() == {"num_warps": 2, "num_stages": 3}
        with trying("polar.symmetric", {"num_warps": 16}):
            assert options()["num_warps"] == 16
        assert options()["num_warps"] == 2
        assert options(kernel="other.kernel")["num_warps"] == 4
    assert options()["num_warps"] == 8
    assert heard == {("polar.symmetric", "768"), ("other.kernel", "768")}


def test_the_shipped_table_fits_the_kernels():
    pytest.importorskip("triton")
    known = tune.candidates()
    for gpu, found in _tuned.table().items():
        assert {"triton", "torch", "commit", "date", "kernels"} <= set(found), gpu
        for kernel, keys in found["kernels"].items():
            for entry in keys.values():
                assert entry["options"] in list(known[kernel])
                assert entry["ms"] < entry["default_ms"]


def test_candidates_name_options_that_their_kernels_ask_for():
    """Every kernel with candidates calls `tuned` with that name, and with the options that a candidate changes."""
    pytest.importorskip("triton")
    sources = {name: (Path(_tuned.__file__).parent / "kernels" / f"{name}.py").read_text() for name in tune.MODULES}
    for kernel, listed in tune.candidates().items():
        module, _, function = kernel.partition(".")
        assert re.search(rf"\ndef _?{function}\(", sources[module])
        assert len({tuple(sorted(options)) for options in listed}) == 1
        for option in listed[0]:
            assert re.search(rf"tuned\((?:[^()]|\([^()]*\))*\b{option}=", sources[module]) or option in (
                "num_warps",
                "num_stages",
            )


def sleeping(wrong: int = -1, failing: int = -1) -> Op:
    """Takes as many milliseconds as its option says; one option gives a wrong result, one fails."""

    def build(x: Inputs):
        def call() -> list[torch.Tensor]:
            ms = tuned("fake.kernel", x.case.name, CPU, num_warps=4)["num_warps"]
            if ms == failing:
                raise RuntimeError("out of resource: shared memory")
            time.sleep(ms * 1e-3)
            return [x.a * (3 if ms == wrong else 2)]

        return call

    return Op(
        "fake", [Case("one", [("a", (8,))])], lambda case, device: Inputs(a=torch.ones(8)), lambda x: [x.a * 2],
        equal, lambda x, line: Limit("bytes", 64), [Provider("fastunlearn", build)],
    )  # fmt: skip


@pytest.mark.serial
def test_the_fastest_candidate_that_is_right_is_chosen():
    said: list[str] = []
    settings = harness.Settings(seconds=0.0, min_runs=3, say=said.append)
    tried = {"fake.kernel": [{"num_warps": n} for n in (1, 2, 3)], "not.asked": [{"num_warps": 1}]}
    found = tune.trials([sleeping(wrong=1, failing=2)], tried, CPU, settings, backend="auto")
    assert set(found) == {("fake.kernel", "one")}
    facts = {"triton": "3.6.0", "torch": "2.11", "commit": "abc", "date": "today"}
    kept = {
        "A GPU": {"triton": "3.6.0", "kernels": {"polar.symmetric": {"768": ENTRY}, "fake.kernel": {"gone": ENTRY}}},
        "B GPU": {},
    }
    table = tune.merged(kept, "A GPU", facts, found)
    assert table["B GPU"] == {}
    assert table["A GPU"]["commit"] == "abc"
    kernels = table["A GPU"]["kernels"]
    assert kernels["polar.symmetric"] == {"768": ENTRY}
    assert {key: entry["options"]["num_warps"] for key, entry in kernels["fake.kernel"].items()} == {"one": 3}
    assert "polar.symmetric" not in tune.merged(kept, "A GPU", facts | {"triton": "3.7.0"}, found)["A GPU"]["kernels"]


def test_what_is_no_better_than_the_defaults_is_not_written():
    assert tune.chosen([{tune.DEFAULT: 1.0, '{"a": 1}': 0.99}]) is None
    assert tune.chosen([{tune.DEFAULT: 1.0}]) is None
    both = [{tune.DEFAULT: 1.0, '{"a": 1}': 0.5, '{"a": 2}': 0.9}, {tune.DEFAULT: 2.0, '{"a": 2}': 1.8}]
    assert tune.chosen(both) == {"options": {"a": 2}, "ms": 2.7, "default_ms": 3.0, "cases": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_written(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune"])
    assert ended.value.code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
