"""Which parameters of a diffusion U-Net may move, by the names of ESD (Gandikota et al. 2023): `train_method`."""

from __future__ import annotations

from torch import nn

from fastunlearn.objectives.language import closest

TRAIN_METHODS = ("full", "xattn", "noxattn", "selfattn", "xattn_kv")


def unet_parameters(unet: nn.Module, train_method: str) -> dict[str, nn.Parameter]:
    """Parameters by name.

    Args:
        unet: of diffusers; `attn2` are its cross-attentions, `attn1` its self-attentions.
        train_method: full, xattn (cross-attention), noxattn (all but cross-attention, time embedding and output, as ESD's code
            has it), selfattn, xattn_kv (keys and values of cross-attention, what UCE edits).

    Raises:
        ValueError: unknown name (the closest are named), or the U-Net has no such parameters.
    """
    if train_method not in TRAIN_METHODS:
        raise ValueError(f"train_method: {train_method!r} is unknown; {closest(train_method, list(TRAIN_METHODS))}")

    def moves(name: str) -> bool:
        if train_method == "xattn":
            return "attn2." in name
        if train_method == "xattn_kv":
            return "attn2.to_k." in name or "attn2.to_v." in name
        if train_method == "selfattn":
            return "attn1." in name
        if train_method == "noxattn":
            return "attn2." not in name and not name.startswith(("conv_out.", "time_embedding."))
        return True

    chosen = {name: parameter for name, parameter in unet.named_parameters() if moves(name)}
    if not chosen:
        raise ValueError(f"train_method: {type(unet).__name__} has no parameters of {train_method}")
    return chosen
