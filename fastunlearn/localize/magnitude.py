"""Magnitude pruning: the smallest |weight| go. Needs no calibration text; the baseline the other methods are measured by.

Han et al. 2015, "Learning both Weights and Connections". The pruning papers for language models compare a whole tensor at
once in the unstructured case (scope "tensor"); the default here compares inside every output row, as Wanda does, so that
methods differ in their scores alone. n:m patterns are the same in both.
"""

from __future__ import annotations

from torch import Tensor


def magnitude_scores(weight: Tensor) -> Tensor:
    """|weight| of a weight [out, in], in fp32."""
    return weight.detach().float().abs()
