"""Train and eval mode of a model, set and given back; gradient checkpointing of networks of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside (no dropout); after it every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checkpoint_blocks(args: Any, *networks: Any) -> None:
    """Gradient checkpointing of diffusers' networks where the arguments ask for it; the Trainer, which knows only transformers'
    models, is told of none. Newer arguments call it activation_checkpointing and keep the older name beside it: both are cleared."""
    names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(args, name)]
    if any(getattr(args, name) for name in names):
        for network in networks:
            network.enable_gradient_checkpointing()
    for name in names:
        setattr(args, name, False)
