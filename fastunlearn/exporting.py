"""A run as files that other tools load: `fastunlearn export`.

A run left an adapter (PEFT's own, or one of `MaskedLoraConfig`), a part of a pipeline's weights, or a whole language model, maybe with
masks. What of it fits which format:

    peft       a PEFT adapter           adapters; other weights by their difference from the model they were made from, approximated
    diffusers  a LoRA file              the same, of a text-to-image model
    kohya      a LoRA file              the same, of a U-Net
    partial    the weights that moved   of a text-to-image model; exact
    merged     a pipeline, or a model   everything; exact

A product of low rank holds a masked adapter, or weights that moved freely, only nearly: how far it is off is told.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
from fastunlearn.localize.text_paths import denoiser_of
from fastunlearn.objectives.language import closest
from fastunlearn.output_folder import claim_output
from fastunlearn.parametrize.low_rank import Change, change_between, check_rank
from fastunlearn.parametrize.partial_unet import load_partial_unet, read_partial_unet, save_partial_unet
from fastunlearn.pipelines import INDEX, is_canvas, load_pipeline, save_pipeline_folder
from fastunlearn.run_source import ADAPTER, ADAPTER_WEIGHTS, FORMATS, Source, read_source

#: of weights that moved freely, unless another is asked for
RANK = 16
#: the file of a LoRA in a folder, as diffusers and Comfy's users know it
LORA = "pytorch_lora_weights.safetensors"
#: from this share on what is lost is worth a word
_MUCH = 0.05


def export_run(
    run: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes a run in another tool's format, whole or not at all.

    Args:
        run: a folder that spare, scapre, uce, unlearn, sau ... or a trainer's `save_model` wrote; an adapter's folder; a file of a
            pipeline's weights.
        to: peft, diffusers, kohya, partial or merged.
        output: a folder; of diffusers, kohya and partial also a .safetensors file.
        model: what the run started from, by name or folder; None: what the run says.
        rank: of the factors; None: the adapter's own, of weights that moved freely 16.
        dtype: of what is written; None: that of the run; of a merged pipeline float32.
        overwrite: replace what is there.
        say: gets lines for a terminal: what was written, what was lost.

    Returns:
        The file or folder.

    Raises:
        ValueError: an unknown format (the closest is named), one that cannot hold the run (what can is said), no run, nothing to say
        what it was made from, another model than that. FileExistsError: the output is there.
    """
    if to not in FORMATS:
        raise ValueError(f"to: {to!r} is unknown; {closest(to, list(FORMATS))}")
    if rank is not None:
        check_rank(rank)
    source = read_source(run)
    if to not in source.formats:
        what = "a language model" if source.language else "an image transformer, whose projections it names otherwise"
        raise ValueError(f"to: {to} holds no run of {what}; want {' or '.join(source.formats)}")
    path = _check_output(Path(output).expanduser(), to, source, overwrite)
    base = None if model is None else os.fspath(model)
    job = _Job(source, to, path, base or source.base, rank, dtype, overwrite, say)
    if source.language:
        _export_language(job)
    else:
        _export_pipeline(job)
    return path


def _check_output(path: Path, to: str, source: Source, overwrite: bool) -> Path:
    """The file or folder that is written.

    Raises:
        ValueError: it is the run itself. FileExistsError, NotADirectoryError: it is taken.
    """
    held = source.path.resolve()
    if path.resolve() == held or path.resolve() in held.parents:
        raise ValueError(f"output: {path} holds the run itself; choose another folder")
    file = to in ("diffusers", "kohya", "partial")
    if file and path.suffix != ".safetensors":
        claim_output(path, overwrite=overwrite, resumable=False).check()
        path = path / (f"{source.part}.safetensors" if to == "partial" else LORA)
    if file:
        if path.exists() and not overwrite:
            raise FileExistsError(f"output: {path} exists; overwrite=true replaces it")
        return path
    if path.suffix == ".safetensors":
        raise ValueError(f"output: {to} is a folder, not a file; got {path}")
    claim_output(path, overwrite=overwrite, resumable=False).check()
    if (
        to == "merged"
        and not source.language
        and path.is_dir()
        and any(path.iterdir())
        and not (path / INDEX).is_file()
    ):
        raise FileExistsError(f"output: {path} holds something that is no pipeline; choose another folder")
    return path


@dataclass
class _Job:
    source: Source
    to: str
    path: Path
    base: str | None
    rank: int | None
    dtype: torch.dtype | None
    overwrite: bool
    say: Callable[[str], None]

    def base_name(self) -> str:
        if not self.base:
            raise ValueError("model: nothing in the run says what it was made from; give its name or folder")
        return self.base

    def loaded(self, load: Callable[..., Any], **options: Any) -> Any:
        """What the run started from.

        Raises:
            ValueError: the run names what is not here. OSError: the caller does, or it cannot be read.
        """
        name = self.base_name()
        try:
            return load(name, **options)
        except OSError as error:
            if self.base != self.source.base or Path(name).expanduser().exists():
                raise
            raise ValueError(
                f"model: the run was made from {name!r}, which is no folder here and was not found on the Hub; give its name or folder"
            ) from error

    def refuse(self, why: str, *can: str) -> ValueError:
        return ValueError(f"to: {self.to} cannot hold this run ({why}); {' or '.join(can)} can")


