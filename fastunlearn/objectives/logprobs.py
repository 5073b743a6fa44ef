"""Losses of answers: log p(answer | question), and distances of the model's next-token distribution to a target's.

Every objective for language models is made of these numbers, at the positions that predict an answer's token: logits of prompts
and padding are never made, and those of answers only where a model's output layer leaves no other way (`objectives.states`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn._modes import evaluating
from fastunlearn.objectives.states import States, at_head, head_of, known_reason, last_states, logits_at, unwrapped

#: label of a token that does not count
IGNORED = -100


class AnswerLogprobs(NamedTuple):
    """What a model says of a batch of answers."""

    total: Tensor  #: fp32 [rows], log-probability summed over the answer's tokens, <= 0
    length: Tensor  #: int64 [rows], number of answer tokens


class Reference(NamedTuple):
    """A reference model at the same positions: its last hidden states and the output layer they belong to (None: the model's)."""

    hidden: Tensor  #: [n, width]
    weight: Tensor | None = None  #: [vocabulary, width]
    bias: Tensor | None = None  #: [vocabulary]


class LiveReference:
    """A reference that is asked anew in every batch.

    Args:
        source: a model, or a function that makes a context under which the trained model is the reference (adapter off).
    """

    def __init__(self, source: nn.Module | Callable[[], AbstractContextManager[Any]]):
        self.source = source

    def plain(self) -> bool:
        """Whether hidden states will do."""
        return not isinstance(self.source, nn.Module) or known_reason(self.source) is None

    def states(self, model: Any, batch: Mapping[str, Tensor], kept: Tensor) -> Reference:
        if isinstance(self.source, nn.Module):
            head: Any = head_of(self.source)
            return Reference(last_states(self.source, batch, kept), head.weight, head.bias)
        with self.source():
            return Reference(last_states(model, batch, kept))

    @torch.no_grad()
    def logits(self, model: Any, batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
        if isinstance(self.source, nn.Module):
            with evaluating(self.source):
                return logits_at(self.source, batch, kept)
        with self.source(), evaluating(model):
            return logits_at(model, batch, kept)


def positions(labels: Tensor) -> Tensor:
    """bool [rows, length]: the positions whose logits predict an answer's token.

    Raises:
        ValueError: there is none.
    """
    kept = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    if not bool(kept.any()):
        raise ValueError("labels: no answer token in the batch")
    return kept


def next_tokens(labels: Tensor) -> Tensor:
    """int64 [rows, length], labels moved to the position that predicts them; the last position predicts none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def answer_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the positions that predict an answer's token.

    Args:
        model: a causal language model of transformers, maybe wrapped (PEFT, DDP, FSDP).
        batch: input_ids, attention_mask, labels int64 [rows, length]; labels -100 but on answer tokens, at the position of
            their token, as everywhere in transformers.

    Returns:
        (logits [n, vocabulary] in the model's dtype, labels [n], row of each [n]), n the number of answer tokens.

    Raises:
        ValueError: no answer token in the batch, or the model has no output layer.
    """
    kept = positions(batch["labels"])
    return logits_at(model, batch, kept), next_tokens(batch["labels"])[kept], kept.nonzero()[:, 0]


def token_logprobs(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of each of the batch's answer tokens, row-major, differentiable; softmax in fp32.

    Args:
        model, batch: as `answer_logits`.

    Returns:
        (fp32 [n], row of each int64 [n]).

    Raises:
        ValueError: as `answer_logits`.
    """
    kept = positions(batch["labels"])
    labels = next_tokens(batch["labels"])[kept]

    def from_states(s: States) -> Tensor:
        return -ops.linear_nll(
            s.hidden, s.weight, labels, bias=s.bias, reduction="token", logit_scale=s.scale, softcap=s.softcap
        )[0]

    token = at_head(
        model, batch, kept, from_states, lambda logits: -F.cross_entropy(logits.float(), labels, reduction="none")
    )
    return token, kept.nonzero()[:, 0]


def answer_logprobs(model: Any, batch: Mapping[str, Tensor]) -> AnswerLogprobs:
    """log p(answer | question) of each row, differentiable: `token_logprobs` summed over the row's answer."""
    token, row = token_logprobs(model, batch)
    rows = len(batch["labels"])
    length = torch.zeros(rows, dtype=torch.int64, device=row.device).index_add(0, row, torch.ones_like(row))
    return AnswerLogprobs(token.new_zeros(rows).index_add(0, row, token), length)


def divergence_of_logits(
    kind: str, logits: Tensor, reference: Tensor | None, labels: Tensor, strength: float = 0.0
) -> Tensor:
    """`ops.linear_divergence`'s losses from logits [n, vocabulary] (soft cap and scale behind them); fp32 [n]."""
    z = logits.float()
    if kind == "pdu":
        return (z.max(-1)[0] - z.mean(-1)).square()
    if kind == "ce_u":
        target = z.detach().scatter(1, labels[:, None], float("-inf")).softmax(-1)
        return F.cross_entropy(z, target, reduction="none")
    assert reference is not None
    r = reference.float()
    if kind == "kl":
        return F.kl_div(z.log_softmax(-1), r.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    target = r.scatter_add(1, labels[:, None], torch.full_like(r[:, :1], -strength)).softmax(-1)
    return F.cross_entropy(z, target, reduction="none")


def divergence(
    model: Any,
    batch: Mapping[str, Tensor],
    kept: Tensor,
    labels: Tensor,
    kind: str,
    reference: LiveReference | Reference | None = None,
    strength: float = 0.0,
) -> Tensor:
    """`ops.linear_divergence` at chosen positions.

    Args:
        model, batch: as `answer_logits`.
        kept: bool [rows, length]. labels: int64 [n], one for each of these positions, none ignored.
        reference: for kl and undial: a `LiveReference`, or the states at these positions.

    Returns:
        fp32 [n], differentiable.

    Raises:
        ValueError: hidden states of a reference, where the model's losses need logits.
    """
    live = reference if isinstance(reference, LiveReference) else None
    whole = live is not None and not live.plain()
    states: Reference | None = None
    if known_reason(model) is None and not whole:
        # Before the model's own pass: not inside it.
        states = reference if live is None else live.states(model, batch, kept)  # type: ignore[assignment]

    def from_states(s: States) -> Tensor:
        ref: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if states is not None:
            own = states.weight is None
            ref = (
                states.hidden.to(s.hidden.device, s.hidden.dtype),
                s.weight if own else _as(states.weight, s.weight),
                s.bias if own else _as(states.bias, s.weight),
            )
        return ops.linear_divergence(
            s.hidden, s.weight, ref[0], ref[1], labels, kind=kind, strength=strength, bias=s.bias, ref_bias=ref[2],
            reduction="token", logit_scale=s.scale, softcap=s.softcap,
        )[0]  # fmt: skip

    def from_logits(logits: Tensor) -> Tensor:
        if reference is not None and live is None:
            raise ValueError(
                f"reference: hidden states do not serve {type(unwrapped(model)).__name__}, as {known_reason(model)}; give "
                "reference_model"
            )
        wanted = None if live is None else live.logits(model, batch, kept)
        return divergence_of_logits(kind, logits, wanted, labels, strength)

    return at_head(model, batch, kept, from_states, from_logits, whole)


def _as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.device, like.dtype)


def answer_kl(model: Any, reference: Any, batch: Mapping[str, Tensor], *, parity: bool = False) -> Tensor:
    """KL(reference || model), summed over the vocabulary, mean over the positions that predict an answer's token; nats, scalar.

    Args:
        model: differentiated.
        reference: a model, a context manager under which `model` is the reference (a LoRA adapter that is off), a function that
            makes one, a `LiveReference` or a `Reference`.
        batch: as `answer_logits`.
        parity: as open-unlearning has it: the mean over all positions, those of prompts and padding included.
    """
    kept = torch.ones_like(batch["labels"], dtype=torch.bool) if parity else positions(batch["labels"])
    if isinstance(reference, AbstractContextManager):
        context = reference
        reference = LiveReference(lambda: context)
    source = reference if isinstance(reference, (Reference, LiveReference)) else LiveReference(reference)
    dummy = kept.new_zeros(int(kept.sum()), dtype=torch.int64)
    return divergence(model, batch, kept, dummy, "kl", source).mean()
