"""Prompts as a diffusion pipeline's text encoders see them: tokens, features computed once, where a concept stands in a prompt.

A `TextStream` is one run of tokens on its way into a denoiser; the functions below take one, or a pipeline for what the
cross-attention of its U-Net sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tokens:
    """Tokens of every prompt, padded to `length`, or `tokenizer.model_max_length`.

    Raises:
        ValueError: no prompts, one that is no text, or one that the text encoder would see only in part.
    """
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts: want at least one text, got {list(prompts)[:3]!r}")
    most = length or tokenizer.model_max_length
    given = tokenizer(list(prompts), padding="max_length", max_length=most, truncation=False, return_tensors=None)
    long = [(p, len(ids)) for p, ids in zip(prompts, given["input_ids"], strict=True) if len(ids) > most]
    if long:
        raise ValueError(f"prompts: {long[0][0]!r} has {long[0][1]} tokens; the text encoder takes {most}")
    return Tokens(torch.tensor(given["input_ids"]), torch.tensor(given["attention_mask"]).sum(1))


#: tokens that go through a text encoder at once
TOKENS_AT_ONCE = 2**14


@dataclass(frozen=True)
class Encoder:
    """Attributes: tokenizer; module, a text encoder; pick: what it returns -> [prompts, length, width]; length of its prompts."""

    tokenizer: Any
    module: Any
    pick: Callable[[Any], Tensor]
    length: int | None = None


@dataclass(frozen=True)
class TextStream:
    """One run of tokens that a denoiser reads: the features of one text encoder, or of several side by side.

    Attributes:
        encoders: the first one's tokens are the stream's.
        width: of the features; what the encoders leave is filled with zeros. None: theirs together.
        pooled: each prompt is one vector; the run has length 1.
    """

    encoders: tuple[Encoder, ...]
    width: int | None = None
    pooled: bool = False

    def tokens(self, prompts: Sequence[str]) -> Tokens:
        """As `tokenize`."""
        return tokenize(self.encoders[0].tokenizer, prompts, self.encoders[0].length)

    @property
    def length(self) -> int:
        """Tokens of every prompt, padding included."""
        return 1 if self.pooled else int(self.encoders[0].length or self.encoders[0].tokenizer.model_max_length)

    @property
    def features_width(self) -> int:
        """Of the features; an estimate (of the hidden states) where `width` is None."""
        return self.width or sum(int(encoder.module.config.hidden_size) for encoder in self.encoders)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[prompts, length, width], in the text encoder's dtype, on its device; a prompt that is repeated is encoded once.

        Raises:
            ValueError: as `tokenize`.
        """
        distinct = list(dict.fromkeys(prompts))
        parts = []
        for encoder in self.encoders:
            ids = tokenize(encoder.tokenizer, distinct, encoder.length).ids
            device = next(encoder.module.parameters()).device
            with evaluating(encoder.module):
                batches = ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1]))
                rows = [encoder.pick(encoder.module(x.to(device), output_hidden_states=True)) for x in batches]
            parts.append(torch.cat(rows))
        features = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if self.width is not None and features.shape[-1] < self.width:
            features = torch.nn.functional.pad(features, (0, self.width - features.shape[-1]))
        at = {prompt: i for i, prompt in enumerate(distinct)}
        return features[torch.tensor([at[prompt] for prompt in prompts], device=features.device)]


def unet_stream(pipeline: Any) -> TextStream:
    """What the cross-attention of a U-Net sees: the text encoder's last hidden states (SD 1.x, 2.x, the canvas); with two text
    encoders (SDXL) the last but one of each, side by side."""
    first, second = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    if second is None:
        return TextStream((Encoder(pipeline.tokenizer, first, lambda out: out[0]),))
    return TextStream(
        tuple(
            Encoder(tokenizer, module, lambda out: out.hidden_states[-2])
            for tokenizer, module in ((pipeline.tokenizer, first), (pipeline.tokenizer_2, second))
        )
    )


def stream_of(text: Any) -> TextStream:
    """The stream itself, or that of a pipeline with a U-Net."""
    return text if isinstance(text, TextStream) else unet_stream(text)


def encode_prompts(text: Any, prompts: Sequence[str]) -> Tensor:
    """What the U-Net's cross-attention, or whoever reads the stream, sees of every prompt; no gradients.

    Args:
        text: a pipeline of diffusers with a U-Net, or a `TextStream`.
        prompts: in any number, repeated ones too; the empty one is what guidance compares with.

    Returns:
        [prompts, length, width], in the text encoder's dtype, on its device.

    Raises:
        ValueError: as `tokenize`.
    """
    return stream_of(text).encode(prompts)


@dataclass(frozen=True)
class Span:
    """Where two prompts differ: tokens start..end of the one stand for start..other_end of the other."""

    start: int
    end: int
    other_end: int


