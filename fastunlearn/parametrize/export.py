"""A masked adapter as files: its factors and masks, the entries it changes, a low-rank file that diffusers loads.

    save_factors         (A, B, M) of every layer, exact; `apply_factors` merges them into a base model
    save_sparse_delta    the merged values of the entries that may move, exact; `apply_sparse_delta` writes them into a base model
    save_lora            what `pipe.load_lora_weights()` loads, exact for adapters without a mask (per_module, dense)
    save_low_rank        the same for masked adapters: the best approximation of each layer's masked delta by a rank, with its error
    adapter_change       an adapter's change as factors, for any format of LoRA (`fastunlearn.parametrize.lora_files`)

B A o M is not of low rank: a loader of plain LoRA files drops M, and the model is another one. So `save_lora` refuses masked adapters.
A merged model is `model.merge_and_unload()`. Every file is written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn._stored import parse_json, read_tensors
from fastunlearn.ops.mask import BitMask
from fastunlearn.parametrize.lora_files import diffusers_tensors
from fastunlearn.parametrize.low_rank import Change, LowRank, check_rank
from fastunlearn.parametrize.masked_lora import MaskedLoraLayer, base_identity, check_base, masked_layers

_FACTORS, _DELTA = "fastunlearn.masked_lora", "fastunlearn.sparse_delta"
_VERSION = "1"


class Factors(NamedTuple):
    """A layer's adapter: A [rank, in], B [out, rank], its mask (None: all entries) and its scale."""

    A: Tensor
    B: Tensor
    mask: BitMask | None
    scaling: float


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str], overwrite: bool) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        FileExistsError: there is a file and `overwrite` is False.
    """
    from safetensors.torch import save_file

    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; overwrite=True replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what the metadata says of them) of a file of ours."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != kind or metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path}: want a file of format {kind!r}, version {_VERSION}; this one says {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}"
        )
    said = parse_json(metadata.get("layers", ""), f"{path}: its metadata 'layers'", dict)
    if not isinstance(said.get("layers"), dict) or not isinstance(said.get("base"), dict):
        raise ValueError(f"{path}: its metadata 'layers' has no layers and base; is it damaged?")
    return tensors, said


@contextmanager
def _of(path: str | os.PathLike[str]) -> Iterator[None]:
    """What a file's tensors and metadata lack, as an error that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: its tensors are not what its metadata say ({error!r}); is it damaged?") from error


