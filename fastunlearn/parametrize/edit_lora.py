"""The difference of two sets of projections as a LoRA file that diffusers' own `load_lora_weights` loads, with its error known.

The best matrix of rank r is what is left of the singular value decomposition of W_new - W_old (Eckart and Young); a closed-form edit
of n tokens has rank n at most, and is then exact.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from fastunlearn.parametrize.lora_files import diffusers_tensors
from fastunlearn.parametrize.low_rank import Change
from fastunlearn.report.files import write_bytes


def edit_lora(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], rank: int, *, prefix: str = "unet"
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Factors of new - old.

    Args:
        old, new: "<module>.weight" -> [out, in].
        rank: of every factor, at least 1; at most the smaller side of a weight is used.
        prefix: the part of the pipeline: unet or transformer.

    Returns:
        "<prefix>.<module>.lora_A.weight" [rank, in] and ".lora_B.weight" [out, rank] in the weights' dtype; and for every weight
        ||new - old - B A|| / ||new - old||, 0 where nothing changed.

    Raises:
        ValueError: other names, shapes, a rank below 1.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora_rank: want a whole number of at least 1, got {rank!r}")
    if old.keys() != new.keys() or any(old[name].shape != new[name].shape for name in old):
        raise ValueError("new: want the names and shapes of old")
    change = Change()
    for name, before in old.items():
        edit = new[name].detach().double() - before.detach().double()
        change.add(name.removesuffix(".weight"), edit, rank, before.dtype)
    factors = {key: tensor.cpu().contiguous() for key, tensor in diffusers_tensors(change.layers, prefix).items()}
    return factors, {name: change.lost[name.removesuffix(".weight")] for name in old}


def save_edit_lora(factors: Mapping[str, Tensor], path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Writes the factors, whole or not at all -> bytes.

    Raises:
        FileExistsError: there is a file and `overwrite` is False.
    """
    data = save(dict(factors), metadata={"format": "pt"})
    write_bytes(path, data, overwrite=overwrite)
    return len(data)
