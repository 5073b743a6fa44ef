"""Train and eval mode and precision of a model, set and given back; gradient checkpointing of networks of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Passes without gradients under autocast to `dtype` (None: in the weights' own), in which every weight is cast once.

    Autocast keeps its casts until it is left, but only those of fp32 weights that ask for a gradient. Frozen ones (the base of an
    adapter, all but one block after RMU, the head of a pruned model) it casts at every call, on a CPU for longer than the product
    with a few tokens takes. They ask for a gradient inside: casts and results are autocast's own, bit for bit. Not on other devices,
    where casts are cheap and room for the copies is not. Weights must not change inside.
    """
    device = next(model.parameters()).device.type
    frozen: list[Tensor] = []
    if dtype is not None and device == "cpu":
        # A sharded weight that asks for a gradient is treated in other ways than one that does not.
        own = (p for p in model.parameters() if p.dtype == torch.float32 and not hasattr(p, "to_local"))
        frozen = [p for p in own if not (p.requires_grad or p.is_inference())]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """fp32 inside, for differences of almost equal losses: no autocast (accelerate's around `forward` neither), and copies in the place
    of 16-bit weights. The parameters, their gradients and hooks are not touched; no pass inside may be differentiated.

    Raises:
        torch.OutOfMemoryError: there is no room for the copies.
    """
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    own: dict[str, Any] = vars(model)
    forward = own.get("forward")
    wrapped = forward is not None and "_original_forward" in own
    device = next(model.parameters()).device.type
    try:
        if wrapped:
            own["forward"] = own["_original_forward"]
        for module in model.modules():
            entries: dict[str, Any] = module._parameters
            for name, p in entries.items():
                if p is not None and p.dtype in (torch.bfloat16, torch.float16):
                    places.append((entries, name, p))
                    if id(p) not in copies:
                        copies[id(p)] = p.detach().float()
        for entries, name, p in places:
            entries[name] = copies[id(p)]
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for entries, name, p in places:
            entries[name] = p
        if wrapped:
            own["forward"] = forward


def checkpoint_blocks(args: Any, *networks: Any) -> None:
    """Gradient checkpointing of diffusers' networks where the arguments ask for it; the Trainer, which knows only transformers'
    models, is told of none. Newer arguments call it activation_checkpointing and keep the older name beside it: both are cleared."""
    names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(args, name)]
    if any(getattr(args, name) for name in names):
        for network in networks:
            network.enable_gradient_checkpointing()
    for name in names:
        setattr(args, name, False)
