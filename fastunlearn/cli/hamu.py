"""`fastunlearn hamu`: a language model forgets by steps that come with a certificate (HAMU, arXiv 2606.02119)."""

from __future__ import annotations

from collections.abc import Sequence

from fastunlearn.cli import _run

PROG = "fastunlearn hamu"
EXAMPLE = """\
example:
  fastunlearn hamu --model smollm2 --forget forget.jsonl --retain retain.jsonl --output out \\
      learning_rate=1e-2 hamu_share=0.3 on_flag=stop

Beside the model: certificates.jsonl, a line a step; metrics.json says how many were flagged and how many held.
retain_groups=COLUMN keeps every group of retain rows by itself, retain_budgets=[...] says how much each may lose a step."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error), 1 where training diverged."""

    def run() -> int:
        from fastunlearn.methods.hamu import HAMUConfig, HAMUTrainer

        return _run.unlearn(
            PROG,
            "HAMU",
            argv,
            HAMUConfig,
            HAMUTrainer,
            masks="auto",
            description="Makes a causal language model forget a set of rows and keep another, by steps that forget at least Q for "
            "the least damage, and say when damage cannot be avoided.",
            epilog=EXAMPLE,
        )

    return _run.guarded(PROG, run)
