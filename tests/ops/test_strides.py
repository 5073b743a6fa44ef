"""Small arguments and empty ones, which kernels read by their address: strided biases and labels, nothing that counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastunlearn
from fastunlearn import BitMask, ops
from tests.proof import assert_equal


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with NaN (or the largest number) between them."""
    wide = torch.full((2 * len(t),), float("nan") if t.is_floating_point() else 2**40, dtype=t.dtype)
    wide[::2] = t
    return wide[::2]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_strided_bias(backend):
    x, weight, bias = torch.randn(5, 16), torch.randn(7, 16), torch.randn(7)
    A, B = torch.randn(2, 16), torch.randn(7, 2)
    with fastunlearn.backend("auto"):
        mask = ops.nm_mask(weight.abs(), 2, 4)
        compressed = ops.nm_compress(weight, mask, 2, 4)
    with fastunlearn.backend(backend):
        got = (
            ops.nm_linear(x, compressed, strided(bias)),
            ops.masked_lora_linear(x, weight, A, B, mask, 0.5, strided(bias)),
        )
    may = mask.unpack()
    torch.testing.assert_close(got[0], F.linear(x, weight * may, bias), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], F.linear(x, weight + 0.5 * (B @ A) * may, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strided_labels(backend):
    hidden, weight, labels = torch.randn(6, 8), torch.randn(20, 8), torch.randint(20, (6,))
    with fastunlearn.backend(backend):
        nll, counts = ops.linear_nll(hidden, weight, strided(labels), reduction="token")
        kl, _ = ops.linear_divergence(hidden, weight, None, None, strided(labels), kind="ce_u", reduction="token")
        again, _ = ops.linear_divergence(hidden, weight, None, None, labels, kind="ce_u", reduction="token")
    assert counts.tolist() == [1] * 6
    torch.testing.assert_close(nll, F.cross_entropy(hidden @ weight.T, labels, reduction="none"))
    assert_equal(kl, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_token_counts(dtype):
    """A batch without a label, in any type, gives a head that trains a gradient of 0."""
    hidden, weight = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((2, 3, 8), (20, 8)))
    labels = torch.full((2, 3), -100)
    with fastunlearn.backend("reference"):
        nll, counts = ops.linear_nll(hidden, weight, labels)
        grads = torch.autograd.grad(nll.sum(), (hidden, weight))
    assert nll.tolist() == counts.tolist() == [0, 0]
    assert all(g.eq(0).all() for g in grads)


def test_moments_of_no_features():
    assert ops.token_moments(torch.randn(3, 2, 0)).shape == (0, 0)


def test_gaps_in_memory_are_the_tensors_own():
    """The error names the tensor that lies so, not its mask."""
    p, mask = torch.randn(8)[::2], BitMask.ones((4,))
    with pytest.raises(ValueError, match=r"^params\[0\]: the tensor of shape \(4,\) and strides \(2,\) overlaps"):
        ops.masked_sgd_([p], [torch.ones(4)], [mask], [None], [1])
    with pytest.raises(ValueError, match=r"^grads\[0\]: the tensor"):
        ops.masked_grad_norm([p], [mask])
