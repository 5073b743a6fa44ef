"""Names of parameters as places in a table: which block, which layer of it."""

from __future__ import annotations

from collections.abc import Mapping

#: lists of blocks, as models of transformers and diffusers call them
_LISTS = {
    "layers", "h", "blocks", "block", "down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks", "resnets",
    "attentions", "downsamplers", "upsamplers",
}  # fmt: skip
#: what every name of a model begins with says nothing
_DULL = ("base_model.model.", "model.", "transformer.", "unet.")


def place(name: str) -> tuple[str, str]:
    """(block, layer) of a parameter.

    Example:
        >>> place("model.layers.3.self_attn.q_proj.weight")
        ('layers.3', 'self_attn.q_proj')
    """
    words = name.removesuffix(".weight").split(".")
    cut = 0
    for i in range(1, len(words)):
        if words[i].isdigit() and words[i - 1] in _LISTS:
            cut = i + 1
    if not 0 < cut < len(words):
        cut = max(1, len(words) - 1)
    block, layer = ".".join(words[:cut]), ".".join(words[cut:])
    for dull in _DULL:
        if block.startswith(dull):
            block = block.removeprefix(dull)
    return block, layer or "weight"


def arranged(shares: Mapping[str, float]) -> tuple[dict[tuple[str, str], float], list[str], list[str]]:
    """Values by place, and the blocks and layers in the order in which they come.

    Two names in one place would hide each other: the second has its whole name for a block.
    """
    values: dict[tuple[str, str], float] = {}
    for name, share in shares.items():
        where = place(name)
        values[where if where not in values else (name, where[1])] = share
    return values, list(dict.fromkeys(row for row, _ in values)), list(dict.fromkeys(column for _, column in values))
