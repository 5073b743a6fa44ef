"""`fastunlearn uce`: concepts of a text-to-image model are sent to their guides by one closed-form edit of cross-attention."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLE = """\
example:
  fastunlearn uce --edit_concepts "Pop Art" --output out
  fastunlearn uce --model CompVis/stable-diffusion-v1-4 --edit_concepts "Van Gogh" --guide_concepts art \\
      --preserve_concepts Monet Picasso --template "{}" --output out
  fastunlearn uce --model stabilityai/stable-diffusion-xl-base-1.0 --edit_concepts concepts.txt --guide_concepts art --output out

Names and defaults are those of the authors' code (fastunlearn.methods.uce); on the canvas those of fastunlearn.methods.recipes."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, or 2 for bad input (one line on standard error)."""
    from fastunlearn.cli._closed_form import command
    from fastunlearn.methods.uce import UCEConfig, uce

    return command(
        "uce", argv, UCEConfig, uce, example=EXAMPLE,
        description="Edits keys and values of cross-attention (of SD 3 and FLUX: the layers that read the text) so that concepts "
        "are drawn as their guides.",
    )  # fmt: skip
