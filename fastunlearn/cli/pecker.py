"""`fastunlearn pecker`: a diffusion model's one-step generator forgets a class or a concept by masked score distillation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastunlearn.cli import _run
from fastunlearn.cli._arguments import parse

PROG = "fastunlearn pecker"
EXAMPLE = """\
examples:
  fastunlearn pecker --model cifar-ddpm --forget_class 0 --override_class 1 --distill_steps 50000 --output out
  fastunlearn pecker --model cifar-ddpm --generator out/distilled --forget_class 0 --override_class 1 --output out2 \\
      granularity=tile density=0.1
  fastunlearn pecker --erase_concept "Pop Art" --output out stages=single per_device_train_batch_size=8

What the paper's abstract leaves open is an option, and a reconstruction (fastunlearn.methods.pecker says of what). The folder holds the
averaged generator (unet/, scheduler/), masks.safetensors, pecker.json (how to sample it) and metrics.json. method=sfd is the same
without a mask."""


@dataclass
class PeckerArguments:
    """The model, what it forgets, and where the second stage starts."""

    model_name_or_path: str = field(
        default="canvas",
        metadata={
            "help": "A folder with a class-conditional unet/ and scheduler/, a text-to-image pipeline, or canvas."
        },
    )
    generator: str | None = field(
        default=None, metadata={"help": "Folder of a one-step generator of this model (an earlier run's)."}
    )
    distill_steps: int = field(
        default=0,
        metadata={"help": "Iterations of distillation that make the one-step generator first, in output/distilled."},
    )
    forget_class: list[int] | None = field(default=None, metadata={"help": "Labels to forget."})
    override_class: list[int] | None = field(
        default=None, metadata={"help": "What is drawn instead: one label, or one for each."}
    )
    retain_class: list[int] | None = field(default=None, metadata={"help": "Labels to keep; default: all others."})
    erase_concept: str | None = field(default=None, metadata={"help": "The concept; of the canvas by its name alone."})
    surrogate_concept: str | None = field(default=None, metadata={"help": "What is drawn instead."})
    retain_concepts: list[str] | None = field(default=None, metadata={"help": "Concepts that must stay."})
    template: list[str] | None = field(default=None, metadata={"help": "Prompts with {} for the concept."})
    report_images: int = field(
        default=4,
        metadata={
            "help": "Images of what is forgotten, and as many of what is kept, drawn by the one-step generator before and after and kept "
            "in _samples for `fastunlearn report`."
        },
    )

    def __post_init__(self) -> None:
        if self.report_images < 0:
            raise ValueError(f"report_images: want at least 0, got {self.report_images}")


@dataclass
class _Work:
    model: Any
    forget: Any
    override: Any
    retain: Any


def _load(asked: PeckerArguments, method: str) -> _Work:
    from fastunlearn.methods._pecker_setup import load_unet

    folder = Path(asked.model_name_or_path).expanduser()
    config = folder / "unet" / "config.json"
    by_class = config.is_file() and '"UNet2DConditionModel"' not in config.read_text(encoding="utf-8")
    if by_class:
        if asked.erase_concept is not None:
            raise ValueError("erase_concept: this model draws classes; give --forget_class and --override_class")
        if method != "sid" and (not asked.forget_class or not asked.override_class):
            raise ValueError("forget_class, override_class: say which labels go and what is drawn instead")
        unet, scheduler = load_unet(folder)
        unet.scheduler = scheduler  # a pipeline without a pipeline: what the trainer looks for
        return _Work(unet, asked.forget_class, asked.override_class, asked.retain_class)
    from fastunlearn.cli import _diffusion

    if asked.forget_class or asked.override_class:
        raise ValueError("forget_class: this model draws prompts; give --erase_concept")
    if asked.erase_concept is None:
        raise ValueError("erase_concept: say what must be forgotten")
    pipeline_arguments = _diffusion.PipelineArguments(model_name_or_path=asked.model_name_or_path)
    prompts = _diffusion.prompts_of(
        pipeline_arguments.concepts, asked.erase_concept, asked.surrogate_concept, asked.retain_concepts, asked.template
    )  # fmt: skip
    return _Work(pipeline_arguments.load(trained=True), prompts.forget, prompts.surrogate, prompts.retain)


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0, 2 for bad input (one line on standard error), 1 where training diverged."""

    def run() -> int:
        from fastunlearn.methods.pecker import PECKERConfig, PECKERTrainer
        from fastunlearn.report.cost import measured
        from fastunlearn.report.files import write_json
        from fastunlearn.report.samples import write_images

        asked, config = parse(
            (PeckerArguments, PECKERConfig), argv, PROG, epilog=EXAMPLE, required=("output_dir",),
            description="Makes a one-step generator of a diffusion model forget a class or a concept, without data: score "
            "distillation, by the weights that matter for what is forgotten.",
        )  # fmt: skip
        resume = _run.resume_of(config)
        two = config.stages == "two" and config.method in ("pecker", "sfd", "gradient_ascent")
        if asked.distill_steps < 0:
            raise ValueError(f"distill_steps: want at least 0, got {asked.distill_steps}")
        output = Path(config.output_dir)
        work = _load(asked, config.method)
        if config.method == "sid":
            work = _Work(work.model, None, None, _everything(work))
        scheduler = getattr(work.model, "scheduler", None)
        generator: Any = asked.generator
        start = time.perf_counter()
        if two and generator is None and asked.distill_steps:
            generator = output / "distilled"
            _check(config, work, scheduler, output, resume)
            if not (resume and (generator / "pecker.json").is_file()):
                generator = _distil(PECKERTrainer, config, work, scheduler, asked.distill_steps, generator, resume)
            if resume is True and _began_only(output, {"distilled"}):
                print("no checkpoint of the second stage: it begins anew", flush=True)
                resume = False
        trainer = PECKERTrainer(
            work.model, config, work.forget, work.retain, scheduler, override=work.override, generator=generator
        )
        if _began_only(output, {"distilled"}):
            # What the first stage left is this run's own.
            config.overwrite_output_dir = True
        shown = _shown(trainer, asked.report_images)
        before = _draw(trainer, shown) if shown else None
        outcome, cost = measured(lambda: trainer.train(resume_from_checkpoint=resume or None), config.device)
        trainer.save_model()
        if before is not None:
            with trainer.ema.applied(trainer.generator):
                after = _draw(trainer, shown)
            parts = {part: [str(name) for name in names] for part, (names, _) in shown.items()}
            write_images(output, parts, before, after, seed=0)
        model = trainer.masked_model
        if model is not None:
            print(
                f"gradients: {model.share:.0%} of the products of linear layers and convolutions, {len(model.frozen)} parameters frozen"
            )
        write_json(
            output / "metrics.json",
            {
                "method": config.method, "model": asked.model_name_or_path, "train": outcome.metrics,
                "gradient_products": None if model is None else model.share, "history": trainer.state.log_history,
                "seconds": time.perf_counter() - start, "peak_mib": cost.peak_mib, "versions": _run.versions(), "command": _run.shown_command(PROG, argv),
            },
        )  # fmt: skip
        print(f"saved to {output}: unet, scheduler, {'masks, ' if trainer.masks else ''}pecker.json, metrics.json")
        return 0

    return _run.guarded(PROG, run)


