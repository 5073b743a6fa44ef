"""`fastunlearn plan`: memory and time of a run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastunlearn.cli import _run

PROG = "fastunlearn plan"
EXAMPLE = """\
example:
  fastunlearn plan --model llama-3.1-8b --method sau --compressed per_device_train_batch_size=8 gradient_checkpointing=true
  fastunlearn plan --model llama-3.1-70b --method sau+hamu --gpus 8 --compressed --hardware h200"""


@dataclass
class OutputArguments:
    """Where the plan goes."""

    json: str | None = field(
        default=None, metadata={"help": "A file that gets the plan as JSON; it must not be there."}
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error)."""

    def run() -> int:
        from fastunlearn.cli._arguments import ALIASES, parse
        from fastunlearn.report.plan import PlanArguments, plan

        arguments, output = parse(
            (PlanArguments, OutputArguments), argv, PROG, epilog=EXAMPLE, aliases=ALIASES,
            description="Weights, gradients, optimiser states, activations, peak and time of a run, from the model's configuration.",
        )  # fmt: skip
        if output.json is not None and Path(output.json).exists():
            raise FileExistsError(f"json: {output.json} is there already; choose another name")
        made = plan(arguments)
        print(made.text())
        if output.json is not None:
            from fastunlearn.report.files import write_json

            write_json(Path(output.json), made.to_dict())
        return 0

    return _run.guarded(PROG, run)
