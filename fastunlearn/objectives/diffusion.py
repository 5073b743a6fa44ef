"""Objectives for diffusion models: what the network is asked at a noised latent, and towards what it is pulled.

A noised latent is z_t = a_t z_0 + s_t e, with a_t^2 the scheduler's `alphas_cumprod` and a_t^2 + s_t^2 = 1 (Ho et al. 2020, eq. 4).
A network predicts e ("epsilon"), a_t e - s_t z_0 ("v_prediction", Salimans & Ho 2022, appendix D) or z_0 ("sample").

Objectives compare predictions, so that student and teacher are functions (z_t, t, text) -> prediction: a U-Net, a U-Net with its
adapter off, a frozen copy. Self-distillation (SPARE, arXiv 2602.07058; concept ablation, Kumari et al. 2023, eq. 4):

    forget   mean ||student(z_t, t, c_forget) - teacher(z_t, t, c_surrogate)||^2      one z_t, two texts
    retain   mean ||student(z_u, u, c_retain) - teacher(z_u, u, c_retain)||^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: (noised latents [n, C, h, w], timesteps int64 [n], text features [n, length, width]) -> prediction [n, C, h, w]
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
#: (how many, generator) -> int64 timesteps
TimestepSampler = Callable[[int, torch.Generator], Tensor]

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def denoiser(unet: nn.Module) -> Denoiser:
    """A U-Net of diffusers as a function of latents, timesteps and text."""

    def predict(latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        out: Tensor = unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return out

    return predict


@dataclass(frozen=True)
class NoiseSchedule:
    """How a scheduler mixes latent and noise.

    Attributes:
        alphas_cumprod: fp32 [timesteps], a_t^2.
        prediction_type: what the network predicts, one of `PREDICTIONS`.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """That of a scheduler of diffusers.

        Raises:
            ValueError: it has no `alphas_cumprod` (flow matching), or the network predicts something else.
        """
        alphas = getattr(scheduler, "alphas_cumprod", None)
        kind = getattr(scheduler.config, "prediction_type", None)
        if alphas is None or kind not in PREDICTIONS:
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} with prediction_type {kind!r}; want alphas_cumprod and one of {', '.join(PREDICTIONS)}"
            )
        return cls(alphas.float(), kind)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t), fp32 [n, 1, 1, 1]."""
        squared = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return squared.sqrt(), (1 - squared).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t, [n, C, h, w]."""
        a, s = self.scales(timesteps)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network that was trained on these latents predicts, [n, C, h, w]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        a, s = self.scales(timesteps)
        return a * noise - s * latents


def uniform_timesteps(schedule: NoiseSchedule) -> TimestepSampler:
    """t uniform over all timesteps of the schedule."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(schedule), (count,), generator=generator, device=generator.device)

    return draw


def denoising_loss(
    student: Denoiser, schedule: NoiseSchedule, latents: Tensor, text: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error of the prediction, what a diffusion model is trained on (Ho et al. 2020, eq. 14).

    Args:
        latents: clean, [n, C, h, w]. text: [n, length, width]. noise: as latents. timesteps: int64 [n].

    Returns:
        fp32 scalar.
    """
    predicted = student(schedule.add_noise(latents, noise, timesteps), timesteps, text)
    return F.mse_loss(predicted.float(), schedule.target(latents, noise, timesteps).float())


def self_distillation_loss(
    student: Denoiser, teacher: Denoiser, noised: Tensor, timesteps: Tensor, text: Tensor, teacher_text: Tensor
) -> Tensor:
    """Mean squared distance of the student under one text from the teacher under another, at the same noised latents.

    With the surrogate's text for the teacher it is the forget term, with the student's own it is the retain term (zero while
    student and teacher are the same network).

    Args:
        student, teacher: no gradient reaches the teacher.
        noised: z_t, [n, C, h, w]. timesteps: int64 [n]. text, teacher_text: [n, length, width].

    Returns:
        fp32 scalar.
    """
    with torch.no_grad():
        target = teacher(noised, timesteps, teacher_text)
    return F.mse_loss(student(noised, timesteps, text).float(), target.float())
