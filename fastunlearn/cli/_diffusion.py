"""What the commands for text-to-image pipelines share: loading, one concept's prompts, the folder they leave behind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastunlearn.cli._run import check_device, shown_command, versions
from fastunlearn.data.images import latents_of_folder
from fastunlearn.evaluation.worlds import Concepts, Target, canvas_concepts
from fastunlearn.localize.text_paths import denoiser_of, text_paths
from fastunlearn.methods.recipes import SMALL, concept_template, world_settings
from fastunlearn.output_folder import claim_output
from fastunlearn.parametrize.partial_unet import load_partial_unet, read_partial_unet, save_partial_unet
from fastunlearn.pipelines import CANVAS, is_canvas, load_pipeline, save_pipeline_folder
from fastunlearn.report.cost import MIB, measured
from fastunlearn.report.files import write_json
from fastunlearn.report.samples import write_images
from fastunlearn.run_source import EarlierWeights
from fastunlearn.sampling import check_pipeline

#: by the part of the pipeline that changes
WEIGHTS = {"unet": "unet.safetensors", "transformer": "transformer.safetensors"}
_GENERAL = "an image of {}"


@dataclass
class PipelineArguments:
    """The pipeline."""

    model_name_or_path: str = field(
        default=CANVAS,
        metadata={"help": "canvas (comes with fastunlearn), a folder of save_pretrained, or a hub name."},
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "unet.safetensors (transformer.safetensors) of an earlier run (or of ESD's and UCE's code), loaded over it."
        },
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; default: cuda where there is one."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Of the weights; auto: float32 on a CPU, for weights that change and for evaluate, else bfloat16 on a GPU."
        },
    )

    def __post_init__(self) -> None:
        check_device(self.device)

    def load(self, *, trained: bool = False, drawn: bool = True) -> Any:
        """The pipeline, checked.

        Args:
            trained: its weights will take steps: auto is float32 then.
            drawn: images are drawn from it here: it has a U-Net and one text encoder. Else any that a closed form can edit.

        Raises:
            ValueError: it lacks parts, or `weights` do not fit. OSError: it is not there.
        """
        own = torch.float32 if trained else None
        dtype = own if self.dtype == "auto" else getattr(torch, self.dtype)
        pipeline = load_pipeline(self.model_name_or_path, device=self.device, dtype=dtype)
        if drawn:
            check_pipeline(pipeline)
        else:
            text_paths(pipeline)
        if self.weights is not None:
            load_partial_unet(denoiser_of(pipeline)[0], self.weights)
        return pipeline

    def earlier(self) -> Earlier:
        """What `weights` bring, to be asked before the run writes anything.

        Raises:
            ValueError: there is no such file, or it is no safetensors.
        """
        if self.weights is None:
            return Earlier()
        names = tuple(read_partial_unet(self.weights)[0])
        return Earlier(names, EarlierWeights.of(self.weights).record())

    @property
    def concepts(self) -> Concepts | None:
        """The canvas' styles and objects, of any pipeline that draws it; None for another model."""
        return canvas_concepts() if is_canvas(self.model_name_or_path) else None


