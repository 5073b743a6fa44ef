"""Was a text in the training set? Six attacks that score it from what a model says of its tokens, and PrivLeak.

    loss             mean negative log-likelihood a token (Yeom et al. 2018)
    zlib             the same over the bytes of the text compressed by zlib (Carlini et al. 2021)
    reference        the same minus that of a reference model (Carlini et al. 2021)
    gradnorm         mean over parameters of the 2-norm of the loss' gradient (Wang et al. 2024, 2402.17012)
    min_k            minus the mean of the share k of lowest token log-probabilities (Shi et al. 2024, 2310.16789)
    min_k_plus_plus  the same of (log p - mu) / sigma, with mu and sigma^2 mean and variance of the log-probability under the model's
                     own distribution at that position (Zhang et al. 2024, 2404.02936)

Every score is signed as a loss is: the higher, the less likely a member. AUC is the chance that a text of the holdout set scores
above one of the forget set (ties count half): 1 for a model that knows the forget set, 0.5 for one that never saw it. loss, zlib and
reference count the answer's end, the other three do not, as in open-unlearning.

    PrivLeak = 100 (a - a_retain) / a_retain,  a = 1 - AUC   (Shi et al. 2024, MUSE, 2407.06460, eq. 1)

0 is best; below: the forget set is still known better than one that was never seen; above: it stands out for being unlikely.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

ATTACKS = ("loss", "zlib", "reference", "gradnorm", "min_k", "min_k_plus_plus")
#: share of tokens that min_k looks at
SHARE = 0.4
#: least variance of a log-probability, as in open-unlearning
_VARIANCE = 1e-6


def loss_score(avg_loss: float) -> float:
    """Mean negative log-likelihood a token."""
    return avg_loss


def zlib_score(avg_loss: float, text: str) -> float:
    """avg_loss over the length of the compressed text in bytes."""
    return avg_loss / len(zlib.compress(text.encode()))


def reference_score(avg_loss: float, reference_avg_loss: float) -> float:
    """avg_loss minus the reference model's."""
    return avg_loss - reference_avg_loss


def _lowest(values: Sequence[float], share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share: want a number in (0, 1], got {share}")
    if not len(values):
        return 0.0
    count = max(1, int(len(values) * share))
    return -float(np.sort(np.asarray(values, np.float64))[:count].mean())


def min_k_score(logp: Sequence[float], share: float = SHARE) -> float:
    """Minus the mean of the lowest `share` of token log-probabilities; 0 for no tokens.

    Raises:
        ValueError: a share that is not in (0, 1].
    """
    return _lowest(logp, share)


def min_k_plus_plus_score(
    logp: Sequence[float], mean: Sequence[float], variance: Sequence[float], share: float = SHARE
) -> float:
    """Minus the mean of the lowest `share` of standardised token log-probabilities; 0 for no tokens.

    Args:
        logp: of the tokens. mean, variance: of log p over the vocabulary under p, at each token's position.

    Raises:
        ValueError: a share that is not in (0, 1], or lengths that differ.
    """
    if not len(logp) == len(mean) == len(variance):
        raise ValueError(f"logp, mean, variance: want one each a token, got {len(logp)}, {len(mean)}, {len(variance)}")
    sigma = np.sqrt(np.maximum(np.asarray(variance, np.float64), _VARIANCE))
    return _lowest(list((np.asarray(logp, np.float64) - np.asarray(mean, np.float64)) / sigma), share)


def auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """Area under the ROC curve: chance that a holdout score is above a forget score, ties half (Mann-Whitney U / nm).

    Raises:
        ValueError: no scores of one of the two, or NaN.
    """
    a, b = np.asarray(forget, np.float64), np.asarray(holdout, np.float64)
    if a.size == 0 or b.size == 0:
        raise ValueError(f"forget, holdout: want scores of both sets, got {a.size} and {b.size}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("forget, holdout: a score is NaN")
    ordered = np.sort(a)
    below = np.searchsorted(ordered, b, "left") + np.searchsorted(ordered, b, "right")
    return float(below.sum() / (2 * a.size * b.size))


def privleak(auc_model: float, auc_retain: float) -> float:
    """Percent; both AUCs as `auc` gives them.

    Raises:
        ValueError: an AUC outside of [0, 1], or a retain model whose AUC is 1 (it knows the forget set).
    """
    for name, value in (("auc_model", auc_model), ("auc_retain", auc_retain)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: want a number in [0, 1], got {value}")
    if auc_retain == 1:
        raise ValueError("auc_retain: 1: a model that tells all of the forget set from the holdout set has seen it")
    return 100 * (auc_retain - auc_model) / (1 - auc_retain)
