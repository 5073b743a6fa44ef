"""Text-to-image pipelines by name: the canvas pipeline of this package, a folder, or a model of the Hugging Face hub.

The canvas pipeline is a diffusers `StableDiffusionPipeline` (4.8 M parameters, bf16, 64 x 64 pixels) trained by
`python -m benchmarks.train_canvas` on the drawn world of `fastunlearn.data.canvas`; it is the default of every diffusion command.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["CANVAS", "load_pipeline", "pipeline_folder"]

CANVAS = "canvas"
_ASSETS = Path(__file__).parent / "assets"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def pipeline_folder(name: str | os.PathLike[str]) -> str:
    """Where the pipeline of that name lies: "canvas" becomes the folder inside this package, all else stays what it is.

    A folder called canvas with a pipeline in it, where the program runs, goes before; one without a pipeline does not count.

    Raises:
        FileNotFoundError: this installation came without the canvas pipeline.
    """
    if str(name) != CANVAS or (Path(name) / "model_index.json").is_file():
        return str(name)
    folder = _ASSETS / CANVAS
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the canvas pipeline is not in this installation ({folder}); install fastunlearn from a wheel or a full checkout, "
            "or train it: python -m benchmarks.train_canvas"
        )
    return str(folder)


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
        ValueError: the pipeline lacks a denoiser or a text encoder.
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
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder(name), **{keyword: dtype})
    if getattr(pipe, "unet", None) is None and getattr(pipe, "transformer", None) is None:
        raise ValueError(
            f"pipeline {str(name)!r} has neither a unet nor a transformer; it has {sorted(pipe.components)}"
        )
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"pipeline {str(name)!r} has no text_encoder; it has {sorted(pipe.components)}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
