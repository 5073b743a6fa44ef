"""`fastunlearn finetune`: a text-to-image model draws a surrogate where it was asked for a concept, by plain fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastunlearn.cli import _run
from fastunlearn.cli._arguments import parse

PROG = "fastunlearn finetune"
EXAMPLE = """\
example:
  fastunlearn finetune --erase_concept "Pop Art" --output out
  fastunlearn finetune --model stable-diffusion-v1-5/stable-diffusion-v1-5 --erase_concept "Van Gogh" --surrogate_concept photo \\
      --template "a painting in the style of {}" --retain_concepts "Claude Monet" "Pablo Picasso" --output out

The baseline that sparser methods are measured against (fastunlearn.methods.finetune_surrogate)."""


@dataclass
class FinetuneArguments:
    """What is erased."""

    erase_concept: str = field(metadata={"help": "The concept; of the canvas: a style or an object by name."})
    surrogate_concept: str | None = field(
        default=None, metadata={"help": "What is drawn instead; the canvas has one for every concept."}
    )
    retain_concepts: list[str] | None = field(
        default=None, metadata={"help": "What must stay; of the canvas: everything else by default."}
    )
    template: list[str] | None = field(
        default=None, metadata={"help": "Prompts with {} for the concept; the canvas' own, or 'an image of {}'."}
    )
    forget_images: str | None = field(
        default=None, metadata={"help": "Folder of images of the concept; without it the model draws them itself."}
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error), 1 where training diverged."""

    def run() -> int:
        from fastunlearn.cli import _diffusion
        from fastunlearn.methods.finetune_surrogate import FinetuneConfig, finetune_surrogate

        classes = (
            FinetuneArguments, _diffusion.PipelineArguments, _diffusion.RecipeArguments, _diffusion.OutputArguments, FinetuneConfig
        )  # fmt: skip
        asked, pipeline_arguments, _, output, config = parse(
            classes, argv, PROG, epilog=EXAMPLE,
            defaults=_diffusion.canvas_defaults("finetune", lambda given: [given["erase_concept"]]),
            description="Fine-tunes a pipeline's U-Net until a concept's prompts draw a surrogate and all others what they drew.",
        )  # fmt: skip
        prompts = _diffusion.prompts_of(
            pipeline_arguments.concepts, asked.erase_concept, asked.surrogate_concept, asked.retain_concepts, asked.template
        )  # fmt: skip
        if config.retain_alpha and not prompts.retain:
            raise ValueError("retain_concepts: a retain term needs some; retain_alpha=0 keeps nothing on purpose")

        def work(pipeline: Any) -> Any:
            forget = _diffusion.folder_latents(pipeline, asked.forget_images, len(prompts.forget))
            return finetune_surrogate(
                pipeline, prompts.forget, prompts.surrogate, prompts.retain, config, forget=forget
            )

        about = {"method": "finetune", "erase_concept": asked.erase_concept, "settings": asdict(config)}
        return _diffusion.edit(
            PROG, argv, pipeline_arguments, output, work, forget=prompts.forget, retain=prompts.retain, **about
        )

    return _run.guarded(PROG, run)
