"""Models whose linear layers are held in fewer bits than they compute with (bitsandbytes): an adapter trains, they never move (QLoRA,
Dettmers et al. 2023). No mask goes with them: what a mask keeps at zero is no longer exactly zero, and what it frees cannot move."""

from __future__ import annotations

from typing import Any

from torch import nn

_NO_MASKS = (
    "masks say which weights may move or stay zero, and quantised weights do neither; quantise a dense model and train an adapter, or "
    "leave quantization_config out"
)


def is_quantised(model: Any) -> bool:
    """Whether a model of transformers, or the one inside an adapter, holds quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def check_loading(source: str, *, gguf: bool, masks: bool) -> None:
    """Before a model is loaded with a quantization_config.

    Args:
        gguf: it is read from a GGUF file. masks: there are some beside it, or they are wanted.

    Raises:
        ValueError: it cannot be.
    """
    if gguf:
        raise ValueError(
            f"quantization_config: {source} is a GGUF file, which is unpacked as it is read; save it (fastunlearn.checkpoint."
            "save_checkpoint) and load that folder"
        )
    if masks:
        raise ValueError(f"quantization_config: {source} has masks: {_NO_MASKS}")


def keep_differentiable(model: Any) -> None:
    """Keeps the layout of packed weights in which gradients pass through.

    On some CPUs bitsandbytes reorders a layer's weight when it is first called in eval mode without gradients, for a kernel that has no
    backward pass, and leaves it so: whoever evaluates between two steps would train on without the gradients behind that layer.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            # As it is saved it is in the first order again.
            module.state_dict()


def check_training(model: Any, *, masks: bool, adapter: bool) -> None:
    """Before a model trains.

    Args:
        masks: there are some. adapter: it has one, or gets one.

    Raises:
        ValueError: its weights are quantised, and masks are given or there is no adapter.
    """
    if not is_quantised(model):
        return
    if masks:
        raise ValueError(f"masks: {_NO_MASKS}")
    if not adapter:
        raise ValueError(
            "peft_config: the model's weights are quantised and do not move: give an adapter (peft.LoraConfig), or leave "
            "quantization_config out"
        )


def prepare(model: Any, config: Any, *, checkpointing: bool = False, options: dict[str, Any] | None = None) -> Any:
    """A quantised model before it gets an adapter: everything frozen, norms and embeddings in float32, the packed weights as they are.

    Raises:
        ValueError: an adapter whose layers read the weight itself. TypeError: a packed weight was changed.
    """
    if not is_quantised(model):
        return model
    if getattr(config, "masks", None) is not None or hasattr(config, "variant"):
        raise ValueError(
            "peft_config: a MaskedLoraConfig adds to the weight itself, which is quantised; want a peft.LoraConfig"
        )
    from peft import prepare_model_for_kbit_training

    packed = _packed(model)
    options = options or {"use_reentrant": False}
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=options
    )
    if _packed(model) != packed:
        raise TypeError("quantization_config: this version of peft casts packed weights; want another one")
    return model


def _packed(model: nn.Module) -> dict[str, tuple[Any, int]]:
    """dtype and address of what is held packed, by name."""
    return {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters() if not p.is_floating_point()}
