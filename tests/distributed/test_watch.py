"""Watch: a process that gives no sign of life is missed, also where no collective waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.distributed.runs import ROOT

CODE = """
import os, signal, sys, time
import torch.distributed as dist
from fastunlearn.sharded import Watch, agreed, anywhere
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
import torch
assert anywhere(rank == 1, torch.device("cpu")) and not anywhere(False, torch.device("cpu"))
try:
    with agreed():
        if rank == 0:
            raise OSError("nothing there")
except (OSError, ValueError) as error:
    print(type(error).__name__, error, flush=True)
with Watch(limit=3.0, every=0.3):
    time.sleep(1)
with Watch(limit=3.0, every=0.3):
    time.sleep(1)
    if rank == int(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    time.sleep(60)
"""


@pytest.mark.serial
@pytest.mark.parametrize(("dies", "how"), [(1, "SIGKILL"), (0, "SIGKILL"), (1, "SIGSTOP")])
def test_the_others_stop(dies, how):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(dies), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        start = time.monotonic()
        shown, said = processes[1 - dies].communicate(timeout=100)
        assert time.monotonic() - start < 100
        assert processes[1 - dies].returncode == 1
        assert "fastunlearn: process" in said
        assert "resume_from_checkpoint" in said
        wanted = "OSError nothing there" if dies == 1 else "ValueError process 0 of 2: nothing there"
        assert wanted in shown
    finally:
        for process in processes:
            process.kill()
