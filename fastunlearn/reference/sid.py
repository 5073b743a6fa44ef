"""The loss of score identity distillation in plain PyTorch, and its gradients (SiD, Zhou et al. 2024, arXiv 2404.04057, eq. 23).

With x_net = (x_t - s e_net) / a, k = s / a and the noise e of x_t = a x + s e, the image x cancels:

    x_phi - x = k (e - e_phi) = k u          x_phi - x_psi = k (e_psi - e_phi) = k v
    loss = sum (x_phi - x_psi) . [(x_phi - x) - alpha (x_phi - x_psi)] / omega = k^2 / omega * sum v (u - alpha v)
    omega = mean |x_phi - x|, at least 1e-5, taken as a constant

    d loss / d e_psi = k^2 / omega * (u - 2 alpha v)          d loss / d e_phi = -(d loss / d e_psi) - k^2 / omega * v
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-5


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sid_sums(teacher: Tensor, fake: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """[n, size] each -> [n, 2]: sum of |u|, sum of v (u - alpha v)."""
    teacher, fake, noise = (t.to(wide(teacher.dtype)) for t in (teacher, fake, noise))
    u, v = noise - teacher, fake - teacher
    return torch.stack([u.abs().sum(1), (v * (u - alpha * v)).sum(1)], 1)


def sid_gradients(teacher: Tensor, fake: Tensor, noise: Tensor, factor: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(gradient of teacher, of fake), in their types; factor [n] = gradient of the loss * k^2 / omega."""
    t, f, e = (x.to(wide(teacher.dtype)) for x in (teacher, fake, noise))
    u, v, c = e - t, f - t, factor[:, None]
    of_fake = c * (u - 2 * alpha * v)
    return (-of_fake - c * v).to(teacher.dtype), of_fake.to(fake.dtype)
