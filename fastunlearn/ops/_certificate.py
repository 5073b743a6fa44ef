"""What a HAMU step promises (fastunlearn/ops/hamu.py), as one tensor of float64 that torch.library can hand on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn.ops._hamu_solve import Plan, Problem, binding

_HEAD = (
    "s", "demand", "lr", "capacity", "needed", "hardness", "flagged", "largest", "step_norm", "kappa", "quota", "taken", "budgeted",
)  # fmt: skip
_GROUP = ("clip", "norms", "predicted", "multipliers", "budgets")


def size(tensors: int, groups: int) -> int:
    """How many values a certificate of so many tensors and retain groups has."""
    return len(_HEAD) + len(_GROUP) * (groups + 1) + tensors * groups


class Certificate:
    """What a HAMU step promises to first order, and how hard it was. Numbers of groups are in the order retain ..., forget.

    Of a step with `scales` D lengths and inner products (norms, kappa, cosines, step_norm) are of D g and of the change over D.

    Everything is read from `values`, one float64 tensor on the CPU, when it is asked for.

    Attributes:
        s: sine of the angle by which every tensor's step is rotated towards forgetting: the share of what the ball allows that
            was asked for.
        demand: Q (variant "q") or U ("u"), of the clipped gradients. largest: the most that the ball allowed.
        capacity: most forgetting possible inside the ball and the budgets; flagged: that is less than was `needed`, so that retain
            damage (variant "u": un-forgetting) cannot be avoided by any small step. taken: the parameters were changed.
        hardness: 1 - capacity / what the ball allows when nothing must be kept: 0 easy, 1 nothing can be forgotten for free.
        kappa: inner product of the (mean) retain and the forget gradient, clipped: the paper's hardness. cosines: float64
            [tensors, K], of every tensor and retain group.
        clip: factor on each group's gradient. norms: of the gradients as they were given.
        predicted_forget, predicted_retain: first-order changes of the losses, not clipped. step_norm: length of the step.
        multipliers: of the retain groups, in the test of capacity. binding: numbers of the groups that limit it.
        budgets: by how much each retain loss may grow, as they were given; None without.
    """

    __slots__ = ("groups", "tensors", "values")

    def __init__(self, values: Tensor, groups: int, tensors: int):
        self.values, self.groups, self.tensors = values, groups, tensors

    def _number(self, name: str) -> float:
        return float(self.values[_HEAD.index(name)])

    def _row(self, name: str) -> list[float]:
        n = self.groups + 1
        start = len(_HEAD) + n * _GROUP.index(name)
        return self.values[start : start + n].tolist()

    s = property(lambda self: self._number("s"))
    demand = property(lambda self: self._number("demand"))
    lr = property(lambda self: self._number("lr"))
    largest = property(lambda self: self._number("largest"))
    capacity = property(lambda self: self._number("capacity"))
    needed = property(lambda self: self._number("needed"))
    hardness = property(lambda self: self._number("hardness"))
    flagged = property(lambda self: bool(self._number("flagged")))
    taken = property(lambda self: bool(self._number("taken")))
    step_norm = property(lambda self: self._number("step_norm"))
    kappa = property(lambda self: self._number("kappa"))
    clip = property(lambda self: self._row("clip"))
    norms = property(lambda self: self._row("norms"))
    multipliers = property(lambda self: self._row("multipliers")[:-1])
    budgets = property(lambda self: self._row("budgets")[:-1] if self._number("budgeted") else None)
    predicted_retain = property(lambda self: self._row("predicted")[:-1])
    predicted_forget = property(lambda self: self._row("predicted")[-1])

    @property
    def variant(self) -> str:
        return "q" if self._number("quota") else "u"

    @property
    def binding(self) -> tuple[int, ...]:
        return binding(self.multipliers, [c * n for c, n in zip(self.clip, self.norms)])

    @property
    def cosines(self) -> Tensor:
        start = size(0, self.groups)
        return self.values[start:].view(self.tensors, self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Its numbers for a log, without those of single tensors."""
        names = (
            "s",
            "demand",
            "lr",
            "largest",
            "capacity",
            "needed",
            "hardness",
            "flagged",
            "taken",
            "step_norm",
            "kappa",
        )
        rows = ("clip", "norms", "multipliers", "budgets", "predicted_retain", "predicted_forget")
        out = {name: getattr(self, name) for name in (*names, *rows)}
        return {"variant": self.variant, **out, "binding": list(self.binding)}

    def holds(self, forget: float, retain: Sequence[float]) -> bool:
        """Whether measured changes of the losses, on the step's own batches, are within the certificate.

        Variant "q": forget >= 0.9 Q, every retain change <= its prediction + 10 % of lr ||g||^2 of that group; "u": every retain
        change <= -0.9 U (with budgets: <= its budget + 10 % of lr ||g_f|| ||g||), forget >= its prediction - 10 % of lr ||g_f||^2.
        In units of the losses, gradients not clipped.
        """
        clip, budgets, slack = self.clip, self.budgets, self._slack()
        if self.variant == "q":
            enough = forget >= 0.9 * self.demand / clip[-1]
            return enough and all(r <= p + e for r, p, e in zip(retain, self.predicted_retain, slack))
        if budgets is not None:
            enough = all(r <= b + e for r, b, e in zip(retain, budgets, slack))
        else:
            enough = all(r <= -0.9 * self.demand / c for r, c in zip(retain, clip))
        return enough and forget >= self.predicted_forget - slack[-1]

    def unharmed(self, retain: Sequence[float]) -> bool:
        """Whether no retain loss, on the step's own batches, grew by more than its prediction or its budget; 0 where these are falls.

        With the tolerance of `holds`. A step after which retain losses fell, but by less than predicted, is unharmed and does not hold.
        """
        allowed = [max(p, b, 0.0) for p, b in zip(self.predicted_retain, self.budgets or [0.0] * self.groups)]
        return all(r <= a + e for r, a, e in zip(retain, allowed, self._slack()))

    def _slack(self) -> list[float]:
        """Tolerance of a loss change, of every group: 10 % of lr ||g||^2, in "u" of lr ||g_f|| ||g||."""
        norms, last = self.norms, self.clip[-1] * self.norms[-1]
        if self.variant == "q":
            return [0.1 * self.lr * c * n * n for c, n in zip(self.clip, norms)]
        return [0.1 * self.lr * last * n for n in norms]

    def __repr__(self) -> str:
        numbers = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.to_dict().items())
        return f"Certificate({numbers})"


