"""`fastunlearn sample`: a grid of what a text-to-image pipeline draws, before or after unlearning, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastunlearn.cli import _run
from fastunlearn.cli._arguments import parse

PROG = "fastunlearn sample"
EXAMPLE = """\
example:
  fastunlearn sample --styles Photo "Pop Art" --objects Cat Car Tree --output grid.png
  fastunlearn sample --weights out/unet.safetensors --styles all --objects all --seeds 0 --output after.png
  fastunlearn sample --model CompVis/stable-diffusion-v1-4 --concepts "Van Gogh" Monet --template "a tree by {}" --output sd.png"""


@dataclass
class SampleArguments:
    """What is drawn."""

    output: str = field(metadata={"help": "The PNG file."})
    concepts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names, a row each; columns are seeds. Of the canvas: styles and objects that it knows, or all."
        },
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt with {} for the concept; default: 'an image of {}', of the canvas 'A {} image.' and '{} style.'."
        },
    )
    prompts: list[str] | None = field(default=None, metadata={"help": "Whole prompts, a row each; columns are seeds."})
    styles: list[str] | None = field(
        default=None, metadata={"help": "Styles of the canvas, a row each, or all; columns are --objects."}
    )
    objects: list[str] | None = field(default=None, metadata={"help": "Objects of the canvas, a column each, or all."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3],
        metadata={"help": "Of the start latents; a grid of styles takes the first."},
    )
    steps: int = field(default=10, metadata={"help": "DDIM steps."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance, 1: none; default: 7.5, of the canvas its own."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images at once."})
    scale: int = field(default=1, metadata={"help": "Pixels a pixel."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the file."})


def _grid(asked: SampleArguments, concepts: Any) -> tuple[list[list[str]], list[str], list[str]]:
    """(prompts of every row, names of rows, names of columns)."""
    ways = [asked.concepts, asked.prompts, asked.styles or asked.objects]
    if sum(way is not None for way in ways) != 1:
        raise ValueError("concepts: want one of --concepts, --prompts, or --styles with --objects")
    columns = [f"seed {seed}" for seed in asked.seeds]
    if asked.prompts is not None:
        return [[prompt] for prompt in asked.prompts], asked.prompts, columns
    if asked.concepts is not None:
        if asked.template is not None and "{}" not in asked.template:
            raise ValueError(f"template: want a text with {{}} in it, got {asked.template!r}")
        names, texts = asked.concepts, {}
        if concepts is not None:
            names = _names("concepts", names, (*concepts.themes, *concepts.objects))
            texts = {name: "{} style." if name in concepts.themes else "A {} image." for name in names}
        prompts = [(asked.template or texts.get(name, "an image of {}")).replace("{}", name) for name in names]
        return [[prompt] for prompt in prompts], names, columns
    if concepts is None:
        raise ValueError("styles: styles and objects by name are those of the canvas; use --prompts for another model")
    styles = _names("styles", asked.styles or ["all"], concepts.themes)
    objects = _names("objects", asked.objects or ["all"], concepts.objects)
    return [[concepts.prompt(thing, style) for thing in objects] for style in styles], styles, objects


def _names(argument: str, given: list[str], known: tuple[str, ...]) -> list[str]:
    from fastunlearn.data import canvas

    if given == ["all"]:
        return list(known)
    try:
        return [canvas.concept(name, known) for name in given]
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, or 2 for bad input (one line on standard error)."""

    def run() -> int:
        from fastunlearn.cli import _diffusion
        from fastunlearn.evaluation.worlds import CANVAS_GUIDANCE
        from fastunlearn.report.grid import draw_grid
        from fastunlearn.sampling import sample

        asked, pipeline_arguments = parse(
            (SampleArguments, _diffusion.PipelineArguments), argv, PROG, epilog=EXAMPLE,
            description="Draws a grid of images from a pipeline into one PNG.", aliases={"model": "model_name_or_path"},
        )  # fmt: skip
        path = Path(asked.output).expanduser()
        if path.exists() and not asked.overwrite:
            raise FileExistsError(f"output: {path} exists; overwrite=true replaces it")
        concepts = pipeline_arguments.concepts
        prompts, rows, columns = _grid(asked, concepts)
        own = CANVAS_GUIDANCE if concepts is not None else 7.5
        guidance = own if asked.guidance_scale is None else asked.guidance_scale
        seeds = asked.seeds if len(prompts[0]) == 1 else asked.seeds[:1]
        pipeline = pipeline_arguments.load()
        flat = [prompt for row in prompts for prompt in row]
        images = sample(pipeline, flat, seeds, steps=asked.steps, guidance_scale=guidance, batch_size=asked.batch_size)
        grid = images[0].unflatten(0, (len(prompts), -1)) if len(prompts[0]) > 1 else images.transpose(0, 1)
        columns = columns if grid.shape[1] == len(columns) else []
        draw_grid(grid, path, rows=rows, columns=columns, scale=asked.scale, overwrite=asked.overwrite)
        print(f"{len(flat) * len(seeds)} images in {path}")
        return 0

    return _run.guarded(PROG, run)
