"""`fastunlearn export`: a run as files that other tools load: PEFT, diffusers, kohya-ss, a part of a U-Net, or merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastunlearn.cli import _run
from fastunlearn.cli._arguments import parse

PROG = "fastunlearn export"
EXAMPLE = """\
example:
  fastunlearn export out --to diffusers --output lora          pipe.load_lora_weights("lora")
  fastunlearn export out --to kohya --output mosaic.safetensors --dtype float16
  fastunlearn export out --to peft --rank 32 --output adapter  PeftModel.from_pretrained(model, "adapter")
  fastunlearn export out --to partial --output unet.safetensors
  fastunlearn export out --to merged --output pipeline         a whole pipeline, or a whole language model

A LoRA holds a masked adapter, or weights that moved freely, only nearly: what is lost is told. partial and merged are exact."""


@dataclass
class ExportArguments:
    """What is written, from what."""

    run: str = field(
        metadata={
            "help": "A run's folder (--run may be left out), an adapter's folder, or a unet.safetensors of ESD's and UCE's code."
        }
    )
    to: str = field(metadata={"help": "The format: peft, diffusers, kohya, partial or merged."})
    output: str = field(metadata={"help": "A folder; of diffusers, kohya and partial also a .safetensors file."})
    model: str | None = field(
        default=None, metadata={"help": "What the run started from, by name or folder; default: what the run says."}
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "Of the factors; default: the adapter's own, of weights that moved freely 16."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Of what is written; default: that of the run; of a merged pipeline float32."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what is there."})


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, or 2 for bad input (one line on standard error)."""

    def run() -> int:
        words = list(argv)
        if words and not words[0].startswith("-") and "=" not in words[0]:
            words.insert(0, "--run")
        (asked,) = parse(
            (ExportArguments,), words, PROG, epilog=EXAMPLE, aliases={},
            description="Writes what a run left as files that other tools load.",
        )  # fmt: skip
        import torch

        from fastunlearn.exporting import export_run

        export_run(
            asked.run, asked.to, asked.output, model=asked.model, rank=asked.rank, overwrite=asked.overwrite,
            dtype=None if asked.dtype is None else getattr(torch, asked.dtype),
        )  # fmt: skip
        return 0

    return _run.guarded(PROG, run)
