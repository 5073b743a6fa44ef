"""`fastunlearn spare`: a concept is overwritten by a surrogate through a sparse low-rank adapter (SPARE, arXiv 2602.07058)."""

from __future__ import annotations

from collections.abc import Sequence

from fastunlearn.cli import _concept, _run

PROG = "fastunlearn spare"
EXAMPLE = """\
example:
  fastunlearn spare --erase_concept "Pop Art" --output out
  fastunlearn spare --model CompVis/stable-diffusion-v1-4 --erase_concept "Van Gogh" --surrogate_concept "a photographer" \\
      --retain_concepts Monet Picasso --template "a painting by {}" --output out preset=tutorial sparsity_inclusiveness=0.5

Left behind: adapter/ (A, B and masks), pytorch_lora_weights.safetensors (for load_lora_weights; of variant per_weight an
approximation, its error is printed), unet.safetensors (the merged weights), metrics.json.
timesteps other than uniform are a reconstruction (fastunlearn.methods.spare says of what)."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error), 1 where training diverged."""

    def run() -> int:
        from fastunlearn.methods.spare import SPAREConfig, SPARETrainer

        return _concept.erase(
            PROG,
            "spare",
            argv,
            SPAREConfig,
            SPARETrainer,
            description="Erases a concept from a text-to-image model: saliency, a sparse low-rank adapter, self-distillation onto a surrogate.",
            epilog=EXAMPLE,
        )

    return _run.guarded(PROG, run)
