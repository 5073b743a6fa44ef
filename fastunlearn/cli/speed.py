"""`fastunlearn speed`: SPEED, concepts sent to their guides within the null space of what is preserved."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLE = """\
example:
  fastunlearn speed --edit_concepts "Pop Art" --output out
  fastunlearn speed --model CompVis/stable-diffusion-v1-4 --edit_concepts "Van Gogh" --guide_concepts art \\
      --preserve_concepts artists.txt --template "{}" --output out

The published settings are the defaults; what is a reconstruction says fastunlearn.methods.speed."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, or 2 for bad input (one line on standard error)."""
    from fastunlearn.cli._closed_form import command
    from fastunlearn.methods.speed import SPEEDConfig, speed

    return command(
        "speed", argv, SPEEDConfig, speed, example=EXAMPLE,
        description="Edits values of cross-attention so that concepts are drawn as their guides, in directions that preserved text "
        "does not have.",
    )  # fmt: skip
