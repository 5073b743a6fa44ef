"""The pictures of all ops together: which points they show, and that the committed ones are of the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import RESULTS, overview, tables

META = {"device": "a CPU", "commit": "abc123", "date": "2026-01-01"}


def row(op: str, case: str, provider: str, ms: float | None, mib: float | None = 2.0) -> dict[str, Any]:
    return {
        "op": op,
        "case": case,
        "dtype": "fp32",
        "provider": provider,
        "ms_p50": ms,
        "peak_mib": mib,
        "limit_ms": 1.0,
    }


RESULT = {
    "meta": META,
    "rows": [
        row("mask", "pack", "fastunlearn", 1.5),
        row("mask", "pack", "numpy", 4.0),
        row("mask", "pack", "torch", 3.0, 8.0),
        row("mask", "count", "fastunlearn", None),
        row("topk", "global", "fastunlearn", 2.0, 0.0),
        row("nm", "2:4", "torch", 2.0),
    ],
}


def test_a_point_is_a_case_that_ran_beside_its_fastest_peer():
    assert overview.points(RESULT) == {
        "mask": [{"case": "pack, fp32", "limit": 1.0, "ours": 1.5, "peer": 3.0, "ours_mib": 2.0, "peer_mib": 8.0}],
        "topk": [{"case": "global, fp32", "limit": 1.0, "ours": 2.0, "peer": None, "ours_mib": 0.0, "peer_mib": None}],
    }


def test_the_pictures(tmp_path: Path):
    pytest.importorskip("matplotlib")
    time, memory = overview.draw({"a-cpu": RESULT}, tmp_path)
    assert (time.name, memory.name) == ("a-cpu-roofline.svg", "a-cpu-memory.svg")
    text = time.read_text()
    for word in ("a CPU, commit abc123", ">mask<", ">topk<", "1.3x the limit", "limit, ms"):
        assert word in text
    # An op without a peer has no place in the second one.
    assert ">mask<" in memory.read_text()
    assert ">topk<" not in memory.read_text()
    again = overview.draw({"a-cpu": RESULT}, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [time.read_bytes(), memory.read_bytes()]
    alone = {"meta": META, "rows": [row("topk", "global", "fastunlearn", 2.0)]}
    assert [path.name for path in overview.draw({"b-cpu": alone}, tmp_path)] == ["b-cpu-roofline.svg"]


@pytest.mark.parametrize("name", ["roofline", "memory"])
def test_the_committed_pictures_are_of_the_committed_results(name: str):
    for slug, result in tables.load(RESULTS).items():
        path = RESULTS / "plots" / f"{slug}-{name}.svg"
        assert path.is_file(), f"{path.name} is missing: make bench-plots"
        assert path.stat().st_size < 130_000
        _, commits, dates = tables.made(result["meta"], [*overview.points(result)])
        said = f"{result['meta']['device']}, commit {commits}, {dates}"
        assert said in path.read_text(), f"{path.name} is of other results: make bench-plots"
