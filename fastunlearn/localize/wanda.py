"""Wanda pruning to N:M patterns: |weight| times the norm of the input it meets (Sun et al. 2024, "A Simple and Effective
Pruning Approach for Large Language Models", eq. 1).

Only linear layers inside the given blocks are pruned, block by block: a block's scores come from the outputs of the blocks
before it *after* their pruning. The masks name the weights that are left; handed to a masked optimiser they keep the pattern
through any training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.ops.mask import BitMask


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|weight| * input_norm.

    Args:
        weight: [out, in].
        input_norm: [in], the L2 norm of every input column over the calibration tokens.

    Returns:
        fp32 [out, in]. Only comparisons inside a row mean something.

    Raises:
        ValueError: input_norm does not fit the weight.
    """
    if weight.dim() != 2 or input_norm.shape != weight.shape[1:]:
        raise ValueError(
            f"input_norm: a weight [out, in] takes a norm [in]; got weight {tuple(weight.shape)}, norm {tuple(input_norm.shape)}"
        )
    return weight.detach().float().abs() * input_norm.float()


@contextmanager
def input_norms(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """L2 norms of the inputs that linear layers see inside the `with`; read them after it.

    Args:
        layers: name -> layer, called with one tensor [..., in].

    Yields:
        A dict that holds name -> fp32 [in] when the `with` ends. Layers that were never called are missing.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        total = x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)
        squares[name] = squares[name] + total if name in squares else total

    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            hooks.callback(handle.remove)
        yield squares
    for name in squares:
        squares[name] = squares[name].sqrt()


def _first_pass(
    blocks: Sequence[nn.Module], calibrate: Callable[[], Any]
) -> tuple[list[Tensor], list[list[tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """Runs the dense model once per batch: the hidden states before block 0 and, block by block, its other arguments."""
    hidden: list[Tensor] = []
    others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in blocks]

    def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor):
            raise TypeError("blocks: want modules that take the hidden states as their first positional argument")
        cache = [k for k in ("past_key_values", "past_key_value", "layer_past") if kwargs.get(k) is not None]
        if cache:
            raise ValueError(f"calibrate: runs the model with a cache ({cache[0]}); call it with use_cache=False")
        if index == 0:
            hidden.append(args[0].detach())
        others[index].append((args[1:], kwargs))

    with ExitStack() as hooks:
        for i, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(lambda _, a, k, i=i: record(i, a, k), with_kwargs=True)
            hooks.callback(handle.remove)
        calibrate()
    if not hidden or any(len(calls) != len(hidden) for calls in others):
        raise ValueError(
            f"calibrate: want it to run every block once a batch; calls of the blocks: {[len(calls) for calls in others]}"
        )
    return hidden, others


@torch.no_grad()
def prune_nm(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    calibrate: Callable[[], Any],
    n: int = 2,
    m: int = 4,
    *,
    progress: Callable[[Sequence[nn.Module]], Any] = lambda blocks: blocks,
) -> dict[str, BitMask]:
    """Prunes every `nn.Linear` inside `blocks` to n of m consecutive input columns, in place, by Wanda's scores.

    Args:
        model: the whole model; its parameter names become the names of the masks.
        blocks: the decoder blocks in the order they run. Each takes the hidden states as first positional argument and returns
            them (or a tuple that starts with them); its other arguments are recorded from the dense model.
        calibrate: runs the model (without a cache) on text that stands for what it is to stay good at, one or more batches.
            Never on the forget set: the choice of weights would then remember it.
        n, m: keep n of m.
        progress: wraps `blocks`, e.g. in tqdm.

    Returns:
        Parameter name -> BitMask of the weights left; all others are zero now.

    Raises:
        TypeError, ValueError: blocks or calibrate do not do what is said above; a block is not part of the model; a layer's
            input columns are no multiple of m; a linear layer of a block saw no input.
    """
    name_of = {id(module): name for name, module in model.named_modules()}
    strangers = [type(block).__name__ for block in blocks if id(block) not in name_of]
    if strangers or not blocks:
        raise ValueError(f"blocks: want at least one, all part of the model; got {len(blocks)}, not in it: {strangers}")
    hidden, others = _first_pass(blocks, calibrate)
    masks: dict[str, BitMask] = {}
    for block, calls in zip(progress(blocks), others, strict=True):
        prefix = name_of[id(block)]
        layers = {
            ".".join(part for part in (prefix, name) if part): layer
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        }
        with input_norms(layers) as norms:
            for x, (args, kwargs) in zip(hidden, calls, strict=True):
                block(x, *args, **kwargs)
        for name, layer in layers.items():
            if name not in norms:
                raise ValueError(f"calibrate: {name} saw no input, so it has no scores; use more or other text")
            mask = ops.nm_mask(wanda_scores(layer.weight, norms[name]), n, m)
            layer.weight.mul_(mask.unpack())
            masks[f"{name}.weight"] = mask
        # Autocast keeps low-precision copies of parameters; these are of the weights before pruning.
        torch.clear_autocast_cache()
        for i, (args, kwargs) in enumerate(calls):
            out = block(hidden[i], *args, **kwargs)
            hidden[i] = out[0] if isinstance(out, tuple) else out
    return masks


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
        stray = int((nonzero & ~mask.unpack()).sum())
        if crowded or stray:
            lines.append(
                f"{name}: {crowded} groups of {m} with more than {n} nonzeros, {stray} nonzeros outside the mask"
            )
    return lines
