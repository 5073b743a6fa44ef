"""Optimisers that keep state only for entries that may move."""

from fastunlearn.optim.clip import clip_masked_grad_norm_
from fastunlearn.optim.masked_adamw import MaskedAdamW
from fastunlearn.optim.masked_sgd import MaskedSGD
from fastunlearn.optim.masks import local_mask

__all__ = ["MaskedAdamW", "MaskedSGD", "clip_masked_grad_norm_", "local_mask"]
