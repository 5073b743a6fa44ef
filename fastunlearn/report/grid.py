"""A grid of images as one picture: what a model draws, with names at the rows and columns."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn.report.files import write_bytes


def draw_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    scale: int = 1,
    gap: int = 2,
    overwrite: bool = False,
) -> None:
    """Writes a grid of images as PNG, whole or not at all.

    Args:
        images: uint8 [rows, columns, 3, height, width].
        path: of the PNG.
        rows, columns: names at the left and above; none: no names there.
        scale: pixels a pixel.
        gap: white pixels between images.
        overwrite: replace a file that is there.

    Raises:
        ValueError, ImportError: as `grid_sheet`. FileExistsError: there is a file.
    """
    data = io.BytesIO()
    grid_sheet(images, rows=rows, columns=columns, scale=scale, gap=gap).save(data, format="png")
    write_bytes(path, data.getvalue(), overwrite=overwrite)


def grid_sheet(
    images: Tensor, *, rows: Sequence[str] = (), columns: Sequence[str] = (), scale: int = 1, gap: int = 2
) -> Any:
    """A grid of images as a picture of pillow; arguments as `draw_grid`.

    Raises:
        ValueError: images of another shape or dtype, names that are too few or too many. ImportError: pillow is missing.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise ImportError("pictures need pillow: pip install 'fastunlearn[diffusion]'") from None
    if images.dtype != torch.uint8 or images.dim() != 5 or images.shape[2] != 3 or 0 in images.shape:
        raise ValueError(
            f"images: want uint8 [rows, columns, 3, height, width], got {images.dtype} {tuple(images.shape)}"
        )
    for what, names, count in (("rows", rows, images.shape[0]), ("columns", columns, images.shape[1])):
        if names and len(names) != count:
            raise ValueError(f"{what}: want {count} names or none, got {len(names)}")
    if scale < 1:
        raise ValueError(f"scale: want at least 1, got {scale}")
    font = ImageFont.load_default(size=11)
    images = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    height, width = images.shape[3:]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max((int(ruler.textlength(name, font=font)) for name in rows), default=-6) + 6
    # Names wider than an image stand on lines of their own words.
    broken = [_wrapped(name, width, lambda text: ruler.textlength(text, font=font)) for name in columns]
    top = max((13 * len(lines) for lines in broken), default=-4) + 4
    size = (left + images.shape[1] * (width + gap), top + images.shape[0] * (height + gap))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(images):
        y = top + i * (height + gap)
        if rows:
            pen.text((2, y + height // 2 - 7), rows[i], fill="black", font=font)
        for j, image in enumerate(row):
            sheet.paste(
                Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()), (left + j * (width + gap), y)
            )
    for j, lines in enumerate(broken):
        pen.multiline_text((left + j * (width + gap) + 1, 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet


def _wrapped(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and measure(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
