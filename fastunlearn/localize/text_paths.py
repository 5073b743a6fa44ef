"""Where a text-to-image denoiser reads its prompts: the linear layers that see what the text encoders give and nothing else.

These are what a closed-form edit may change. In a U-Net they are the keys and values of cross-attention. In SD 3 and FLUX the text
changes with the image and the time from the first block on, and the keys and values there are no function of the prompt: what is
left are `context_embedder`, which takes the sequence, and `time_text_embed.text_embedder.linear_1`, which takes the pooled vector
(the layers that UCE's code edits in FLUX).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastunlearn.data.prompts import Encoder, TextStream, unet_stream

#: tokens of the T5 encoder, as the pipelines of diffusers have it
T5_LENGTH = {"SD3Transformer2DModel": 256, "FluxTransformer2DModel": 512}
KEYS_AND_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")
SEQUENCE, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"


@dataclass(frozen=True)
class TextPath:
    """Linear layers of one width and what they read.

    Attributes:
        name: cross-attention, sequence or pooled.
        weights: name within the denoiser -> [rows, width].
        streams: runs of tokens, one behind the other; each of them goes through the layers.
    """

    name: str
    weights: dict[str, nn.Parameter]
    streams: tuple[TextStream, ...]


def denoiser_of(pipeline: Any) -> tuple[nn.Module, Literal["unet", "transformer"]]:
    """The U-Net or transformer of a pipeline, and which of the two it is.

    Raises:
        ValueError: there is neither.
    """
    for part in ("unet", "transformer"):
        if isinstance(found := getattr(pipeline, part, None), nn.Module):
            return found, part
    raise ValueError(f"pipeline: {type(pipeline).__name__} has no unet and no transformer; there is nothing to edit")


def _need(pipeline: Any, *parts: str) -> None:
    absent = [part for part in parts if getattr(pipeline, part, None) is None]
    if absent:
        raise ValueError(
            f"pipeline: {type(pipeline).__name__} has no {', '.join(absent)}; want one of Stable Diffusion 1.x, 2.x, XL, 3 or FLUX"
        )


def _transformer_paths(pipeline: Any, transformer: nn.Module) -> list[TextPath]:
    kind = type(transformer).__name__
    if kind not in T5_LENGTH:
        raise ValueError(f"pipeline: {kind} is not known; of the transformers those of SD 3 and FLUX are")
    named = dict(transformer.named_parameters())
    sequence, pooled = named[SEQUENCE], named[POOLED]
    width = int(sequence.shape[1])
    if kind.startswith("Flux"):
        _need(pipeline, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        clip = Encoder(pipeline.tokenizer, pipeline.text_encoder, lambda out: out.pooler_output[:, None])
        t5 = Encoder(pipeline.tokenizer_2, pipeline.text_encoder_2, lambda out: out[0], T5_LENGTH[kind])
        return [
            TextPath("sequence", {SEQUENCE: sequence}, (TextStream((t5,)),)),
            TextPath("pooled", {POOLED: pooled}, (TextStream((clip,), pooled=True),)),
        ]
    _need(pipeline, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pairs = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
    words = tuple(Encoder(tokenizer, module, lambda out: out.hidden_states[-2]) for tokenizer, module in pairs)
    whole = tuple(Encoder(tokenizer, module, lambda out: out[0][:, None]) for tokenizer, module in pairs)
    streams = [TextStream(words, width)]
    # SD 3 may go without its T5 encoder; the sequence then holds zeros there, which no edit can move.
    if getattr(pipeline, "text_encoder_3", None) is not None:
        _need(pipeline, "tokenizer_3")
        streams.append(
            TextStream(
                (Encoder(pipeline.tokenizer_3, pipeline.text_encoder_3, lambda out: out[0], T5_LENGTH[kind]),), width
            )
        )
    return [
        TextPath("sequence", {SEQUENCE: sequence}, tuple(streams)),
        TextPath("pooled", {POOLED: pooled}, (TextStream(whole, pooled=True),)),
    ]


@torch.no_grad()
def text_paths(pipeline: Any) -> list[TextPath]:
    """The layers of a pipeline's denoiser that read text alone, by what they read.

    Args:
        pipeline: of diffusers: Stable Diffusion 1.x, 2.x, XL, 3, FLUX, or one with the same parts.

    Raises:
        ValueError: parts are missing, there are no such layers, they do not take the text encoders' text, or are not finite.
    """
    denoiser, part = denoiser_of(pipeline)
    if part == "transformer":
        paths = _transformer_paths(pipeline, denoiser)
    else:
        _need(pipeline, "text_encoder", "tokenizer")
        named = dict(denoiser.named_parameters())
        weights = {name: weight for name, weight in named.items() if name.endswith(KEYS_AND_VALUES)}
        if not weights:
            raise ValueError(
                f"pipeline: {type(denoiser).__name__} has no layers that read text (keys and values of cross-attention, "
                "attn2.to_k and attn2.to_v); there is nothing to edit"
            )
        paths = [TextPath("cross-attention", weights, (unet_stream(pipeline),))]
    for path in paths:
        broken = [name for name, weight in path.weights.items() if not bool(weight.isfinite().all())]
        if broken:
            raise ValueError(f"pipeline: {broken[0]} holds NaN or infinite entries already; the model is damaged")
        for stream in path.streams:
            given = stream.encode([""]).shape[-1]
            wrong = [name for name, weight in path.weights.items() if weight.shape[1] != given]
            if wrong:
                raise ValueError(
                    f"pipeline: {wrong[0]} takes text of width {path.weights[wrong[0]].shape[1]}, the text encoders give {given}"
                )
    return paths


@torch.no_grad()
def write_weights(paths: Sequence[TextPath], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes weights by name into their layers, all or none -> copies of what the layers now hold.

    Raises:
        FloatingPointError: some are not finite; the layers are what they were.
    """
    broken = [name for name, weight in made.items() if not bool(weight.isfinite().all())]
    if broken:
        raise FloatingPointError(f"weights: {broken[0]} came out with NaN or infinite entries; raise lamb")
    for path in paths:
        for name, weight in path.weights.items():
            if name in made:
                weight.copy_(made[name])
    return {name: weight.detach().clone() for path in paths for name, weight in path.weights.items() if name in made}
