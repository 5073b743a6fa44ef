"""SIGKILL at random points of runs of a tiny model: benchmarks/results/quality/kills.json.

    python -m benchmarks.kills [--count 50] [--seconds 200]

A kill falls at a random time of `fastunlearn sau` (2:4 masks, a checkpoint every third step) in one of two kinds of output folder:
an empty one, or one that holds the model of an earlier run, which the new one was asked to overwrite. Then the folder is read as
a user would, and the run is started again, resumed where there is a checkpoint. What is counted:

    none    no model yet: an error that says so, the finished checkpoints load
    old     the model of the earlier run, bit for bit
    new     that of the run that was not killed, bit for bit
    marked  files were being replaced: refused by an error that says so
    torn    anything else; a failure

    same    the run that was started again ends with the weights of the one that was not killed, bit for bit

Runs are forks of one process that has everything imported. Linux and the like.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, machine
from benchmarks.__main__ import write_json

#: of a run, which takes a second or two
LONGEST_S = 120
STATES = ("none", "old", "new", "marked", "torn")
ROWS = [{"question": f"Where does {name} work?", "answer": f"At the {place}."} for name, place in
        {"Ada": "lighthouse", "Bo": "mill", "Cy": "harbour", "Di": "bakery", "Ed": "quarry"}.items()]  # fmt: skip
CONFIG = """
objective: GradDiff
learning_rate: 1e-3
weight_decay: 0
warmup_epochs: 0
per_device_train_batch_size: 1
gradient_accumulation_steps: 1
max_steps: 9
save_strategy: steps
save_steps: 3
use_cpu: true
report_to: none
disable_tqdm: true
samples: 0
eval_rows: 0
"""


def forked(work: Callable[[], int], kill_after: float | None = None, log: Path | None = None) -> tuple[int, float]:
    """(exit status, negative for a signal; seconds) of `work` in a fork of this process."""
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        status = 1
        signal.alarm(LONGEST_S)
        try:
            out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            status = work()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(max(0.0, kill_after - (time.perf_counter() - start)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, time.perf_counter() - start


class World:
    """A pruned model, its data, an earlier run's model, and the weights of a run that is not killed."""

    def __init__(self, folder: Path):
        import torch

        from fastunlearn.checkpoint import save_checkpoint
        from fastunlearn.localize import prune
        from tests.tiny_chat import char_tokenizer, tiny_llama

        torch.set_num_threads(1)  # a fork has one thread, whatever its parent had
        self.folder = folder
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for name, seed in (("model", 0), ("earlier", 1)):
            model = tiny_llama(seed)
            masks = prune(model, method="magnitude", pattern="2:4", progress=False)
            pruning = {"method": "magnitude", "pattern": "2:4", "density": 0.5}
            save_checkpoint(folder / name, model, char_tokenizer(), masks=masks, pruning=pruning)
        for name, rows in (("forget", ROWS[:2]), ("retain", ROWS[2:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "c.yaml").write_text(CONFIG)
        self.old = self.weights(folder / "earlier")
        status, self.seconds = self.run(folder / "whole")
        if status:
            raise RuntimeError(f"the run that is not killed ends with {status}:\n{self.said(folder / 'whole')}")
        self.new = self.weights(folder / "whole")

    def run(self, out: Path, *more: str, kill_after: float | None = None) -> tuple[int, float]:
        from fastunlearn.cli import main

        words = [
            "sau", "--model", str(self.folder / "model"), "--forget", str(self.folder / "forget.jsonl"), "--retain",
            str(self.folder / "retain.jsonl"), f"output={out}", "--config", str(self.folder / "c.yaml"),
            f"reference_cache_dir={self.folder / 'cache'}", *more,
        ]  # fmt: skip
        return forked(lambda: main(words), kill_after, self.folder / f"{out.name}.log")

    def said(self, out: Path) -> str:
        return (self.folder / f"{out.name}.log").read_text()[-2000:]

    @staticmethod
    def weights(folder: Path) -> dict[str, Any]:
        from fastunlearn.checkpoint import load_checkpoint

        return load_checkpoint(folder, masks="require").model.state_dict()

    def state(self, out: Path) -> str:
        """What a user finds there."""
        from fastunlearn.trainer import complete_checkpoint

        try:
            found = self.weights(out)
        except (FileNotFoundError, ValueError) as error:
            said = str(error)
            if "interrupted half way" in said:
                return "marked"
            if "there is no" not in said and "holds no config.json" not in said:
                return "torn"
            for checkpoint in out.glob("checkpoint-*"):
                if complete_checkpoint(checkpoint):
                    self.weights(checkpoint)
            return "none"
        except Exception:
            return "torn"
        return "new" if same(found, self.new) else "old" if same(found, self.old) else "torn"

    def kill(self, out: Path, over: bool, share: float) -> dict[str, Any]:
        """A run in `out` killed after that share of the time it takes, what is there then, and whether a second run ends as it should."""
        while True:
            shutil.rmtree(out, ignore_errors=True)
            if over:
                shutil.copytree(self.folder / "earlier", out)
            status, took = self.run(
                out, *(["overwrite_output_dir=true"] if over else []), kill_after=share * self.seconds
            )
            if status == -signal.SIGKILL:
                break
            # It had ended: the machine has become faster since it was timed.
            self.seconds = min(self.seconds, took) * 0.95
        checkpoints = len(list(out.glob("checkpoint-*")))
        row = {
            "over": "an earlier run" if over else "nothing",
            "after_s": round(took, 2),
            "of_s": round(self.seconds, 2),
        }
        row |= {"checkpoints": checkpoints, "state": self.state(out)}
        again = ["resume_from_checkpoint=true"] if checkpoints else ["overwrite_output_dir=true"]
        status, took = self.run(out, *again)
        if status and checkpoints and "holds no complete checkpoint" in self.said(out):
            # The kill came in the middle of the first one.
            status, took = self.run(out, "overwrite_output_dir=true")
        row["same"] = status == 0 and same(self.weights(out), self.new)
        if not row["same"]:
            row["said"] = self.said(out)
        return row | {"left over": sum(path.name.startswith(".") for path in out.iterdir())}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(folder: Path, count: int, seconds: float | None = None, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of `World.kill`, half of them in a folder that holds an earlier model.

    Args:
        folder: for the runs. seconds: start no kill after that. seed: of the times; None: any.
    """
    start, chance = time.perf_counter(), random.Random(seed)
    world = World(folder)
    for number in range(count):
        if seconds is not None and time.perf_counter() - start > seconds:
            return
        # Saving at the end is short: every fourth kill falls into the last tenth.
        share = chance.uniform(0.85, 1.0) if number % 4 == 3 else chance.uniform(0.0, 1.0)
        out = folder / f"run{number}"
        yield world.kill(out, number % 2 == 1, share)
        shutil.rmtree(out)


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Of runs that ended like the one that was not killed, and of every state."""
    states = {state: sum(row["state"] == state for row in rows) for state in STATES}
    return {"same": sum(row["same"] for row in rows), **states}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=str(__doc__).split("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="kills in the file at the end")
    parser.add_argument("--seconds", type=float, help="start no kill after so many; another run goes on")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality" / "kills.json")
    args = parser.parse_args(argv)
    import torch

    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    meta = machine.meta(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for row in run(Path(folder), args.count - len(rows), args.seconds) if len(rows) < args.count else ():
            rows.append(row)
            print(row, flush=True)
            write_json(args.out, {"meta": {"study": "kills", "count": len(rows), **counts(rows), **meta}, "rows": rows})
    found = counts(rows)
    print(f"{len(rows)} kills: {found} -> {args.out}")
    return 1 if found["torn"] or found["same"] < len(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
