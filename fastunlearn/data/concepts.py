"""Concepts as text for a closed-form edit: checked names, their tokens beside their anchors', batch by batch, noisy copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastunlearn.data.prompts import aligned_features, encode_prompts, last_features, tokenize

#: concepts whose text is encoded at once: there may be more than fit memory
BATCH = 64


def in_templates(concepts: Sequence[str], template: Sequence[str] | None) -> list[str]:
    """Every concept in every template, those of one template together; the names alone where there is none."""
    return [text.replace("{}", concept) for text in template or ["{}"] for concept in concepts]


def check_concepts(
    pipeline: Any, concepts: Sequence[str], anchors: Sequence[str], preserve: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Concepts without repetition, an anchor for each, what is preserved.

    Raises:
        ValueError: none, a name without tokens, one that is preserved too or its own anchor, unequal numbers. Repetitions are
        warned of.
    """
    names, guides, kept = list(concepts), list(anchors), list(dict.fromkeys(preserve))
    if not names:
        raise ValueError("concepts: none given; there is nothing to erase")
    if len(guides) == 1:
        guides = guides * len(names)
    if len(guides) != len(names):
        raise ValueError(f"anchors: want one, or one for each of the {len(names)} concepts, got {len(guides)}")
    pairs = dict(zip(reversed(names), reversed(guides)))
    if len(pairs) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        warnings.warn(
            f"concepts: {len(names) - len(pairs)} are repetitions and count once, {twice!r} for one", stacklevel=3
        )
        names = list(dict.fromkeys(names))
        guides = [pairs[name] for name in names]
    lengths = tokenize(pipeline.tokenizer, [*names, *(kept or [""])]).lengths
    for i, name in enumerate(names):
        if int(lengths[i]) <= 2:
            raise ValueError(f"concepts: {name!r} has no token; the text encoder sees nothing of it")
        if name == guides[i]:
            raise ValueError(f"anchors: {name!r} is its own anchor; nothing would be erased")
    both = [name for name in names if name in set(kept)]
    if both:
        raise ValueError(f"preserve: {both[0]!r} is to be erased, too; take it out of one of the two")
    return names, guides, kept


def token_pairs(
    pipeline: Any, names: Sequence[str], guides: Sequence[str], template: Sequence[str] | None, *, last: bool, padding_weight: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Tokens of concepts and of the anchors in their places, a batch of concepts at a time.

    Args:
        last: the last word alone; else every position.
        padding_weight: of a padding position.

    Yields:
        fp64 [tokens, width] twice, weights fp64 [tokens].
    """
    for at in range(0, len(names), BATCH):
        mine, theirs = (in_templates(texts[at : at + BATCH], template) for texts in (names, guides))
        if last:
            c, a = last_features(pipeline, mine), last_features(pipeline, theirs)
            yield c, a, torch.ones(len(c), dtype=c.dtype, device=c.device)
        else:
            c, a, padding = aligned_features(pipeline, mine, theirs)
            yield c, a, torch.ones(len(c), dtype=c.dtype, device=c.device).masked_fill(padding, padding_weight)


def kept_tokens(
    pipeline: Any, names: Sequence[str], template: Sequence[str] | None, *, last: bool = False
) -> Iterator[Tensor]:
    """Tokens of concepts alone, fp64 [tokens, width], a batch of concepts at a time."""
    for at in range(0, len(names), BATCH):
        texts = in_templates(names[at : at + BATCH], template)
        yield last_features(pipeline, texts) if last else encode_prompts(pipeline, texts).double().flatten(0, 1)


def noisy(features: Tensor, samples: int, noise: float, seed: int) -> Tensor:
    """[m, d] -> [m, samples, d]: copies with normal noise; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    added = torch.randn(len(features), samples, features.shape[1], generator=generator, dtype=torch.float64)
    return features[:, None, :] + noise * added.to(features)
