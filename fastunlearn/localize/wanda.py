"""Wanda: |weight| times the norm of the input it meets (Sun et al. 2024, "A Simple and Effective Pruning Approach for Large
Language Models", eq. 1). Scores and the norms they need; `prune` runs them block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


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
