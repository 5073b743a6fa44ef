"""HamuSGD: the HAMU step as a torch optimiser, so that schedulers, checkpoints and hooks work as with any other.

The step is `ops.hamu_step_` (arXiv 2606.02119); the gradients come from whoever keeps them apart (`gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastunlearn import ops
from fastunlearn.ops._slots import local
from fastunlearn.ops.hamu import group_of
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
        geometry: "euclidean": the paper's balls. "adam" (a reconstruction): of D = (sqrt(v) + eps)^(-1/2), v the running mean
            (beta2, corrected for its start) of the squares of the forget gradient and of the mean retain gradient, each over its
            norm. A ball holds changes with ||change / D|| <= lr ||D g_retain|| / ||g_retain|| ("u": of g_forget), so that
            following that gradient alone moves no weight by more than about lr, as Adam does without momentum, however long the
            gradients are. The constraints are the same: promises are of first order in the losses, and a certificate checks them.
            max_grad_norm is without meaning, ratio is refused (without share and q: share 0.5), the certificate's lr is the one over
            that norm, its lengths are of D g; v is one more float32 copy of the parameters, D another in a step.

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
        geometry: str = "euclidean",
        beta2: float = 0.999,
        eps: float = 1e-8,
        **options: Any,
    ):
        if geometry not in ("euclidean", "adam"):
            raise ValueError(f"geometry: want 'euclidean' or 'adam', got {geometry!r}")
        if geometry == "adam" and options.get("ratio") is not None:
            raise ValueError("ratio: of clipped gradients, which geometry='adam' does not know; give share or q")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2: want a number in [0, 1), got {beta2}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps: want a number > 0, got {eps}")
        if infeasible not in ("error", "largest", "stop"):
            raise ValueError(f"infeasible: want 'error', 'largest' or 'stop', got {infeasible!r}")
        told = options.get("share"), options.get("q"), options.get("budgets") if options.get("variant") == "u" else None
        if geometry == "adam" and all(value is None for value in told):
            options["share"] = 0.5
        super().__init__(params, {"lr": lr, "steps": 0, "shrink": 1.0})
        if len(self.param_groups) != 1:
            raise ValueError(f"params: want one group, got {len(self.param_groups)}; one certificate is of one step")
        self.gradients, self.masks, self.infeasible, self.options = gradients, masks, infeasible, options
        self.geometry, self.beta2, self.eps = geometry, beta2, eps
        self.certificate: ops.Certificate | None = None
        self.infeasible_step: str | None = None

    def _products(self, params: Sequence[Tensor], rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """Inner products of whole gradients over the entries that may move, of all shards; float64 on the CPU."""
        values = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        devices = [local(p).device for p in params]
        for device in dict.fromkeys(devices):
            here = [t for t, other in enumerate(devices) if other == device]
            masks = None if self.masks is None else [self.masks[t] for t in here]
            values += ops.gram([[row[t] for t in here] for row in rows], masks=masks).sum(0).cpu()
        process_group = group_of(params, self.options.get("process_group"))
        if process_group is None:
            return values
        values = values.to(devices[0] if torch.distributed.get_backend(process_group) == "nccl" else "cpu")
        torch.distributed.all_reduce(values, group=process_group)
        return values.cpu()

    def _adam(self, forget: Sequence[Tensor | None], retain: Sequence[Sequence[Tensor | None]]) -> dict[str, Any]:
        """Counts these gradients in v. Returns the options that make the step one of its geometry; none where they are bad."""
        group, k = self.param_groups[0], len(retain)
        params = group["params"]
        rows = [[x if x is None else local(x) for x in row] for row in (*retain, forget)]
        values = self._products(params, rows)
        kept, gone = float(values[:k, :k].mean()), float(values[k, k])
        if not torch.isfinite(values).all() or not (values.diagonal() > 0).all():
            # Refused by the step, which says which.
            return {}
        if kept <= 0:
            raise ValueError("g_retain: the groups' gradients cancel out; their mean says nothing of what must stay")
        group["counted"] = group.get("counted", 0) + 1
        correction, scales = 1 - self.beta2 ** group["counted"], []
        for t, p in enumerate(params):
            state = self.state[p]
            if not state:
                state["square"] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
            v = local(state["square"]).mul_(self.beta2)
            mine = [x.float() for x in (row[t] for row in rows[:k]) if x is not None]
            if mine:
                mean = mine[0] if k == 1 else torch.stack(mine).sum(0) / k
                v.addcmul_(mean, mean, value=(1 - self.beta2) / kept)
            lost = rows[k][t]
            if lost is not None:
                lost = lost.float()
                v.addcmul_(lost, lost, value=(1 - self.beta2) / gone)
            scales.append((v / correction).sqrt_().add_(self.eps).rsqrt_())
        length = gone if self.options.get("variant") == "u" else kept
        return {"scales": scales, "max_grad_norm": None, "lr": float(group["lr"]) * group["shrink"] / math.sqrt(length)}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        # torch gives a state its parameter's type; v is float32.
        for p, index in zip(self.param_groups[0]["params"], state_dict["param_groups"][0]["params"]):
            if "square" in state_dict["state"].get(index, {}):
                square = state_dict["state"][index]["square"]
                self.state[p]["square"] = square.detach().to(p.device, torch.float32, copy=True)

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
        if self.geometry == "adam":
            options |= self._adam(forget, retain)
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
