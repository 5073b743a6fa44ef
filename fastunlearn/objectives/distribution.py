"""Objectives that look at the model's whole next-token distribution, by `ops.linear_divergence`: never at logits in memory.

With z the logits at a position that predicts an answer's token y, p = softmax(z):

    UNDIAL  mean -sum_v t_v log p_v, t = softmax(z_ref - beta [v = y])          (Dong et al. 2024, 2402.10052, eq. 3-4)
    CEU     mean -sum_v t_v log p_v, t = softmax(z with z_y = -inf), constant   (Yang 2025, 2503.01224, eq. 5), the first answer
            token left out (its footnote on training settings); no retain term
    PDU     mean (max_v z_v - mean_v z_v)^2 + lambda (retain - eps), lambda <- max(0, lambda + step (retain - eps))
            (Entesari et al. 2025, 2506.05314, eq. 9-11)

open-unlearning (`parity`) takes UNDIAL's mean over prompts and padding as well, where a label of -100 means the hundredth entry from
the end of the vocabulary, and PDU's at the answer's tokens instead of where they are predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastunlearn.objectives.language import Inputs, Objective
from fastunlearn.objectives.logprobs import IGNORED, divergence, next_tokens, positions
from fastunlearn.objectives.references import References
from fastunlearn.objectives.states import head_of


@dataclass(frozen=True)
class UNDIAL(Objective):
    """Self-distillation towards the reference's distribution with the answer's logits lowered by beta."""

    alpha: float = 0.0
    beta: float = 10.0
    needs_states = True

    def forget(self, model: Any, inputs: Inputs, references: References) -> Tensor:
        batch = inputs["forget"]
        reference = references.states("forget", batch["index"])
        if self.parity:
            kept = torch.ones_like(batch["labels"], dtype=torch.bool)
            kept[:, -1] = False
            head: Any = head_of(model)
            labels = batch["labels"][:, 1:].reshape(-1) % head.weight.shape[0]
        else:
            kept = positions(batch["labels"])
            labels = next_tokens(batch["labels"])[kept]
        return divergence(model, batch, kept, labels, "undial", reference, self.beta).mean()


@dataclass(frozen=True)
class CEU(Objective):
    """Cross entropy with the model's own distribution without the answer's token."""

    alpha: float = 0.0
    ignore_first_n_answer_tokens: int = 1
    at_least_zero = ("gamma", "alpha", "ignore_first_n_answer_tokens")

    def forget(self, model: Any, inputs: Inputs, references: References) -> Tensor:
        batch = inputs["forget"]
        counted = batch["labels"] != IGNORED
        first = counted & (counted.cumsum(1) <= self.ignore_first_n_answer_tokens)
        labels = batch["labels"].masked_fill(first, IGNORED)
        if not bool((labels[:, 1:] != IGNORED).any()):
            raise ValueError(
                f"ignore_first_n_answer_tokens: no answer of the batch has more than {self.ignore_first_n_answer_tokens} tokens"
            )
        kept = positions(labels)
        return divergence(model, batch, kept, next_tokens(labels)[kept], "ce_u").mean()


class Dual:
    """PDU's multiplier of the retain term.

    Attributes:
        value: lambda. eps: the retain loss that is allowed.
    """

    def __init__(self, start: float, eps: float, step: float, upon: str, warmup_epochs: float, each: bool):
        self.value, self.eps, self.step, self.upon, self.warmup, self.each = start, eps, step, upon, warmup_epochs, each
        self.losses: list[float] = []
        self.at = 0.0  # the epoch of the last of them

    def observe(self, retain_loss: float, epoch: float) -> None:
        """The retain loss of a micro-batch, averaged over processes."""
        self.losses.append(retain_loss)
        self.at = epoch
        if self.each and self.upon == "step":
            self._update(epoch)

    def end(self, epoch: float, of: str) -> None:
        """A step or an epoch is over."""
        if of == self.upon:
            self._update(epoch if of == "epoch" else self.at)

    def _update(self, epoch: float) -> None:
        # Full epochs: open-unlearning enables updates when the warm-up's last epoch has ended.
        if self.losses and (not self.warmup or int(epoch + 1e-6) >= self.warmup):
            gap = sum(self.losses) / len(self.losses) - self.eps
            self.value = max(0.0, self.value + self.step * gap)
        self.losses.clear()


@dataclass(frozen=True)
class PDU(Objective):
    """Flat logits on the forget set, a bound on the retain loss kept by a dual variable that starts at alpha.

    With dual_update_upon="step" the multiplier moves once a step, by the mean over its micro-batches (parity: after each of them);
    with "epoch" by the mean over the epoch's batches. Its defaults are those of the TOFU runs.
    """

    alpha: float = 100.0
    retain_loss_eps: float = 0.3
    primal_dual: bool = True
    dual_step_size: float = 5.0
    dual_update_upon: str = "step"
    dual_warmup_epochs: float = 5.0
    at_least_zero = ("gamma", "alpha", "retain_loss_eps", "dual_step_size", "dual_warmup_epochs")
    updates: ClassVar[tuple[str, ...]] = ("step", "epoch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_update_upon not in self.updates:
            raise ValueError(f"dual_update_upon: want one of {', '.join(self.updates)}, got {self.dual_update_upon!r}")

    def make_dual(self) -> Dual | None:
        """The multiplier of a run; None: alpha stays what it is."""
        if not self.primal_dual or not self.alpha:
            return None
        return Dual(
            self.alpha,
            self.retain_loss_eps,
            self.dual_step_size,
            self.dual_update_upon,
            self.dual_warmup_epochs,
            self.parity,
        )

    def forget(self, model: Any, inputs: Inputs, references: References) -> Tensor:
        batch = inputs["forget"]
        kept = batch["labels"] != IGNORED if self.parity else positions(batch["labels"])
        return divergence(model, batch, kept, batch["labels"].new_zeros(int(kept.sum())), "pdu").mean()
