"""Noise schedules against diffusers' scheduler, losses against their definition, the retain term's zero."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_diffusion import prompt, tiny_pipeline

pytest.importorskip("diffusers")

from fastunlearn.data.prompts import encode_prompts
from fastunlearn.objectives.diffusion import (
    NoiseSchedule,
    denoiser,
    denoising_loss,
    self_distillation_loss,
    uniform_timesteps,
)


def drawn(count: int = 3):
    return torch.randn(count, 2, 8, 8), torch.randn(count, 2, 8, 8), torch.tensor([0, 500, 999])[:count]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_the_schedulers(kind):
    scheduler = tiny_pipeline(prediction_type=kind).scheduler
    schedule = NoiseSchedule.of(scheduler)
    clean, noise, t = drawn()
    assert len(schedule) == 1000
    torch.testing.assert_close(schedule.add_noise(clean, noise, t), scheduler.add_noise(clean, noise, t))
    target = schedule.target(clean, noise, t)
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}[kind]
    torch.testing.assert_close(target, wanted)


def test_losses_are_what_they_say():
    pipeline = tiny_pipeline()
    schedule, predict = NoiseSchedule.of(pipeline.scheduler), denoiser(pipeline.unet)
    clean, noise, t = drawn()
    text = encode_prompts(pipeline, [prompt("Cat", "Mosaic")] * 3)
    other = encode_prompts(pipeline, [prompt("Cat", "Photo")] * 3)
    noised = schedule.add_noise(clean, noise, t)
    with torch.no_grad():
        mine, theirs = (pipeline.unet(noised, t, x).sample for x in (text, other))
    v = pipeline.scheduler.get_velocity(clean, noise, t)
    torch.testing.assert_close(
        denoising_loss(predict, schedule, clean, text, noise, t).detach(), (mine - v).square().mean()
    )
    loss = self_distillation_loss(predict, predict, noised, t, text, other)
    torch.testing.assert_close(loss.detach(), (mine - theirs).square().mean())
    # Student and teacher the same: nothing to learn from what must stay.
    assert self_distillation_loss(predict, predict, noised, t, text, text).item() == 0


def test_no_gradient_reaches_the_teacher():
    student, teacher = tiny_pipeline(), tiny_pipeline(seed=1)
    clean, _, t = drawn()
    text = encode_prompts(student, [prompt("Cat", "Mosaic")] * 3)
    self_distillation_loss(denoiser(student.unet), denoiser(teacher.unet), clean, t, text, text).backward()
    assert all(p.grad is None for p in teacher.unet.parameters())
    assert all(p.grad is not None for p in student.unet.parameters())


def test_timesteps_are_uniform_and_the_generators():
    schedule = NoiseSchedule.of(tiny_pipeline().scheduler)
    draw = uniform_timesteps(schedule)
    one, two = (draw(20_000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert (int(one.min()), int(one.max())) == (0, 999)
    counts = torch.histc(one.float(), 10, 0, 1000)
    assert (counts - 2000).abs().max() < 200


def test_a_schedule_that_is_none_is_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(
        ValueError, match="FlowMatchEulerDiscreteScheduler with prediction_type None; want alphas_cumprod"
    ):
        NoiseSchedule.of(FlowMatchEulerDiscreteScheduler())
