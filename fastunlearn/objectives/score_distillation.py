"""Score distillation of a one-step generator, and forgetting by it: SiD (Zhou et al. 2024, arXiv 2404.04057), SFD (Chen et al. 2025,
arXiv 2409.11219), which PECKER (arXiv 2604.05634) is taken to build on.

Three networks of one architecture predict noise: phi, frozen (the teacher), psi (the pseudo-score), and theta inside the generator

    g(z, c) = (x_T - s_0 e_theta(x_T, t_0, c)) / a_0,  x_T = s_0 z          x_t = a_t x + s_t e,  t uniform in [t_min, t_max)
    L_psi   = k_r ||e - e_psi(x_t, t, c)||^2 + k_f ||e - e_psi(x_t, t, c_f)||^2          x = g, detached
    L_theta = k_r SiD(phi(., c), psi(., c); g(z, c)) + k_f SiD(phi(., c_o), psi(., c_f); g(z, c_f))

sums over an image, means over a batch. On what the generator makes for c_f the teacher is asked for c_o: g(., c_f) is distilled to
p(x | c_o). While psi = phi the retain term and its gradient are exactly 0, and the forget term is what separates the two labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.objectives.diffusion import NoiseSchedule


class Timesteps(NamedTuple):
    """Attributes: low, high: noise of the distillation is drawn from [low, high); start: where the generator begins."""

    low: int
    start: int
    high: int

    def check(self, schedule: NoiseSchedule) -> None:
        """
        Raises:
            ValueError: outside of the schedule, or an empty interval.
        """
        if not 0 <= self.low < self.high <= len(schedule) or not 0 <= self.start < len(schedule):
            raise ValueError(
                f"t_min, t_init, t_max: want 0 <= t_min < t_max <= {len(schedule)} and t_init below {len(schedule)}, "
                f"got {self.low}, {self.start}, {self.high}"
            )


@dataclass(frozen=True)
class Conditions:
    """What images are asked for by: int64 labels [n] of a class-conditional model, or text features [n, length, width].

    Attributes:
        values: one for each condition.
        empty: text features [1, length, width] of the empty prompt, for guidance; None: there is none.
        names: the prompts or labels themselves, one for each; empty: nobody said.
    """

    values: Tensor
    empty: Tensor | None = None
    names: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> Conditions:
        return Conditions(self.values.to(device), None if self.empty is None else self.empty.to(device), self.names)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Positions of `count` conditions, each as likely."""
        return torch.randint(len(self.values), (count,), generator=generator)


def predict_noise(
    network: nn.Module, schedule: NoiseSchedule, noised: Tensor, timesteps: Tensor, condition: Tensor,
    empty: Tensor | None = None, guidance: float = 1.0,
) -> Tensor:  # fmt: skip
    """The noise that a U-Net of diffusers predicts, whatever it was trained to predict.

    Args:
        network: UNet2DModel (condition: int64 [n]) or UNet2DConditionModel (condition: features [n, length, width]).
        empty: [1, length, width]; with guidance w other than 1: e(empty) + w (e(c) - e(empty)).

    Returns:
        [n, C, h, w].

    Raises:
        ValueError: guidance without the empty condition.
    """
    # A node of its own: what comes back through one network is added up before it meets what came through another, so that
    # networks that are equal cancel to the last bit.
    noised = noised.view_as(noised)
    count = len(noised)
    guided = guidance != 1.0
    if guided:
        if empty is None:
            raise ValueError("guidance: compares with the empty prompt; a class-conditional model has none (kappa = 1)")
        condition = torch.cat([condition, empty.to(condition).expand(count, *empty.shape[1:])])
    inputs = torch.cat([noised, noised]) if guided else noised
    steps = torch.cat([timesteps, timesteps]) if guided else timesteps
    dtype = next(network.parameters()).dtype
    named = (
        {"encoder_hidden_states": condition.to(dtype)} if condition.is_floating_point() else {"class_labels": condition}
    )
    out: Tensor = network(inputs.to(dtype), steps, return_dict=False, **named)[0]
    if guided:
        given, without = out.chunk(2)
        out = without + guidance * (given - without)
    if schedule.prediction_type == "epsilon":
        return out
    a, s = schedule.scales(timesteps)
    if schedule.prediction_type == "v_prediction":
        return a * out + s * noised
    return (noised - a * out) / s


@dataclass(frozen=True)
class Draw:
    """The random part of one term: latent noise z, noise e, timesteps, conditions (positions and values)."""

    z: Tensor
    noise: Tensor
    timesteps: Tensor
    index: Tensor
    condition: Tensor


