"""Watch: a process that gives no sign of life is missed, also where no collective waits for it."""

from __future__ import annotations

import time

import pytest

pytestmark = pytest.mark.serial


@pytest.mark.parametrize(
    ("dies", "how"),
    [(1, "SIGKILL"), pytest.param(0, "SIGKILL", marks=pytest.mark.thorough), (1, "SIGSTOP"), (1, "raise")],
)
def test_the_others_stop(processes, tmp_path, dies, how):
    start = time.monotonic()
    codes = processes.ask("watched", [dies, how], tmp_path, 2, limit=20.0)
    assert time.monotonic() - start < 15
    assert codes[dies] == (1 if how == "raise" else -9)
    assert codes[1 - dies] == 1
    said = (tmp_path / f"said-{1 - dies}.txt").read_text()
    assert "fastunlearn: process" in said
    assert "resume_from_checkpoint" in said
    assert ("OSError nothing there" if dies == 1 else "ValueError process 0 of 2: nothing there") in said