def pack(plan: Plan, problem: Problem, taken: bool) -> Tensor:
    """The values of a certificate."""
    clipped = problem.gram * problem.clip[:, None] * problem.clip
    k = clipped.shape[1] - 1
    squares = np.maximum(np.einsum("tgg->tg", problem.gram), 0)
    norms = np.sqrt(squares)
    products = norms[:, :k] * norms[:, k:]
    cosines = np.divide(problem.gram[:, :k, k], products, out=np.zeros_like(products), where=products > 0)
    head = {
        "s": plan.s, "demand": plan.demand, "lr": problem.lr, "capacity": plan.capacity, "needed": plan.needed,
        "hardness": plan.hardness, "flagged": plan.flagged, "largest": plan.largest, "step_norm": plan.step_norm,
        "kappa": clipped[:, :k, k].sum() / k, "quota": problem.variant == "q", "taken": taken,
        "budgeted": problem.budgets is not None,
    }  # fmt: skip
    groups = {
        "clip": problem.clip,
        "norms": np.sqrt(squares.sum(0)),
        "predicted": plan.predicted,
        "multipliers": np.append(plan.multipliers, 0.0),
        "budgets": np.zeros(k + 1) if problem.budgets is None else np.append(problem.budgets / problem.clip[:k], 0.0),
    }
    flat = [[float(head[name]) for name in _HEAD], *(groups[name] for name in _GROUP), cosines.clip(-1, 1).ravel()]
    return torch.from_numpy(np.concatenate(flat).astype(np.float64))
