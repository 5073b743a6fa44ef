"""MaskedAdamW: AdamW that moves, and keeps state for, only the entries a mask allows.

The maths: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), in torch.optim.AdamW's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastunlearn.ops import _masked_step as engine
from fastunlearn.ops._slots import Batch
from fastunlearn.optim._base import MaskedOptimizer, _Entry, check_torch_options


class MaskedAdamW(MaskedOptimizer):
    """AdamW on the entries that may move.

    Frozen entries stay equal bit for bit, whatever the weight decay, the learning rate or their gradients (NaN included).
    Moments are fp32, 1-D and compact: 8 bytes for each entry that may move. Where every entry may move the step is
    torch.optim.AdamW's, to rounding. One call of a kernel a step and device for all groups.

    Args:
        params: tensors, named tensors or groups, as in torch.optim; float32, float16 or bfloat16; DTensors too. A group may
            carry its own `masks` and `lr_scale`.
        masks: None, a sequence aligned with the parameters, or a mapping by name (with named parameters) or by tensor, with
            an entry for each. An entry is a BitMask, a torch.bool tensor of the parameter's shape, or None: every entry may
            move.
        lr, betas, eps, weight_decay, maximize: torch.optim.AdamW's.
        lr_scale: None, or like masks (a mapping may leave parameters out): for each None or factors on the learning rate of
            every entry, so on the update (decay included) and not on the gradient, where AdamW would cancel them. Of the
            parameter's shape, or compact: one for each entry that may move, in row-major order.
        max_grad_norm: clips the norm over entries that may move, inside the step; the norm is then `optimizer.grad_norm`.
        stochastic_rounding: bfloat16 parameters are rounded at random, without bias, by a counter of (seed, step, parameter,
            entry): a resumed run repeats it. Without it steps under half a bfloat16 place are lost.
        master_weights: keep fp32 copies of the entries that may move of float16 and bfloat16 parameters instead.
        seed: of stochastic rounding.
        fused, foreach: taken for torch.optim's sake and without effect: the step is always fused. amsgrad, capturable and
            differentiable are refused where they are True.

    Raises:
        TypeError, ValueError: naming the argument.

    `state_dict()` holds neither masks nor lr_scale: give them again when a run is resumed.

    With torch.amp.GradScaler a step is skipped when any gradient, also of a frozen entry, is not finite: the scaler looks
    at whole gradients.
    """

    _compact = ("exp_avg", "exp_avg_sq")
    _kernel = "masked_adamw"

    def __init__(
        self,
        params: Any,
        masks: Any = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        lr_scale: Any = None,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = True,
        master_weights: bool = False,
        seed: int = 0,
        fused: bool | None = None,
        foreach: bool | None = None,
        **torch_options: Any,
    ):
        check_torch_options(torch_options)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, masks, defaults, lr_scale=lr_scale, max_grad_norm=max_grad_norm)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"betas: want two numbers in [0, 1), got {betas}")
        if not group["eps"] >= 0:
            raise ValueError(f"eps: want a number >= 0, got {group['eps']}")

    def _new_state(self, state: dict[str, Any], entry: _Entry, param: Tensor, group: Mapping[str, Any]) -> None:
        super()._new_state(state, entry, param, group)
        for name in self._compact:
            if name not in state:
                state[name] = torch.zeros(entry.slot.count, dtype=torch.float32, device=param.device)

    def _options(self, group: Mapping[str, Any], step: int, starts: bool) -> engine.Options:
        beta1, beta2 = group["betas"]
        return engine.Options(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            step=step,
            seed=group["seed"],
            stochastic=group["stochastic_rounding"],
        )

    def _run(
        self, batch: Batch, options: list[engine.Options], grad_scale: Tensor | None, tables: engine.Tables
    ) -> None:
        engine.adamw_batch(batch, options, grad_scale, tables)
