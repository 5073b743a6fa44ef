"""Runs that are killed at random, and a thousand steps: short forms of the studies whose figures are committed."""

from __future__ import annotations

import json
import os
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from benchmarks import RESULTS, kills, steady

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
