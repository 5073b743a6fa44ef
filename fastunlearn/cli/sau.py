"""`fastunlearn sau`: a pruned language model forgets without touching its sparsity pattern (SAU, arXiv 2602.00577)."""

from __future__ import annotations

from collections.abc import Sequence

from fastunlearn.cli import _run

PROG = "fastunlearn sau"
EXAMPLE = """\
example:
  fastunlearn prune --model smollm2 --output sparse pattern=2:4
  fastunlearn sau --model sparse --forget forget.jsonl --retain retain.jsonl --output out learning_rate=2e-5
  fastunlearn sau --model sparse ... --compressed      survivors only: weights, gradients, optimiser state
  accelerate launch --config_file fsdp2.yaml -m fastunlearn sau --model sparse ... --compressed      cut over processes (FSDP2)

Gradient masking is the method's; redistribution other than none is a reconstruction (fastunlearn.methods.sau says of what)."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error), 1 where training diverged."""

    def run() -> int:
        from fastunlearn.methods.sau import SAUConfig, SAUTrainer

        return _run.unlearn(
            PROG,
            "SAU",
            argv,
            SAUConfig,
            SAUTrainer,
            masks="require",
            description="Makes a pruned language model forget a set of rows and keep another; every update goes to the weights "
            "that pruning left, so the pattern (2:4, say) holds.",
            epilog=EXAMPLE,
        )

    return _run.guarded(PROG, run)
