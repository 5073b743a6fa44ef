"""Where an edited projection sends text: residuals by which a closed-form edit is judged before an image is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def spread(tokens: Sequence[Tensor], count: int = 128) -> Tensor:
    """At most `count` of all rows together, evenly spread."""
    joined = torch.cat(list(tokens))
    return joined[torch.linspace(0, len(joined) - 1, min(len(joined), count)).long().to(joined.device)]


def forget_residuals(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], tokens: Tensor, targets: Tensor
) -> dict[str, float]:
    """sum |W c - W0 c*|^2 / sum |W0 c - W0 c*|^2 of each weight: 0, every token is where it shall be; 1, nothing has moved.

    Args:
        new, old: W, W0 by name. tokens, targets: c, c*, fp64 [tokens, width].
    """  # fmt: skip
    out = {}
    for name, before in old.items():
        aim = before.double() @ targets.T
        gap = float((before.double() @ tokens.T - aim).square().sum())
        out[name] = float((new[name].double() @ tokens.T - aim).square().sum()) / gap if gap else 0.0
    return out


def retain_residuals(new: Mapping[str, Tensor], old: Mapping[str, Tensor], tokens: Tensor) -> dict[str, float]:
    """sum |W p - W0 p|^2 / sum |W0 p|^2 of each weight; tokens p, fp64 [tokens, width]."""
    out = {}
    for name, before in old.items():
        size = float((before.double() @ tokens.T).square().sum())
        moved = float(((new[name].double() - before.double()) @ tokens.T).square().sum())
        out[name] = moved / size if size else 0.0
    return out
