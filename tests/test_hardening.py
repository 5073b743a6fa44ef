"""Runs that are killed at random, and a thousand steps: short forms of the studies whose figures are committed."""

from __future__ import annotations

import json
import os
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from benchmarks import RESULTS, kills, steady, tables

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="forks of a process with torch"
)


def check(rows):
    for row in rows:
        assert row["state"] != "torn", row
        assert row["same"], row
        assert row["left over"] == 0, row
        assert not (row["over"] == "nothing" and row["state"] == "old"), row


@pytest.mark.serial
def test_two_kills(tmp_path):
    check(kills.run(tmp_path, 2, seed=3))


@pytest.mark.serial
@pytest.mark.thorough
@pytest.mark.slow
def test_twenty_kills(tmp_path):
    check(kills.run(tmp_path, 20))


@pytest.mark.serial
@pytest.mark.thorough
@pytest.mark.slow
def test_memory_is_flat():
    found = steady.growth(steady.run(500))
    assert found["rss_mib"] < 4
    assert found["python_mib"] < 0.3
    assert found["objects"] < 500


def test_committed_figures_are_of_whole_studies():
    """No failure was committed as if it were none."""
    for name in ("fuzz", "kills", "memory"):
        path = RESULTS / "quality" / f"{name}.json"
        if not path.is_file():
            continue
        rows = json.loads(path.read_text())["rows"]
        assert rows, name
        if name == "fuzz":
            assert not [row for row in rows if row["failures"]]
        if name == "kills":
            check(rows)
        if name == "memory":
            assert steady.growth(rows)["rss_mib"] < 4


def test_the_table_says_what_is_short_of_what_was_wanted(tmp_path):
    assert tables.block("hardening", tmp_path) == tables.NOT_MEASURED
    meta = {"device": "a machine", "commit": "0123456789abcdef", "date": "today"}
    row = {"op": "gram, nm_mask", "test": "t", "backend": "native", "cases": 9_000, "wanted": 9_000, "failures": 0}
    slow = row | {"op": "gram", "backend": "triton", "cases": 3, "wanted": 200}
    killed = [{"state": "old", "same": True}, {"state": "none", "same": False}]
    steps = [{"step": 100, "rss_mib": 400.0, "objects": 5}, {"step": 1000, "rss_mib": 400.5, "objects": 7}]
    (tmp_path / "quality").mkdir()
    for name, rows in (("fuzz", [row, slow]), ("kills", killed), ("memory", steps)):
        (tmp_path / "quality" / f"{name}.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    text = tables.block("hardening", tmp_path)
    assert "9,003 cases of 2 ops in 2 tests (each on one backend), 0 failed; 1 of the tests (triton) had fewer" in text
    assert "2 kills; the folder then held 1 no model yet, 1 the earlier one; 1 runs" in text
    assert "from step 100 to 1,000: +0.50 MiB of 400, +2 Python objects" in text
    assert "a machine, 0123456789ab, today" in text
