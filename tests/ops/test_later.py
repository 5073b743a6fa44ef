"""Warnings of what a GPU finds out later: each once, from any thread, at the line that called, and none lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

from fastunlearn import ops
from fastunlearn.ops import _later


class Event:
    """A CUDA event of a device that is done, or done when it has been waited for."""

    def __init__(self, done=True):
        self.done = done

    def query(self):
        time.sleep(1e-4)  # other threads run here
        return self.done

    def synchronize(self):
        self.done = True


@pytest.fixture(autouse=True)
def _nothing_pending():
    _later._pending.clear()
    yield
    _later._pending.clear()


def put(text, done=True, caller=None):
    """As say_later, without a GPU."""
    entry = _later._Entry(Event(done), torch.tensor(1), lambda found: [text], UserWarning, caller or _later._caller())
    with _later._lock:
        _later._pending.append(entry)


def test_each_is_said_once_whatever_the_threads():
    for i in range(200):
        put(f"number {i}")
    failed = []

    def check():
        try:
            for _ in range(3):
                _later.check_nan(wait=False)
        except Exception as error:
            failed.append(error)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=check) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert sorted(str(w.message) for w in said) == sorted(f"number {i}" for i in range(200))


def test_waits_only_where_asked():
    put("slow", done=False)
    put("fast")
    with pytest.warns(UserWarning, match="fast") as said:
        ops.nm.check_nan(wait=False)
    assert len(said) == 1
    with pytest.warns(UserWarning, match="slow"):
        ops.nm.check_nan()


def test_a_warning_made_an_error_leaves_the_others():
    put("first")
    put("second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="first"):
            _later.check_nan()
        with pytest.raises(UserWarning, match="second"):
            _later.check_nan()
        _later.check_nan()


def test_the_same_text_from_two_lines_is_said_twice():
    """Python's default filter says a text once a line: it has to be the line of the call that found it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        put("again", caller=_later._caller())
        _later.check_nan()
        put("again", caller=_later._caller())
        _later.check_nan()
    assert [w.filename for w in said] == [__file__, __file__]
    assert said[0].lineno != said[1].lineno


def test_the_line_is_the_users():
    source = "def call():\n    return caller()\n"
    names = {"__name__": "fastunlearn.ops.some", "caller": _later._caller}
    exec(compile(source, "inside.py", "exec"), names)
    found = names["call"]()
    assert found.filename == __file__
    assert found.module == __name__


def test_the_end_of_the_process_says_the_rest():
    program = (
        "import torch\nfrom tests.ops.test_later import put\nput('never asked for', done=False)\nput('nor this')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "UserWarning: never asked for" in done.stderr
    assert "UserWarning: nor this" in done.stderr
