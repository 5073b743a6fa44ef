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


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """What the U-Net's cross-attention sees of every prompt: the text encoder's last hidden states; no gradients.

    Args:
        pipeline: of diffusers, with one CLIP text encoder (SD 1.x, 2.x and the canvas).
        prompts: in any number, repeated ones too; the empty one is what guidance compares with.

    Returns:
        [prompts, length, width], in the text encoder's dtype, on its device.

    Raises:
        ValueError: as `tokenize`.
    """
    distinct = list(dict.fromkeys(prompts))
    ids = tokenize(pipeline.tokenizer, distinct).ids
    encoder = pipeline.text_encoder
    device = next(encoder.parameters()).device
    with evaluating(encoder):
        features = torch.cat([encoder(part.to(device))[0] for part in ids.split(batch_size)])
    at = {prompt: i for i, prompt in enumerate(distinct)}
    return features[torch.tensor([at[prompt] for prompt in prompts], device=device)]


@dataclass(frozen=True)
class Span:
    """Where two prompts differ: tokens start..end of the one stand for start..other_end of the other."""

    start: int
    end: int
    other_end: int


def differing_span(ids: Sequence[int], other: Sequence[int]) -> Span:
    """What is left of two rows of tokens when their common beginning and their common ending are taken off.

    Args:
        ids, other: tokens without padding.

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
    if span.end <= span.start or span.other_end <= span.start:
        raise ValueError("prompts: want two that differ in the name of a concept, each with a name of its own")
    return span


def concept_spans(tokenizer: Any, prompts: Sequence[str], others: Sequence[str]) -> list[Span]:
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
            spans.append(differing_span(*rows))
        except ValueError:
            raise ValueError(f"prompts: {prompt!r} and {others[i]!r} do not differ in the name of a concept") from None
    return spans
