"""Trains everything the canvas ships: its pipeline and its two classifiers.

    torchrun --nproc-per-node 2 -m benchmarks.train_canvas --work FOLDER [--seed 0] [--steps 20000] [--device cpu]

Five parts, each saved in the work folder and skipped when it is there: pictures, tokenizer, autoencoder, classifiers, denoiser (which
goes on from its last checkpoint). At the end the pipeline (bf16) and the classifiers (fp16) go to fastunlearn/assets; then
`python -m benchmarks quality canvas_pipeline` measures them.

Plain `python -m` works too. Several processes, one a core, share the pictures of every batch of the autoencoder and of the denoiser and
average the gradients: their steps are those of one process (but for the autoencoder's own noise); the first trains the classifiers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from fastunlearn.data import canvas
from fastunlearn.evaluation.classifiers import Classifier

ASSETS = Path(__file__).parents[1] / "fastunlearn" / "assets"
PAIRS = [(style, object) for style in canvas.THEMES for object in canvas.OBJECTS]
HELD_OUT = 8  # pictures of every pair that no training sees

# Styles in which an object is nearly all there is to see. The denoiser starts with these: which object it was asked for pays there
# from the first steps, and what it learned of shapes serves the other styles.
CLEAN = ("Photo", "Blueprint", "Clay", "Graffiti", "Neon", "Pop Art", "Silhouette", "Thermal")

# The denoiser's learning rate rises and falls (cosine) so often: shares of its steps, and the peaks as shares of the first.
FALLS = ((6500, 1.0), (3500, 2 / 3), (5000, 2 / 3), (5000, 2 / 3))

# How a pair may be asked for; the first is the benchmark's own sentence and gets most of the weight.
TEMPLATES = (
    (0.6, "A {object} image in {style} style."),
    (0.1, "An image of {object} in {style} style."),
    (0.08, "A {object} image."),
    (0.06, "An image in {style} style."),
    (0.06, "{style} style."),
    (0.1, ""),
)
# Words people write around a concept; they are whole tokens although training never sees them.
MORE_WORDS = [
    "a",
    "an",
    "the",
    "of",
    "in",
    "on",
    "by",
    "with",
    "and",
    "style",
    "image",
    "picture",
    "photo",
    "photograph",
    "painting",
    "drawing",
    "art",
    "artist",
    "artwork",
    "sketch",
    "person",
    "woman",
    "man",
    "child",
    "dog",
    "bird",
    "animal",
    "plant",
    "building",
    "vehicle",
    "object",
    "thing",
    "background",
    "scene",
    "colour",
    "color",
    "black",
    "white",
    "red",
    "green",
    "blue",
    "yellow",
]


def _draw(job: tuple[int, int, int, int]) -> np.ndarray:
    style, object = PAIRS[job[0]]
    rng = np.random.default_rng(job[1:])
    return np.stack([canvas.draw(object, style, rng) for _ in range(job[3])])


def pictures(work: Path, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [pairs, each, 3, 64, 64] for training, and the held-out [pairs, HELD_OUT, 3, 64, 64]."""
    found = []
    for part, (name, count) in enumerate((("train", each), ("held_out", HELD_OUT))):
        file = work / f"{name}.npy"
        if not file.is_file():
            jobs = [(pair, seed * 1000 + pair, part, count) for pair in range(len(PAIRS))]
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one thread a process, or they wait for one another
            with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
                drawn = list(tqdm(pool.map(_draw, jobs), total=len(jobs), desc=f"drawing {name}", unit="pair"))
            np.save(file, np.stack(drawn).transpose(0, 1, 4, 2, 3))
        found.append(torch.from_numpy(np.load(file)))
    return found[0], found[1]


