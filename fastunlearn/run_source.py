"""What a run left behind that another tool might load: an adapter, weights of a part of a pipeline, a whole language model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastunlearn.report.run_folder import METRICS, PECKER, read_json, why_not

FORMATS = ("peft", "diffusers", "kohya", "partial", "merged")
#: of PEFT
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: of a pipeline, by which a file of weights is called
PARTS = ("unet", "transformer")
LANGUAGE = "language model"
#: what the names of their modules begin with
_TOPS = {
    "unet": {"down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"},
    "transformer": {
        "transformer_blocks",
        "single_transformer_blocks",
        "context_embedder",
        "x_embedder",
        "time_text_embed",
    },
}


@dataclass
class Source:
    """What a run's folder holds.

    Attributes:
        kind: adapter, weights (a part of a pipeline's) or model (a whole language model).
        part: what it is of: unet, transformer, or LANGUAGE.
        path: the adapter's folder, the file of weights, or the model's folder.
        partial: unet.safetensors or transformer.safetensors, where there is one. base: name of the model it was made from.
        about: method and concepts, for the metadata of files.
    """

    kind: str
    part: str
    path: Path
    partial: Path | None = None
    base: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def language(self) -> bool:
        """Of a language model, not of a pipeline."""
        return self.part == LANGUAGE

    @property
    def formats(self) -> tuple[str, ...]:
        """What can hold it, by what is known before anything is loaded."""
        if self.language:
            return ("peft", "merged")
        return tuple(name for name in FORMATS if name != "kohya" or self.part == "unet")

    @property
    def masked(self) -> bool:
        """Whether the adapter is of a kind that PEFT alone does not know."""
        kind = read_json(self.path / ADAPTER, dict).get("peft_type") if self.kind == "adapter" else None
        return kind == "FASTUNLEARN_MASKED_LORA"


def read_source(run: str | os.PathLike[str]) -> Source:
    """What there is to export in a run's folder, an adapter's folder, or a file of weights as ESD's and UCE's code write it.

    Raises:
        ValueError: nothing there is of a run; what is there is said.
    """
    path = Path(run).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return Source("weights", "transformer" if path.stem == "transformer" else "unet", path, path)
    if not path.is_dir():
        raise ValueError(f"run: {path} is {'a file; want the folder it is in' if path.exists() else 'not there'}")
    # Beside the adapter's own folder stands what is known of it.
    top = path.parent if path.name == "adapter" and (path.parent / METRICS).is_file() else path
    metrics = read_json(top / METRICS, dict) if (top / METRICS).is_file() else {}
    about = {k: metrics[k] for k in ("method", "erase_concept", "edit_concepts", "concepts") if k in metrics}
    partial = next((file for part in PARTS if (file := top / f"{part}.safetensors").is_file()), None)
    base = metrics.get("model") if isinstance(metrics.get("model"), str) else None
    adapter = next((folder for folder in (path, path / "adapter") if (folder / ADAPTER).is_file()), None)
    if adapter is not None:
        told = read_json(adapter / ADAPTER, dict).get("base_model_name_or_path")
        base = base or (told if isinstance(told, str) and told else None)
        return Source("adapter", _part_of(adapter), adapter, partial, base, about)
    if (path / PECKER).is_file():
        raise ValueError(
            f"run: {path} is PECKER's one-step generator: unet/ and scheduler/ in it are what diffusers loads as they are, and "
            f"{PECKER} says how it is sampled; there is no format of it to export"
        )
    if partial is not None:
        return Source("weights", partial.stem, partial, partial, base, about)
    if (path / "config.json").is_file():
        return Source("model", LANGUAGE, path, None, base, about)
    raise ValueError(f"run: {path} is no folder of a run: {why_not(path)}")


def _part_of(adapter: Path) -> str:
    """What the modules of an adapter belong to: unet, transformer, or a language model."""
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"run: {adapter / ADAPTER_WEIGHTS} is missing or no safetensors file ({error})") from None
    tops = {name.removeprefix("base_model.model.").split(".", 1)[0] for name in names}
    return next((part for part, known in _TOPS.items() if tops & known), LANGUAGE)
