"""sid_loss, forward and backward: the loss of score identity distillation from two predictions and the noise.

Peers: the loss as SiD's and SFD's code has it (three images and their differences, by autograd), and the same compiled. The limit is three
inputs read twice and two gradients written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target, compiled, ours
from fastunlearn import ops

SHAPES = {"CIFAR-10": (128, 3, 32, 32), "STL-10": (64, 3, 64, 64), "SD 1.5 latents": (8, 4, 64, 64)}
IN_IMAGES = "in images, autograd (SiD, SFD)"
CASES = [
    Case(name, [("prediction", shape)], dtype, {}, devices, quick=name == "CIFAR-10")
    for name, shape in SHAPES.items()
    for dtype, devices in ((torch.float32, ("cpu", "cuda")), (torch.bfloat16, ("cuda",)))
]
ALPHA = 1.2


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shape = case.shapes[0][1]
    teacher, other, more = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    x = Inputs(noise=teacher + 0.5 * more, k=torch.rand(shape[0], generator=generator, device=device) * 5 + 0.1)
    x.teacher, x.fake = (t.to(case.dtype).requires_grad_() for t in (teacher, teacher + 0.3 * other))
    x.grad = torch.full((shape[0],), 1 / shape[0], device=device)
    # Any image will do: it drops out.
    x.image = torch.randn(shape, generator=generator, device=device)
    return x


def in_images(teacher: Tensor, fake: Tensor, noise: Tensor, k: Tensor, image: Tensor) -> Tensor:
    k = k.view(-1, 1, 1, 1)
    a = (1 + k.square()).rsqrt()
    s = k * a
    noised = a * image + s * noise
    of_teacher, of_fake = (noised - s * teacher.float()) / a, (noised - s * fake.float()) / a
    with torch.no_grad():
        omega = (image - of_teacher).abs().mean((1, 2, 3)).clamp_min(1e-5)
    difference = of_teacher - of_fake
    return (difference * ((of_teacher - image) - ALPHA * difference)).sum((1, 2, 3)) / omega


def step(x: Inputs, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, (x.teacher, x.fake), x.grad)]

    return run


def mine(x: Inputs) -> Callable[[], Any]:
    return step(x, lambda: ops.sid_loss(x.teacher, x.fake, x.noise, x.k, alpha=ALPHA))


def autograd(x: Inputs) -> Callable[[], Any]:
    return step(x, lambda: in_images(x.teacher, x.fake, x.noise, x.k, x.image))


def torch_compile(x: Inputs) -> Callable[[], Any]:
    fused = compiled(in_images)
    return step(x, lambda: fused(x.teacher, x.fake, x.noise, x.k, x.image))


def expected(x: Inputs) -> list[Tensor]:
    teacher, fake = (t.detach().double().requires_grad_() for t in (x.teacher, x.fake))
    loss = in_images_double(teacher, fake, x)
    return [loss.detach(), *torch.autograd.grad(loss, (teacher, fake), x.grad.double())]


def in_images_double(teacher: Tensor, fake: Tensor, x: Inputs) -> Tensor:
    k, noise = x.k.double().view(-1, 1, 1, 1), x.noise.double()
    u, v = noise - teacher, fake - teacher
    omega = (k * u).abs().mean((1, 2, 3)).clamp_min(1e-5).detach()
    return (k.square() * v * (u - ALPHA * v)).sum((1, 2, 3)) / omega


def near(x: Inputs, output: Any, wanted: Any) -> str | None:
    rtol = 1e-4 if x.case.dtype == torch.float32 else 2e-2
    for i, (got, want) in enumerate(zip(output, wanted, strict=True)):
        off = ((got.double() - want).norm() / want.norm()).item()
        if not off <= rtol:
            return f"output {i} is {off:.3g} off"
    return None


def limit(x: Inputs, line: int) -> Limit:
    size = x.case.dtype.itemsize
    return Limit("bytes", x.teacher.numel() * (2 * (2 * size + 4) + 2 * size))


OP = Op(
    name="sid",
    cases=CASES,
    make=make,
    expected=expected,
    check=near,
    limit=limit,
    providers=[
        *ours("sid_loss", mine),
        Provider(IN_IMAGES, autograd),
        Provider("torch.compile of it", torch_compile, compiles=True),
    ],
    targets=[Target(IN_IMAGES, 0.5, "cuda"), Target(IN_IMAGES, 0.8, "cpu")],
)
