"""A style erased from a text-to-image pipeline in closed form (UCE, Gandikota et al. 2024), and what the classifiers then see.

The canvas, the small pipeline of this package, draws objects in styles. The keys and values of its cross-attention are edited so
that the name of a style says what another does: no training, a fraction of a second. For Stable Diffusion the calls are the same:
`load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")`.

Run it with `python examples/erase_concepts.py` (half a minute on two cores; needs the extra `diffusion`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastunlearn.data.canvas import OBJECTS, SEED_STYLE, THEMES, prompt
from fastunlearn.evaluation.classifiers import load_classifiers
from fastunlearn.methods.resolved import resolved_settings
from fastunlearn.methods.uce import UCEConfig, uce
from fastunlearn.parametrize.partial_unet import save_partial_unet
from fastunlearn.pipelines import load_pipeline
from fastunlearn.sampling import sample


def share(pipeline: Any, style: str, objects: list[str], seed: int) -> float:
    """Of the images asked for in that style, those in which the classifier sees it."""
    images = sample(
        pipeline, [prompt(thing, style) for thing in objects], [seed], steps=10, guidance_scale=3.0, progress=False
    )
    judge = load_classifiers()["style"]
    seen = judge(images[0]).argmax(1)
    return float((seen == THEMES.index(style)).float().mean())


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--erase", default="Mosaic")
    parser.add_argument("--keep", default="Pop Art", help="a style to look at beside it")
    parser.add_argument("--objects", type=int, default=10, help="how many to draw")
    parser.add_argument("--output", type=Path, help="writes the new weights there, as diffusers reads them")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    pipeline, objects = load_pipeline("canvas", device="cpu"), list(OBJECTS[: options.objects])
    styles = (options.erase, options.keep)
    found = {style: [share(pipeline, style, objects, 188)] for style in styles}
    new = uce(pipeline, [options.erase], [SEED_STYLE], [options.keep], UCEConfig(**resolved_settings("uce", "style")))
    for style in styles:
        found[style].append(share(pipeline, style, objects, 188))
        print(f"{style}: seen in {found[style][0]:.0%} of the images before, {found[style][1]:.0%} after")
    if options.output is not None:
        print(f"{save_partial_unet(new, options.output)} bytes -> {options.output}")
    return found


if __name__ == "__main__":
    main()
