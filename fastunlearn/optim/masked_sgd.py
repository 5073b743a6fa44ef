"""MaskedSGD: SGD with momentum that moves, and keeps state for, only the entries a mask allows (torch.optim.SGD's maths)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastunlearn.ops import _masked_step as engine
from fastunlearn.ops._slots import Batch
from fastunlearn.optim._base import MaskedOptimizer, _Entry, check_torch_options


class MaskedSGD(MaskedOptimizer):
    """SGD on the entries that may move; momentum is fp32, 1-D and compact.

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: torch.optim.SGD's.
        params, masks, lr_scale, max_grad_norm, stochastic_rounding, master_weights, seed: as in `MaskedAdamW`; lr_scale is a
            factor on the whole update.
        fused, foreach, differentiable: as in `MaskedAdamW`.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    _compact = ("momentum_buffer",)
    _kernel = "masked_sgd"

    def __init__(
        self,
        params: Any,
        masks: Any = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, masks, defaults, lr_scale=lr_scale, max_grad_norm=max_grad_norm)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if not group["momentum"] >= 0:
            raise ValueError(f"momentum: want a number >= 0, got {group['momentum']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov: wants momentum > 0 and dampening 0")

    def _new_state(self, state: dict[str, Any], entry: _Entry, param: Tensor, group: Mapping[str, Any]) -> None:
        super()._new_state(state, entry, param, group)
        if group["momentum"] and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros(entry.slot.count, dtype=torch.float32, device=param.device)
            state["starts"] = True

    def _options(self, group: Mapping[str, Any], step: int, starts: bool) -> engine.Options:
        return engine.Options(
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first=starts or not group["momentum"],
            step=step,
            seed=group["seed"],
            stochastic=group["stochastic_rounding"],
        )

    def _run(
        self, batch: Batch, options: list[engine.Options], grad_scale: Tensor | None, tables: engine.Tables
    ) -> None:
        engine.sgd_batch(batch, options, grad_scale, tables)
