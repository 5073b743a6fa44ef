"""Membership attacks on cases small enough to work out by hand."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from fastunlearn.evaluation import membership as mia


def test_scores():
    assert mia.loss_score(1.5) == 1.5
    text = "Hsiao Yun-Hwa"
    assert mia.zlib_score(3.0, text) == 3.0 / len(zlib.compress(text.encode()))
    assert mia.reference_score(1.5, 2.0) == -0.5
    # k = 0.4 of 5 tokens: the two lowest, -4 and -3.
    assert mia.min_k_score([-1, -4, -2, -3, -0.5]) == pytest.approx(3.5)
    # int(0.4 * 2) = 0: one at least.
    assert mia.min_k_score([-1, -2]) == 2.0
    # Standardised: (-2 + 1) / 2, (-3 + 1) / 1, (-1 - 0) / 0.001 (the least sigma); the lowest one of three.
    assert mia.min_k_plus_plus_score([-2, -3, -1], [-1, -1, 0], [4, 1, 0]) == pytest.approx(1000)
    assert mia.min_k_plus_plus_score([-2, -3], [-1, -1], [4, 1], share=1.0) == pytest.approx((0.5 + 2) / 2)
    assert mia.min_k_score([]) == 0


def test_auc():
    # Pairs of (forget, holdout): 1<2, 1<3, 2=2, 2<3: 3.5 of 4.
    assert mia.auc([1, 2], [2, 3]) == 3.5 / 4
    assert mia.auc([1, 2], [3, 4]) == 1.0
    assert mia.auc([3, 4], [1, 2]) == 0.0


def test_auc_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 20, 50), generator.integers(5, 25, 70)
    labels = [0] * 50 + [1] * 70
    assert mia.auc(a, b) == pytest.approx(metrics.roc_auc_score(labels, [*a, *b]))


def test_privleak():
    # A model that knows all of the forget set, beside a retain model at chance: -100 %.
    assert mia.privleak(1.0, 0.5) == -100
    assert mia.privleak(0.5, 0.5) == 0
    # 1 - AUC rose from 0.4 to 0.6.
    assert mia.privleak(0.4, 0.6) == pytest.approx(50)


def test_bad_input():
    with pytest.raises(ValueError, match=r"share: want a number in \(0, 1\], got 0"):
        mia.min_k_score([-1], share=0)
    with pytest.raises(ValueError, match="one each a token, got 2, 1, 2"):
        mia.min_k_plus_plus_score([-1, -2], [0], [1, 1])
    with pytest.raises(ValueError, match="got 0 and 1"):
        mia.auc([], [1])
    with pytest.raises(ValueError, match="NaN"):
        mia.auc([float("nan")], [1])
    with pytest.raises(ValueError, match="auc_retain: 1"):
        mia.privleak(0.5, 1)
