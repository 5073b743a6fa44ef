"""What an objective may ask of the model before unlearning, for the rows of a batch.

Log-probabilities of answers are a number a row; last hidden states (KL, UNDIAL) and states of a layer (RMU) are a vector a token.
Both are computed once, before training, and kept on disk (`cached_logprobs`); the logits of a reference are never stored, its output
layer makes them again a chunk at a time. A reference model that is given, and an adapter that can be switched off, are asked anew
in every batch instead where every position counts (`parity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastunlearn.objectives.logprobs import LiveReference, Reference


@dataclass
class StoredStates:
    """States of the counted positions of all rows of a set.

    Attributes:
        states: [positions of all rows, width], on the CPU, maybe mapped from a file.
        starts: int64 [rows + 1]: where each row's begin.
        weight, bias: of the output layer they belong to; None: the trained model's, which is frozen.
    """

    states: Tensor
    starts: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def of(self, index: Sequence[int]) -> Tensor:
        """[n, width] of the rows, one row's after the other."""
        parts = [self.states[int(self.starts[i]) : int(self.starts[i + 1])] for i in index]
        return torch.cat(parts)


@dataclass
class References:
    """By part ("forget", "retain", "alternate")."""

    logprobs: dict[str, Tensor] = field(default_factory=dict)  #: fp32 [rows], of whole answers
    last: dict[str, StoredStates] = field(
        default_factory=dict
    )  #: what enters the output layer, where answers are predicted
    layer: dict[str, StoredStates] = field(default_factory=dict)  #: what leaves RMU's layer, on answers
    live: LiveReference | None = None
    files: dict[str, str] = field(default_factory=dict)  #: "last retain" -> where these states are kept

    def answers(self, part: str, index: Tensor) -> Tensor:
        """Log-probabilities of the answers of some rows, beside `index`."""
        return self.logprobs[part].to(index.device)[index]

    def states(self, part: str, index: Tensor) -> LiveReference | Reference:
        """The reference of a divergence, at the positions that predict the answers of some rows."""
        if part not in self.last:
            assert self.live is not None, part
            return self.live
        stored = self.last[part]
        # Moved once: the head of a large model is no small change.
        stored.weight = None if stored.weight is None else stored.weight.to(index.device)
        stored.bias = None if stored.bias is None else stored.bias.to(index.device)
        return Reference(stored.of(index.tolist()).to(index.device), stored.weight, stored.bias)
