"""Unlearning objectives for language models, with open-unlearning's names and defaults.

Each is a forget term and a retain term: loss = gamma * forget + alpha * retain. The terms are functions of log p(answer), summed
over answer tokens (`AnswerLogprobs`), never of logits: differences of logits are no log-ratios. With r = log p - log p_ref:

    GradAscent  forget = -NLL a token                                       no retain term
    GradDiff    forget = -NLL a token                                       (Liu et al. 2022)
    NPO         forget = 2 / beta * mean log(1 + exp(beta r))               (Zhang et al. 2024, eq. 3)
    SimNPO      forget = -2 / beta * mean log sigmoid(beta (NLL / length - delta))    (Fan et al. 2024, eq. 6)
    IdkDPO      forget = -2 / beta * mean log sigmoid(beta (r_idk - r_forget))        (Maini et al. 2024, "IDK" with DPO)

The retain term is NLL a token (the mean of the batch, as transformers' loss) or KL to the reference model.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastunlearn.objectives.logprobs import AnswerLogprobs

RETAIN_LOSSES = ("NLL", "KL")


def token_nll(answers: AnswerLogprobs) -> Tensor:
    """Mean negative log-likelihood of the batch's answer tokens; nats, scalar (transformers' causal loss)."""
    return -answers.total.sum() / answers.length.sum()


@dataclass(frozen=True)
class Objective:
    """What every objective has.

    Attributes:
        gamma: factor of the forget term.
        alpha: factor of the retain term; 0: no retain forward pass.
        retain_loss_type: "NLL" or "KL".
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain_loss_type: str = "NLL"

    #: needs log p(answer) of the forget set under the reference model
    needs_reference: ClassVar[bool] = False
    #: needs an "I don't know" answer for every forget row
    needs_alternates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("gamma", "alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: want a finite number >= 0, got {value}")
        if self.retain_loss_type not in RETAIN_LOSSES:
            raise ValueError(f"retain_loss_type: want one of {', '.join(RETAIN_LOSSES)}, got {self.retain_loss_type!r}")
        beta = getattr(self, "beta", 1.0)
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta: want a finite number > 0, got {beta}")

    def forget_loss(
        self,
        answers: AnswerLogprobs,
        reference: Tensor | None = None,
        alternates: AnswerLogprobs | None = None,
        alternates_reference: Tensor | None = None,
    ) -> Tensor:
        """The forget term without its factor.

        Args:
            answers: of the forget rows under the model that is trained.
            reference: fp32 [rows], log-probabilities summed over tokens under the reference model.
            alternates, alternates_reference: the same for the "I don't know" answers.

        Returns:
            fp32 scalar.
        """
        raise TypeError("Objective is a base class")  # pragma: no cover


@dataclass(frozen=True)
class GradAscent(Objective):
    """Gradient ascent on the forget set; no retain term."""

    alpha: float = 0.0

    def forget_loss(self, answers: AnswerLogprobs, *_: Any) -> Tensor:
        return -token_nll(answers)


@dataclass(frozen=True)
class GradDiff(Objective):
    """Gradient ascent on the forget set, descent on the retain set."""

    def forget_loss(self, answers: AnswerLogprobs, *_: Any) -> Tensor:
        return -token_nll(answers)


@dataclass(frozen=True)
class NPO(Objective):
    """Negative preference optimisation: ascent that slows down as the answer becomes less likely than it was."""

    beta: float = 0.1
    needs_reference = True

    def forget_loss(self, answers: AnswerLogprobs, reference: Tensor | None = None, *_: Any) -> Tensor:
        assert reference is not None
        return 2 / self.beta * F.softplus(self.beta * (answers.total - reference)).mean()


@dataclass(frozen=True)
class SimNPO(Objective):
    """NPO without a reference model: the log-likelihood a token against a margin delta (nats a token)."""

    gamma: float = 0.125
    beta: float = 4.5
    delta: float = 0.0

    def forget_loss(self, answers: AnswerLogprobs, *_: Any) -> Tensor:
        nll = -answers.total / answers.length
        return -2 / self.beta * F.logsigmoid(self.beta * (nll - self.delta)).mean()


@dataclass(frozen=True)
class IdkDPO(Objective):
    """DPO that prefers "I don't know" to the answer that must go."""

    beta: float = 0.1
    needs_reference = True
    needs_alternates = True

    def forget_loss(
        self,
        answers: AnswerLogprobs,
        reference: Tensor | None = None,
        alternates: AnswerLogprobs | None = None,
        alternates_reference: Tensor | None = None,
    ) -> Tensor:
        assert reference is not None
        assert alternates is not None
        assert alternates_reference is not None
        ratio = (alternates.total - alternates_reference) - (answers.total - reference)
        return -2 / self.beta * F.logsigmoid(self.beta * ratio).mean()


OBJECTIVES: dict[str, type[Objective]] = {c.__name__: c for c in (GradAscent, GradDiff, NPO, SimNPO, IdkDPO)}
_ALIASES = {"ga": "GradAscent", "gd": "GradDiff", "dpo": "IdkDPO"}


def closest(name: str, known: list[str]) -> str:
    """ "did you mean ...?" with up to three names, or the whole list."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    return (
        "did you mean " + " or ".join(by_lower[k] for k in near) + "?" if near else "known: " + ", ".join(sorted(known))
    )


def make_objective(name: str, **options: float | str | None) -> Objective:
    """The objective of that name (any case; GA, GD and DPO are known too).

    Args:
        name: one of OBJECTIVES.
        options: gamma, alpha, beta, delta, retain_loss_type; None: the objective's default.

    Raises:
        ValueError: unknown name (the closest are named), an option the objective does not have, or one out of range.
    """
    known = {key.lower(): key for key in OBJECTIVES} | _ALIASES
    key = str(name).lower().replace("_", "").replace("-", "")
    if key not in known:
        raise ValueError(f"objective: {name!r} is unknown; {closest(name, list(OBJECTIVES))}")
    kind = OBJECTIVES[known[key]]
    given = {option: value for option, value in options.items() if value is not None}
    unused = sorted(set(given) - {field.name for field in fields(kind)})
    if unused:
        raise ValueError(
            f"{unused[0]}: {kind.__name__} has no such option; it takes {', '.join(f.name for f in fields(kind))}"
        )
    return kind(**given)  # type: ignore[arg-type]
