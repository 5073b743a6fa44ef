"""Parameter shapes of real models, as lists of (name, shape), derived from their published configurations.

Weights are never loaded: times and memory of the ops depend on the shapes only (values are random, and labelled so).
A test compares the lists with transformers' and diffusers' own models and asserts the totals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Shapes: TypeAlias = list[tuple[str, tuple[int, ...]]]


def numel(shapes: Shapes) -> int:
    """Entries of all tensors together."""
    return sum(math.prod(shape) for _, shape in shapes)


def _llama(
    *, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool
) -> Shapes:
    """A decoder of the Llama family in transformers' names and order."""
    out: Shapes = [("model.embed_tokens.weight", (vocab, hidden))]
    for i in range(layers):
        at = f"model.layers.{i}."
        out += [
            (at + "self_attn.q_proj.weight", (heads * head_dim, hidden)),
            (at + "self_attn.k_proj.weight", (kv_heads * head_dim, hidden)),
            (at + "self_attn.v_proj.weight", (kv_heads * head_dim, hidden)),
            (at + "self_attn.o_proj.weight", (hidden, heads * head_dim)),
            (at + "mlp.gate_proj.weight", (intermediate, hidden)),
            (at + "mlp.up_proj.weight", (intermediate, hidden)),
            (at + "mlp.down_proj.weight", (hidden, intermediate)),
            (at + "input_layernorm.weight", (hidden,)),
            (at + "post_attention_layernorm.weight", (hidden,)),
        ]
    out.append(("model.norm.weight", (hidden,)))
    if not tied:
        out.append(("lm_head.weight", (vocab, hidden)))
    return out


def smollm2_135m() -> Shapes:
    """SmolLM2-135M: 134,515,008 entries (the embedding is tied)."""
    return _llama(
        layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True
    )  # fmt: skip


def llama_31_8b(layers: int = 32) -> Shapes:
    """Llama-3.1-8B: 8,030,261,248 entries; fewer `layers` keep the embedding and the head."""
    return _llama(
        layers=layers, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, tied=False
    )  # fmt: skip


def llama_31_8b_slice(layers: int = 2) -> Shapes:
    """Only `layers` decoder layers of Llama-3.1-8B (218,112,000 entries each): what fits a small machine."""
    return [(name, shape) for name, shape in llama_31_8b(layers) if ".layers." in name]


class _UNet:
    """UNet2DConditionModel's parameters in diffusers' names and order."""

    def __init__(
        self,
        *,
        channels: Sequence[int],
        depths: Sequence[int],
        cross: int,
        linear_projection: bool,
        added: int | None,
        per_block: int = 2,
    ):
        self.out: Shapes = []
        self.cross, self.linear_projection = cross, linear_projection
        self.time = time = channels[0] * 4
        self._layer("conv_in", (channels[0], 4, 3, 3))
        self._layer("time_embedding.linear_1", (time, channels[0]))
        self._layer("time_embedding.linear_2", (time, time))
        if added is not None:
            self._layer("add_embedding.linear_1", (time, added))
            self._layer("add_embedding.linear_2", (time, time))
        last = len(channels) - 1
        skips = [channels[0]]
        width = channels[0]
        for b, c in enumerate(channels):
            at = f"down_blocks.{b}."
            for i in range(per_block if depths[b] else 0):
                self._transformer(f"{at}attentions.{i}.", c, depths[b])
            for i in range(per_block):
                self._resnet(f"{at}resnets.{i}.", width if i == 0 else c, c)
                skips.append(c)
            if b < last:
                self._layer(f"{at}downsamplers.0.conv", (c, c, 3, 3))
                skips.append(c)
            width = c
        for b, c in enumerate(reversed(channels)):
            at = f"up_blocks.{b}."
            depth = depths[last - b]
            for i in range(per_block + 1 if depth else 0):
                self._transformer(f"{at}attentions.{i}.", c, depth)
            for i in range(per_block + 1):
                self._resnet(f"{at}resnets.{i}.", (width if i == 0 else c) + skips.pop(), c)
            if b < last:
                self._layer(f"{at}upsamplers.0.conv", (c, c, 3, 3))
            width = c
        middle = channels[-1]
        self._transformer("mid_block.attentions.0.", middle, depths[-1] or 1)
        for i in range(2):
            self._resnet(f"mid_block.resnets.{i}.", middle, middle)
        self._norm("conv_norm_out", channels[0])
        self._layer("conv_out", (4, channels[0], 3, 3))

    def _layer(self, name: str, shape: tuple[int, ...], bias: bool = True) -> None:
        self.out.append((f"{name}.weight", shape))
        if bias:
            self.out.append((f"{name}.bias", (shape[0],)))

    def _norm(self, name: str, width: int) -> None:
        self.out += [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]

    def _resnet(self, at: str, inside: int, outside: int) -> None:
        self._norm(at + "norm1", inside)
        self._layer(at + "conv1", (outside, inside, 3, 3))
        self._layer(at + "time_emb_proj", (outside, self.time))
        self._norm(at + "norm2", outside)
        self._layer(at + "conv2", (outside, outside, 3, 3))
        if inside != outside:
            self._layer(at + "conv_shortcut", (outside, inside, 1, 1))

    def _transformer(self, at: str, c: int, depth: int) -> None:
        projection = (c, c) if self.linear_projection else (c, c, 1, 1)
        self._norm(at + "norm", c)
        self._layer(at + "proj_in", projection)
        for i in range(depth):
            block = f"{at}transformer_blocks.{i}."
            for n, keys in ((1, c), (2, self.cross)):
                self._norm(f"{block}norm{n}", c)
                self._layer(f"{block}attn{n}.to_q", (c, c), bias=False)
                self._layer(f"{block}attn{n}.to_k", (c, keys), bias=False)
                self._layer(f"{block}attn{n}.to_v", (c, keys), bias=False)
                self._layer(f"{block}attn{n}.to_out.0", (c, c))
            self._norm(f"{block}norm3", c)
            self._layer(f"{block}ff.net.0.proj", (8 * c, c))
            self._layer(f"{block}ff.net.2", (c, 4 * c))
        self._layer(at + "proj_out", projection)


def sd14_unet() -> Shapes:
    """The U-Net of Stable Diffusion 1.4: 859,520,964 entries."""
    return _UNet(
        channels=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), cross=768, linear_projection=False, added=None
    ).out


def sdxl_unet() -> Shapes:
    """The U-Net of SDXL: 2,567,463,684 entries."""
    return _UNet(channels=(320, 640, 1280), depths=(0, 2, 10), cross=2048, linear_projection=True, added=2816).out