def _common(ids: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin."""
    return next((n for n, pair in enumerate(zip(ids, other)) if pair[0] != pair[1]), min(len(ids), len(other)))


def differing_span(ids: Sequence[int], other: Sequence[int], *, empty: bool = False) -> Span:
    """What is left of two rows of tokens when their common beginning and their common ending are taken off.

    Args:
        ids, other: tokens without padding.
        empty: the other may have nothing where the one has a name.

    Raises:
        ValueError: they are equal, or one is the other with something added.
    """
    start = _common(ids, other)
    tail = min(_common(ids[::-1], other[::-1]), len(ids) - start, len(other) - start)
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
    return _spans(prompts, others, tokenize(tokenizer, prompts), tokenize(tokenizer, others), empty=empty)


def _spans(prompts: Sequence[str], others: Sequence[str], mine: Tokens, theirs: Tokens, *, empty: bool) -> list[Span]:
    spans = []
    for i, prompt in enumerate(prompts):
        rows = [t.ids[i, : t.lengths[i]].tolist() for t in (mine, theirs)]
        try:
            spans.append(differing_span(*rows, empty=empty))
        except ValueError:
            raise ValueError(f"prompts: {prompt!r} and {others[i]!r} do not differ in the name of a concept") from None
    return spans


def in_templates(concepts: Sequence[str], template: Sequence[str] | None) -> list[str]:
    """Every concept in every template, those of one template together; the names alone where there is none."""
    return [text.replace("{}", concept) for text in template or ["{}"] for concept in concepts]


def last_features(text: Any, concepts: Sequence[str], template: Sequence[str] | None = None) -> Tensor:
    """Features of each concept's last word, in every template: the last token of its own, not of what a template puts behind it.

    That token is found from the end: it is the one before the tokens that the prompt shares with the text behind the last {}. Of an
    empty concept it is the token that comes before its place.

    Args:
        text: a pipeline of diffusers with a U-Net, or a `TextStream`; a pooled one has the one vector of the whole prompt.
        concepts, template: as in `in_templates`.

    Returns:
        fp64 [templates * concepts, width].

    Raises:
        ValueError: as `tokenize`.
    """
    stream, template = stream_of(text), template or ["{}"]
    prompts = in_templates(concepts, template)
    features = stream.encode(prompts).double()
    if stream.pooled:
        return features[:, 0]
    whole, behind = stream.tokens(prompts), stream.tokens([prompt.rpartition("{}")[2] for prompt in template])
    at = []
    for i, length in enumerate(whole.lengths.tolist()):
        of = i // len(concepts)
        ids, ending = whole.ids[i, :length].tolist(), behind.ids[of, : behind.lengths[of]].tolist()
        # An empty prompt has only the tokens that begin and end it.
        at.append(max(0, length - 1 - _common(ids[::-1], ending[::-1])))
    return features[torch.arange(len(prompts), device=features.device), torch.tensor(at, device=features.device)]


def empty_feature(text: Any) -> Tensor:
    """What the empty prompt ends with, fp64 [1, width]."""
    stream = stream_of(text)
    return stream.encode([""])[:, 0 if stream.pooled else int(stream.tokens([""]).lengths[0]) - 1].double()


def aligned_features(text: Any, prompts: Sequence[str], others: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Features at every position of the prompts, and those of the others that stand in their places.

    What comes before a concept's name is the same in both. Names of unequal length end together; the rest of the longer name
    stands for the first word of the shorter, and for a name that is empty what comes behind it. Pooled features are pairs.

    Returns:
        fp64 [positions, width] twice, and bool [positions]: it is padding.

    Raises:
        ValueError: as `concept_spans`.
    """
    stream = stream_of(text)
    mine, theirs = (stream.encode(texts).double() for texts in (prompts, others))
    if stream.pooled:
        return mine[:, 0], theirs[:, 0], torch.zeros(len(mine), dtype=torch.bool, device=mine.device)
    tokens = stream.tokens(prompts), stream.tokens(others)
    lengths = tokens[0].lengths.tolist()
    rows, stand_ins, padding = [], [], []
    for i, span in enumerate(_spans(prompts, others, *tokens, empty=True)):
        name = range(span.start, span.end)
        guide = [max(span.start, at - span.end + span.other_end) for at in name]
        rest = mine.shape[1] - max(span.end, span.other_end)
        rows += [mine[i, : span.end + rest]]
        stand_ins += [
            theirs[i, : span.start], theirs[i, guide], theirs[i, span.other_end : span.other_end + rest],
        ]  # fmt: skip
        padding += [torch.arange(span.end + rest, device=mine.device) >= lengths[i]]
    return torch.cat(rows), torch.cat(stand_ins), torch.cat(padding)
