"""Stochastic rounding of fp32 to bf16 with a counter-based generator, in plain PyTorch: the definition.

The random number of an entry is a function of (key, index of the entry in its tensor); the two-word key is mixed from
(seed, step, number of the tensor). csrc/stochastic.h and kernels/adamw.py give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_WORDS = 0xFFFFFFFFFFFFFFFF


def _mix(x: np.ndarray) -> np.ndarray:
    # The output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


Column = Sequence[int] | np.ndarray


def rounding_keys(seeds: Column, steps: Column, indices: Column) -> np.ndarray:
    """uint32 [n, 2]: the keys of n tensors, each of (seed, step, number of the tensor); arrays are uint64."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    words = np.zeros(len(seeds), dtype=np.uint64)
    for column in (seeds, steps, indices):
        # Python's numbers may be negative or longer than a word.
        word = column if isinstance(column, np.ndarray) else np.array([v & _WORDS for v in column], dtype=np.uint64)
        words = _mix((words ^ word) + golden)
    return words.view(np.uint32).reshape(-1, 2)


def counter_random(index: Tensor, key: Sequence[int]) -> Tensor:
    """int64 tensor of numbers in [0, 2^32), one for each entry of `index` (int64)."""
    a, b = int(key[0]), int(key[1])
    high = index >> 32
    b_high = b ^ (high * 0x9E3779B9 & _WORD)
    x = (index & _WORD) + a & _WORD
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & _WORD
    x = x ^ x >> 13
    x = x + b_high & _WORD
    x = x ^ x >> 15
    x = x * 0xC2B2AE35 & _WORD
    return x ^ x >> 16


def to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """fp32 -> bf16, up with a probability equal to the share that would be cut off: unbiased. inf and NaN stay.

    Args:
        random: int64 as from `counter_random`; its lower 16 bits are used.
    """
    bits = x.view(torch.int32).to(torch.int64) & _WORD
    rounded = (bits + (random & 0xFFFF)) & 0xFFFF0000
    # A value that fits 32 bits as an unsigned one is given as the signed one of the same bits.
    signed = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32)
    return torch.where(torch.isfinite(x), signed.view(torch.float32), x).to(torch.bfloat16)
