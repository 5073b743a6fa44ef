"""`fastunlearn time`: TIME, concepts read as their guides over all tokens of a few prompts each, by one closed-form edit."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLE = """\
example:
  fastunlearn time --edit_concepts "Pop Art" --output out
  fastunlearn time --model CompVis/stable-diffusion-v1-4 --edit_concepts "Van Gogh" --guide_concepts art --output out lamb=0.1

The equation is that of the paper (fastunlearn.methods.time_edit); nothing is preserved by name."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, or 2 for bad input (one line on standard error)."""
    from fastunlearn.cli._closed_form import command
    from fastunlearn.methods.time_edit import TIMEConfig, time_edit

    return command(
        "time", argv, TIMEConfig, time_edit, example=EXAMPLE, preserves=False,
        description="Edits keys and values of cross-attention so that every token of a concept is read as its guide's.",
    )  # fmt: skip
