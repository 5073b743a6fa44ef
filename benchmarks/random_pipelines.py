"""Stable Diffusion 1.5 and SDXL with random weights: the shapes of their published configurations, for time and memory.

Every word of the prompts is one token of a vocabulary as large as CLIP's. `levels` cuts a U-Net down to its first levels (and their
mirror), and the text encoders to one layer, for machines where a whole one takes minutes a step; whoever measures with it has to say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

VOCABULARY, LENGTH = 49408, 77
#: name -> U-Net, width and depth of the text encoders, pixels
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {
        "unet": {
            "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
        "text": ({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},),
        "pixels": 512,
    },
    "sdxl": {
        "unet": {
            "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        },
        "text": (
            {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
            {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
        ),
        "pixels": 1024,
    },
}  # fmt: skip


def word_tokenizer(prompts: Iterable[str]) -> Any:
    """Every word (or sign) of the prompts is one token; <|startoftext|> before, <|endoftext|> after and as padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+|[^\w\s]", prompt.lower()))
    start, end = "<|startoftext|>", "<|endoftext|>"
    # As in CLIP's vocabulary the two stand last, the end with the highest number: its place is found by that.
    table = {word: i for i, word in enumerate(words)} | {start: VOCABULARY - 2, end: VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(table, unk_token=end))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, VOCABULARY - 2), (end, VOCABULARY - 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=LENGTH, bos_token=start, eos_token=end, pad_token=end, unk_token=end
    )


def unet_config(shapes: str, levels: int | None = None, pixels: int | None = None) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel`.

    Args:
        levels: the first so many; None: all.
        pixels: of a side of the images it draws; None: those of the configuration.

    Raises:
        ValueError: unknown shapes; levels out of range; pixels that the levels do not divide.
    """
    if shapes not in SHAPES:
        raise ValueError(f"shapes: {shapes!r} is unknown; known are {', '.join(SHAPES)}")
    config, whole = dict(SHAPES[shapes]["unet"]), len(SHAPES[shapes]["unet"]["block_out_channels"])
    levels, side = whole if levels is None else levels, (pixels or SHAPES[shapes]["pixels"])
    if not 1 <= levels <= whole:
        raise ValueError(f"levels: {shapes} has {whole}, got {levels}")
    if side % (8 << (levels - 1)):
        raise ValueError(f"pixels: want a multiple of {8 << (levels - 1)}, got {side}")
    for name in ("block_out_channels", "down_block_types", "attention_head_dim", "transformer_layers_per_block"):
        if isinstance(config.get(name), tuple):
            config[name] = config[name][:levels]
    config["up_block_types"] = config["up_block_types"][whole - levels :]
    if levels < whole:
        # The middle of the whole network has the last level's depth; here it is a plain one.
        config["mid_block_type"] = "UNetMidBlock2DCrossAttn"
    return config | {"sample_size": side // 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2}


def random_pipeline(
    shapes: str, prompts: Iterable[str], *, device: Any, dtype: torch.dtype = torch.float32, levels: int | None = None,
    pixels: int | None = None, seed: int = 0,
) -> Any:  # fmt: skip
    """The pipeline, weights drawn on the device it lies on.

    Args:
        shapes: "sd15" or "sdxl".
        prompts: all texts it will be asked with; another word is the end token.
        levels, pixels: as `unet_config`.

    Raises:
        ValueError: as `unet_config`. ImportError: diffusers or transformers is missing.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = unet_config(shapes, levels, pixels)
    tokenizer = word_tokenizer(prompts)
    torch.manual_seed(seed)
    with torch.device(device):
        unet = UNet2DConditionModel(**config).to(dtype).eval()
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        texts = [
            kind(
                CLIPTextConfig(
                    vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                    **about | ({} if levels is None else {"num_hidden_layers": 1}),
                )
            ).to(dtype).eval()
            for kind, about in zip(kinds, SHAPES[shapes]["text"])
        ]  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).to(dtype).eval()  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": texts[0],
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": scheduler,
    }
    if len(texts) == 1:
        made: Any = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    else:
        made = StableDiffusionXLPipeline(**parts, text_encoder_2=texts[1], tokenizer_2=tokenizer)
    made.set_progress_bar_config(disable=True)
    return made.to(device)
