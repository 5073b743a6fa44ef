"""LoRA files of other programs: the same factors under PEFT's, diffusers' and kohya-ss' names.

PEFT       adapter_config.json, adapter_model.safetensors: base_model.model.<module>.lora_A.weight, alpha in the configuration
diffusers  <unet|transformer>.<module>.lora_A.weight; without an alpha, so the scaling is in B
kohya-ss   lora_unet_<module with _ for .>.lora_down.weight, .lora_up.weight and .alpha (scaling = alpha / rank), what sd-scripts writes
           and the web UIs read. Modules are named as diffusers names them in SD 1.x and 2.x, as Stability's own code does in SDXL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.parametrize.low_rank import LowRank

#: inside a residual block: diffusers' name -> Stability's
_RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2",
}  # fmt: skip
_BLOCK = re.compile(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)")
_MIDDLE = re.compile(r"mid_block_(resnets|attentions)_(\d+)_(.+)")


def _stability_name(name: str, layers_per_block: int, attends: Sequence[bool]) -> str:
    """A module of diffusers' SDXL U-Net (with _ for .) under Stability's names.

    Args:
        layers_per_block: of the U-Net. attends: whether up block i has attention: its upsampler stands behind that.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = _MIDDLE.fullmatch(name)
    if found:
        kind, number, rest = found.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block_{place}_{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    found = _BLOCK.fullmatch(name)
    if not found:
        raise ValueError(f"adapter: kohya-ss has no name for {name!r}, a module of this U-Net")
    side, block, kind, number, rest = found.groups()
    per = layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks_{(int(block) + 1) * per}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{int(block) * per + layers_per_block}_{2 if attends[int(block)] else 1}_{rest}"
    place = int(block) * per + int(number) + (1 if side == "down" else 0)
    inner, rest = (0, _RESNET.get(rest, rest)) if kind == "resnets" else (1, rest)
    return f"{'input' if side == 'down' else 'output'}_blocks_{place}_{inner}_{rest}"


def kohya_name(module: str, config: Mapping[str, Any]) -> str:
    """What kohya-ss calls a module of a U-Net.

    Args:
        module: its name within the U-Net. config: of the U-Net, of diffusers.

    Raises:
        ValueError: a module that has no name there.
    """
    name = module.replace(".", "_")
    if config.get("addition_embed_type") == "text_time":
        layers = config.get("layers_per_block", 2)
        if not isinstance(layers, int):
            raise ValueError(
                f"adapter: kohya-ss numbers blocks of one depth; this U-Net has layers_per_block={list(layers)}"
            )
        attends = ["Attn" in kind for kind in config.get("up_block_types", ())]
        name = _stability_name(name, layers, attends)
    return f"lora_unet_{name}"


def kohya_tensors(layers: Mapping[str, LowRank], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A change of a U-Net as kohya-ss' tensors; alpha in fp32.

    Raises:
        ValueError: a module that has no name there.
    """
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        at = kohya_name(module, config)
        tensors[f"{at}.lora_down.weight"], tensors[f"{at}.lora_up.weight"] = layer.shaped()
        tensors[f"{at}.alpha"] = torch.tensor(layer.scaling * layer.rank)
    return tensors


def kohya_metadata(layers: Mapping[str, LowRank], config: Mapping[str, Any]) -> dict[str, str]:
    """What kohya-ss says of such a file, and the web UIs ask it for."""
    ranks = [layer.rank for layer in layers.values()]
    alphas = [layer.scaling * layer.rank for layer in layers.values()]
    about = {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)), "ss_network_alpha": f"{max(alphas):g}"}  # fmt: skip
    text = config.get("cross_attention_dim")
    version = "sdxl_base_v1-0" if config.get("addition_embed_type") == "text_time" else None
    if version is None and text in (768, 1024):
        version = "sd_v1" if text == 768 else "sd_v2"
    if version is not None:
        # Web UIs tell SD 2.x from SD 1.x by the second.
        about |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return about


def diffusers_tensors(layers: Mapping[str, LowRank], prefix: str) -> dict[str, Tensor]:
    """A change as diffusers' tensors, the scaling in B.

    Args:
        prefix: the model's name in the pipeline: unet or transformer; "" for none.
    """
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        at = f"{prefix}.{module}" if prefix else module
        tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"] = layer.shaped(folded=True)
    return tensors


def save_peft(
    layers: Mapping[str, LowRank],
    folder: Path,
    *,
    whole: Mapping[str, Mapping[str, Tensor]] | None = None,
    base: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained(model, folder)` loads.

    Args:
        folder: is there and empty.
        whole: module name -> its tensors by name, of modules that are no product of low rank and are kept as they are.
        base: name of the model it is for. task_type: of PEFT, e.g. CAUSAL_LM.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.scaling * layer.rank for name, layer in layers.items()}
    rank, alpha = _most(list(ranks.values())), _most(list(alphas.values()))
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted(layers), bias="none", inference_mode=True, task_type=task_type,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        modules_to_save=sorted(whole) if whole else None, base_model_name_or_path=base,
    )  # fmt: skip
    tensors = diffusers_tensors({name: layer._replace(scaling=1.0) for name, layer in layers.items()}, "")
    tensors |= {f"{module}.{name}": t for module, own in (whole or {}).items() for name, t in own.items()}
    plain = {f"base_model.model.{name}": t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))


def _most(values: list[Any]) -> Any:
    """The value that most layers have."""
    return max(dict.fromkeys(values), key=values.count)


def peft_layers(model: Any, adapter: str = "default") -> dict[str, LowRank]:
    """The factors of PEFT's own LoRA on a model, by module.

    Raises:
        ValueError: what is no plain product of factors (another kind of adapter, DoRA, biases), or none at all.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = model.peft_config[adapter]
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise ValueError("adapter: it trained more than its factors (modules_to_save, bias)")
    layers: dict[str, LowRank] = {}
    for name, found in model.named_modules():
        if not isinstance(found, BaseTunerLayer):
            continue
        module: Any = found
        name = name.removeprefix("base_model.model.")
        if not isinstance(found, LoraLayer) or adapter not in module.lora_A:
            kind = type(module).__module__.split(".")[-2]
            raise ValueError(f"adapter: {name} has one of the kind {kind}, no product of two factors")
        if adapter in module.lora_magnitude_vector or module.lora_bias.get(adapter):
            raise ValueError(f"adapter: {name} has more than two factors (DoRA, or a bias of its own)")
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear | nn.Conv2d) or getattr(base, "groups", 1) != 1:
            raise ValueError(f"adapter: {name} is a {type(base).__name__} that no plain file holds")
        shape = tuple(base.weight.shape)
        A, B = (factor[adapter].weight.detach() for factor in (module.lora_A, module.lora_B))
        layers[name] = LowRank(A.flatten(1), B.flatten(1), float(module.scaling[adapter]), shape)
    if not layers:
        raise ValueError("adapter: it is on no module")
    return layers
