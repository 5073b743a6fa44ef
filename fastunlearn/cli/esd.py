"""`fastunlearn esd`: a text-to-image model is pushed away from a concept (ESD, arXiv 2303.07345)."""

from __future__ import annotations

from collections.abc import Sequence

from fastunlearn.cli import _concept, _run

PROG = "fastunlearn esd"
EXAMPLE = """\
example:
  fastunlearn esd --erase_concept "Pop Art" --output out
  fastunlearn esd --model CompVis/stable-diffusion-v1-4 --erase_concept "Van Gogh" --template "{}" --output out

train_method=x, u, all are the authors' ESD-x, ESD-u and all weights (fastunlearn.methods.esd)."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error), 1 where training diverged."""

    def run() -> int:
        from fastunlearn.methods.esd import ESDConfig, ESDTrainer

        return _concept.erase(
            PROG,
            "esd",
            argv,
            ESDConfig,
            ESDTrainer,
            description="Pushes a text-to-image model away from a concept, by its own negative guidance.",
            epilog=EXAMPLE,
            surrogates=False,
        )

    return _run.guarded(PROG, run)