def _metadata(kind: str, layers: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    base = base_identity({name: layer._base.weight for name, layer in masked_layers(model)})
    said = {"layers": layers, "base": base}
    return {"format": kind, "version": _VERSION, "layers": json.dumps(said)}


def _unmerged(model: nn.Module, adapter: str) -> list[tuple[str, MaskedLoraLayer]]:
    """The layers that have the adapter, whose base weights are their own.

    Raises:
        ValueError: no such adapter, or it is merged.
    """
    layers = list(masked_layers(model))
    with_it = [(name, layer) for name, layer in layers if adapter in layer.lora_A]
    if not with_it:
        known = sorted({name for _, layer in layers for name in layer.lora_A})
        raise ValueError(f"adapter: {adapter!r} is on no layer of the model; it has {known}")
    if any(layer.merged for _, layer in with_it):
        raise ValueError("model: the adapter is merged into the weights; unmerge_adapter() first")
    return with_it


def _base_weights(model: nn.Module, names: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of those modules of a base model."""
    modules = dict(model.named_modules())
    absent = [name for name in names if not isinstance(modules.get(name), nn.Linear | nn.Conv2d)]
    if absent:
        raise ValueError(f"{path}: has {len(absent)} layers that the model has not, the first is {absent[0]!r}")
    return {name: modules[name].weight for name in names}


# ---- factors and masks ----------------------------------------------------------------------------------------------------


def save_factors(
    model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default", overwrite: bool = False
) -> None:
    """Writes A, B and M of every layer into one safetensors file, with the scales and which base they are for.

    Raises:
        ValueError: no such adapter, or merged. FileExistsError: there is a file and `overwrite` is False.
    """
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for name, layer in _unmerged(model, adapter):
        A, B, mask, scaling = layer._factors(adapter)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        if mask is not None:
            tensors[f"{name}.lora_mask_bits"] = mask.bits
        said[name] = {"scaling": scaling, "shape": list(layer._base.weight.shape)}
    write_tensors(tensors, Path(path), _metadata(_FACTORS, said, model), overwrite)


def load_factors(path: str | os.PathLike[str]) -> dict[str, Factors]:
    """Module name -> its `Factors`, of a file of `save_factors`.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file.
    """
    tensors, said = _read(Path(path), _FACTORS)
    out = {}
    with _of(path):
        for name, layer in said["layers"].items():
            bits = tensors.get(f"{name}.lora_mask_bits")
            mask = None if bits is None else BitMask(bits, layer["shape"])
            out[name] = Factors(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], mask, float(layer["scaling"]))
    return out


@torch.no_grad()
def apply_factors(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Merges a file of `save_factors` into the base model it was made for, in place; returns the model.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, another base.
    """
    factors = load_factors(path)
    weights = _base_weights(model, factors, Path(path))
    check_base(weights, _read(Path(path), _FACTORS)[1]["base"])
    for name, weight in weights.items():
        A, B, mask, scaling = factors[name]
        mask = None if mask is None else mask.to(weight.device)
        weight.copy_(ops.masked_lora_weight(weight.detach(), A.to(weight.device), B.to(weight.device), mask, scaling))
    return model


# ---- sparse delta ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_sparse_delta(
    model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default", overwrite: bool = False
) -> int:
    """Writes the merged value of every entry that changes, and one bit an entry that says where; needs no adapter to load.

    New values rather than differences: those are exact in the weight's own type.

    Returns:
        How many entries change.

    Raises:
        ValueError: no such adapter, or merged. FileExistsError: there is a file and `overwrite` is False.
    """
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    total = 0
    for name, layer in _unmerged(model, adapter):
        weight = layer._base.weight.detach()
        merged = ops.masked_lora_weight(weight, *layer._factors(adapter))
        changed = merged != weight
        tensors[f"{name}.values"] = merged[changed]
        tensors[f"{name}.bits"] = BitMask.pack(changed).bits
        said[name] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
        total += int(changed.sum())
    write_tensors(tensors, Path(path), _metadata(_DELTA, said, model), overwrite)
    return total


@torch.no_grad()
def apply_sparse_delta(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Writes the values of a file of `save_sparse_delta` into the base model it was made for, in place; returns the model.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, another base.
    """
    tensors, said = _read(Path(path), _DELTA)
    weights = _base_weights(model, said["layers"], Path(path))
    check_base(weights, said["base"])
    new = {}
    with _of(path):
        for name, weight in weights.items():
            changed = BitMask(tensors[f"{name}.bits"], said["layers"][name]["shape"]).unpack().to(weight.device)
            values = tensors[f"{name}.values"].to(weight.device, weight.dtype)
            if changed.shape != weight.shape or values.shape != (int(changed.sum()),):
                raise ValueError(
                    f"{path}: {name} is of {tuple(changed.shape)}, {values.numel()} values; is it damaged?"
                )
            new[name] = changed, values
    for name, (changed, values) in new.items():
        weights[name][changed] = values
    return model


# ---- low-rank files -------------------------------------------------------------------------------------------------------


def adapter_change(
    model: nn.Module, *, adapter: str = "default", rank: int | None = None, dtype: torch.dtype | None = None
) -> Change:
    """What an adapter changes: its own factors where it has no mask, else the best of a rank, approximated.

    Args:
        rank: None: factors as they are where there is no mask, and the layer's own rank where there is one.
        dtype: of the factors; None: of the weights.

    Raises:
        ValueError: a rank below 1, a grouped convolution, no such adapter, or merged.
    """
    change = Change()
    for name, layer in _unmerged(model, adapter):
        A, B, mask, scaling = layer._factors(adapter)
        if getattr(layer._base, "groups", 1) != 1:
            raise ValueError(f"adapter: {name} is a grouped convolution, which a plain LoRA file cannot hold")
        weight = layer._base.weight
        kind = weight.dtype if dtype is None else dtype
        if mask is None and rank is None:
            change.layers[name] = LowRank(A.detach(), B.detach(), scaling, tuple(weight.shape)).to(kind)
        else:
            delta = layer.get_delta_weight(adapter).detach()
            change.add(name, delta, layer.r[adapter] if rank is None else rank, kind)
    return change


def save_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str = "default",
    prefix: str = "unet",
    overwrite: bool = False,
) -> None:
    """Writes an adapter without a mask as the file that `pipe.load_lora_weights(folder, weight_name=...)` loads.

    Args:
        prefix: the model's name in the pipeline: "unet" or "transformer"; "" for none.

    Raises:
        ValueError: a masked adapter (`save_low_rank` approximates it), a grouped convolution, no such adapter, or merged.
        FileExistsError: there is a file and `overwrite` is False.
    """
    for name, layer in _unmerged(model, adapter):
        if layer.mask(adapter) is not None:
            raise ValueError(
                f"adapter: {name} has a mask, which a plain LoRA file cannot hold; use save_factors or save_sparse_delta, or "
                "save_low_rank for an approximation"
            )
    layers = adapter_change(model, adapter=adapter).layers
    write_tensors(diffusers_tensors(layers, prefix), Path(path), {"format": "pt"}, overwrite)


@torch.no_grad()
def save_low_rank(
    model: nn.Module,
    path: str | os.PathLike[str],
    rank: int,
    *,
    adapter: str = "default",
    prefix: str = "unet",
    overwrite: bool = False,
) -> dict[str, float]:
    """Writes the best approximation of every layer's masked delta by `rank` as a LoRA file, and prints how far off it is.

    The error of a layer is ||D - D_rank|| / ||D|| (Frobenius) of its delta D = s (B A) o M.

    Returns:
        Module name -> error; "" -> that of all layers together.

    Raises:
        ValueError: a rank below 1, a grouped convolution, no such adapter, or merged. FileExistsError: there is a file and
        `overwrite` is False.
    """
    check_rank(rank)
    change = adapter_change(model, adapter=adapter, rank=rank)
    print(change.said(f"rank {rank} of {len(change.lost)} masked layers"))
    write_tensors(diffusers_tensors(change.layers, prefix), Path(path), {"format": "pt"}, overwrite)
    return {**change.lost, "": change.total}
