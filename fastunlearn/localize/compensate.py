"""Survivors of a pruned model take over what a change of its dense weights would do, layer by layer.

For every masked linear layer: weight += argmin over d with support on the mask of ||(d - D) X||^2, D a change of the dense weight
and X the layer's inputs on the calibration rows, as the corrected layers before it give them. The optimal brain surgeon's
update (Hassibi and Stork 1993), by SparseGPT's sweep (`obs_compensate`). One block's Hessians live at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastunlearn._modes import evaluating
from fastunlearn.localize.prune import _batches, _first_pass, find_blocks
from fastunlearn.localize.sparsegpt import input_hessians, obs_compensate
from fastunlearn.ops.mask import BitMask


@torch.no_grad()
def obs_compensate_model(
    model: nn.Module,
    masks: Mapping[str, BitMask],
    deltas: Mapping[str, Tensor],
    calibration: Any,
    *,
    blocks: Sequence[nn.Module] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    batch_size: int = 8,
    progress: bool = True,
) -> None:
    """Changes the survivors of every masked linear layer in place; zeros stay zeros.

    Args:
        model: pruned; its parameter names are the names of the masks.
        masks: names of weights of linear layers inside the blocks -> what pruning left.
        deltas: name -> D [out, in], looked up one at a time.
        calibration: int64 tokens [rows, length], or a sequence of such batches, without padding.
        blocks: the decoder blocks in the order they run; None: found.
        damping, block_size: of `obs_compensate`.
        batch_size: rows of a forward pass where calibration is one tensor.

    Raises:
        ValueError: a mask is of no linear layer inside the blocks.
    """
    blocks = find_blocks(model) if blocks is None else list(blocks)
    modules = [
        {
            name: module.weight
            for name, module in ((_name_of(model, m), m) for m in block.modules() if isinstance(m, nn.Linear))
            if f"{name}.weight" in masks
        }
        for block in blocks
    ]
    known = {f"{name}.weight" for weights in modules for name in weights}
    strangers = sorted(set(masks) - known)
    if strangers:
        raise ValueError(
            f"masks: {len(strangers)} belong to no linear layer inside the blocks, the first is {strangers[0]!r}"
        )
    with evaluating(model):
        hidden, others = _first_pass(blocks, _batches(model, calibration, batch_size))
        bar = tqdm(
            zip(blocks, others, modules, strict=True),
            desc="compensating",
            unit="block",
            total=len(blocks),
            leave=False,
            disable=None if progress else True,
        )
        for block, calls, weights in bar:
            with input_hessians({name: model.get_submodule(name) for name in weights}) as hessians:
                for x, (args, kwargs) in zip(hidden, calls, strict=True):
                    block(x, *args, **kwargs)
            for name, weight in weights.items():
                if name not in hessians:
                    raise ValueError(f"calibration: {name} met no input; use more or other text")
                change = obs_compensate(
                    deltas[f"{name}.weight"].to(weight.device),
                    masks[f"{name}.weight"].to(weight.device),
                    hessians[name],
                    damping=damping,
                    block_size=block_size,
                )
                weight.add_(change.to(weight.dtype))
            # Autocast keeps low-precision copies of parameters; these are of the weights before.
            torch.clear_autocast_cache()
            for i, (args, kwargs) in enumerate(calls):
                out = block(hidden[i], *args, **kwargs)
                hidden[i] = out[0] if isinstance(out, tuple) else out


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)
