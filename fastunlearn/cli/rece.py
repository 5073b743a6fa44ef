"""`fastunlearn rece`: RECE, UCE and then UCE of the text that still draws the concept, all in closed form."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLE = """\
example:
  fastunlearn rece --edit_concepts "Pop Art" --output out
  fastunlearn rece --model CompVis/stable-diffusion-v1-4 --edit_concepts nudity --guide_concepts "" --template "{}" \\
      --output out epochs=3 ridge=0.1

The published settings are the defaults (fastunlearn.methods.rece)."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, or 2 for bad input (one line on standard error)."""
    from fastunlearn.cli._closed_form import command
    from fastunlearn.methods.rece import RECEConfig, rece

    return command(
        "rece", argv, RECEConfig, rece, example=EXAMPLE,
        description="Edits keys and values of cross-attention so that concepts, and the text that still finds them after that, are "
        "drawn as their guides.",
    )  # fmt: skip
