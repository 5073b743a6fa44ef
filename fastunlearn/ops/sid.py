"""The loss of score identity distillation, from what two networks predict, with its gradients in one pass.

The maths: fastunlearn/reference/sid.py (SiD, arXiv 2404.04057; SFD, arXiv 2409.11219). The image drops out, so nothing of it is kept:
the gradient reaches a generator through the inputs of the two networks alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastunlearn import _backend, _native
from fastunlearn.ops import _sid_cpu as cpu
from fastunlearn.reference import sid as reference

_OP = _backend.register("sid_loss", native=("cpu",), triton=("cuda",))
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _kernels() -> Any:
    from fastunlearn.kernels import sid

    return sid


def _backend_of(teacher: Tensor, fake: Tensor) -> Any:
    odd = next((t.dtype for t in (teacher, fake) if t.dtype not in _KERNEL_DTYPES), None)
    unsupported: dict[str, str] = {}
    if odd:
        why = f"predictions are {odd}; kernels take float32, float16 and bfloat16"
        unsupported = {"native": why, "triton": why}
    backend = _backend.resolve(_OP, teacher.device, unsupported)
    if backend == "reference" or not teacher.numel():
        return reference
    return _kernels() if backend == "triton" else cpu


def _sums(teacher: Tensor, fake: Tensor, noise: Tensor, alpha: float) -> Tensor:
    made = _backend_of(teacher, fake).sid_sums(*(_native.in_memory(t) for t in (teacher, fake, noise)), alpha)
    return made


# As torch.library ops: what torch.compile sees. Inputs [n, size]; out [n, 2] as the reference has it.
@torch.library.custom_op("fastunlearn::sid_sums", mutates_args=())
def _sums_op(teacher: Tensor, fake: Tensor, noise: Tensor, scale: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return _forward(teacher, fake, noise, scale, alpha)


def _forward(teacher: Tensor, fake: Tensor, noise: Tensor, scale: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(loss [n], k^2 / omega [n]); scale [n] is k."""
    sums = _sums(teacher, fake, noise, alpha)
    scale = scale.to(sums.dtype)
    omega = (scale * sums[:, 0] / max(teacher.shape[1], 1)).clamp_min(reference.SMALLEST)
    factor = scale.square() / omega
    return factor * sums[:, 1], factor


@_sums_op.register_fake
def _(teacher: Tensor, fake: Tensor, noise: Tensor, scale: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    out = teacher.new_empty(teacher.shape[0], dtype=reference.wide(teacher.dtype))
    return out, torch.empty_like(out)


@torch.library.custom_op("fastunlearn::sid_gradients", mutates_args=())
def _gradients_op(teacher: Tensor, fake: Tensor, noise: Tensor, factor: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return _gradients(teacher, fake, noise, factor, alpha)


@_gradients_op.register_fake
def _(teacher: Tensor, fake: Tensor, noise: Tensor, factor: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return teacher.new_empty(teacher.shape), fake.new_empty(fake.shape)


def _gradients(teacher: Tensor, fake: Tensor, noise: Tensor, factor: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    kernels = _backend_of(teacher, fake)
    rows = [_native.in_memory(t) for t in (teacher, fake, noise, factor)]
    made: tuple[Tensor, Tensor] = kernels.sid_gradients(*rows, alpha)
    return made


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    teacher, fake, noise, _, ctx.alpha = inputs
    ctx.save_for_backward(teacher, fake, noise, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    teacher, fake, noise, factor = ctx.saved_tensors
    run = _gradients_op if _backend.traced(grad, teacher) else _gradients
    of_teacher, of_fake = run(teacher, fake, noise, grad * factor, ctx.alpha)
    return of_teacher, of_fake, None, None, None


_sums_op.register_autograd(_backward, setup_context=_setup)


class _Sid(torch.autograd.Function):
    """What an eager call goes through: no dispatch."""

    @staticmethod
    def forward(teacher: Tensor, fake: Tensor, noise: Tensor, scale: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        return _forward(teacher, fake, noise, scale, alpha)

    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_backward))  # type: ignore[assignment]


def sid_loss(
    eps_teacher: Tensor,
    eps_fake: Tensor,
    noise: Tensor,
    sigma_over_alpha: Tensor | float,
    *,
    alpha: float = 1.2,
) -> Tensor:
    """Score identity distillation, one loss an image.

    With k = sigma_over_alpha, u = noise - eps_teacher, v = eps_fake - eps_teacher:
    k^2 / omega * sum v (u - alpha v), omega = max(k mean |u|, 1e-5) taken as a constant.

    Args:
        eps_teacher, eps_fake: [n, ...], the noise that the frozen teacher and the pseudo-score network predict at the same noised
            images; float32, float16, bfloat16 (float64 as plain PyTorch). Gradients reach these two alone; not twice.
        noise: [n, ...], floating, the noise those images were made with.
        sigma_over_alpha: [n], or a number: standard deviation of the noise over the factor of the image.
        alpha: of SiD; 1.2 in SiD's and SFD's class-conditional runs, 1.0 in SFD's on Stable Diffusion.

    Returns:
        fp32 [n] (fp64 for fp64), summed over an image.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, tensor in (("eps_teacher", eps_teacher), ("eps_fake", eps_fake), ("noise", noise)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: want a floating tensor, got {what}")
        if not tensor.dim():
            raise ValueError(f"{name}: want [n, ...], got a scalar")
        if tensor.shape != eps_teacher.shape:
            raise ValueError(f"{name}: want eps_teacher's shape {tuple(eps_teacher.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != eps_teacher.device:
            raise ValueError(
                f"{name}: on {tensor.device}, but eps_teacher is on {eps_teacher.device}; move one of them"
            )
    if eps_fake.dtype != eps_teacher.dtype:
        raise ValueError(f"eps_fake: {eps_fake.dtype}, but eps_teacher is {eps_teacher.dtype}; cast one of them")
    n = eps_teacher.shape[0]
    exact = reference.wide(eps_teacher.dtype)
    if isinstance(sigma_over_alpha, Tensor):
        if sigma_over_alpha.numel() != n or sigma_over_alpha.dim() not in (1, eps_teacher.dim()):
            raise ValueError(f"sigma_over_alpha: want one number an image, [{n}], got {tuple(sigma_over_alpha.shape)}")
        scale = sigma_over_alpha.detach().reshape(n).to(eps_teacher.device, exact)
    else:
        scale = torch.full((n,), float(sigma_over_alpha), dtype=exact, device=eps_teacher.device)
    flat = [t.reshape(n, t[0].numel() if n else 0) for t in (eps_teacher, eps_fake, noise.detach())]
    run = _sums_op if _backend.traced(*flat) else _Sid.apply
    loss: Tensor = run(*flat, scale, float(alpha))[0]
    return loss
