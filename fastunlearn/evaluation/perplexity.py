"""Perplexity of a causal language model on running text: exp of the mean negative log-likelihood of a token given those before
it in its row. The first token of a row has nothing before it and does not count, as in transformers' own loss; rows do not see
each other, so the number falls with their length: compare at one length only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastunlearn._modes import cast_once, evaluating


def chunk_tokens(tokenizer: Any, text: str, length: int, limit: int | None = None) -> Tensor:
    """Running text as rows of tokens, without special tokens; what is left over at the end of the text is dropped.

    Args:
        tokenizer: of transformers, or a callable that gives {"input_ids": [...]}.
        text: all of it.
        length: tokens a row.
        limit: at most so many rows, the first ones.

    Returns:
        int64 [rows, length].

    Raises:
        ValueError: length below 2, limit below 1, or a text of fewer than `length` tokens.
    """
    if length < 2:
        raise ValueError(f"length: want rows of at least 2 tokens, got {length}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: want at least 1 row, got {limit}")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = len(ids) // length
    if rows == 0:
        raise ValueError(
            f"text: {len(ids)} tokens do not fill a row of length {length}; give more text or a smaller length"
        )
    rows = rows if limit is None else min(rows, limit)
    return torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)


@torch.no_grad()
def perplexity(
    model: Any, tokens: Tensor, *, batch_size: int = 1, dtype: torch.dtype | None = None, progress: bool = True
) -> float:
    """exp(mean of -log p(token | tokens before it in its row)) over all tokens but the first of each row.

    Runs the model in evaluation mode and sets its mode back. Log-probabilities are taken in fp32, sums in double precision.

    Args:
        model: a causal language model of transformers.
        tokens: int64 [rows, length], length >= 2, without padding; `chunk_tokens` makes them.
        batch_size: rows a forward pass.
        dtype: torch.bfloat16 or torch.float16 runs the model under autocast; None or torch.float32: as it is.
        progress: a bar, where standard error is a terminal.

    Returns:
        The perplexity; infinity where it exceeds a double, NaN where the model gives NaN.

    Raises:
        ValueError: tokens of another shape or dtype, or none; batch_size below 1.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens: want int64 [rows >= 1, length >= 2], got {tokens.dtype} {tuple(tokens.shape)} (chunk_tokens makes them)"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: want at least 1 row, got {batch_size}")
    device = next(model.parameters()).device
    low = dtype if dtype in (torch.bfloat16, torch.float16) else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model), cast_once(model, low):
        batches = tokens.split(batch_size)
        for batch in tqdm(batches, desc="perplexity", unit="batch", leave=False, disable=None if progress else True):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, labels in zip(logits, batch):
                total += F.cross_entropy(row[:-1].float(), labels[1:], reduction="sum")
    mean = float(total) / (tokens.shape[0] * (tokens.shape[1] - 1))
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
