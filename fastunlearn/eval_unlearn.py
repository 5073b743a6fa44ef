"""Techniques for eval-unlearn, a benchmark of text-to-image unlearning: its entry points eval_unlearn.techniques lead here.

    fastunlearn          a folder that a run left, of any of our methods: run=out
    fastunlearn_uce, _rece, _speed, _time, _scapre
                         the closed form itself, made when the technique is: erase_concept="Van Gogh"

A technique is made from keywords and has generate(prompts, seed=None, **options) -> images of PIL; nothing of that package is imported.
Of its keywords these are understood: model_id, device, use_fp16, num_inference_steps, guidance_scale, erase_concept; further ones are
the method's settings. What no setting is called is left alone, with a warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastunlearn.objectives.language import closest
from fastunlearn.pipelines import load_pipeline

#: what its own techniques are run on
MODEL = "CompVis/stable-diffusion-v1-4"


def _concepts(name: str, given: Any) -> list[str]:
    """Concepts of a text, which may name several with commas, or of a list.

    Raises:
        ValueError: none.
    """
    listed = given.split(",") if isinstance(given, str) else list(given or ())
    found = [str(text).strip() for text in listed if str(text).strip()]
    if not found:
        raise ValueError(f"{name}: want a concept, or several, got {given!r}")
    return found


class Technique:
    """What all have in common: a pipeline without what it forgot, and images drawn from it.

    Args:
        device: cpu, cuda, ...; None: cuda where there is one.
        use_fp16: half precision to draw with, on cuda.
        num_inference_steps, guidance_scale: of `generate`, unless it is told others.
        options: the technique's own.

    Raises:
        ImportError: diffusers is not installed. ValueError, OSError: a model or setting that does not work.
    """

    def __init__(
        self,
        device: str | None = None,
        use_fp16: bool = True,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        **options: Any,
    ):
        self.num_inference_steps, self.guidance_scale = int(num_inference_steps), float(guidance_scale)
        # Edited in fp32: what is small would be lost.
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = self.make(options)
        if use_fp16 and torch.device(self.device).type == "cuda":
            self.pipeline.to(dtype=torch.float16)

    def make(self, options: dict[str, Any]) -> Any:
        """The pipeline, unlearned."""
        raise NotImplementedError

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Any]:
        """One image of PIL for each prompt.

        Args:
            seed: of the first image; each further one has the next.
            options: of the pipeline's call.
        """
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale} | options
        images = []
        for i, prompt in enumerate(prompts):
            generator = None if seed is None else torch.Generator(self.device).manual_seed(seed + i)
            images.append(self.pipeline(prompt=prompt, generator=generator, **given).images[0])
        return images


def _unknown(options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        warnings.warn(f"{name}: no setting of this technique, left alone; {closest(name, list(known))}", stacklevel=5)


class Run(Technique):
    """A folder that a run left (spare, esd, ablate, salun, finetune, uce, scapre ...): run=folder; model_id, where it says none."""

    def make(self, options: dict[str, Any]) -> Any:
        from fastunlearn.exporting import apply_source
        from fastunlearn.run_source import read_source

        folder = options.pop("run", None) or options.pop("load_path", None)
        if not folder:
            raise ValueError("run: want the folder of a run of fastunlearn's")
        source = read_source(folder)
        if source.language:
            raise ValueError(f"run: {folder} is of a language model, which draws nothing")
        base = options.pop("model_id", None) or source.base
        if not base:
            raise ValueError(f"model_id: {folder} does not say what model it is of")
        options.pop("erase_concept", None)
        _unknown(options, ["run", "model_id"])
        pipeline = load_pipeline(base, device=self.device, dtype=torch.float32)
        apply_source(pipeline, source)
        return pipeline


class ClosedForm(Technique):
    """Concepts are sent to their guides by one edit: erase_concept (several: with commas, or a list), guide_concept, preserve_concepts."""

    #: the method's name for its configuration, and whether it preserves by name
    method, preserves = "uce", True

    def make(self, options: dict[str, Any]) -> Any:
        given = options.pop("erase_concept", None)
        concepts = _concepts("erase_concept", given)
        guides = options.pop("guide_concept", None)
        kept = options.pop("preserve_concepts", None)
        if kept is not None and not self.preserves:
            raise ValueError(f"preserve_concepts: {self.method} preserves nothing by name")
        edit, config_class = self.edit()
        known = [field.name for field in dataclasses.fields(config_class)]
        settings = {name: options.pop(name) for name in known if name in options}
        base = options.pop("model_id", None) or MODEL
        _unknown(options, [*known, "erase_concept", "guide_concept", "preserve_concepts", "model_id"])
        config = config_class(**settings)
        pipeline = load_pipeline(base, device=self.device, dtype=torch.float32)
        texts = [concepts, [""] if guides is None else _concepts("guide_concept", guides)]
        if self.preserves:
            texts.append([] if kept is None else _concepts("preserve_concepts", kept))
        edit(pipeline, *texts, config=config)
        return pipeline

    def edit(self) -> tuple[Callable[..., Any], type[Any]]:
        """(what edits a pipeline by texts and a configuration, the configuration's class)."""
        from fastunlearn.methods.uce import UCEConfig, uce

        return uce, UCEConfig


class UCE(ClosedForm):
    """Unified concept editing (arXiv 2308.14761)."""


class RECE(ClosedForm):
    """The same, and again for the text that still finds the concept (arXiv 2407.12383)."""

    method = "rece"

    def edit(self) -> tuple[Callable[..., Any], type[Any]]:
        from fastunlearn.methods.rece import RECEConfig, rece

        return rece, RECEConfig


class SPEED(ClosedForm):
    """The same, in the null space of what is preserved (arXiv 2503.07392)."""

    method = "speed"

    def edit(self) -> tuple[Callable[..., Any], type[Any]]:
        from fastunlearn.methods.speed import SPEEDConfig, speed

        return speed, SPEEDConfig


class TIME(ClosedForm):
    """The same, over every token of a prompt and with nothing preserved by name (arXiv 2303.08084)."""

    method, preserves = "time", False

    def edit(self) -> tuple[Callable[..., Any], type[Any]]:
        from fastunlearn.methods.time_edit import TIMEConfig, time_edit

        return time_edit, TIMEConfig


class ScaPre(ClosedForm):
    """Any number of concepts by one solve (arXiv 2601.06162)."""

    method = "scapre"

    def edit(self) -> tuple[Callable[..., Any], type[Any]]:
        from fastunlearn.methods.scapre import ScaPreConfig, scapre

        def solve(pipeline: Any, concepts: list[str], guides: list[str], kept: list[str], config: Any) -> Any:
            return scapre(pipeline, concepts, guides, preserve=kept, config=config)

        return solve, ScaPreConfig
