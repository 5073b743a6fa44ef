"""Patterns: what is read, what is refused, and that text and pattern are one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastunlearn.localize import parse_pattern
from fastunlearn.localize.patterns import select


@pytest.mark.parametrize(
    ("given", "n", "m", "sparsity", "text", "kind"),
    [
        ("2:4", 2, 4, 0.5, "2:4", "2:4"),
        (" 4 : 8 ", 4, 8, 0.5, "4:8", "4:8"),
        ((1, 4), 1, 4, 0.75, "1:4", "1:4"),
        ("0.5", None, None, 0.5, "50%", "unstructured"),
        ("50%", None, None, 0.5, "50%", "unstructured"),
        (0.7, None, None, 0.7, "70%", "unstructured"),
        ("33.5 %", None, None, 0.335, "33.5%", "unstructured"),
        (0, None, None, 0.0, "0%", "unstructured"),
        ("100e-1%", None, None, 0.1, "10%", "unstructured"),
    ],
)
def test_what_is_read(given, n, m, sparsity, text, kind):
    pattern = parse_pattern(given)
    assert (pattern.n, pattern.m, str(pattern), pattern.kind) == (n, m, text, kind)
    assert pattern.sparsity == pytest.approx(sparsity)
    assert parse_pattern(pattern) is pattern
    assert str(parse_pattern(text)) == text


@given(st.integers(1, 63), st.integers(2, 64))
def test_any_n_below_m(n, m):
    if n < m:
        assert str(parse_pattern(f"{n}:{m}")) == f"{n}:{m}"
        assert parse_pattern((n, m)).density == pytest.approx(n / m)
    else:
        with pytest.raises(ValueError, match="1 <= n < m <= 64"):
            parse_pattern(f"{n}:{m}")


@pytest.mark.parametrize("percent", range(0, 100, 5))
def test_a_density_keeps_what_the_sparsity_leaves(percent):
    mask = select(torch.rand(3, 20), parse_pattern(f"{percent}%"))
    assert mask.unpack().sum(1).tolist() == [(100 - percent) // 5] * 3
    mask = select(torch.rand(3, 20), parse_pattern(percent / 100), "tensor")
    assert int(mask.count()) == 3 * (100 - percent) // 5


@pytest.mark.parametrize(
    "wrong", ["four", "2:", "4:2", "2:65", "0:4", "100%", "1", "-1%", "nan", 1.0, -0.1, (2, 4, 8), (2.0, 4)]
)
def test_what_is_refused(wrong):
    with pytest.raises(ValueError, match=r"pattern: .* got"):
        parse_pattern(wrong)


@pytest.mark.parametrize("wrong", [None, True, {2: 4}])
def test_what_is_no_pattern(wrong):
    with pytest.raises(TypeError, match="pattern: want n:m"):
        parse_pattern(wrong)
