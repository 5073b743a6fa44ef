"""Did a class-conditional model forget a class: UA by a classifier, FID over the classes that stay (SalUn, SFD).

    UA = 1 - share of the images that were asked for as the forgotten class and are taken for it

Images asked for as another class do not count: dividing by all images of a folder, as a script of SFD's code does, makes any model
look ten times as forgetful.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn._modes import evaluating
from fastunlearn.objectives.diffusion import NoiseSchedule
from fastunlearn.objectives.score_distillation import predict_noise


def unlearning_accuracy(predicted: Tensor, asked: Tensor, forgotten: int | Sequence[int]) -> float:
    """UA in [0, 1].

    Args:
        predicted: int64 [n], what a classifier takes each image for.
        asked: int64 [n], the label each was drawn for.
        forgotten: the label or labels that were to be forgotten.

    Raises:
        ValueError: of another length, or no image was drawn for a forgotten label.
    """
    if predicted.shape != asked.shape or predicted.dim() != 1:
        raise ValueError(f"predicted: want one label an image, {tuple(asked.shape)}, got {tuple(predicted.shape)}")
    labels = torch.as_tensor([forgotten] if isinstance(forgotten, int) else list(forgotten), device=asked.device)
    among = torch.isin(asked, labels)
    if not bool(among.any()):
        raise ValueError(f"asked: no image was drawn for {labels.tolist()}")
    return 1.0 - float((predicted[among] == asked[among]).double().mean())


def to_images(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, as diffusers rounds."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _noise(shape: Sequence[int], seed: int, number: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


@torch.no_grad()
def draw_classes(
    unet: nn.Module,
    scheduler: Any,
    labels: Tensor,
    *,
    one_step: int | None = None,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 250,
    progress: bool = True,
) -> Tensor:
    """Images of a class-conditional model, the same for the same seed, place and label, whatever the batches.

    Args:
        unet: UNet2DModel with class embeddings. scheduler: its own.
        labels: int64 [n].
        one_step: t_init of a distilled generator; None: DDIM of `steps` steps (Song et al. 2021, eta 0).

    Returns:
        uint8 [n, C, H, W] on the CPU.
    """
    schedule = NoiseSchedule.of(scheduler)
    about: Any = unet.config
    size: Any = about.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (int(about.in_channels), height, width)
    device = next(unet.parameters()).device
    out = []
    with (
        evaluating(unet),
        tqdm(total=len(labels), desc="drawing", unit="image", leave=False, disable=None if progress else True) as bar,
    ):
        for first in range(0, len(labels), batch_size):
            label = labels[first : first + batch_size].to(device)
            z = torch.cat([_noise((1, *shape), seed, first + i) for i in range(len(label))]).to(device)
            x = (
                _one_step(unet, schedule, z, label, one_step)
                if one_step is not None
                else _ddim(unet, schedule, z, label, steps)
            )
            out.append(to_images(x).cpu())
            bar.update(len(label))
    return torch.cat(out) if out else torch.zeros(0, *shape, dtype=torch.uint8)


def _one_step(unet: nn.Module, schedule: NoiseSchedule, z: Tensor, label: Tensor, start: int) -> Tensor:
    t = torch.full((len(z),), start, dtype=torch.int64, device=z.device)
    a, s = schedule.scales(t)
    return (s * z - s * predict_noise(unet, schedule, s * z, t, label)) / a


def _ddim(unet: nn.Module, schedule: NoiseSchedule, x: Tensor, label: Tensor, steps: int) -> Tensor:
    times = torch.linspace(len(schedule) - 1, 0, steps).round().long()
    for i, t in enumerate(times.tolist()):
        at = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        a, s = schedule.scales(at)
        noise = predict_noise(unet, schedule, x, at, label).float()
        clean = ((x - s * noise) / a).clamp(-1, 1)
        if i + 1 == len(times):
            return clean
        noise = (x - a * clean) / s
        a, s = schedule.scales(torch.full_like(at, int(times[i + 1])))
        x = a * clean + s * noise
    return x


@torch.no_grad()
def classify(
    classifier: Callable[[Tensor], Tensor], images: Tensor, *, device: Any = "cpu", batch_size: int = 500
) -> Tensor:
    """Labels of uint8 images [n, C, H, W]: the largest logit; int64 [n] on the CPU."""
    parts = [
        classifier(images[i : i + batch_size].to(device)).argmax(1).cpu() for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
