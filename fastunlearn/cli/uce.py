"""`fastunlearn uce`: concepts of a text-to-image model are sent to their guides by one closed-form edit of cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastunlearn.cli import _run
from fastunlearn.cli._arguments import parse

PROG = "fastunlearn uce"
EXAMPLE = """\
example:
  fastunlearn uce --edit_concepts "Pop Art" --output out tokens=all
  fastunlearn uce --model CompVis/stable-diffusion-v1-4 --edit_concepts "Van Gogh" --guide_concepts art \\
      --preserve_concepts Monet Picasso --template "{}" --output out

Names and defaults are those of the authors' code (fastunlearn.methods.uce)."""


@dataclass
class UCEArguments:
    """What is erased."""

    edit_concepts: list[str] = field(
        metadata={"help": "Concepts to erase; of the canvas: styles, or objects, by name."}
    )
    guide_concepts: list[str] | None = field(
        default=None,
        metadata={"help": "What is drawn instead: one, or one for each; the canvas has one for every concept."},
    )
    preserve_concepts: list[str] | None = field(
        default=None, metadata={"help": "What must stay; of the canvas: everything else of its kind by default."}
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, or 2 for bad input (one line on standard error)."""

    def run() -> int:
        from fastunlearn.cli import _diffusion
        from fastunlearn.methods.uce import UCEConfig, uce

        classes = (UCEArguments, _diffusion.PipelineArguments, _diffusion.OutputArguments, UCEConfig)
        asked, pipeline_arguments, output, config = parse(
            classes, argv, PROG, epilog=EXAMPLE,
            description="Edits keys and values of a U-Net's cross-attention so that concepts are drawn as their guides.",
        )  # fmt: skip
        edits, guides, kept = list(asked.edit_concepts), asked.guide_concepts, asked.preserve_concepts
        concepts = pipeline_arguments.concepts
        if concepts is not None:
            targets = [concepts.target(name) for name in edits]
            edits = [target.name for target in targets]
            if guides is None:
                guides = [_diffusion.default_surrogate(concepts, target) for target in targets]
            if kept is None:
                every = dict.fromkeys(name for target in targets for name in _diffusion.of_kind(concepts, target))
                kept = [name for name in every if name not in edits]
        if guides is None:
            raise ValueError("guide_concepts: say what to draw instead")
        settings = replace(config, template=_diffusion.template_of(concepts, edits, config.template))

        def work(pipeline: Any) -> Any:
            return uce(pipeline, edits, guides, kept or (), settings)

        about = {"method": "uce", "edit_concepts": edits, "guide_concepts": guides, "settings": asdict(settings)}
        return _diffusion.edit(PROG, argv, pipeline_arguments, output, work, **about)

    return _run.guarded(PROG, run)