def _shown(trainer: Any, count: int) -> dict[str, tuple[list[Any], Any]]:
    """Part -> names and values of a few conditions, evenly over all; none where the model draws in many steps, or no pictures."""
    by_class = trainer.setup.classes is not None
    if trainer.args.method in ("gradient_ascent", "sid") or (by_class and trainer.setup.shape[0] not in (1, 3)):
        return {}
    out = {}
    for part in ("forget", "retain"):
        conditions = getattr(trainer, part)
        if conditions is None or len(conditions.names) != len(conditions) or not count:
            continue
        some = min(count, len(conditions))
        places = [i * len(conditions) // some for i in range(some)]
        named = [conditions.names[i] for i in places]
        names = [f"class {name}" for name in named] if by_class else named
        out[part] = (names, conditions.values[places])
    return out


def _draw(trainer: Any, shown: dict[str, tuple[list[Any], Any]]) -> Any:
    """uint8 [n, 3, H, W]: one step of the generator from one noise for all."""
    import torch

    from fastunlearn._modes import evaluating
    from fastunlearn.evaluation.classes import to_images
    from fastunlearn.sampling import decode_latents

    values = torch.cat([values for _, values in shown.values()])
    z = torch.randn(1, *trainer.setup.shape, generator=torch.Generator().manual_seed(0)).to(values.device)
    with torch.no_grad(), evaluating(trainer.generator):
        drawn = trainer.distillation.generate(trainer.generator, z.expand(len(values), -1, -1, -1), values)
    if trainer.setup.classes is None:
        return decode_latents(trainer.setup.pipeline, drawn)
    return to_images(drawn).expand(-1, 3, -1, -1)


def _check(config: Any, work: _Work, scheduler: Any, output: Path, resume: Any) -> None:
    """Raises before the first stage what the second would raise after it."""
    from fastunlearn.methods._pecker_setup import make_setup, named_conditions
    from fastunlearn.output_folder import claim_output
    from fastunlearn.resuming import resumes_in

    # The model stands for the generator that is still to be made.
    setup = make_setup(work.model, scheduler, config, work.model)
    named_conditions(setup, work.forget, work.override, work.retain, needs_forget=True, k_retain=config.k_retain)
    if not output.is_dir() or {p.name for p in output.iterdir()} - {"distilled"}:
        claim_output(output, overwrite=config.overwrite_output_dir, resume=resumes_in(output, resume or None)).check()


def _began_only(folder: Path, own: set[str]) -> bool:
    """Whether the folder is there and holds nothing but `own` and what a kill left half written."""
    from fastunlearn.resuming import complete_checkpoint

    def half(path: Path) -> bool:
        if path.name.startswith("checkpoint-"):
            return not complete_checkpoint(path)
        return path.name.startswith(".") and path.name.endswith((".lock", ".tmp"))

    return folder.is_dir() and all(path.name in own or half(path) for path in folder.iterdir())


def _everything(work: _Work) -> list[Any] | None:
    """What distillation draws: all that is named, for what will be forgotten has to be drawn first, too. None: all labels."""
    if work.retain is None:
        return None
    return list(dict.fromkeys([*work.retain, *(work.forget or ())]))


def _distil(
    trainer_class: Any, config: Any, work: _Work, scheduler: Any, steps: int, folder: Path, resume: Any
) -> Path:
    """The first stage: SiD alone, into its own folder."""
    from fastunlearn.resuming import last_checkpoint

    changes = {"method": "sid", "max_steps": steps, "output_dir": str(folder)}
    first = dataclasses.replace(config, **changes)
    print(f"distilling a one-step generator, {steps:,} iterations ...", flush=True)
    trainer = trainer_class(work.model, first, None, _everything(work), scheduler)
    going_on = bool(resume) and folder.is_dir() and last_checkpoint(folder) is not None
    if resume and not going_on and _began_only(folder, {"unet", "scheduler"}):
        print("no checkpoint of the first stage: it begins anew", flush=True)
        first.overwrite_output_dir = True
    trainer.train(resume_from_checkpoint=True if going_on else None)
    trainer.save_model()
    return folder