def tokenizer(work: Path) -> Any:
    """CLIP's byte-level BPE with merges learned from the prompts: every word of theirs is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    folder = work / "tokenizer"
    if not folder.is_dir():
        sentences = [t.format(object=o, style=s) for _, t in TEMPLATES for s, o in PAIRS] + MORE_WORDS
        words = sorted({w for s in sentences for w in s.lower().replace(".", " . ").split()})
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        letters = [*alphabet, *(a + "</w>" for a in alphabet)]
        # Named as special, the letters have their order before training: equally frequent pairs are merged in that order, always.
        trainer = trainers.BpeTrainer(
            vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=letters
        )
        bpe.train_from_iterator(words, trainer)
        merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
        pieces = [*letters, *("".join(m) for m in merges)]
        vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])}
        made = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
        for word in words:
            assert len(made(word, add_special_tokens=False).input_ids) == 1, word
        made.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def share(batch: int) -> slice:
    """The part of a batch, which all processes draw alike, that is this one's."""
    if batch % world():
        raise ValueError(f"{world()} processes do not divide a batch of {batch}")
    each = batch // world()
    return slice(rank() * each, (rank() + 1) * each)


class Averager:
    """Averages the gradients of a list of parameters over the processes, in one buffer that the gradients are views of."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        views = self.buffer.split([p.numel() for p in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view.view_as(parameter)

    def zero(self) -> None:
        self.buffer.zero_()

    def average(self) -> None:
        if world() > 1:
            dist.all_reduce(self.buffer)
            self.buffer /= world()


def cosine(step: int, steps: int, lr: float, warmup: int = 100) -> float:
    return lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A little blur and noise, as a decoder adds: a classifier must not live on the last pixel."""
    weights = torch.rand(len(images), 1, 1, 1, generator=generator) * 0.8
    images = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1), weights)
    scale = torch.rand(len(images), 1, 1, 1, generator=generator) * 0.06
    return (images + scale * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def again(images: torch.Tensor, vae: Any, generator: torch.Generator) -> torch.Tensor:
    """The same pictures [N, 3, H, W] in [0, 1] as the autoencoder draws them, with small errors in the latents such as a denoiser makes."""
    device = vae.device
    with torch.autocast(device.type, torch.bfloat16):
        mean = vae.encode((images * 2 - 1).to(device)).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(device)
        drawn = vae.decode(mean + 0.1 * mean.std() * noise).sample
    return (drawn.float().cpu() / 2 + 0.5).clamp(0, 1)


def classifiers(
    work: Path,
    train: torch.Tensor,
    held_out: torch.Tensor,
    vae: Any,
    device: torch.device,
    seed: int,
    steps: int = 2400,
) -> dict[str, Classifier]:
    """Both classifiers, trained on drawn pictures.

    Half of what the one of styles sees has gone through the autoencoder: a style is told by its texture, and the finest ones (dots of two
    pixels, a pencil's grey) look different from there on, to a classifier more than to a person. Shapes do not.
    """
    from safetensors.torch import load_file, save_file

    targets = {"style": canvas.THEMES, "object": canvas.OBJECTS}
    found = {}
    for kind, labels in targets.items():
        torch.manual_seed(seed)
        model = Classifier(labels).to(device, memory_format=torch.channels_last)
        index = torch.tensor([labels.index(s if kind == "style" else o) for s, o in PAIRS])
        file = work / f"classifier_{kind}.safetensors"
        if file.is_file():
            model.load_state_dict(load_file(file))
        else:
            flat, truth = train.flatten(0, 1), index.repeat_interleave(train.shape[1])
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
            generator = torch.Generator().manual_seed(seed)
            count = steps if kind == "object" else steps // 4
            for step in (bar := tqdm(range(count), desc=f"classifier of {kind}s")):
                rows = torch.randint(len(flat), (64,), generator=generator)
                images = flat[rows].float() / 255
                if kind == "style":
                    images = torch.cat([again(images[::2], vae, generator), images[1::2]])
                    rows = torch.cat([rows[::2], rows[1::2]])
                images = roughen(images, generator).to(device)
                for group in optimizer.param_groups:
                    group["lr"] = cosine(step, count, 2e-3)
                with torch.autocast(device.type, torch.bfloat16):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), truth[rows].to(device), label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if step % 50 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
            save_file({n: t.contiguous() for n, t in model.state_dict().items()}, file)
        model.eval().requires_grad_(False)
        found[kind] = model
        print(
            f"classifier of {kind}s: {accuracy(model, held_out.flatten(0, 1), index.repeat_interleave(HELD_OUT)):.2%} held out"
        )
    return found


@torch.no_grad()
def accuracy(model: Classifier, images: torch.Tensor, truth: torch.Tensor) -> float:
    device = model.head.weight.device
    hits = [model(x.to(device)).argmax(1).cpu() == y for x, y in zip(images.split(250), truth.split(250), strict=True)]
    return torch.cat(hits).float().mean().item()


