"""Pruning patterns: n of m consecutive input columns, or a share of every row; and the check that one holds.

Both are compared per output row (Sun et al. 2024, section 3: rows are what a layer's outputs are made of); the magnitude
baseline of the papers compares a whole tensor instead, which `select(..., scope="tensor")` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.ops.mask import BitMask
from fastunlearn.ops.nm import MAX_GROUP

_WANTED = 'n:m as "2:4" or (2, 4), or the share of weights to remove as "50%", "0.5" or 0.5'


@dataclass(frozen=True)
class Pattern:
    """What pruning leaves: `parse_pattern` makes one.

    Attributes:
        n, m: of m consecutive input columns n are kept; None where the pattern is unstructured.
        sparsity: share of weights removed, in [0, 1); 1 - n/m for n:m.
    """

    n: int | None
    m: int | None
    sparsity: float

    @property
    def density(self) -> float:
        """Share of weights kept."""
        # Twelve digits: 1 - 0.9 is a little less than 0.1, and would keep none of ten.
        return round(1 - self.sparsity, 12)

    @property
    def structured(self) -> bool:
        """Whether it is n:m."""
        return self.m is not None

    @property
    def kind(self) -> str:
        """ "2:4" or "unstructured", as pruning.json names it."""
        return f"{self.n}:{self.m}" if self.structured else "unstructured"

    def __str__(self) -> str:
        return self.kind if self.structured else f"{self.sparsity:.6%}".rstrip("%").rstrip("0").rstrip(".") + "%"


def parse_pattern(pattern: Pattern | str | float | tuple[int, int]) -> Pattern:
    """Reads a pattern.

    Args:
        pattern: "2:4" or (2, 4): n of m are kept, 1 <= n < m <= 64. "50%", "0.5" or 0.5: the share to REMOVE of every output
            row, in [0, 1).

    Raises:
        TypeError: another type. ValueError: out of range, or text that is no pattern.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, bool) or not isinstance(pattern, str | int | float | tuple | list):
        raise TypeError(f"pattern: want {_WANTED}, got {type(pattern).__name__}")
    share: float
    if isinstance(pattern, str):
        text = pattern.strip()
        if found := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text):
            return parse_pattern((int(found[1]), int(found[2])))
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            raise ValueError(f"pattern: want {_WANTED}, got {pattern!r}") from None
    elif isinstance(pattern, int | float):
        share = float(pattern)
    else:
        if len(pattern) != 2 or any(isinstance(x, bool) or not isinstance(x, int) for x in pattern):
            raise ValueError(f"pattern: want {_WANTED}, got {pattern!r}")
        n, m = pattern
        if not 1 <= n < m <= MAX_GROUP:
            raise ValueError(f"pattern: n:m wants 1 <= n < m <= {MAX_GROUP}, got {n}:{m}")
        return Pattern(n, m, 1 - n / m)
    if not 0 <= share < 1:
        raise ValueError(f"pattern: a share of weights to remove is in [0, 1) (or 0% to below 100%), got {pattern!r}")
    return Pattern(None, None, share)


def select(scores: Tensor, pattern: Pattern, scope: Literal["row", "tensor"] = "row") -> BitMask:
    """The weights a pattern keeps: those of the highest scores.

    Args:
        scores: floating [out, in].
        pattern: n:m, or unstructured: floor(density * in) of every row.
        scope: "tensor": floor(density * out * in) of the whole tensor; for unstructured patterns.

    Raises:
        ValueError: m does not divide the columns.
    """
    if pattern.n is not None and pattern.m is not None:
        return ops.nm_mask(scores, pattern.n, pattern.m)
    return ops.topk_mask([scores], density=pattern.density, scope=scope)[0]


def nm_violations(model: nn.Module, masks: Mapping[str, BitMask], n: int = 2, m: int = 4) -> list[str]:
    """What is wrong with an N:M pattern; an empty list means that it holds exactly.

    Every masked parameter is checked: each group of m consecutive input columns holds at most n nonzeros, and every weight
    outside its mask is exactly zero.

    Returns:
        One line a parameter that fails.

    Raises:
        ValueError: a mask names no parameter of the model, or has another shape.
    """
    parameters = dict(model.named_parameters())
    lines = []
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ValueError(f"masks[{name!r}]: the model has no parameter of that name and shape {tuple(mask.shape)}")
        nonzero = parameters[name].detach() != 0
        crowded = int((nonzero.reshape(mask.rows, -1, m).sum(-1) > n).sum())
        stray = int((nonzero & ~mask.to(nonzero.device).unpack()).sum())
        if crowded or stray:
            lines.append(
                f"{name}: {crowded} groups of {m} with more than {n} nonzeros, {stray} nonzeros outside the mask"
            )
    return lines