# ---- changes --------------------------------------------------------------------------------------------------------------


def _adapter_change(model: Any, job: _Job) -> Change:
    """What the adapter on a model changes."""
    if job.source.masked:
        from fastunlearn.parametrize.export import adapter_change

        return adapter_change(model, rank=job.rank, dtype=job.dtype)
    from fastunlearn.parametrize.lora_files import peft_layers

    if job.rank is not None:
        raise ValueError("rank: the adapter has its own, and none of it is approximated; leave rank out")
    try:
        layers = peft_layers(model)
    except ValueError as error:
        raise job.refuse(str(error).removeprefix("adapter: "), "peft", *job.source.formats[-2:]) from None
    return Change({name: layer if job.dtype is None else layer.to(job.dtype) for name, layer in layers.items()})


def _with_adapter(network: nn.Module, source: Source) -> Any:
    from peft import PeftModel

    import fastunlearn.parametrize.masked_lora  # noqa: F401 (PEFT learns of masked adapters)

    return PeftModel.from_pretrained(network, source.path)


def _told(change: Change, job: _Job, exact: str) -> None:
    """Says how far factors are off."""
    if not change.lost:
        job.say(f"{len(change.layers)} layers, exact")
        return
    ranks = {change.layers[name].rank for name in change.lost}
    shown = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(ranks.pop())
    job.say(change.said(f"rank {shown} of {len(change.lost)} layers"))
    if change.total > _MUCH:
        job.say(f"a higher rank= loses less; {exact} nothing")


