"""Fine-tuning until a set of facts is known by heart: what TOFU (Maini et al. 2024, section 3) does before it unlearns.

A plain loop around the masked optimiser, so that a pruned model keeps its pattern. General text runs along: without it a small
model that learns sixty short answers by heart speaks of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm

from fastunlearn import optim
from fastunlearn.data.text import TextSet, collate
from fastunlearn.objectives import AnswerLogprobs, answer_logprobs, token_nll
from fastunlearn.ops.mask import BitMask
from fastunlearn.parametrize import full_weights


def endless(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices, every index once before any comes again."""
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(count, generator=order).tolist()
        yield queue[:batch_size]
        queue = queue[batch_size:]


def memorise(
    model: Any,
    facts: TextSet,
    masks: Mapping[str, BitMask],
    *,
    text: TextSet | None = None,
    passes: int = 20,
    lr: float = 3e-4,
    batch_size: int = 20,
    text_batch_size: int = 3,
    text_weight: float = 0.3,
    until: float = 0.015,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Trains on the answers until they are known by heart; only what the masks name moves.

    Args:
        facts: what is to be known.
        text: general text that keeps the model able to speak; None: none.
        passes: at most so many times over all facts.
        text_batch_size, text_weight: rows of text in every step, and the factor of their loss.
        until: stop after a pass whose loss was below this (nats per answer token).
        autocast: dtype of the forward passes; None: the weights' own.

    Returns:
        The loss of each pass.
    """
    full_weights(model, masks, others=False)
    movable = [(name, parameter) for name, parameter in model.named_parameters() if name in masks]
    optimizer = optim.MaskedAdamW(movable, masks, lr=lr, weight_decay=0.0)
    device = movable[0][1].device
    order = torch.Generator().manual_seed(seed)
    texts = None if text is None else endless(len(text), text_batch_size, seed)

    losses: list[float] = []
    bar = tqdm(
        range(passes), desc="  memorising", unit="pass", leave=False, disable=None if progress else True
    )  # disable=None: no bar where standard error is a file
    with bar:
        for _ in bar:
            summed = tokens = 0.0
            for chosen in torch.randperm(len(facts), generator=order).split(batch_size):
                # One pass for both: what a pass costs beside its tokens, casting weights and gradients, is paid once.
                rows = [facts[i] for i in chosen.tolist()]
                known = len(rows)
                if text is not None and texts is not None:
                    rows += [text[i] for i in next(texts)]
                batch = {name: t.to(device) for name, t in collate(rows, facts.end_ids[0]).items()}
                with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                    total, length = answer_logprobs(model, batch)
                answers = AnswerLogprobs(total[:known], length[:known])
                loss = token_nll(answers)
                if len(rows) > known:
                    loss = loss + text_weight * token_nll(AnswerLogprobs(total[known:], length[known:]))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                summed -= float(answers.total.detach().sum())
                tokens += float(answers.length.sum())
            losses.append(summed / tokens)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if losses[-1] < until:
                break
    return losses
