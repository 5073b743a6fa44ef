"""Memory over a thousand steps of the trainer with masks and the masked optimiser: benchmarks/results/quality/memory.json.

    python -m benchmarks.steady [--steps 1000]

A tiny model on a CPU, so that anything kept from step to step is seen beside it: the process's resident set, what Python has
allocated (tracemalloc) and the number of objects, after 100 steps and every 100 that follow. The log's own history grows by a
row of numbers a log; it is made every 50 steps here.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, machine
from benchmarks.__main__ import write_json
from benchmarks.kills import ROWS

EVERY = 100


def run(steps: int) -> list[dict[str, Any]]:
    """Rows of step, rss_mib, python_mib, objects."""
    from transformers import TrainerCallback

    from fastunlearn import UnlearnConfig, UnlearnTrainer
    from fastunlearn.localize import prune
    from fastunlearn.report.cost import process_bytes, trim_heap
    from tests.tiny_chat import char_tokenizer, tiny_llama

    rows: list[dict[str, Any]] = []

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % EVERY:
                return
            gc.collect()
            trim_heap()
            rss, python = (process_bytes("VmRSS") or 0) / machine.MIB, tracemalloc.get_traced_memory()[0] / machine.MIB
            objects = len(gc.get_objects())
            rows.append(
                {
                    "step": state.global_step,
                    "rss_mib": round(rss, 2),
                    "python_mib": round(python, 3),
                    "objects": objects,
                }
            )
            print(rows[-1], flush=True)

    model, tokenizer = tiny_llama(), char_tokenizer()
    masks = prune(model, method="magnitude", pattern="2:4", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        config = UnlearnConfig(
            output_dir=folder, objective="NPO", learning_rate=1e-5, max_steps=steps, per_device_train_batch_size=1,
            gradient_accumulation_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            logging_steps=50, reference_cache_dir=folder, dataloader_pin_memory=False, warmup_epochs=0,
        )  # fmt: skip
        trainer = UnlearnTrainer(
            model, config, ROWS[:2], ROWS[2:], processing_class=tokenizer, masks=masks,
            pruning={"method": "magnitude", "pattern": "2:4", "density": 0.5},
        )  # fmt: skip
        trainer.add_callback(Measure())
        tracemalloc.start()
        try:
            trainer.train()
        finally:
            tracemalloc.stop()
    return rows


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Last row less the first."""
    return {name: round(rows[-1][name] - rows[0][name], 3) for name in ("rss_mib", "python_mib", "objects")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steady", description=str(__doc__).split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality" / "memory.json")
    args = parser.parse_args(argv)
    import torch

    rows = run(args.steps)
    found = growth(rows)
    write_json(args.out, {"meta": {"study": "memory", "steps": args.steps, **{f"growth_{name}": value for name, value in found.items()}, **machine.meta(torch.device("cpu"))}, "rows": rows})  # fmt: skip
    print(f"from step {rows[0]['step']} to {rows[-1]['step']}: {found} -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
