"""A text-to-image pipeline of every real class, with random weights and a vocabulary of words, small enough for a test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STYLES = ("Pop Art", "Van Gogh", "Mosaic")
SEED_STYLE = "Photo"
THEMES = (SEED_STYLE, *STYLES)
OBJECTS = ("Cat", "Tree", "Fish")
WORDS = ("a", "image", "in", "style", ".", *" ".join((*THEMES, *OBJECTS)).lower().split())


def prompt(thing: str, style: str) -> str:
    return f"A {thing} image in {style} style."


def word_tokenizer(length: int = 16) -> Any:
    """A CLIP tokenizer whose every word is one token."""
    from transformers import CLIPTokenizer

    pieces = sorted({letter for word in WORDS for letter in word} | {w[-1] + "</w>" for w in WORDS})
    merges: list[str] = []
    for word in WORDS:
        so_far = word[0] if len(word) > 1 else word[0] + "</w>"
        for i, letter in enumerate(word[1:], 1):
            right = letter + "</w>" if i == len(word) - 1 else letter
            if f"{so_far} {right}" not in merges:
                merges.append(f"{so_far} {right}")
                pieces.append(so_far + right)
            so_far += right
    vocab = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    table = {piece: i for i, piece in enumerate(vocab)}
    return CLIPTokenizer(vocab=table, merges=[tuple(m.split()) for m in merges], model_max_length=length)  # type: ignore[arg-type]


def tiny_pipeline(seed: int = 0, length: int = 16, prediction_type: str = "v_prediction") -> Any:
    """StableDiffusionPipeline: images 16x16, latents 2x8x8."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = word_tokenizer(length)
    torch.manual_seed(seed)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=length, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    # Random weights hardly look at the text: here a word has to matter.
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2.to_" in name and weight.dim() == 2:
                weight.mul_(6)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_v2(seed: int = 0) -> Any:
    """SD 2.x: a linear projection into its attention, heads by number, v-prediction."""
    from diffusers import UNet2DConditionModel

    pipeline = tiny_pipeline(seed)
    torch.manual_seed(seed)
    pipeline.unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=(2, 4), use_linear_projection=True,
    ).eval()  # fmt: skip
    return pipeline


def _clip(base: Any, seed: int, **changes: Any) -> Any:
    """A CLIP text encoder with a projection, for the base pipeline's tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    settings = base.text_encoder.config.to_dict() | {"num_hidden_layers": 2, "projection_dim": 8} | changes
    return CLIPTextModelWithProjection(CLIPTextConfig(**settings)).eval()


def tiny_xl() -> Any:
    """StableDiffusionXLPipeline: text encoders of widths 16 and 24, and a U-Net that attends to both."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    base = tiny_pipeline()
    torch.manual_seed(1)
    first = CLIPTextModel(CLIPTextConfig(**base.text_encoder.config.to_dict() | {"num_hidden_layers": 2})).eval()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, attention_head_dim=8, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    ).eval()  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=first, text_encoder_2=_clip(base, 2, hidden_size=24, num_hidden_layers=3),
        tokenizer=base.tokenizer, tokenizer_2=base.tokenizer, unet=unet, scheduler=base.scheduler,
    )  # fmt: skip


def _t5(width: int) -> tuple[Any, Any]:
    """A T5 tokenizer whose every word is one token, and an encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"\u2581{w}", -1.0) for w in _cased_words())]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config).eval()


def _cased_words() -> list[str]:
    names = " ".join((*THEMES, *OBJECTS)).split()
    return list(dict.fromkeys([*WORDS, *names, "A"]))


def tiny_sd3(*, t5: bool = True) -> Any:
    """StableDiffusion3Pipeline: CLIP encoders of widths 16 and 8, their pooled vectors of width 16, T5 of width 32."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    base = tiny_pipeline()
    tokenizer, encoder = _t5(32) if t5 else (None, None)
    torch.manual_seed(4)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=_clip(base, 5),
        tokenizer=base.tokenizer, text_encoder_2=_clip(base, 6, hidden_size=8), tokenizer_2=base.tokenizer,
        text_encoder_3=encoder, tokenizer_3=tokenizer,
    )  # fmt: skip


def tiny_flux() -> Any:
    """FluxPipeline: T5 of width 32 for the sequence, CLIP's pooled vector of width 16."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    base = tiny_pipeline()
    tokenizer, encoder = _t5(32)
    torch.manual_seed(7)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
        text_encoder_2=encoder, tokenizer_2=tokenizer, transformer=transformer,
    )  # fmt: skip


class TinyClassifier(nn.Module):
    """Random features of an image and one linear layer: a stand-in for `fastunlearn.evaluation.classifiers.Classifier`."""

    def __init__(self, labels: tuple[str, ...], seed: int = 0, width: int = 6):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.labels = labels
        self.first = nn.Parameter(torch.randn(width, 3 * 16 * 16, generator=generator), requires_grad=False)
        self.head = nn.Linear(width, len(labels)).requires_grad_(False)
        self.head.weight.copy_(torch.randn(len(labels), width, generator=generator))
        self.head.bias.zero_()

    def features(self, images: Tensor) -> Tensor:
        images = images.to(self.first.device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (images.flatten(1) - 0.5) @ self.first.T / 8

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def tiny_world(**changes: Any) -> Any:
    """Four themes and three objects, with classifiers that know nothing."""
    from fastunlearn.evaluation.worlds import World

    def real(theme: str, thing: str, number: int) -> Tensor:
        rng = np.random.default_rng([THEMES.index(theme), OBJECTS.index(thing), number])
        return torch.from_numpy(draw(thing, theme, rng)).permute(2, 0, 1)

    return World(
        **{
            "name": "tiny", "settings": "canvas", "themes": THEMES, "objects": OBJECTS, "seed_theme": SEED_STYLE, "prompt": prompt,
            "surrogate_theme": SEED_STYLE, "seeds": (1, 2), "steps": 2, "guidance_scale": 1.0, "real": real, "real_count": 3,
            "classifiers": {"style": TinyClassifier(THEMES), "object": TinyClassifier(OBJECTS, 1)},
            "feature_name": "fid_tiny_features",
        }
        | changes
    )  # fmt: skip


def draw(thing: str, style: str, rng: np.random.Generator, size: int = 16) -> np.ndarray:
    """An image whose mean colour is the style's and whose bright row is the object's."""
    image = np.full((size, size, 3), 40 * THEMES.index(style) + 20, dtype=np.uint8)
    image[4 * OBJECTS.index(thing) + 2] = 255
    return np.clip(image.astype(int) + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)
