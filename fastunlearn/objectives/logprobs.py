"""log p(answer | question) of a causal language model, from the answers' tokens only.

Every objective for language models is a function of these numbers, so the logits of prompts and padding are never made: a hook
hands the output layer only the hidden states that predict an answer's token, inside the model's own forward pass (so a soft
cap or a scale of the logits, an adapter, DDP's and FSDP's wrappers all stay in place).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunlearn._modes import evaluating

#: label of a token that does not count
IGNORED = -100


class AnswerLogprobs(NamedTuple):
    """What a model says of a batch of answers."""

    total: Tensor  #: fp32 [rows], log-probability summed over the answer's tokens, <= 0
    length: Tensor  #: int64 [rows], number of answer tokens


def _unwrapped(model: Any) -> Any:
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    return model


@contextmanager
def _only(layer: nn.Module, kept: Tensor) -> Iterator[None]:
    """Hands `layer` [1, n, hidden]: the positions of [rows, length - 1] where `kept` is True."""

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if hidden.dim() != 3 or hidden.shape[:2] != (kept.shape[0], kept.shape[1] + 1):
            raise ValueError(
                f"model: its output layer is called with hidden states {tuple(hidden.shape)}, "
                f"want ({kept.shape[0]}, {kept.shape[1] + 1}, hidden)"
            )
        return (hidden[:, :-1][kept].unsqueeze(0), *args[1:])

    handle = layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


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
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    head = _unwrapped(model).get_output_embeddings()
    if head is None:
        raise ValueError("model: has no output layer (get_output_embeddings() is None); want a causal language model")
    with _only(head, kept):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    row = kept.nonzero()[:, 0]
    if not len(row):
        raise ValueError("labels: no answer token in the batch")
    return logits[0], labels[kept], row


def answer_logprobs(model: Any, batch: Mapping[str, Tensor]) -> AnswerLogprobs:
    """log p(answer | question) of each row, differentiable; softmax in fp32.

    Args:
        model, batch: as `answer_logits`.

    Raises:
        ValueError: as `answer_logits`; a row without an answer token.
    """
    logits, labels, row = answer_logits(model, batch)
    token = -F.cross_entropy(logits.float(), labels, reduction="none")
    length = torch.zeros(len(batch["labels"]), dtype=torch.int64, device=row.device).index_add(
        0, row, torch.ones_like(row)
    )
    return AnswerLogprobs(token.new_zeros(len(length)).index_add(0, row, token), length)


def answer_kl(model: Any, reference: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """KL(reference || model) over answer tokens, summed over the vocabulary, mean over tokens; nats, scalar.

    open-unlearning averages over rows after a sum over every position, prompt and padding included; here only answer tokens
    count, as in every other objective.

    Args:
        model: differentiated.
        reference: a model, or a context manager under which `model` is the reference (a LoRA adapter that is off).
        batch: as `answer_logits`.
    """
    separate = isinstance(reference, nn.Module)
    with torch.no_grad(), evaluating(reference if separate else model):  # no dropout in the reference
        if separate:
            wanted = answer_logits(reference, batch)[0]
        else:
            with reference:
                wanted = answer_logits(model, batch)[0]
        wanted = wanted.float().log_softmax(-1)
    got = answer_logits(model, batch)[0].float().log_softmax(-1)
    return F.kl_div(got, wanted, reduction="sum", log_target=True) / len(got)