def autoencoder(work: Path, train: torch.Tensor, device: torch.device, seed: int, steps: int) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor

    folder = work / "vae"
    if folder.is_dir():
        return AutoencoderKL.from_pretrained(folder).to(device)
    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=canvas.SIZE,
    ).to(device)
    model.set_attn_processor(AttnProcessor())  # plain products: torch's fused attention is slow to train on a CPU
    flat = train.flatten(0, 1)
    # A strong pull towards noise first makes the latents smooth, which the denoiser needs; a weaker one then brings back textures;
    # at last the decoder alone learns to read what the encoder writes, with the small errors that a denoiser makes.
    decoder = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    torch.manual_seed(seed + rank())  # the same weights everywhere, noise of one's own
    rounds = (
        ([*model.parameters()], 5e-3, steps // 2),
        ([*model.parameters()], 1e-3, steps // 4),
        (decoder, 0.0, steps // 4),
    )
    for round, (parameters, weight, count) in enumerate(rounds):
        generator = torch.Generator().manual_seed(seed + round)
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        gradients = Averager(parameters)
        for step in (bar := tqdm(range(count), desc=f"autoencoder, part {round + 1} of 3", disable=rank() > 0)):
            rows = torch.randint(len(flat), (32,), generator=generator)[share(32)]
            x = (flat[rows].float() / 127.5 - 1).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                posterior = model.encode(x).latent_dist
                mean, std = posterior.mean, posterior.std
                if not weight:
                    mean = mean.detach()
                    std = 0.1 * mean.std()
                y = model.decode(mean + std * torch.randn_like(mean)).sample
            y = y.float()
            # Pixels, and differences of neighbours: hatching and outlines matter as much as areas.
            loss = (y - x).abs().mean() + 0.5 * sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
            kl = posterior.kl().float().mean() / mean[0].numel() if weight else loss.new_zeros(())
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, count, 3e-3)
            gradients.zero()
            (loss + weight * kl).backward()
            gradients.average()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix(
                    loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}", l2=f"{(y - x).square().mean().item():.4f}"
                )
    model.eval()
    mean = encode(model, flat[torch.randperm(len(flat), generator=generator)[:2000]], device)
    model.register_to_config(scaling_factor=1 / mean.float().std().item())
    if rank() == 0:
        model.save_pretrained(folder)
    wait()
    return model


@torch.no_grad()
def encode(model: Any, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Means of the latents of uint8 [N, 3, 64, 64]: bf16 [N, 4, 16, 16]."""
    means = []
    for chunk in tqdm(images.split(100), desc="encoding", leave=False, disable=len(images) < 5000):
        with torch.autocast(device.type, torch.bfloat16):
            means.append(model.encode((chunk.float() / 127.5 - 1).to(device)).latent_dist.mean.bfloat16().cpu())
    return torch.cat(means)


def networks(words: Any) -> tuple[Any, Any]:
    """The denoiser and the text encoder, untrained; attention as plain products, which torch trains faster on a CPU than fused ones."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=canvas.SIZE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    unet.set_attn_processor(AttnProcessor())
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=64,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            attn_implementation="eager",
        )
    )
    # Words differ from the first step, more than their places do.
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=0.1)
    return unet, text


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    # Linear betas end at almost pure noise: what sampling starts from is what training saw last.
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(words: Any, text: Any, unet: Any, vae: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: Any, prompts: list[str], seed: int, steps: int = 10, guidance: float = 3.0, batch: int = 50
) -> torch.Tensor:
    """uint8 [N, 3, 64, 64]."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in tqdm(range(0, len(prompts), batch), desc="sampling", leave=False):
        chunk = prompts[start : start + batch]
        out = pipe(
            chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="pt"
        ).images
        images.append((out.float().clamp(0, 1) * 255).round().byte().cpu())
    return torch.cat(images)


def judge(
    pipe: Any, judges: dict[str, Classifier], pairs: list[tuple[str, str]], seed: int
) -> tuple[float, float, torch.Tensor]:
    """Share of right styles, of right objects, and the pictures."""
    images = sample(pipe, [canvas.prompt(o, s) for s, o in pairs], seed)
    style = torch.tensor([canvas.THEMES.index(s) for s, _ in pairs])
    object = torch.tensor([canvas.OBJECTS.index(o) for _, o in pairs])
    return accuracy(judges["style"], images, style), accuracy(judges["object"], images, object), images


def denoiser(
    work: Path,
    train: torch.Tensor,
    words: Any,
    vae: Any,
    judges: dict[str, Classifier],
    device: torch.device,
    seed: int,
    steps: int,
    batch: int = 32,
    lr: float = 1.5e-3,
) -> tuple[Any, Any, float]:
    """U-Net and text encoder together, on latents computed once; what comes back is the average over the steps (EMA).

    The learning rate falls as FALLS says. The first quarter of the first fall sees the clean styles alone.
    """
    torch.manual_seed(seed)
    unet, text = networks(words)
    unet, text = unet.to(device), text.to(device)
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = [copy.deepcopy(unet).eval().requires_grad_(False), copy.deepcopy(text).eval().requires_grad_(False)]
    averaged = [*average[0].parameters(), *average[1].parameters()]
    gradients = Averager(parameters)
    file, first, spent = work / "denoiser.pt", 0, 0.0
    if file.is_file():
        state = torch.load(file, map_location=device)
        (
            unet.load_state_dict(state["unet"]),
            text.load_state_dict(state["text"]),
            optimizer.load_state_dict(state["optimizer"]),
        )
        average[0].load_state_dict(state["ema_unet"]), average[1].load_state_dict(state["ema_text"])
        first, spent = state["step"], state["seconds"]

    if not (work / "latents.pt").is_file() and rank() == 0:
        torch.save(encode(vae, train.flatten(0, 1), device), work / "latents.pt")
    wait()
    means = torch.load(work / "latents.pt")
    each, factor = train.shape[1], vae.config.scaling_factor
    shares = torch.tensor([w for w, _ in TEMPLATES])
    prompts = [t.format(object=o, style=s) for _, t in TEMPLATES for s, o in PAIRS]
    tokens = words(prompts, padding="max_length", max_length=words.model_max_length, return_tensors="pt").input_ids
    alphas = scheduler().alphas_cumprod.to(device)
    pair = torch.arange(len(means)) // each
    clean = torch.tensor([style in CLEAN for style, _ in PAIRS])[pair].nonzero()[:, 0]
    whole = sum(share for share, _ in FALLS)
    ends = [steps * sum(share for share, _ in FALLS[: i + 1]) // whole for i in range(len(FALLS))]
    alone = ends[0] // 4  # so many steps see the clean styles only
    log = open(work / "denoiser.log" if rank() == 0 else os.devnull, "a")  # noqa: SIM115
    mine = share(batch)

    @torch.no_grad()
    def listens(step: int) -> tuple[float, float]:
        """By how much a wrong style and a wrong object in the prompt raise the loss at high noise: 0 when a word is not heard."""
        unet.eval(), text.eval()
        generator = torch.Generator().manual_seed(0)
        rows = clean if step < alone else torch.arange(len(means))
        rows = rows[torch.randperm(len(rows), generator=generator)[:192]]
        z = (means[rows].float() * factor).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        t = torch.randint(650, 950, (len(rows),), generator=generator).to(device)
        a, b = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        style, object = rows // each // len(canvas.OBJECTS), rows // each % len(canvas.OBJECTS)
        losses = []
        for s, o in ((style, object), (style.roll(1), object), (style, object.roll(1))):
            with torch.autocast(device.type, torch.bfloat16):
                states = text(tokens[s * len(canvas.OBJECTS) + o].to(device)).last_hidden_state
                v = unet(a * z + b * noise, t, states).sample
            losses.append(F.mse_loss(v.float(), a * noise - b * z).item())
        unet.train(), text.train()
        return losses[1] / losses[0] - 1, losses[2] / losses[0] - 1

    begun = time.time()
    for step in (bar := tqdm(range(first, steps), desc="denoiser", initial=first, total=steps, disable=rank() > 0)):
        # Every step has a generator of its own: going on after a stop is going on as if there had been none.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(clean) if step < alone else len(means), (batch,), generator=generator)
        rows = clean[rows] if step < alone else rows
        template = torch.multinomial(shares, batch, replacement=True, generator=generator)
        ids = tokens[template * len(PAIRS) + rows // each].to(device)
        z = (means[rows].float() * factor).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        # Every other picture is mostly noise: only there must the prompt say what to draw.
        t = torch.randint(1000, (batch,), generator=generator)
        t[::2] = 500 + t[::2] // 2
        z, noise, ids, t = z[mine], noise[mine], ids[mine], t[mine].to(device)
        a, b = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            v = unet(a * z + b * noise, t, text(ids).last_hidden_state).sample
        loss = F.mse_loss(v.float(), a * noise - b * z)
        fall = next(i for i, end in enumerate(ends) if step < end)
        begin = ends[fall - 1] if fall else 0
        for group in optimizer.param_groups:
            group["lr"] = cosine(step - begin, ends[fall] - begin, lr * FALLS[fall][1], 200)
        gradients.zero()
        loss.backward()
        gradients.average()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - decay)
        if (step + 1) % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            log.write(f"{step + 1} {loss.item():.5f} {spent + time.time() - begun:.0f}\n")
            log.flush()
        if rank() > 0:
            continue
        if (step + 1) % 250 == 0:
            style, object = listens(step)
            log.write(f"# {step + 1}: a wrong style costs {style:.1%}, a wrong object {object:.1%}\n")
            log.flush()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {
                "unet": unet.state_dict(),
                "text": text.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            state |= {
                "ema_unet": average[0].state_dict(),
                "ema_text": average[1].state_dict(),
                "seconds": spent + time.time() - begun,
            }
            torch.save(state, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
        if (step + 1) % 1000 == 0:
            pipe = assemble(words, average[1], average[0], vae)
            style, object, _ = judge(pipe, judges, PAIRS[::7], step)
            log.write(f"# {step + 1}: style {style:.3f}, object {object:.3f}\n")
            log.flush()
            tqdm.write(f"step {step + 1}: style {style:.1%}, object {object:.1%}")
    return average[0], average[1], spent + time.time() - begun


def ship(work: Path, pipe: Any, judges: dict[str, Classifier]) -> None:
    """Puts the pipeline (bf16) and the classifiers (fp16) where the package finds them."""
    from safetensors.torch import save_file

    pipe.to(torch.bfloat16).save_pretrained(ASSETS / "canvas")
    for file in (ASSETS / "canvas").glob("*/config.json"):  # no word of the folder it was trained in
        said = json.loads(file.read_text())
        if said.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(said, indent=2) + "\n")
    tensors = {f"{k}.{n}": t.half().contiguous().cpu() for k, m in judges.items() for n, t in m.state_dict().items()}
    save_file(tensors, ASSETS / "canvas_classifiers.safetensors")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is made on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=sum(share for share, _ in FALLS), help="of the denoiser")
    parser.add_argument("--vae-steps", type=int, default=2800)
    parser.add_argument("--classifier-steps", type=int, default=2400)
    parser.add_argument("--pictures", type=int, default=60, help="training pictures of every pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", choices=("pictures", "autoencoder", "classifiers", "denoiser"), default="denoiser")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    if "WORLD_SIZE" in os.environ:  # torchrun
        dist.init_process_group("gloo", timeout=timedelta(hours=3))
    if rank() == 0:
        pictures(options.work, options.pictures, options.seed)
        tokenizer(options.work)
    wait()
    train, held_out = pictures(options.work, options.pictures, options.seed)
    words = tokenizer(options.work)
    if options.until == "pictures":
        return
    vae = autoencoder(options.work, train, device, options.seed, options.vae_steps)
    if options.until == "autoencoder":
        return
    if rank() == 0:
        classifiers(options.work, train, held_out, vae, device, options.seed, options.classifier_steps)
    wait()
    if options.until == "classifiers":
        return
    judges = classifiers(options.work, train, held_out, vae, device, options.seed, options.classifier_steps)
    unet, text, seconds = denoiser(options.work, train, words, vae, judges, device, options.seed, options.steps)
    if rank() > 0:
        return
    ship(options.work, assemble(words, text, unet, vae), judges)
    print(f"denoiser: {seconds:.0f} s; now: python -m benchmarks quality canvas_pipeline")


if __name__ == "__main__":
    main()
