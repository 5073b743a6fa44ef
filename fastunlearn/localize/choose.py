"""What a run may move: the entries a pruned model has left, the salient ones of the forget set, or both; whole modules by rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn.localize.saliency import SaliencyCollector
from fastunlearn.ops.mask import BitMask


def saliency_scores(
    model: nn.Module, losses: Iterable[Tensor], *, kind: Any = "abs", total: int | None = None
) -> dict[str, Tensor]:
    """Parameter name -> fp32 scores of its shape, summed over the losses; parameters with requires_grad are scored.

    Args:
        losses: scalar forget losses, one a batch, made one after the other; each is differentiated here.
        kind: of `ops.saliency_accumulate_`; "signed" gives the magnitude of the summed gradient.
        total: number of losses, for the progress bar.

    Raises:
        ValueError: no gradient reaches any parameter.
    """
    with SaliencyCollector(model, kind=kind) as collector:
        for loss in tqdm(losses, desc="saliency", unit="batch", total=total, leave=False, disable=None):
            loss.backward()
            model.zero_grad(set_to_none=True)
    torch.clear_autocast_cache()
    scores = collector.scores
    if kind == "signed":
        for score in scores.values():
            score.abs_()
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError("saliency: no gradient of the forget set reaches the model; there is nothing to choose by")
    return scores


def top_modules(model: nn.Module, scores: Mapping[str, Tensor], share: float) -> list[str]:
    """The linear layers and convolutions whose weights score highest on average, best first (SPARE, per-module).

    Args:
        scores: parameter name -> scores, of `saliency_scores`; biases do not count.
        share: of the modules, in (0, 1]; one at least.

    Raises:
        ValueError: a share outside of (0, 1], or no such module is scored.
    """
    if not 0 < share <= 1:
        raise ValueError(f"sparsity_inclusiveness: want a number in (0, 1], got {share}")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    means = {
        name: float(scores[f"{name}.weight"].mean())
        for name, module in model.named_modules()
        if isinstance(module, kinds) and f"{name}.weight" in scores
    }
    if not means:
        raise ValueError("scores: of no linear layer and no convolution of the model")
    ranked = sorted(means, key=lambda name: -means[name])
    return ranked[: max(1, int(share * len(ranked)))]


def saliency_masks(
    model: nn.Module,
    losses: Iterable[Tensor],
    density: float,
    *,
    within: Mapping[str, BitMask] | None = None,
    kind: Any = "abs",
    total: int | None = None,
    process_group: Any = None,
) -> dict[str, BitMask]:
    """The top share of entries by summed |gradient| of the forget loss, over all tensors; of kind "signed" by the |summed
    gradient| (SalUn, Fan et al. 2024, eq. 3).

    Args:
        model: parameters with requires_grad are scored.
        losses: scalar forget losses, one a batch, made one after the other; each is differentiated here.
        density: share of the entries that may move at all.
        within: masks of a pruned model; entries outside score nothing and are never chosen.
        kind: of `ops.saliency_accumulate_`.
        total: number of losses, for the progress bar.
        process_group: over which the parameters are sharded by rows; `within` and the masks are then of the rows held here, the
            share is one of all processes' entries together.

    Returns:
        Parameter name -> mask; parameters of `within` keep a subset of their mask.

    Raises:
        ValueError: density outside (0, 1], or so small that nothing may move; no gradient reaches the model.
    """
    from fastunlearn import ops

    if not 0 < density <= 1:
        raise ValueError(f"saliency_density: want a number in (0, 1], got {density}")
    scores = saliency_scores(model, losses, kind=kind, total=total)
    allowed = sum(s.numel() for s in scores.values())
    if within:
        allowed = 0
        for name, score in scores.items():
            if name in within:
                # Scores are >= 0: -1 stands behind every entry that is left.
                score.masked_fill_(~within[name].unpack().to(score.device), -1.0)
                allowed += int(within[name].count())
            else:
                allowed += score.numel()
    if process_group is not None:
        everywhere = torch.tensor(allowed, dtype=torch.int64, device=next(iter(scores.values())).device)
        torch.distributed.all_reduce(everywhere, group=process_group)
        allowed = int(everywhere)
    names, k = list(scores), int(density * allowed)
    if k == 0:
        raise ValueError(f"saliency_density: {density} of {allowed:,} weights is none; want a larger share")
    chosen = ops.topk_mask([scores[name] for name in names], k=k, process_group=process_group)
    return dict(zip(names, chosen, strict=True))
