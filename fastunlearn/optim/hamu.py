"""HamuSGD: the HAMU step as a torch optimiser, so that schedulers, checkpoints and hooks work as with any other.

The step is `ops.hamu_step_` (arXiv 2606.02119); the gradients come from whoever keeps them apart (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastunlearn import ops
from fastunlearn.ops.mask import BitMask

Gradients = tuple[Sequence[Tensor | None], Sequence[Sequence[Tensor | None]]]


class HamuSGD(Optimizer):
    """Plain SGD of the constrained kind: no momentum, no weight decay, which would void the certificate.

    Args:
        params: tensors or (name, tensor) pairs; one group.
        gradients: called in `step`: (forget gradients of descent, [retain gradients of every group]).
        masks: for each parameter a BitMask or None.
        lr: eta. options: of `ops.hamu_step_`: variant, ratio, q, share, scope, allocation, rule, budgets, max_grad_norm,
            skip_flagged, stochastic_rounding, seed, process_group.
        infeasible: where the ball does not hold Q: "error"; "largest": the most that it does; "stop": an error in the first step,
            later nothing is done and `infeasible_step` says why.

    Attributes:
        certificate: of the last step; None before it, and where lr was 0 and nothing was done.

    The number of steps and `shrink`, a factor on lr that backtracking halves, are saved with the parameter group.
    """

    def __init__(
        self,
        params: Any,
        gradients: Callable[[], Gradients],
        masks: Sequence[BitMask | None] | None = None,
        lr: float = 1e-4,
        *,
        infeasible: str = "error",
        **options: Any,
    ):
        if infeasible not in ("error", "largest", "stop"):
            raise ValueError(f"infeasible: want 'error', 'largest' or 'stop', got {infeasible!r}")
        super().__init__(params, {"lr": lr, "steps": 0, "shrink": 1.0})
        if len(self.param_groups) != 1:
            raise ValueError(f"params: want one group, got {len(self.param_groups)}; one certificate is of one step")
        self.gradients, self.masks, self.infeasible, self.options = gradients, masks, infeasible, options
        self.certificate: ops.Certificate | None = None
        self.infeasible_step: str | None = None

    def shrink(self, factor: float = 0.5) -> None:
        """Makes every later step smaller by this factor."""
        self.param_groups[0]["shrink"] *= factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        forget, retain = self.gradients()
        group["steps"] += 1
        lr = float(group["lr"]) * group["shrink"]
        self.certificate = None
        if lr == 0:
            return loss
        options = {**self.options, "lr": lr, "masks": self.masks, "descent": True, "step": group["steps"]}
        given = list(retain) if len(retain) > 1 else retain[0]
        try:
            self.certificate = ops.hamu_step_(group["params"], given, forget, **options)
        except ops.InfeasibleError as error:
            if self.infeasible == "stop" and group["steps"] > 1:
                self.infeasible_step = str(error)
                return loss
            if self.infeasible != "largest" or error.largest <= 0:
                raise
            options |= {"ratio": None, "q": None, "share": 1.0}
            self.certificate = ops.hamu_step_(group["params"], given, forget, **options)
        return loss
