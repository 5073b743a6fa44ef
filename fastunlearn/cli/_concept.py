"""What the commands share that erase one concept from a text-to-image pipeline by training: spare, esd, ablate, salun."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastunlearn.cli import _run
from fastunlearn.cli._arguments import parse


@dataclass
class ConceptArguments:
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
        default=None,
        metadata={
            "help": "Images of the concept: a folder (of one prompt, or with metadata.jsonl), or a data set of the hub; without it the "
            "model draws them itself."
        },
    )
    retain_images: str | None = field(default=None, metadata={"help": "Images of what must stay, likewise."})
    save_pipeline: bool = field(
        default=False, metadata={"help": "Also write the whole pipeline, as diffusers loads it."}
    )


@dataclass
class AnchorArguments(ConceptArguments):
    """What is erased by concept ablation."""

    forget_images: str | None = field(
        default=None, metadata={"help": "Not of concept ablation, which learns from anchor_images."}
    )
    anchor_images: str | None = field(
        default=None,
        metadata={
            "help": "Images of the anchor (surrogate_concept): a folder (of one prompt, or with metadata.jsonl), or a data set of the "
            "hub; without it the model draws them itself."
        },
    )


def _images(source: str | None, prompts: Sequence[str], surrogates: Sequence[str] | None) -> Any:
    from fastunlearn.data.concept_images import ConceptImages

    if source is None:
        return ConceptImages(list(prompts), None if surrogates is None else list(surrogates)) if prompts else None
    if Path(source).expanduser().is_dir():
        return ConceptImages.of_folder(source, prompts, surrogates)
    return ConceptImages.of_hub(source, prompts=prompts, surrogates=surrogates)


def check_read(asked: ConceptArguments, config: Any) -> None:
    """Refuses what was given and nothing would read.

    Raises:
        ValueError: images of the concept that the method does not look at; what must stay, without a retain term.
    """
    unread = config.unread_images()
    if asked.forget_images is not None and unread is not None:
        raise ValueError(f"forget_images: they would not be looked at: {unread}")
    for name in ("retain_concepts", "retain_images"):
        if getattr(asked, name) is not None and not config.retain_alpha:
            raise ValueError(
                f"{name}: with retain_alpha=0 nothing is kept by name; want retain_alpha above 0, or leave it out"
            )


def erase(
    prog: str,
    method: str,
    argv: Sequence[str],
    config_class: Any,
    trainer_class: Any,
    *,
    description: str,
    epilog: str,
    surrogates: bool = True,
    arguments: type[ConceptArguments] = ConceptArguments,
) -> int:
    """A whole run; errors are raised.

    Args:
        surrogates: whether the method draws something instead.
        arguments: what the method is told of the concept.

    Returns:
        0.
    """
    from fastunlearn.cli import _diffusion

    classes = (
        arguments, _diffusion.PipelineArguments, _diffusion.RecipeArguments, _diffusion.ReportArguments, config_class
    )  # fmt: skip
    asked, pipeline_arguments, _, drawn, config = parse(
        classes, argv, prog, description=description, epilog=epilog,
        required=("output_dir",), aliases={"model": "model_name_or_path", "output": "output_dir"},
        defaults=_diffusion.canvas_defaults(method, lambda given: [given["erase_concept"]]),
    )  # fmt: skip
    if pipeline_arguments.device is not None and pipeline_arguments.device != str(config.device).split(":")[0]:
        raise ValueError(
            f"device: training is on {config.device}; use_cpu=true trains on the CPU, CUDA_VISIBLE_DEVICES chooses a GPU"
        )
    check_read(asked, config)
    if pipeline_arguments.dtype == "float16":
        raise ValueError(
            "dtype: gradients and updates in float16 are lost where they are small; want bfloat16 or float32"
        )
    concepts = pipeline_arguments.concepts
    surrogate = asked.surrogate_concept
    if not surrogates and surrogate is None and concepts is None:
        # It is not asked for; the prompts are made in pairs.
        surrogate = ""
    prompts = _diffusion.prompts_of(concepts, asked.erase_concept, surrogate, asked.retain_concepts, asked.template)
    forget = _images(asked.forget_images, prompts.forget, prompts.surrogate if surrogates else None)
    named = getattr(asked, "anchor_images", None)
    more = {} if named is None else {"anchor_images": _images(named, list(dict.fromkeys(prompts.surrogate)), None)}
    # Concept ablation keeps its anchor's images where nothing else was named.
    anchors = method == "ablation" and not asked.retain_concepts and asked.retain_images is None
    kept = config.retain_alpha and not anchors
    retain = _images(asked.retain_images, prompts.retain, None) if kept else None
    if retain is None and config.retain_alpha and method != "ablation":
        raise ValueError("retain_concepts: a retain term needs some; retain_alpha=0 keeps nothing on purpose")
    resume = _run.resume_of(config)
    from fastunlearn.output_folder import claim_output
    from fastunlearn.resuming import check_resume, resumes_in

    if resume:
        check_resume(config.output_dir, resume)
    with claim_output(
        config.output_dir, overwrite=config.overwrite_output_dir, resume=resumes_in(config.output_dir, resume)
    ) as output:
        print(f"loading {pipeline_arguments.model_name_or_path} ...", flush=True)
        earlier = pipeline_arguments.earlier()
        pipeline = pipeline_arguments.load(trained=True, drawn=False)
        pictures = _diffusion.Pictures(drawn, pipeline_arguments, pipeline, prompts.forget, prompts.retain)
        status = _train(
            prog, method, argv, asked, pipeline_arguments, config, trainer_class, pipeline, earlier, forget, retain, more, resume,
            output.path,
        )  # fmt: skip
        pictures.write(pipeline, output.path)
        return status


def _train(
    prog: str, method: str, argv: Sequence[str], asked: Any, given: Any, config: Any, trainer_class: Any, pipeline: Any, earlier: Any,
    forget: Any, retain: Any, more: Mapping[str, Any], resume: Any, folder: Path,
) -> int:  # fmt: skip
    from fastunlearn.cli import _diffusion
    from fastunlearn.parametrize import export
    from fastunlearn.parametrize.partial_unet import save_partial_unet
    from fastunlearn.pipelines import save_pipeline_folder
    from fastunlearn.report.cost import MIB, measured
    from fastunlearn.report.files import plain, write_json

    start = time.perf_counter()
    trainer: Any = None
    weights: dict[str, Any] = {}
    trained = 0
    densities: dict[str, Any] = {}

    def work() -> None:
        nonlocal trainer, trained, weights
        trainer = trainer_class(pipeline, config, forget, retain, **more)
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model()
        # A LoRA that lacks the earlier change would bring back what it erased.
        if trainer.adapter_bytes and not earlier.names:
            model = trainer.accelerator.unwrap_model(trainer.model)
            part = trainer.family.part
            path = folder / "pytorch_lora_weights.safetensors"
            if trainer.args.variant == "per_weight":
                export.save_low_rank(model, path, trainer.args.r, prefix=part, overwrite=True)
            else:
                export.save_lora(model, path, prefix=part, overwrite=True)
        trained = trainer.trained_count
        densities.update(_run.mask_density(trainer))
        weights = trainer.merge()

    _, cost = measured(work, config.device)
    name = _diffusion.WEIGHTS[trainer.family.part]
    about = {"method": method, "erase_concept": asked.erase_concept}
    size = save_partial_unet(earlier.joined(pipeline, weights), folder / name, overwrite=True, **about)
    stored = trainer.adapter_bytes or size
    write_json(
        folder / "metrics.json",
        {
            **about, "model": given.model_name_or_path, **earlier.record,
            "settings": {name: plain(getattr(config, name)) for name in _settings(config)},
            "weights": sum(t.numel() for t in weights.values()), "trained": trained,
            "steps": trainer.state.global_step, "history": trainer.state.log_history, "seconds": time.perf_counter() - start,
            "peak_mib": cost.peak_mib, "storage_mib": stored / MIB, "mask_density": densities, "versions": _run.versions(),
            "command": _run.shown_command(prog, argv),
        },
    )  # fmt: skip
    if asked.save_pipeline:
        save_pipeline_folder(pipeline, folder / "pipeline", True, canvas=given.concepts is not None)
    kept = f"adapter ({stored / MIB:.1f} MiB), " if trainer.adapter_bytes else ""
    print(f"{cost.seconds:.1f} s; {kept}{name} ({size / MIB:.1f} MiB) in {folder}")
    if earlier.names and trainer.adapter_bytes:
        print(
            f"{name} holds the change of --weights, too, the adapter does not; as a LoRA: "
            f"fastunlearn export {shlex.quote(str(folder))} --to diffusers --output ..."
        )
    if trainer.family.part == "transformer" or getattr(pipeline, "text_encoder_2", None) is not None:
        print(f"look at it with diffusers: pipe.{trainer.family.part}.load_state_dict(load_file(...), strict=False)")
    else:
        model = (
            "" if given.model_name_or_path == _diffusion.CANVAS else f"--model {shlex.quote(given.model_name_or_path)} "
        )
        print(f"look at it: fastunlearn sample {model}--weights {folder / name} ...")
    return 0


def _settings(config: Any) -> list[str]:
    """Fields that are not transformers' own, and those of them that every run is described by."""
    from dataclasses import fields

    from transformers import TrainingArguments

    theirs = {f.name for f in fields(TrainingArguments)}
    shown = (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "seed",
        "bf16",
        "weight_decay",
    )
    return [f.name for f in fields(config) if f.name not in theirs or f.name in shown]