# ---- writing --------------------------------------------------------------------------------------------------------------


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{path}: {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


def _files_into(path: Path, overwrite: bool, write: Callable[[Path], None]) -> None:
    """Files that `write` leaves in an empty folder, moved into `path`."""
    with claim_output(path, overwrite=overwrite, resumable=False):
        temporary = path / f".export.{os.getpid()}.tmp"
        try:
            temporary.mkdir()
            write(temporary)
            for file in sorted(temporary.iterdir()):
                file.replace(path / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_peft(change: Change, job: _Job, whole: Mapping[str, Mapping[str, Tensor]], task: str | None) -> None:
    from fastunlearn.parametrize.lora_files import save_peft

    base = job.base_name()
    kept = {m: {n: t if job.dtype is None else t.to(job.dtype) for n, t in own.items()} for m, own in whole.items()}
    _files_into(job.path, job.overwrite, lambda to: save_peft(change.layers, to, whole=kept, base=base, task_type=task))


def _copy_adapter(job: _Job) -> None:
    """PEFT's own adapter is in PEFT's format."""
    if job.rank is not None or job.dtype is not None:
        raise ValueError("rank, dtype: the run is a PEFT adapter already and is copied as it is; leave them out")

    def copy(to: Path) -> None:
        for name in (ADAPTER, ADAPTER_WEIGHTS):
            shutil.copyfile(job.source.path / name, to / name)

    _files_into(job.path, job.overwrite, copy)
    job.say("PEFT's own adapter, as it was")


def _cast(model: Any, dtype: torch.dtype | None) -> Any:
    return model if dtype is None else model.to(dtype)


# ---- pipelines ------------------------------------------------------------------------------------------------------------


def _export_pipeline(job: _Job) -> None:
    from fastunlearn.parametrize.export import write_tensors
    from fastunlearn.parametrize.lora_files import diffusers_tensors, kohya_metadata, kohya_tensors

    source = job.source
    if job.to == "peft" and source.kind == "adapter" and not source.masked and source.earlier is None:
        _copy_adapter(job)
        job.say(_size(job.path))
        return
    if job.to == "partial" and source.partial is not None:
        weights, about = read_partial_unet(source.partial)
        _write_partial(weights, job, about or source.about)
        return
    if source.earlier is not None and job.to not in ("partial", "merged"):
        raise job.refuse(
            f"its adapter goes on from {source.earlier.path}, and the file that holds both is gone", "partial", "merged"
        )
    pipeline = job.loaded(load_pipeline, device="cpu", dtype=torch.float32)
    network, part = denoiser_of(pipeline)
    if job.to == "kohya" and part != "unet":
        raise job.refuse("it names the projections of an image transformer otherwise", "diffusers", "partial", "merged")
    if job.to in ("partial", "merged"):
        moved = apply_source(pipeline, source)
        if job.to == "partial":
            _write_partial(moved, job, source.about)
            return
        save_pipeline_folder(_cast(pipeline, job.dtype), job.path, job.overwrite, canvas=is_canvas(job.base_name()))
        job.say(_size(job.path))
        return
    whole: dict[str, dict[str, Tensor]] = {}
    if source.kind == "adapter":
        change = _adapter_change(_with_adapter(network, source), job)
    else:
        new = read_partial_unet(source.path)[0]
        change, whole = change_between(network, new, rank=job.rank or RANK, dtype=job.dtype)
    if whole and job.to != "peft":
        raise job.refuse(f"{len(whole)} modules changed that are no factors' own, as {next(iter(whole))}", "peft", "partial", "merged")  # fmt: skip
    _told(change, job, "--to partial and --to merged lose")
    config = dict(network.config)  # type: ignore[arg-type]
    if job.to == "peft":
        _write_peft(change, job, whole, None)
    else:
        kohya = job.to == "kohya"
        tensors = kohya_tensors(change.layers, config) if kohya else diffusers_tensors(change.layers, part)
        metadata = {"format": "pt"} | (kohya_metadata(change.layers, config) if kohya else {})
        write_tensors(tensors, job.path, metadata, job.overwrite)
    job.say(_size(job.path))


def _write_partial(weights: Mapping[str, Tensor], job: _Job, about: Mapping[str, Any]) -> None:
    plain = {name: weight if job.dtype is None else weight.to(job.dtype) for name, weight in weights.items()}
    # What a stranger's file says of itself goes by the names it likes.
    kept = {name: value for name, value in about.items() if name not in ("weights", "path", "overwrite")}
    save_partial_unet(plain, job.path, overwrite=job.overwrite, **kept)
    job.say(f"{len(plain)} tensors, {'exact' if job.dtype is None else f'rounded to {job.dtype}'}\n{_size(job.path)}")


def apply_source(pipeline: Any, source: Source) -> dict[str, Tensor]:
    """Gives a pipeline what a run learned, and the weights that it went on from -> name within the denoiser -> weight, of what moved.

    Raises:
        ValueError: a run of another model; an adapter whose earlier weights are gone or changed.
    """
    network, part = denoiser_of(pipeline)
    if source.kind == "weights":
        load_partial_unet(network, source.path)
        names = list(read_partial_unet(source.path)[0])
    else:
        names = []
        if source.earlier is not None:
            earlier = source.earlier.check()
            load_partial_unet(network, earlier)
            names = list(read_partial_unet(earlier)[0])
        model = _with_adapter(network, source)
        own = [name for name, _ in network.named_parameters() if name.endswith("base_layer.weight")]
        network = model.merge_and_unload(safe_merge=True)
        setattr(pipeline, part, network)
        names = list(dict.fromkeys([*names, *(name.replace(".base_layer", "") for name in own)]))
    parameters = dict(network.named_parameters())
    return {name: parameters[name].detach() for name in names}


# ---- language models ------------------------------------------------------------------------------------------------------


def _export_language(job: _Job) -> None:
    source, kept = job.source, "auto" if job.dtype is None else job.dtype
    if source.kind == "model":
        run = load_checkpoint(source.path, dtype=kept if job.to == "merged" else "auto")  # type: ignore[arg-type]
        if job.to == "merged":
            save_checkpoint(job.path, run.model, run.tokenizer, masks=run.masks, pruning=run.pruning, overwrite=job.overwrite)  # fmt: skip
        else:
            _model_as_adapter(run, job)
    elif job.to == "peft" and not source.masked:
        _copy_adapter(job)
    else:
        base = job.loaded(load_checkpoint, dtype=kept if job.to == "merged" else "auto")
        adapted = _with_adapter(base.model, source)
        if job.to == "merged":
            merged = adapted.merge_and_unload(safe_merge=True)
            save_checkpoint(job.path, merged, base.tokenizer, masks=base.masks, pruning=base.pruning, overwrite=job.overwrite)  # fmt: skip
        else:
            change = _adapter_change(adapted, job)
            _told(change, job, "--to merged loses")
            if change.lost and base.masks is not None:
                job.say("the base is pruned: merged, these factors fill its zeros; --to merged keeps them")
            _write_peft(change, job, {}, "CAUSAL_LM")
    job.say(_size(job.path))


def _model_as_adapter(run: Any, job: _Job) -> None:
    base = load_checkpoint(job.base_name(), dtype="auto", masks="ignore")
    new = dict(run.model.named_parameters())
    change, whole = change_between(base.model, new, rank=job.rank or RANK, dtype=job.dtype)
    shared: dict[int, list[str]] = {}
    for name, parameter in base.model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    tied = [
        names for names in shared.values() if len(names) > 1 and any(n in whole or n in change.layers for n in names)
    ]
    if tied:
        raise job.refuse(f"{tied[0][0]} changed, whose weight is {tied[0][1]}'s, too", "merged")
    if change.layers:
        _told(change, job, "--to merged loses")
    if whole:
        job.say(f"{len(whole)} other modules (as {next(iter(whole))}) are kept whole: modules_to_save")
    if run.masks is not None and change.lost:
        job.say("the run is of a pruned model: merged, these factors fill its zeros; --to merged keeps them")
    _write_peft(change, job, whole, "CAUSAL_LM")
