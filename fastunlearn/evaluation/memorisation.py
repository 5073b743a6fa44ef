"""What a language model still says of answers, as numbers: functions of log-probabilities and greedy predictions alone.

TOFU's (Maini et al. 2024, section 2.2 and 3): with NLL / len the mean negative log-likelihood of an answer's tokens, its end included,

    probability     p(a | q)^(1 / len) = exp(-NLL / len)
    truth ratio     exp(-mean of NLL / len over the wrong answers) / exp(-NLL / len of the paraphrased right one)
                    variant "probability": right / (right + wrong), the newer form of open-unlearning
    forget quality  p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios of a model and of one that never saw
                    the forget set
    model utility   harmonic mean of nine: {probability, ROUGE-L recall, truth ratio} x {retain set, real authors, world facts}

and of memorisation under teacher forcing, over the answer's tokens without its end (Carlini et al. 2022; Tirumala et al. 2022):

    extraction strength   1 - k / T, k the first token from which on all greedy predictions are right; T - 1 where none is: the
                          floor is 1 / T, as in open-unlearning
    exact memorisation    share of greedy predictions that are right
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastunlearn.objectives.language import closest

#: keeps quotients finite, as in open-unlearning
TINY = 1e-10
Variant = Literal["ratio", "probability"]
AGGREGATES = ("closer_to_1_better", "true_better", "prob_mean")
#: metrics of model utility, as they are named in the logs
UTILITY = tuple(
    name
    for part, normalised in (("retain", ""), ("ra", "_normalised"), ("wf", "_normalised"))
    for name in (f"{part}_Q_A_Prob{normalised}", f"{part}_Q_A_ROUGE", f"{part}_Truth_Ratio")
)


def _some(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name}: want numbers, got none")
    return array


def probability(avg_loss: ArrayLike) -> NDArray[np.float64]:
    """exp(-NLL / len), of any shape."""
    return np.exp(-_some("avg_loss", avg_loss))


def normalised_probability(right: ArrayLike, wrong: ArrayLike) -> NDArray[np.float64]:
    """p(right) / (p(right) + sum of p(wrong)): of a question with options (real authors, world facts).

    Args:
        right: [rows]. wrong: [rows, options].

    Raises:
        ValueError: no rows, no options, or numbers of rows that differ.
    """
    right, wrong = _some("right", right), _options("wrong", wrong, len(_some("right", right)))
    return right / (right + wrong.sum(1) + TINY)


def _options(name: str, values: ArrayLike, rows: int) -> NDArray[np.float64]:
    array = _some(name, values)
    if array.ndim != 2 or len(array) != rows:
        raise ValueError(f"{name}: want [{rows} rows, options], got {array.shape}")
    return array


def truth_ratio(right: ArrayLike, wrong: ArrayLike, variant: Variant = "ratio") -> NDArray[np.float64]:
    """How much likelier wrong answers are than the right one, from mean negative log-likelihoods a token.

    Args:
        right: [rows], of the paraphrased right answer. wrong: [rows, options], of the wrong ones (their geometric mean counts).
        variant: "ratio": wrong / right, in [0, inf); "probability": right / (right + wrong), in [0, 1].

    Raises:
        ValueError: no rows, no options, numbers of rows that differ, an unknown variant.
    """
    right = _some("right", right)
    wrong = _options("wrong", wrong, len(right))
    p_right, p_wrong = np.exp(-right), np.exp(-wrong.mean(1))
    if variant == "ratio":
        return p_wrong / (p_right + TINY)
    if variant == "probability":
        return p_right / (p_right + p_wrong + TINY)
    raise ValueError(f"variant: {variant!r} is unknown; {closest(str(variant), ['ratio', 'probability'])}")


def aggregate_truth_ratio(values: ArrayLike, how: str) -> float:
    """One number of all rows' truth ratios.

    Args:
        values: [rows].
        how: "closer_to_1_better" (forget set): mean min(TR, 1 / TR); "true_better" (what must stay): mean max(0, 1 - TR);
            "prob_mean": mean, for the variant "probability".

    Raises:
        ValueError: no rows, or an unknown aggregate.
    """
    array = _some("values", values)
    if how == "closer_to_1_better":
        return float(np.minimum(array, 1 / (array + TINY)).mean())
    if how == "true_better":
        return float(np.maximum(0, 1 - array).mean())
    if how == "prob_mean":
        return float(array.mean())
    raise ValueError(f"how: {how!r} is unknown; {closest(str(how), list(AGGREGATES))}")


def kolmogorov_smirnov() -> Any:
    """scipy's two-sample test.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy.stats import ks_2samp  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("forget quality needs scipy: pip install 'fastunlearn[eval]'") from None
    return ks_2samp


def forget_quality(truth_ratios: ArrayLike, reference: ArrayLike) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test, exact for sets of up to 10,000 rows; 1: as if never seen.

    Args:
        truth_ratios: of the model on the forget set. reference: of the retain model on the same rows.

    Raises:
        ValueError: no rows. ImportError: scipy is missing.
    """
    return float(kolmogorov_smirnov()(_some("truth_ratios", truth_ratios), _some("reference", reference)).pvalue)


def harmonic_mean(values: ArrayLike) -> float:
    """0 where one of the values is.

    Raises:
        ValueError: no values, or one below 0 (or NaN).
    """
    array = _some("values", values)
    if not (array >= 0).all():
        raise ValueError(f"values: want numbers >= 0, got {array.min()}")
    return float(len(array) / (1 / array).sum()) if array.all() else 0.0


def model_utility(metrics: Mapping[str, float]) -> float:
    """Harmonic mean of the nine `UTILITY` metrics.

    Raises:
        ValueError: one is missing.
    """
    absent = [name for name in UTILITY if metrics.get(name) is None]
    if absent:
        raise ValueError(f"metrics: model utility is the mean of nine, and {', '.join(absent)} is missing")
    return harmonic_mean([metrics[name] for name in UTILITY])


def extraction_strength(right: Sequence[bool]) -> float:
    """1 - k / T, see the top; 0 for an answer without tokens (as open-unlearning has it).

    Args:
        right: of each token of the answer without its end, whether the greedy prediction is it.
    """
    if not len(right):
        return 0.0
    wrong = [i for i, ok in enumerate(right) if not ok]
    first = min(wrong[-1] + 1, len(right) - 1) if wrong else 0
    return 1 - first / len(right)


def exact_memorisation(right: Sequence[bool]) -> float | None:
    """Share of right predictions; None for an answer without tokens."""
    return sum(map(bool, right)) / len(right) if len(right) else None


def mean_of(values: Sequence[Any]) -> float:
    """Mean over rows, those that are None left out.

    Raises:
        ValueError: none is left.
    """
    return float(_some("values", [value for value in values if value is not None]).mean())
