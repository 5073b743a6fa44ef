"""Runs every CUDA kernel on small ragged inputs under compute-sanitizer: `python -m tests.sanitize`.

Every op whose proof (tests/ops) says that it has CUDA bodies is run on its cases; a kernel without proof is not run. Each op and tool
is a process of its own: a kernel that goes astray takes the GPU from its process, and the others are still told of.

`python -m tests.sanitize topk_mask` runs that op's cases in this process, for any tool: `compute-sanitizer --tool initcheck python -m ...`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

import fastunlearn
from tests.proof import OpProof

ROOT = Path(__file__).resolve().parent.parent
#: bad addresses, then threads of a block that read what others have not written yet
TOOLS = ("memcheck", "racecheck")
_AT_ONCE = 4


def proofs() -> list[type[OpProof]]:
    for path in sorted((Path(__file__).parent / "ops").glob("test_*.py")):
        importlib.import_module(f"tests.ops.{path.stem}")
    found, todo = [], list(OpProof.__subclasses__())
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.cuda_bodies:
            found.append(cls)
    return sorted(found, key=lambda cls: cls.op)


def run(ops: Sequence[str], device: str = "cuda") -> int:
    """Runs the ops' cases here; a case that fails does not keep the others from running."""
    ran = failed = 0
    for cls in proofs():
        if cls.op not in ops:
            continue
        for name in cls.cases:
            ran += 1
            try:
                with fastunlearn.backend("native"):
                    cls().run(cls.cases[name](device))
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception:
                failed += 1
                print(f"{cls.op}, {name}:\n{traceback.format_exc()}", flush=True)
    print(f"{', '.join(ops)}: {ran} cases, {failed} failed", flush=True)
    return 1 if failed or not ran else 0


def under(tool: str, op: str, until: float) -> tuple[str, str | None]:
    """(what it printed, None or why it has not passed)."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "tests.sanitize", op]
    left = until - time.monotonic()
    if left <= 0:
        return "", "no time was left"
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(left)
            why = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what the tool has started, too
            process.wait()
            why = "no time was left"
        said.seek(0)
        return said.read(), why


def all_under_tools(seconds: float) -> int:
    until, wrong = time.monotonic() + seconds, []
    names = sorted({cls.op for cls in proofs()})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = {pool.submit(under, tool, op, until): (tool, op) for tool in TOOLS for op in names}
        for done in as_completed(running):
            said, why = done.result()
            label = f"{', '.join(running[done])}: {why or 'nothing found'}"
            wrong += [label] if why else []
            print(f"==== {label}\n{said}", flush=True)
    for label in wrong:
        print(label, flush=True)
    print(f"{len(running) - len(wrong)} of {len(running)} found nothing", flush=True)
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize")
    parser.add_argument(
        "ops", nargs="*", help="run these in this process; default: all of them under compute-sanitizer"
    )
    parser.add_argument("--seconds", type=float, default=600, help="of all processes together")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tests.sanitize: torch finds no GPU", file=sys.stderr)
        return 2
    if not args.ops and not shutil.which("compute-sanitizer"):
        print("tests.sanitize: no compute-sanitizer on PATH (it comes with the CUDA toolkit)", file=sys.stderr)
        return 2
    return run(args.ops) if args.ops else all_under_tools(args.seconds)


if __name__ == "__main__":
    sys.exit(main())
