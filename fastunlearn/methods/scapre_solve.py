"""ScaPre's modes robust and paper for one group of layers: moments of the text, R, relevance, and the one solve.

See `fastunlearn.methods.scapre` for the equations and for what is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastunlearn import ops
from fastunlearn.data.concepts import concept_moments, kept_tokens, last_words, noisy, token_pairs
from fastunlearn.data.prompts import TextStream, empty_feature

if TYPE_CHECKING:
    from fastunlearn.methods.scapre import ScaPreConfig


def gate(values: Tensor, kind: str) -> Tensor:
    """R's weight of each direction by its singular value; `conflict` and `code` see it in units of the median."""
    if kind == "paper":
        return (1 - values.sigmoid()) * values
    scaled = values / values.median().clamp_min(1e-300)
    return scaled.square() * (scaled - 1).sigmoid() if kind == "conflict" else 1 - (scaled - 1).sigmoid()


def overlap(concepts: Tensor, kind: str) -> Tensor:
    """R = U diag(gate(s)) U^T of the concepts' last words [m, d]: eq. 4; columns of length 1 unless `paper`."""
    columns = concepts if kind == "paper" else torch.nn.functional.normalize(concepts, dim=1)
    _, s, Vh = torch.linalg.svd(columns, full_matrices=False)
    return (Vh.T * gate(s, kind)) @ Vh


def pairs(
    streams: Sequence[TextStream], names: Sequence[str], guides: Sequence[str], config: ScaPreConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`token_pairs` of all streams, as the config has them."""
    # In the paper a concept is its name.
    last, template = (True, None) if config.mode == "paper" else (config.tokens == "last", config.template)
    for stream in streams:
        yield from token_pairs(stream, names, guides, template, last=last, padding_weight=config.padding_weight)


def kept_text(streams: Sequence[TextStream], names: Sequence[str], config: ScaPreConfig) -> Iterator[Tensor]:
    """`kept_tokens` of all streams, as the config has them."""
    for stream in streams:
        yield from kept_tokens(stream, names, config.template, last=config.tokens == "last")


def relevance(
    streams: Sequence[TextStream], weights: Sequence[Tensor], concepts: Tensor, kept: Sequence[str], config: ScaPreConfig,
    estimator: str,
) -> Tensor:  # fmt: skip
    """Mutual information over its largest, eq. 7; against the preserved concepts, or the empty prompt where there are none."""
    if config.negatives == "empty" or not kept:
        others = torch.cat([empty_feature(stream) for stream in streams])
    else:
        others = last_words(streams, kept)
    negatives = noisy(others.to(concepts), config.samples, config.noise, config.seed).flatten(0, 1)
    if len(negatives) > config.samples:
        pick = torch.linspace(0, len(negatives) - 1, min(len(negatives), 4 * config.samples)).long()
        negatives = negatives[pick.to(negatives.device)]
    positives = noisy(concepts, config.samples, config.noise, config.seed)
    mi = ops.informax(weights, positives, negatives, estimator=estimator)  # type: ignore[arg-type]
    return mi / mi.max().clamp_min(torch.finfo(mi.dtype).tiny)


def controlled(alpha: Tensor, heights: Sequence[int], config: ScaPreConfig) -> Tensor:
    """What an ablation puts in the place of relevance [rows]: the same numbers on other rows of a projection, or their mean."""
    generator = torch.Generator().manual_seed(config.seed)
    parts = list(alpha.split(list(heights)))
    if config.control == "shuffled":
        parts = [part[torch.randperm(len(part), generator=generator).to(part.device)] for part in parts]
    elif config.control == "constant":
        parts = [part.mean().expand_as(part) for part in parts]
    return torch.cat(parts)


def solve(
    streams: Sequence[TextStream], weights: Sequence[Tensor], names: Sequence[str], guides: Sequence[str] | None,
    kept: Sequence[str], config: ScaPreConfig,
) -> tuple[list[Tensor], Tensor | None, Tensor]:  # fmt: skip
    """New weights, relevance, S.

    Raises:
        ValueError: no guides (mode paper: V* = 0).
    """
    if guides is None:
        raise ValueError(
            "anchors: none given, and so V* = 0, for which eq. 9 has the one solution W = 0: everything would be forgotten. Give "
            'anchors ("" is the empty prompt), or use mode robust'
        )
    device = weights[0].device
    # In the paper a concept is its name.
    by_name = config.mode == "paper"
    text = concept_moments(
        streams, names, guides, kept, None if by_name else config.template, device,
        last=by_name or config.tokens == "last", padding_weight=config.padding_weight,
    )  # fmt: skip
    S, S_star = config.erase_scale * text.S, config.erase_scale * text.S_star
    last = last_words(streams, names).to(device)
    if config.mode == "paper":
        # S is of all tokens of the concepts; V* C^T of their last words.
        S.zero_()
        for stream in streams:
            for c in kept_tokens(stream, names, None):
                ops.token_moments(c.to(device), out=S)
        S *= config.erase_scale
        alpha = relevance(streams, weights, last, (), config, "binary")
        R = overlap(last, "paper")
        return ops.spectral_solve(weights, S, S_star, lam=config.lamb, R=R, gamma=1.0, relevance=alpha, mode="paper"), alpha, S  # fmt: skip
    held = text.kept
    S, S_star = S + config.preserve_scale * held, S_star + config.preserve_scale * held
    rows = None
    if config.relevance != "none":
        rows = relevance(streams, weights, last, kept, config, config.relevance)
        rows = controlled(rows, [len(w) for w in weights], config)
    held_on, gamma = None, 0.0
    if config.gamma:
        held_on, gamma = overlap(last, config.gate), config.gamma * float(last.square().sum(1).mean())
    return ops.spectral_solve(weights, S, S_star, lam=config.lamb, R=held_on, gamma=gamma, relevance=rows), rows, S
