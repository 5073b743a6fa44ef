"""Optimisers that keep state only for entries that may move, and the one whose step is HAMU's."""

from fastunlearn.optim.clip import clip_masked_grad_norm_
from fastunlearn.optim.hamu import HamuSGD
from fastunlearn.optim.masked_adamw import MaskedAdamW
from fastunlearn.optim.masked_sgd import MaskedSGD
from fastunlearn.optim.masks import local_mask

__all__ = ["HamuSGD", "MaskedAdamW", "MaskedSGD", "clip_masked_grad_norm_", "local_mask"]