@dataclass(frozen=True)
class Earlier:
    """What an earlier run moved: a file that lacks it would bring back what that run erased.

    Attributes:
        names: of its weights. record: for metrics.json, which file they were in.
    """

    names: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def joined(self, pipeline: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the weights that this run moved: all that makes the pipeline of the plain one."""
        network = denoiser_of(pipeline)[0]
        mine = dict(network.named_parameters()) | dict(network.named_buffers()) if self.names else {}
        return {name: mine[name].detach() for name in self.names} | dict(weights)


@dataclass
class RecipeArguments:
    """Where settings come from."""

    canvas_settings: bool = field(
        default=True,
        metadata={
            "help": "On the canvas, settings that are not given are those of fastunlearn.methods.recipes, which its table is made with; "
            "false: the method's own, as on any other model."
        },
    )


def canvas_defaults(
    method: str, names: Callable[[Mapping[str, Any]], Sequence[str]]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """For `parse`: what fastunlearn.methods.recipes has for a method on the canvas, for the kind of concept that is erased.

    Nothing where another model, a preset (SalUn's recipe) or `canvas_settings=false` is given, or names that are not all styles or
    all objects (they are refused later, or have a template); no number of steps where epochs are given.

    Args:
        names: what was given -> the concepts.
    """

    def chosen(given: Mapping[str, Any]) -> dict[str, Any]:
        wanted = given.get("canvas_settings", True) and not {"preset", "recipe"} & {*given}
        if not wanted or not is_canvas(given.get("model_name_or_path", CANVAS)):
            return {}
        try:
            kinds = {canvas_concepts().target(name).kind for name in names(given)}
        except (ValueError, OSError):
            return {}
        if len(kinds) != 1:
            return {}
        # Without saliency SPARE is plain LoRA self-distillation.
        variant = given.get("variant", "per_weight")
        own = world_settings("canvas", "lora" if variant == "dense" else method, kinds.pop()) or {}
        if variant == "per_module":
            own = {name: value for name, value in own.items() if name in SMALL}
        if "num_train_epochs" in given:
            own.pop("max_steps", None)
        added = {name: value for name, value in own.items() if name not in given}
        if added:
            said = " ".join(f"{name}={value}" for name, value in added.items())
            print(f"canvas: {said} (the canvas' own settings; canvas_settings=false: the method's)", flush=True)
        return added

    return chosen


@dataclass
class ReportArguments:
    """What is drawn for the report."""

    report_images: int | None = field(
        default=None,
        metadata={
            "help": "Images of what is forgotten, and as many of what is kept, drawn before and after and kept in _samples for "
            "`fastunlearn report`; default: 4 of the canvas, else 0 (they take time)."
        },
    )
    report_steps: int | None = field(
        default=None, metadata={"help": "DDIM steps of these; default: 10 of the canvas, else 30."}
    )


class Pictures:
    """The same prompts from the same start latents, before and after: `with` nothing, draw, change the pipeline, draw again.

    Args:
        forget, retain: prompts; a few of each are drawn.

    Raises:
        ValueError: images are asked for of a pipeline that this library does not draw from, or report_images < 0.
    """

    SEED = 0

    def __init__(
        self,
        given: ReportArguments,
        model: PipelineArguments,
        pipeline: Any,
        forget: Sequence[str],
        retain: Sequence[str],
    ):
        from fastunlearn.evaluation.worlds import CANVAS_GUIDANCE

        canvas = model.concepts is not None
        count = (4 if canvas else 0) if given.report_images is None else given.report_images
        if count < 0:
            raise ValueError(f"report_images: want at least 0, got {count}")
        self.parts = {"forget": _spread(forget, count), "retain": _spread(retain, count)}
        self.prompts = [prompt for some in self.parts.values() for prompt in some]
        self.steps = given.report_steps or (10 if canvas else 30)
        self.guidance = CANVAS_GUIDANCE if canvas else 7.5
        self.before: Tensor | None = None
        if self.prompts:
            check_pipeline(pipeline)
            self.before = self._draw(pipeline)

    def _draw(self, pipeline: Any) -> Tensor:
        from fastunlearn.sampling import sample

        options = {"steps": self.steps, "guidance_scale": self.guidance, "batch_size": 16}
        return sample(pipeline, self.prompts, [self.SEED], **options)[0]

    def write(self, pipeline: Any, folder: Path) -> None:
        """Draws again and keeps both."""
        if self.before is not None:
            write_images(folder, self.parts, self.before, self._draw(pipeline), seed=self.SEED)


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """At most `count` of them, the same for the same prompts; not evenly, for prompts often go round in a circle."""
    places = random.Random(0).sample(range(len(prompts)), min(count, len(prompts)))
    return [prompts[i] for i in sorted(places)]


@dataclass
class OutputArguments(ReportArguments):
    """What is left behind."""

    output_dir: str = field(
        kw_only=True,
        metadata={"help": "Folder for unet.safetensors or transformer.safetensors (what changed) and metrics.json."},
    )
    save_pipeline: bool = field(
        default=False, metadata={"help": "Also write the whole pipeline, as diffusers loads it."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what the folder holds."})


@dataclass(frozen=True)
class Prompts:
    """Attributes: forget; surrogate, one for each; retain."""

    forget: list[str]
    surrogate: list[str]
    retain: list[str]


def template_of(concepts: Concepts | None, names: Sequence[str], template: Sequence[str] | None) -> list[str]:
    """The template that was given, or the canvas' own for concepts of one kind, or a general one.

    Raises:
        ValueError: names of the canvas that are unknown, or of both kinds, without a template.
    """
    if template:
        return list(template)
    if concepts is None:
        return [_GENERAL]
    kinds = {concepts.target(name).kind for name in names}
    if len(kinds) > 1:
        raise ValueError(
            "template: styles and objects in one call need one; give --template 'an image of {}', or edit in turn"
        )
    return concept_template(concepts, kinds.pop())


def prompts_of(
    concepts: Concepts | None, erase: str, surrogate: str | None, retain: Sequence[str] | None, template: Sequence[str] | None
) -> Prompts:  # fmt: skip
    """Prompts of one concept; a concept of the canvas needs its name alone.

    Raises:
        ValueError: unknown names; no surrogate where the canvas gives none.
    """
    if concepts is not None and not template:
        target = concepts.target(erase, "erase_concept")
        if surrogate is None and retain is None:
            return Prompts(
                concepts.forget_prompts(target), concepts.surrogate_prompts(target), concepts.retain_prompts(target)
            )
        erase, surrogate = target.name, surrogate or default_surrogate(concepts, target)
        if retain is None:
            retain = [name for name in of_kind(concepts, target) if name != target.name]
    if surrogate is None:
        raise ValueError("surrogate_concept: say what to draw instead")
    texts = template_of(concepts, [erase], template)

    def fill(name: str) -> list[str]:
        return [text.replace("{}", name) for text in texts]

    return Prompts(fill(erase), fill(surrogate), [prompt for name in retain or () for prompt in fill(name)])


def filled(names: Sequence[str], template: Sequence[str] | None) -> list[str]:
    """Every name and every template at least once, both in turn."""
    texts = template or [_GENERAL]
    count = max(len(names), len(texts)) if names else 0
    return [texts[i % len(texts)].replace("{}", names[i % len(names)]) for i in range(count)]


def default_surrogate(concepts: Concepts, target: Target) -> str:
    return concepts.surrogate_theme if target.kind == "style" else concepts.surrogate_object(target)


def of_kind(concepts: Concepts, target: Target) -> tuple[str, ...]:
    """All names a target of that kind might have, the surrogate style with them."""
    return concepts.themes if target.kind == "style" else concepts.objects


def folder_latents(pipeline: Any, folder: str | None, prompts: int) -> Any:
    """Latents of a folder of images, each with the first prompt; None where none was given.

    Raises:
        ValueError: there is more than one prompt: nobody says which image belongs to which.
    """
    if folder is None:
        return None
    if prompts != 1:
        raise ValueError(f"template: images of a folder need one prompt, there are {prompts}; give one --template")
    return latents_of_folder(pipeline, folder)


def edit(
    prog: str,
    argv: Sequence[str],
    pipeline_arguments: PipelineArguments,
    output_arguments: OutputArguments,
    work: Callable[[Any], Mapping[str, Tensor]],
    *,
    closed_form: bool = False,
    forget: Sequence[str] = (),
    retain: Sequence[str] = (),
    **about: Any,
) -> int:
    """Runs a method on a pipeline and writes what changed.

    Args:
        work: changes the pipeline in place -> the weights that changed.
        forget, retain: prompts, of which a few are drawn before and after.
        closed_form: the method asks for what the denoiser reads of the text alone: SDXL, SD 3 and FLUX will do.
        about: into metrics.json and the file's metadata.
    """
    with claim_output(output_arguments.output_dir, overwrite=output_arguments.overwrite, resumable=False) as output:
        print(f"loading {pipeline_arguments.model_name_or_path} ...", flush=True)
        earlier = pipeline_arguments.earlier()
        pipeline = pipeline_arguments.load(trained=True, drawn=not closed_form)
        pictures = Pictures(output_arguments, pipeline_arguments, pipeline, forget, retain)
        start = time.perf_counter()
        denoiser, part = denoiser_of(pipeline)
        device = next(denoiser.parameters()).device
        weights, cost = measured(lambda: work(pipeline), device)
        path = output.path / WEIGHTS[part]
        size = save_partial_unet(earlier.joined(pipeline, weights), path, overwrite=output_arguments.overwrite, **about)
        write_json(
            output.path / "metrics.json",
            {
                "model": pipeline_arguments.model_name_or_path, **earlier.record, **about,
                "weights": sum(t.numel() for t in weights.values()),
                "seconds": time.perf_counter() - start, "peak_mib": cost.peak_mib, "storage_mib": size / MIB,
                "versions": versions(), "command": shown_command(prog, argv),
            },
        )  # fmt: skip
        pictures.write(pipeline, output.path)
        if output_arguments.save_pipeline:
            canvas = pipeline_arguments.concepts is not None
            save_pipeline_folder(pipeline, output.path / "pipeline", output_arguments.overwrite, canvas=canvas)
    print(f"{cost.seconds:.1f} s; {size / MIB:.1f} MiB in {path}")
    if part == "unet" and getattr(pipeline, "text_encoder_2", None) is None:
        print(f"look at it: fastunlearn sample --model {pipeline_arguments.model_name_or_path} --weights {path} ...")
    else:
        print(f"look at it with diffusers: pipe.{part}.load_state_dict(load_file({str(path)!r}), strict=False)")
    return 0
