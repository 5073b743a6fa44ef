"""The masks of a run: the entries a pruned model has left, the salient ones of the forget set, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn.localize.saliency import SaliencyCollector
from fastunlearn.ops.mask import BitMask


def saliency_masks(
    model: nn.Module,
    losses: Iterable[Tensor],
    density: float,
    *,
    within: Mapping[str, BitMask] | None = None,
    kind: Any = "abs",
    total: int | None = None,
) -> dict[str, BitMask]:
    """The top share of entries by summed |gradient| of the forget loss (SalUn, Fan et al. 2024, eq. 3), over all tensors.

    Args:
        model: parameters with requires_grad are scored.
        losses: scalar forget losses, one a batch, made one after the other; each is differentiated here.
        density: share of the entries that may move at all.
        within: masks of a pruned model; entries outside score nothing and are never chosen.
        kind: of `ops.saliency_accumulate_`.
        total: number of losses, for the progress bar.

    Returns:
        Parameter name -> mask; parameters of `within` keep a subset of their mask.

    Raises:
        ValueError: density outside (0, 1], or so small that nothing may move.
    """
    from fastunlearn import ops

    if not 0 < density <= 1:
        raise ValueError(f"saliency_density: want a number in (0, 1], got {density}")
    with SaliencyCollector(model, kind=kind) as collector:
        for loss in tqdm(losses, desc="saliency", unit="batch", total=total, leave=False, disable=None):
            loss.backward()
            model.zero_grad(set_to_none=True)
    scores = collector.scores
    allowed = sum(s.numel() for s in scores.values())
    if within:
        allowed = 0
        for name, score in scores.items():
            if name in within:
                # Scores of kind "abs" are >= 0: -1 stands behind every entry that is left.
                score.masked_fill_(~within[name].unpack().to(score.device), -1.0)
                allowed += int(within[name].count())
            else:
                allowed += score.numel()
    names, k = list(scores), int(density * allowed)
    if k == 0:
        raise ValueError(f"saliency_density: {density} of {allowed:,} weights is none; want a larger share")
    chosen = ops.topk_mask([scores[name] for name in names], k=k)
    masks = dict(zip(names, chosen, strict=True))
    torch.clear_autocast_cache()
    return masks
