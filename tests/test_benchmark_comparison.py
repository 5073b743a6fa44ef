"""`python -m benchmarks compare`: what counts as slower, what is said of two machines, and the exit status; on files made by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as cli
from benchmarks.compare import compare, report

META = {
    "device": "a CPU", "cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.11", "triton": "3.6", "python": "3.11", "quick": False,
    "copy_gbps": 40.0, "matmul_tflops": 0.2, "commit": "aaa", "date": "2026-01-01", "other_load": 0.0, "backends": {"mask": "native"},
}  # fmt: skip


def row(provider: str = "fastunlearn", ms: float | None = 10.0, spread: float = 0.02, **changes: Any) -> dict[str, Any]:
    low, high = (None, None) if ms is None else (ms * (1 - spread), ms * (1 + spread))
    made = {
        "op": "mask", "case": "pack", "dtype": "fp32", "provider": provider, "ms_p20": low, "ms_p50": ms, "ms_p80": high,
        "peak_mib": 100.0, "limit_ms": 5.0, "limit_kind": "bytes", "correct": ms is not None,
    }  # fmt: skip
    return made | changes


def result(*rows: dict[str, Any], **meta: Any) -> dict[str, Any]:
    return {"meta": META | meta, "rows": list(rows), "targets": [], "left_out": []}


def judged(old: dict[str, Any], new: dict[str, Any], by: float = 1.1) -> tuple[str, bool]:
    (change,) = compare(result(old), result(new), by).changes
    return change.what, change.regression


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        (row(), row(), ("", False)),
        (row(ms=10), row(ms=10.9), ("", False)),  # below the threshold
        (row(ms=10), row(ms=12), ("slower", True)),
        (row(ms=12), row(ms=10), ("faster", False)),
        (row(ms=10, spread=0.15), row(ms=12, spread=0.05), ("", False)),  # 11.5 of the old run lies above 11.4 of the new one
        (row(ms=10, spread=0.02), row(ms=12, spread=0.20), ("", False)),
        (row(ms=10, spread=0.15), row(ms=15, spread=0.15), ("slower", True)),
        (row(ms=12, spread=0.20), row(ms=10, spread=0.05), ("", False)),
        (row(ms=10, ms_p20=None, ms_p80=None), row(ms=12, ms_p20=None, ms_p80=None), ("slower", True)),
        (row("torch eager", ms=10), row("torch eager", ms=20), ("slower", False)),  # a peer's time is not ours
        (row("fastunlearn-triton", ms=10), row("fastunlearn-triton", ms=20), ("slower", True)),
        (row(), row(ms=None), ("wrong", True)),
        (row(ms=None), row(), ("right", False)),
        (row(ms=None), row(ms=None), ("", False)),
        (row(peak_mib=100), row(peak_mib=140), ("memory", True)),
        (row(peak_mib=140), row(peak_mib=100), ("less memory", False)),
        (row(ms=12, peak_mib=100), row(ms=10, peak_mib=200), ("memory", True)),  # speed bought with memory
        (row(ms=10, peak_mib=200), row(ms=12, peak_mib=100), ("slower", True)),
        (row(peak_mib=0.1), row(peak_mib=4), ("", False)),  # what the measurement is good to
        (row(peak_mib=None), row(peak_mib=100), ("", False)),
    ],
)  # fmt: skip
def test_what_counts(old: dict[str, Any], new: dict[str, Any], want: tuple[str, bool]):
    assert judged(old, new) == want


def test_the_threshold_is_the_callers():
    assert judged(row(ms=10), row(ms=12), 1.5) == ("", False)
    assert judged(row(ms=10), row(ms=10.9), 1.05) == ("slower", True)
    with pytest.raises(ValueError, match="--by must be > 1"):
        judged(row(), row(), 1.0)


def test_missing_rows_of_either_side_are_listed_with_the_reason():
    old = result(row(), row(case="count"))
    new = result(row(), row(case="unpack")) | {"left_out": ["mask, count: left out: wants 9.0 GiB, 1.0 are free"]}
    found = compare(old, new)
    assert found.gone == [("mask", "count", "fp32", "fastunlearn")]
    assert found.fresh == [("mask", "unpack", "fp32", "fastunlearn")]
    text = report(found, old, new, 1.1)
    assert "## Only in the old result" in text
    assert "- mask: count, fp32, fastunlearn (mask, count: left out: wants 9.0 GiB, 1.0 are free)" in text
    assert "- mask: unpack, fp32, fastunlearn" in text
    assert not found.regressions


def test_our_row_that_vanished_from_a_case_that_ran_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = result(
        row(), row("torch eager"), row(case="count"), row("torch eager", case="count"), row("numpy", case="count")
    )
    # Of "pack" our row failed; "count" was not asked for, and the peer that is gone from neither is no fault of ours.
    assert compare(old, result(row("torch eager"))).lost == [("mask", "pack", "fp32", "fastunlearn")]
    assert compare(old, result(row(), row("torch eager"))).lost == []
    assert compare(old, result(row(), row(case="count"))).lost == []
    files = [str(tmp_path / name) for name in ("old.json", "new.json")]
    for path, made in zip(files, (old, result(row("torch eager"))), strict=True):
        Path(path).write_text(json.dumps(made))
    assert cli.main(["compare", *files]) == 1
    assert "gone: mask, pack, fp32, fastunlearn: the new run has its case" in capsys.readouterr().err


def test_other_machines_versions_and_rates_are_said_at_the_top():
    old, new = (
        result(row()),
        result(row(), device="b CPU", torch="2.13", copy_gbps=60.0, backends={"mask": "reference"}, other_load=0.4),
    )
    found = compare(old, new)
    text = report(found, old, new, 1.1)
    top = text[: text.index("0 regressions")]
    for line in (
        "not of one machine", "device: a CPU -> b CPU", "torch: 2.11 -> 2.13", "copy, GB/s: 40 -> 60 (1.50x)",
        "backend of mask: native -> reference", "new run: other processes took 40%",
    ):  # fmt: skip
        assert line in top
    assert compare(old, result(row(), copy_gbps=41.0, commit="bbb")).differences == []
    assert "not of one machine" not in report(compare(old, old), old, old, 1.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = result(row(), row("torch eager", ms=20), row(case="count", ms=30))
    files = {}
    new = copy.deepcopy(old)
    new["rows"][0] = row(ms=25)
    new["rows"][2] = row(case="count", ms=10)
    for name, made in (
        ("a", old),
        ("b", new),
        ("none", {"rows": [], "meta": META}),
        ("other", {"rows": [{"method": "uce"}]}),
    ):
        files[name] = str(tmp_path / f"{name}.json")
        Path(files[name]).write_text(json.dumps(made))
    assert cli.main(["compare", files["a"], files["a"]]) == 0
    assert "0 regressions, 0 improvements, 3 rows the same" in capsys.readouterr().out
    assert cli.main(["compare", files["a"], files["b"]]) == 1
    said = capsys.readouterr()
    assert "worse: mask, pack, fp32, fastunlearn: slower" in said.err
    assert "## Regressions" in said.out
    assert (
        "| mask: pack, fp32 | fastunlearn | slower | 2.50x | 10 (9.8 - 10.2) | 25 (24.5 - 25.5) | 100 -> 100 |"
        in said.out
    )
    assert said.out.index("## Regressions") < said.out.index("## Improvements") < said.out.index("<summary>The same")
    assert (
        cli.main(["compare", files["a"], files["b"], "--by", "3.5", "--out", str(tmp_path / "out" / "report.md")]) == 0
    )
    assert "0 regressions" in (tmp_path / "out" / "report.md").read_text()
    for wrong, words in (("none", "has no rows"), ("other", "no result of"), ("absent", "No such file")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", files["a"], files.get(wrong, str(tmp_path / "absent.json"))])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
