"""How two gradients become one. A step runs forward and backward on forget rows, then on retain rows.

An update may look at `.grad` after each of the two passes; what `.grad` holds after `combine` is what the optimiser sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastunlearn.objectives.language import closest


class Update(Protocol):
    """What the trainer calls; gradients are those of descent on gamma * forget and alpha * retain."""

    def after_forget(self, params: Sequence[Tensor]) -> None:
        """After the backward pass of the forget term, in every micro-batch."""

    def combine(self, params: Sequence[Tensor]) -> None:
        """Before the optimiser's step."""


class Sum:
    """The plain sum: autograd has added the two up already."""

    def after_forget(self, params: Sequence[Tensor]) -> None:
        pass

    def combine(self, params: Sequence[Tensor]) -> None:
        pass


UPDATES: dict[str, type[Update]] = {"sum": Sum}


def make_update(name: str) -> Update:
    """The update of that name.

    Raises:
        ValueError: unknown name; the closest are named.
    """
    if name not in UPDATES:
        raise ValueError(f"update: {name!r} is unknown; {closest(str(name), list(UPDATES))}")
    return UPDATES[name]()