@dataclass
class Distillation:
    """The two losses.

    Attributes:
        teacher: phi, frozen. pseudo: psi.
        schedule: of all three networks.
        shape: of an image (or latent), [C, h, w].
        times: see `Timesteps`.
        alpha: of SiD.
        kappa_train: guidance of psi in its own loss; kappa_fake, kappa_real: of psi and phi in the generator's (SiD-LSG).
        empty: of the empty prompt, where there is guidance.
    """

    teacher: nn.Module
    pseudo: nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    times: Timesteps
    alpha: float = 1.2
    kappa_train: float = 1.0
    kappa_fake: float = 1.0
    kappa_real: float = 1.0
    empty: Tensor | None = None

    def draw(self, conditions: Conditions, count: int, generator: torch.Generator, *, whole: bool = False) -> Draw:
        """Of `count` images; on the CPU, so that a seed gives the same on every device. whole: timesteps of all the schedule, as a
        model that draws in many steps sees them, not of `times`."""
        z, noise = (torch.randn(count, *self.shape, generator=generator) for _ in range(2))
        low, high = (0, len(self.schedule)) if whole else (self.times.low, self.times.high)
        timesteps = torch.randint(low, high, (count,), generator=generator)
        index = conditions.draw(count, generator)
        device = conditions.values.device
        return Draw(z.to(device), noise.to(device), timesteps.to(device), index, conditions.values[index.to(device)])

    def generate(self, generator: nn.Module, z: Tensor, condition: Tensor) -> Tensor:
        """g(z, c): one step of the network, [n, C, h, w]."""
        start = torch.full((len(z),), self.times.start, dtype=torch.int64, device=z.device)
        a, s = self.schedule.scales(start)
        noised = s * z
        return (noised - s * predict_noise(generator, self.schedule, noised, start, condition)) / a

    def denoising(self, network: nn.Module, images: Tensor, draw: Draw, kappa: float = 1.0) -> Tensor:
        """||e - e_net(x_t, t, c)||^2, summed over an image, its mean over the batch; fp32 scalar."""
        noised = self.schedule.add_noise(images, draw.noise, draw.timesteps)
        guessed = predict_noise(network, self.schedule, noised, draw.timesteps, draw.condition, self.empty, kappa)
        return (draw.noise - guessed.float()).square().flatten(1).sum(1).mean()

    def pseudo_loss(self, generator: nn.Module, draw: Draw) -> Tensor:
        """L_psi of one draw, without its factor."""
        with torch.no_grad():
            images = self.generate(generator, draw.z, draw.condition)
        return self.denoising(self.pseudo, images, draw, self.kappa_train)

    def generator_loss(self, generator: nn.Module, draw: Draw, teacher_condition: Tensor | None = None) -> Tensor:
        """L_theta of one draw, without its factor: the teacher is asked for `teacher_condition`, None: for the same.

        The gradient reaches the generator through the inputs of both networks, whose own parameters must be frozen meanwhile.
        """
        images = self.generate(generator, draw.z, draw.condition)
        noised = self.schedule.add_noise(images, draw.noise, draw.timesteps)
        asked = draw.condition if teacher_condition is None else teacher_condition
        of_teacher = predict_noise(
            self.teacher, self.schedule, noised, draw.timesteps, asked, self.empty, self.kappa_real
        )
        of_pseudo = predict_noise(
            self.pseudo, self.schedule, noised, draw.timesteps, draw.condition, self.empty, self.kappa_fake
        )
        a, s = self.schedule.scales(draw.timesteps)
        ratio = (s / a).flatten()
        of_teacher = of_teacher.to(of_pseudo.dtype)
        return ops.sid_loss(of_teacher, of_pseudo, draw.noise, ratio, alpha=self.alpha).mean()


#: what saliency is taken of: PECKER's forget term, or SalUn's denoising loss on images of the forgotten condition
SALIENCY_LOSSES = ("sid", "denoising")
#: how batches come together: |sum of g| (SalUn), or sum of |g| (SPARE)
SALIENCY_SUMS = ("signed", "abs")


def forget_saliency(
    generator: nn.Module,
    losses: Callable[[int], Tensor],
    batches: int,
    *,
    reduce: Any = "signed",
    max_norm: float | None = None,
) -> dict[str, Tensor]:
    """Scores of every parameter that requires a gradient: |sum of g| or sum of |g| over batches of a forget loss.

    Args:
        losses: number of a batch -> its loss.
        max_norm: the gradient of a batch is scaled down to this norm before it counts (SalUn's code: 1); None: not.

    Returns:
        name -> fp32 scores >= 0.

    Raises:
        ValueError: a gradient that is not finite, or no gradient at all.
    """
    named = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    scores = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in named.values()]
    for number in range(batches):
        found = torch.autograd.grad(losses(number), list(named.values()), allow_unused=True)
        pairs = [(s, g) for s, g in zip(scores, found, strict=True) if g is not None]
        if not pairs:
            raise ValueError("saliency: the forget loss reaches no parameter that may move")
        norm = ops.masked_grad_norm([g for _, g in pairs], [None] * len(pairs))
        if not bool(torch.isfinite(norm)):
            raise ValueError(f"saliency: the gradient of batch {number} is not finite")
        scale = 1.0 if max_norm is None else min(1.0, max_norm / max(float(norm), 1e-12))
        grads = [g if scale == 1.0 else g * scale for _, g in pairs]
        ops.saliency_accumulate_([s for s, _ in pairs], grads, kind=reduce)
    return {name: score.abs_() for name, score in zip(named, scores, strict=True)}
