"""`fastunlearn unlearn`: any causal language model forgets a set and keeps another, by the objective asked for."""

from __future__ import annotations

from collections.abc import Sequence

from fastunlearn.cli import _run

PROG = "fastunlearn unlearn"
EXAMPLE = """\
example:
  fastunlearn unlearn --model smollm2 --forget forget.jsonl --retain retain.jsonl --output out \\
      objective=SimNPO learning_rate=2e-5 num_train_epochs=5

The masks of a pruned model (masks.safetensors beside it) are kept: what was pruned stays zero."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error), 1 where training diverged."""

    def run() -> int:
        from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer

        return _run.unlearn(
            PROG,
            "unlearning",
            argv,
            UnlearnConfig,
            UnlearnTrainer,
            masks="auto",
            description="Makes a causal language model forget a set of rows and keep another. Defaults are open-unlearning's.",
            epilog=EXAMPLE,
        )

    return _run.guarded(PROG, run)
