"""What a model said or drew before and after, kept in a run's folder for its report.

    _samples/samples.json    [{"part": "forget", "prompt": ..., "wanted": ..., "before": text, "after": text}, ...]
                             or, with "before_image" and "after_image", names of PNG files beside it

The name begins with an underscore because the Trainer's push_to_hub leaves such names out: a card is published, what had to be
forgotten must not be.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastunlearn.report.files import dump_json, write_bytes

FOLDER = "_samples"
FILE = "samples.json"


def write_samples(
    folder: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], files: Mapping[str, bytes] | None = None
) -> None:
    """Writes the samples of a run, whole; those of a run before it are replaced.

    Args:
        folder: of the run.
        rows: see above.
        files: name -> content of the images.

    Raises:
        OSError: it cannot be written.
    """
    final = Path(folder) / FOLDER
    temporary = final.with_name(f".{FOLDER}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, data in (files or {}).items():
            write_bytes(temporary / name, data)
        write_bytes(temporary / FILE, dump_json(list(rows)).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def png(image: Tensor) -> bytes:
    """A PNG of uint8 [3, height, width].

    Raises:
        ImportError: pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("pictures need pillow: pip install 'fastunlearn[diffusion]'") from None
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(data, format="png", optimize=True)
    return data.getvalue()


def write_images(
    folder: str | os.PathLike[str], parts: Mapping[str, Sequence[str]], before: Tensor, after: Tensor, *, seed: int
) -> None:
    """Writes images of the same prompts and the same start latents before and after.

    Args:
        parts: "forget", "retain" -> prompts; the images follow their order.
        before, after: uint8 [prompts, 3, height, width].

    Raises:
        ValueError: not one image a prompt.
    """
    prompts = [(part, prompt) for part, some in parts.items() for prompt in some]
    if not len(prompts) == len(before) == len(after):
        raise ValueError(f"before, after: want {len(prompts)} images each, got {len(before)} and {len(after)}")
    files, rows = {}, []
    for i, (part, prompt) in enumerate(prompts):
        names = {"before_image": f"{i:02}-before.png", "after_image": f"{i:02}-after.png"}
        for name, image in zip(names.values(), (before[i], after[i]), strict=True):
            files[name] = png(image)
        rows.append({"part": part, "prompt": prompt, "seed": seed, **names})
    write_samples(folder, rows, files)
