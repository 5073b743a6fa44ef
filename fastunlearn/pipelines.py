"""Text-to-image pipelines by name: the canvas pipeline of this package, a folder, or a model of the Hugging Face hub.

The canvas pipeline is a diffusers `StableDiffusionPipeline` (4.8 M parameters, bf16, 64 x 64 pixels) trained by
`python -m benchmarks.train_canvas` on the drawn world of `fastunlearn.data.canvas`; it is the default of every diffusion command.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastunlearn._stored import read_json

__all__ = ["CANVAS", "is_canvas", "load_pipeline", "mark_canvas", "pipeline_folder", "save_pipeline_folder"]

CANVAS = "canvas"
_ASSETS = Path(__file__).parent / "assets"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
INDEX = "model_index.json"
#: beside it where a pipeline draws the canvas' styles and objects
MARK = "fastunlearn.json"


def pipeline_folder(name: str | os.PathLike[str]) -> str:
    """Where the pipeline of that name lies: "canvas" becomes the folder inside this package, all else stays what it is.

    A folder called canvas with a pipeline in it, where the program runs, goes before; one without a pipeline does not count.

    Raises:
        FileNotFoundError: this installation came without the canvas pipeline.
    """
    if str(name) != CANVAS or (Path(name) / INDEX).is_file():
        return str(name)
    folder = _ASSETS / CANVAS
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"the canvas pipeline is not in this installation ({folder}); install fastunlearn from a wheel or a full checkout, "
            "or train it: python -m benchmarks.train_canvas"
        )
    return str(folder)


def mark_canvas(folder: str | os.PathLike[str]) -> None:
    """Says of a folder of `save_pretrained` that its pipeline knows the styles and objects of the canvas by name."""
    (Path(folder) / MARK).write_text(json.dumps({"world": CANVAS}) + "\n", encoding="utf-8")


def is_canvas(name: str | os.PathLike[str]) -> bool:
    """Whether a pipeline draws the canvas: "canvas", this package's folder, or one that `mark_canvas` has marked.

    Raises:
        ValueError: the mark is no JSON object.
    """
    folder = Path(name).expanduser()
    if str(name) == CANVAS or (folder.is_dir() and folder.resolve() == (_ASSETS / CANVAS).resolve()):
        return True
    return (folder / MARK).is_file() and read_json(folder / MARK).get("world") == CANVAS


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that is no whole pipeline of diffusers; one that is not there may be a name of the hub.

    Raises:
        ValueError: it has no model_index.json, the index lacks parts, or the folder those that the index has; they are named.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        return
    if not (path / INDEX).is_file():
        raise ValueError(f"pipeline: {path} has no {INDEX}; want a folder that save_pretrained of a pipeline wrote")
    index = read_json(path / INDEX)
    listed = {name for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    denoiser = "transformer" if "transformer" in listed else "unet"
    wanted = [denoiser, *PARTS[1:]]
    absent = [part for part in wanted if part not in listed]
    if absent:
        raise ValueError(
            f"pipeline: {path / INDEX} ({index.get('_class_name')}) has no {', '.join(absent)}; want {', '.join(wanted)}"
        )
    gone = sorted(part for part in listed if not (path / part).is_dir())
    if gone:
        raise ValueError(f"pipeline: {path} lacks {', '.join(f'{part}/' for part in gone)}, which its {INDEX} names")
    models = [part for part in listed if part in (denoiser, "vae") or part.startswith("text_encoder")]
    bare = sorted(part for part in models if not (path / part / "config.json").is_file())
    if bare:
        raise ValueError(f"pipeline: {path} lacks {', '.join(f'{part}/config.json' for part in bare)}")


def load_pipeline(
    name: str | os.PathLike[str] = CANVAS,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A text-to-image pipeline ready to sample.

    Args:
        name: "canvas" (the pipeline of this package), a folder written by `save_pretrained`, or a hub name.
        device: where it goes; None: a GPU when there is one.
        dtype: of its weights; None: fp32 on a CPU, bf16 on a GPU.

    Returns:
        The diffusers pipeline, its progress bar off.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the pipeline lacks a denoiser or a text encoder; a folder that is no whole pipeline (as `check_folder`).
    """
    try:
        from diffusers import DiffusionPipeline, __version__
    except ImportError as error:
        raise ImportError("text-to-image pipelines need diffusers: pip install 'fastunlearn[diffusion]'") from error
    device = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    # Its name changed; the old one works before 0.42 and warns after.
    keyword = "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    folder = pipeline_folder(name)
    check_folder(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, **{keyword: dtype})
    if getattr(pipe, "unet", None) is None and getattr(pipe, "transformer", None) is None:
        raise ValueError(
            f"pipeline {str(name)!r} has neither a unet nor a transformer; it has {sorted(pipe.components)}"
        )
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"pipeline {str(name)!r} has no text_encoder; it has {sorted(pipe.components)}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def save_pipeline_folder(pipeline: Any, folder: Path, overwrite: bool, *, canvas: bool = False) -> None:
    """A pipeline's folder, there whole or not at all.

    Args:
        canvas: it draws the canvas' styles and objects, and the folder says so.
    """
    temporary = folder.with_name(f".{folder.name}.new.tmp")
    try:
        pipeline.save_pretrained(temporary)
        if canvas:
            mark_canvas(temporary)
        if folder.exists() and overwrite:
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
