"""A part of a U-Net's weights as a safetensors file, in the layout of ESD's and UCE's own files: names within the U-Net.

`unet.load_state_dict(load_file(path), strict=False)` of any other program reads it; `load_partial_unet` also finds what does not fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastunlearn._stored import parse_json, read_tensors
from fastunlearn.report.files import write_bytes


def save_partial_unet(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], *, overwrite: bool = False, **about: Any
) -> int:
    """Writes weights by name, whole or not at all.

    Args:
        weights: name within the U-Net -> weight.
        about: what stands in the file's metadata, as JSON under "fastunlearn": method, concepts.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: no weights, or some that are not finite. FileExistsError: there is a file and `overwrite` is False.
    """
    if not weights:
        raise ValueError("weights: none to save")
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"weights: not finite: {', '.join(broken[:3])}")
    plain = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    data = save(plain, metadata={"fastunlearn": json.dumps(about), "format": "pt"})
    write_bytes(path, data, overwrite=overwrite)
    return len(data)


def read_partial_unet(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by name, what `save_partial_unet` was told about them; {} for the file of another program).

    Raises:
        ValueError: no such file, no safetensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    weights, metadata = read_tensors(path)
    about = parse_json(metadata.get("fastunlearn", "{}"), f"{path}: its metadata 'fastunlearn'", dict)
    return weights, about


def load_partial_unet(unet: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads such a file into a U-Net; the weights that it does not name stay as they are.

    Returns:
        What `save_partial_unet` was told about it; {} for the file of another program.

    Raises:
        ValueError: no such file, no safetensors, names or shapes that the U-Net does not have. The U-Net is unchanged then.
    """
    weights, about = read_partial_unet(path)
    mine = dict(unet.named_parameters()) | dict(unet.named_buffers())
    wrong = [name for name, weight in weights.items() if name not in mine or mine[name].shape != weight.shape]
    if wrong or not weights:
        raise ValueError(f"path: {path} does not fit this U-Net: {', '.join(wrong[:3]) or 'it is empty'}")
    with torch.no_grad():
        for name, weight in weights.items():
            mine[name].copy_(weight)
    return about
