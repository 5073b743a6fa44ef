"""Masks whose entries come in tiles, rows or whole tensors: units of the highest summed saliency.

A mask of single weights (SalUn, Fan et al. 2024) says what may move and saves no arithmetic: every product of the backward pass has
an entry that is wanted. Units that stay or go as a whole save theirs (`fastunlearn.parametrize.mask_model`). What stands for a unit is
the sum of its entries' saliencies; that choice, and tiles at all, are a reconstruction: PECKER's abstract speaks of "unnecessary
gradient computation" and does not say how it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastunlearn.ops.mask import BitMask, rows_cols
from fastunlearn.ops.topk import Key, Scope, topk_mask

Granularity = Literal["weight", "tile", "row", "module"]
GRANULARITIES = ("weight", "tile", "row", "module")


def check_granularity(granularity: str, block: int) -> None:
    """
    Raises:
        ValueError: an unknown granularity, or a block below 1.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: want one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block: want a whole number of at least 1, got {block!r}")


def unit_scores(scores: Tensor, granularity: Granularity, block: int = 128, *, key: Key = "value") -> Tensor:
    """Saliency of the units of one tensor: the sum over their entries, of absolute values with key "abs".

    Args:
        scores: of the parameter's shape; seen as a matrix, a convolution's rows being its output channels and a vector one row.
        granularity: tile (`block` x `block` of that matrix), row, module (all of it), weight.

    Returns:
        fp32: tile [ceil(rows / block), ceil(cols / block)], row [rows], module [1], weight: of scores' shape.
    """
    check_granularity(granularity, block)
    values = (scores.abs() if key == "abs" else scores).float()
    if granularity == "weight":
        return values
    rows, cols = rows_cols(values.shape)
    matrix = values.reshape(rows, cols)
    if granularity == "module":
        return matrix.sum().view(1)
    if granularity == "row":
        return matrix.sum(1)
    down, across = -(-rows // block), -(-cols // block)
    padded = F.pad(matrix, (0, across * block - cols, 0, down * block - rows))
    return padded.view(down, block, across, block).sum((1, 3))


def unit_mask(units: Tensor, shape: torch.Size, granularity: Granularity, block: int = 128) -> BitMask:
    """The mask of a tensor of `shape` in which whole units are set; `units` bool, as `unit_scores` has them."""
    if granularity == "weight":
        return BitMask.pack(units.view(shape))
    rows, cols = rows_cols(shape)
    if granularity == "tile":
        down, across = -(-rows // block), -(-cols // block)
        units = units.view(down, across).repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :cols]
    elif granularity == "row":
        units = units.view(rows, 1).expand(rows, cols)
    else:
        units = units.expand(rows, cols)
    return BitMask.pack(units.reshape(shape))


def structured_masks(
    scores: Mapping[str, Tensor],
    density: float | list[float] | tuple[float, ...] | None = None,
    k: int | None = None,
    *,
    granularity: Granularity = "tile",
    block: int = 128,
    scope: Scope = "global",
    key: Key = "value",
) -> Any:
    """Masks of the units with the highest summed saliency.

    Args:
        scores: name -> scores of a parameter, as `SaliencyCollector.scores`.
        density, k, scope: as `fastunlearn.ops.topk_mask`, counted in units: floor(density * units) of them. scope "row" is for
            weights only.
        granularity, block, key: as `unit_scores`.

    Returns:
        name -> BitMask of the parameter's shape; for a list of densities a list of such dicts.

    Raises:
        ValueError: as `topk_mask`; unknown granularity; scope "row" with units that are no weights.
    """
    check_granularity(granularity, block)
    if scope == "row" and granularity != "weight":
        raise ValueError(f"scope: 'row' chooses within rows, and granularity={granularity} has no rows to choose in")
    if granularity == "module" and scope == "tensor":
        raise ValueError("scope: 'tensor' chooses within tensors, and granularity='module' takes them whole or not")
    units = [unit_scores(s, granularity, block, key=key) for s in scores.values()]
    select: Any = topk_mask
    chosen = select(units, density, k, scope=scope, key="value")

    def spread(masks: list[BitMask]) -> dict[str, BitMask]:
        if granularity == "weight":
            return {n: BitMask(m.bits, s.shape) for (n, s), m in zip(scores.items(), masks, strict=True)}
        return {
            name: unit_mask(mask.unpack(), s.shape, granularity, block)
            for (name, s), mask in zip(scores.items(), masks, strict=True)
        }

    if isinstance(density, list | tuple):
        return [spread(cast("list[BitMask]", masks)) for masks in chosen]
    return spread(chosen)
