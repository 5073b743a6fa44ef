"""Prompts as a diffusion pipeline's text encoder sees them: tokens, features computed once, where a concept stands in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastunlearn._modes import evaluating


@dataclass(frozen=True)
class Tokens:
    """Prompts as tokens.

    Attributes:
        ids: int64 [prompts, length], padded to the text encoder's length.
        lengths: int64 [prompts], tokens of a prompt with those that begin and end it, without padding.
    """

    ids: Tensor
    lengths: Tensor


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tokens:
    """Tokens of every prompt, padded to `tokenizer.model_max_length`.

    Raises:
        ValueError: no prompts, one that is no text, or one that the text encoder would see only in part.
    """
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts: want at least one text, got {list(prompts)[:3]!r}")
    most = tokenizer.model_max_length
    given = tokenizer(list(prompts), padding="max_length", max_length=most, truncation=False, return_tensors=None)
    long = [(p, len(ids)) for p, ids in zip(prompts, given["input_ids"], strict=True) if len(ids) > most]
    if long:
        raise ValueError(f"prompts: {long[0][0]!r} has {long[0][1]} tokens; the text encoder takes {most}")
    return Tokens(torch.tensor(given["input_ids"]), torch.tensor(given["attention_mask"]).sum(1))


def text_width(pipeline: Any) -> int:
    """Width of the text that cross-attention sees: that of the text encoder, of SDXL's two together."""
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    return sum(int(encoder.config.hidden_size) for encoder in encoders if encoder is not None)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """What the U-Net's cross-attention sees of every prompt; no gradients.

    The text encoder's last hidden states; with two text encoders (SDXL) the last but one of each, side by side.

    Args:
        pipeline: of diffusers, with one CLIP text encoder (SD 1.x, 2.x and the canvas) or two (SDXL).
        prompts: in any number, repeated ones too; the empty one is what guidance compares with.

    Returns:
        [prompts, length, width], in the text encoder's dtype, on its device.

    Raises:
        ValueError: as `tokenize`.
    """
    distinct = list(dict.fromkeys(prompts))
    both = getattr(pipeline, "text_encoder_2", None) is not None
    parts = []
    for suffix in ("", "_2") if both else ("",):
        encoder = getattr(pipeline, f"text_encoder{suffix}")
        ids = tokenize(getattr(pipeline, f"tokenizer{suffix}"), distinct).ids
        device = next(encoder.parameters()).device
        with evaluating(encoder):
            if both:
                rows = [
                    encoder(x.to(device), output_hidden_states=True).hidden_states[-2] for x in ids.split(batch_size)
                ]
            else:
                rows = [encoder(x.to(device))[0] for x in ids.split(batch_size)]
        parts.append(torch.cat(rows))
    features = torch.cat(parts, -1) if both else parts[0]
    at = {prompt: i for i, prompt in enumerate(distinct)}
    return features[torch.tensor([at[prompt] for prompt in prompts], device=features.device)]


@dataclass(frozen=True)
class Span:
    """Where two prompts differ: tokens start..end of the one stand for start..other_end of the other."""

    start: int
    end: int
    other_end: int


def differing_span(ids: Sequence[int], other: Sequence[int], *, empty: bool = False) -> Span:
    """What is left of two rows of tokens when their common beginning and their common ending are taken off.

    Args:
        ids, other: tokens without padding.
        empty: the other may have nothing where the one has a name.

    Raises:
        ValueError: they are equal, or one is the other with something added.
    """
    start = 0
    while start < min(len(ids), len(other)) and ids[start] == other[start]:
        start += 1
    tail = 0
    while tail < min(len(ids), len(other)) - start and ids[-1 - tail] == other[-1 - tail]:
        tail += 1
    span = Span(start, len(ids) - tail, len(other) - tail)
    if span.end <= span.start or (span.other_end <= span.start and not empty):
        raise ValueError("prompts: want two that differ in the name of a concept, each with a name of its own")
    return span


def concept_spans(tokenizer: Any, prompts: Sequence[str], others: Sequence[str], *, empty: bool = False) -> list[Span]:
    """`differing_span` of each pair of prompts.

    Raises:
        ValueError: unequal numbers of prompts; a pair without a difference (the prompts are named).
    """
    if len(prompts) != len(others):
        raise ValueError(f"prompts: want as many as surrogates, got {len(prompts)} and {len(others)}")
    mine, theirs = tokenize(tokenizer, prompts), tokenize(tokenizer, others)
    spans = []
    for i, prompt in enumerate(prompts):
        rows = [t.ids[i, : t.lengths[i]].tolist() for t in (mine, theirs)]
        try:
            spans.append(differing_span(*rows, empty=empty))
        except ValueError:
            raise ValueError(f"prompts: {prompt!r} and {others[i]!r} do not differ in the name of a concept") from None
    return spans


def last_features(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Features of each prompt's last word (the last token before the ending one), fp64 [prompts, width]."""
    features = encode_prompts(pipeline, prompts).double()
    # An empty prompt has only the token that begins it.
    at = (tokenize(pipeline.tokenizer, prompts).lengths - 2).clamp_min(0).to(features.device)
    return features[torch.arange(len(prompts), device=features.device), at]


def empty_feature(pipeline: Any) -> Tensor:
    """What the empty prompt ends with, fp64 [1, width]."""
    return encode_prompts(pipeline, [""])[:, 1].double()


def aligned_features(pipeline: Any, prompts: Sequence[str], others: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Features at every position of the prompts, and those of the others that stand in their places.

    What comes before a concept's name is the same in both. Names of unequal length end together; the rest of the longer name
    stands for the first word of the shorter, and for a name that is empty what comes behind it.

    Returns:
        fp64 [positions, width] twice, and bool [positions]: it is padding.

    Raises:
        ValueError: as `concept_spans`.
    """
    mine, theirs = (encode_prompts(pipeline, texts).double() for texts in (prompts, others))
    lengths = tokenize(pipeline.tokenizer, prompts).lengths.tolist()
    rows, stand_ins, padding = [], [], []
    for i, span in enumerate(concept_spans(pipeline.tokenizer, prompts, others, empty=True)):
        name = range(span.start, span.end)
        guide = [max(span.start, at - span.end + span.other_end) for at in name]
        rest = mine.shape[1] - max(span.end, span.other_end)
        rows += [mine[i, : span.end + rest]]
        stand_ins += [
            theirs[i, : span.start], theirs[i, guide], theirs[i, span.other_end : span.other_end + rest],
        ]  # fmt: skip
        padding += [torch.arange(span.end + rest, device=mine.device) >= lengths[i]]
    return torch.cat(rows), torch.cat(stand_ins), torch.cat(padding)
