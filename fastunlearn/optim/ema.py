"""The exponential moving average of a model's weights: what SiD and SFD sample from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- decay average + (1 - decay) weight, after every step, in fp32, of parameters that train.

    A parameter that does not train is its own average; so is every one with decay 0.

    Args:
        model: whose parameters are averaged, from what they are now.
        decay: in [0, 1).

    Raises:
        ValueError: a decay outside of [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: want a number in [0, 1), got {decay}")
        self.decay = decay
        self.averages = {
            name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad and decay > 0
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a step."""
        own = dict(model.named_parameters())
        for name, average in self.averages.items():
            # a + (w - a) (1 - decay): an entry that never moves is its average to the last bit.
            average.lerp_(own[name].detach().float(), 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averages; after it, its own weights again, bit for bit."""
        own = dict(model.named_parameters())
        kept = {name: own[name].detach().clone() for name in self.averages}
        with torch.no_grad():
            for name, average in self.averages.items():
                own[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    own[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Raises:
            ValueError: averages of other parameters.
        """
        if set(state) != set(self.averages):
            raise ValueError("ema: the saved averages are of other parameters")
        for name, value in state.items():
            self.averages[name].copy_(value)
