"""Concepts as text for a closed-form edit: checked names, their tokens beside their anchors', batch by batch, noisy copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastunlearn import ops
from fastunlearn.data.prompts import (
    TextStream,
    aligned_features,
    encode_prompts,
    in_templates,
    last_features,
    stream_of,
    tokenize,
)

#: concepts whose text is encoded at once, at most, and bytes of their features: there may be more than fit memory
BATCH, BATCH_BYTES = 64, 2**28


def _batch(stream: TextStream, template: Sequence[str] | None) -> int:
    """Concepts whose text in every template is encoded at once."""
    each = 8 * stream.length * stream.features_width * len(template or ["{}"])
    return max(1, min(BATCH, BATCH_BYTES // each))


def last_words(streams: Sequence[TextStream], names: Sequence[str]) -> Tensor:
    """`last_features` of every stream, one stream behind the other: fp64 [streams * names, width]."""
    parts = [last_features(stream, names[at : at + BATCH]) for stream in streams for at in range(0, len(names), BATCH)]
    return torch.cat(parts)


#: what scapre and uce call concepts, what each becomes, what is preserved, and one of what they become
WORDS = ("concepts", "anchors", "preserve", "anchor")
UCE_WORDS = ("edit_concepts", "guide_concepts", "preserve_concepts", "guide")


def _readings(streams: Sequence[TextStream], texts: Sequence[str]) -> dict[str, Any]:
    """Text -> what all tokenizers make of it: one thing for texts that no text encoder tells apart."""
    distinct = list(dict.fromkeys(texts))
    rows = [
        tokenize(encoder.tokenizer, distinct, encoder.length).ids.tolist() for s in streams for encoder in s.encoders
    ]
    return {text: tuple(map(tuple, row)) for text, row in zip(distinct, zip(*rows), strict=True)}


def check_concepts(
    streams: Sequence[TextStream], concepts: Sequence[str], anchors: Sequence[str], preserve: Sequence[str],
    words: tuple[str, str, str, str] = WORDS,
) -> tuple[list[str], list[str], list[str]]:  # fmt: skip
    """Concepts without repetition, an anchor for each, what is preserved.

    Args:
        streams: in which every concept has to have a token. anchors: one, or one for each. words: names of the arguments.

    Raises:
        TypeError: a text in place of a list. ValueError: none, a name without tokens, one that is preserved too or its own anchor,
        unequal numbers. Repetitions are warned of. Names are the same where every text encoder reads the same in them: for most "Van Gogh" and "van gogh" are.
    """
    for word, given in zip(words, (concepts, anchors, preserve)):
        if isinstance(given, str):
            raise TypeError(f"{word}: want a list of names, got the text {given!r}")
    names, guides, kept = list(concepts), list(anchors), list(preserve)
    if not names:
        raise ValueError(f"{words[0]}: none given; there is nothing to erase")
    if len(guides) == 1:
        guides = guides * len(names)
    if len(guides) != len(names):
        raise ValueError(f"{words[1]}: want one, or one for each of the {len(names)} {words[0]}, got {len(guides)}")
    same = _readings(streams, [*names, *guides, *kept])
    first: dict[Any, int] = {}
    for i, name in enumerate(names):
        first.setdefault(same[name], i)
    if len(first) < len(names):
        twice = next(name for i, name in enumerate(names) if first[same[name]] != i)
        warnings.warn(
            f"{words[0]}: {len(names) - len(first)} are repetitions and count once, {twice!r} for one", stacklevel=3
        )
        names, guides = ([given[i] for i in first.values()] for given in (names, guides))
    own = [name for name, guide in zip(names, guides) if same[name] == same[guide]]
    for stream in streams:
        # The empty prompt has the tokens that begin and end every one.
        *lengths, least = stream.tokens([*names, ""]).lengths.tolist()
        bare = [name for name, length in zip(names, lengths) if length <= least]
        if bare:
            raise ValueError(f"{words[0]}: {bare[0]!r} has no token; the text encoder sees nothing of it")
    if own:
        raise ValueError(f"{words[1]}: {own[0]!r} is its own {words[3]}; nothing would be erased")
    held: dict[Any, str] = {}
    for name in kept:
        held.setdefault(same[name], name)
    both = [held[same[name]] for name in names if same[name] in held]
    if both:
        raise ValueError(f"{words[2]}: {both[0]!r} is to be erased, too; take it out of one of the two")
    return names, guides, list(held.values())


@dataclass
class Moments:
    """What a closed form needs of the text: sums over the tokens c of concepts, c* of their guides in their places and p of what
    is preserved, float64 [width, width].

    Attributes:
        S: sum c c^T. S_star: sum c* c^T. kept: sum p p^T.
    """

    S: Tensor
    S_star: Tensor
    kept: Tensor


def concept_moments(
    streams: Sequence[TextStream], names: Sequence[str], guides: Sequence[str], kept: Sequence[str],
    template: Sequence[str] | None, device: torch.device, *, last: bool, padding_weight: float = 1.0,
) -> Moments:  # fmt: skip
    """Moments of all concepts in all streams, a batch of concepts at a time: there may be more than fit memory.

    Args:
        last, padding_weight: as `token_pairs`. device: where the sums are.
    """
    width = streams[0].encode([""]).shape[-1]
    S, S_star, held = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(3))
    for stream in streams:
        for c, a, w in token_pairs(stream, names, guides, template, last=last, padding_weight=padding_weight):
            c, a, w = c.to(device), a.to(device), w.to(device)
            ops.token_moments(c, w, S)
            ops.token_moments(c, w, S_star, anchors=a)
        for p in kept_tokens(stream, kept, template, last=last):
            ops.token_moments(p.to(device), out=held)
    return Moments(S, S_star, held)


def token_pairs(
    text: Any, names: Sequence[str], guides: Sequence[str], template: Sequence[str] | None, *, last: bool, padding_weight: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Tokens of concepts and of the anchors in their places, a batch of concepts at a time.

    Args:
        text: a stream, or a pipeline with a U-Net.
        last: the concept's last word alone; else every position of the prompt.
        padding_weight: of a padding position.

    Yields:
        fp64 [tokens, width] twice, weights fp64 [tokens].
    """
    stream = stream_of(text)
    batch = _batch(stream, template)
    for at in range(0, len(names), batch):
        mine, theirs = names[at : at + batch], guides[at : at + batch]
        if last:
            c, a = last_features(stream, mine, template), last_features(stream, theirs, template)
            yield c, a, torch.ones(len(c), dtype=c.dtype, device=c.device)
        else:
            c, a, padding = aligned_features(stream, in_templates(mine, template), in_templates(theirs, template))
            yield c, a, torch.ones(len(c), dtype=c.dtype, device=c.device).masked_fill(padding, padding_weight)


def kept_tokens(
    text: Any, names: Sequence[str], template: Sequence[str] | None, *, last: bool = False
) -> Iterator[Tensor]:
    """Tokens of concepts alone, fp64 [tokens, width], a batch of concepts at a time."""
    stream = stream_of(text)
    batch = _batch(stream, template)
    for at in range(0, len(names), batch):
        some = names[at : at + batch]
        if last:
            yield last_features(stream, some, template)
        else:
            yield encode_prompts(stream, in_templates(some, template)).double().flatten(0, 1)


def noisy(features: Tensor, samples: int, noise: float, seed: int) -> Tensor:
    """[m, d] -> [m, samples, d]: copies with normal noise; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    added = torch.randn(len(features), samples, features.shape[1], generator=generator, dtype=torch.float64)
    return features[:, None, :] + noise * added.to(features)
