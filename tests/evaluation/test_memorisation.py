"""The metrics of answers on cases small enough to work out by hand."""

from __future__ import annotations

import math

import pytest

from fastunlearn.evaluation import memorisation as m
from fastunlearn.evaluation.rouge import longest_common_subsequence, rouge, words
from fastunlearn.evaluation.stemmer import stem

LN2, LN4 = math.log(2), math.log(4)


def test_probability():
    assert m.probability([0.0, LN2, LN4]).tolist() == pytest.approx([1, 0.5, 0.25])


def test_normalised_probability():
    # 0.5 / (0.5 + 0.25 + 0.25), 0.1 / (0.1 + 0.3 + 0.6)
    assert m.normalised_probability([0.5, 0.1], [[0.25, 0.25], [0.3, 0.6]]).tolist() == pytest.approx([0.5, 0.1])


def test_truth_ratio():
    # Right 1/2; wrong: geometric mean of 1/2 and 1/8 is 1/4. Then right 1/4, wrong 1/2 twice.
    right, wrong = [LN2, LN4], [[LN2, 3 * LN2], [LN2, LN2]]
    assert m.truth_ratio(right, wrong).tolist() == pytest.approx([0.5, 2.0])
    assert m.truth_ratio(right, wrong, "probability").tolist() == pytest.approx([2 / 3, 1 / 3])


def test_truth_ratios_in_one_number():
    values = [0.5, 2.0, 0.25]
    assert m.aggregate_truth_ratio(values, "closer_to_1_better") == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert m.aggregate_truth_ratio(values, "true_better") == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert m.aggregate_truth_ratio([0.2, 0.4], "prob_mean") == pytest.approx(0.3)


def test_forget_quality():
    pytest.importorskip("scipy")
    assert m.forget_quality([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    # Two sets of four that do not overlap: D = 1, two of the C(8, 4) = 70 orders have it.
    assert m.forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    # D = 1/2, the least that two sets of two can have: all 6 orders have as much.
    assert m.forget_quality([1, 2], [1.5, 3]) == pytest.approx(1.0)


def test_forget_quality_of_nothing():
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match="truth_ratios: want numbers, got none"):
        m.forget_quality([], [1])


def test_utility_is_a_harmonic_mean_of_nine():
    assert m.harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
    assert m.harmonic_mean([1, 0, 1]) == 0.0
    assert len(m.UTILITY) == 9
    metrics = dict.fromkeys(m.UTILITY, 0.5) | {"retain_Q_A_Prob": 1.0}
    assert m.model_utility(metrics) == pytest.approx(9 / (1 + 8 * 2))
    del metrics["wf_Truth_Ratio"]
    with pytest.raises(ValueError, match="wf_Truth_Ratio is missing"):
        m.model_utility(metrics)


@pytest.mark.parametrize(
    ("right", "strength", "exact"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 0, 1, 1], 0.5, 0.75),
        ([1, 1, 1, 0], 0.25, 0.75),  # no suffix is right: the floor 1 / T
        ([0, 0, 0, 0], 0.25, 0.0),
        ([0], 1.0, 0.0),  # of one token the floor is all of it
        ([], 0.0, None),
    ],
)
def test_extraction_and_exact_memorisation(right, strength, exact):
    right = [bool(r) for r in right]
    assert m.extraction_strength(right) == pytest.approx(strength)
    assert m.exact_memorisation(right) == exact


def test_mean_leaves_out_what_has_no_value():
    assert m.mean_of([1.0, None, 0.0]) == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match=r"wrong: want \[2 rows, options\], got \(1, 2\)"):
        m.truth_ratio([1, 2], [[1, 2]])
    with pytest.raises(ValueError, match="variant: 'probabilty' is unknown; did you mean probability"):
        m.truth_ratio([1], [[1]], "probabilty")
    with pytest.raises(ValueError, match="how: 'mean' is unknown"):
        m.aggregate_truth_ratio([1], "mean")
    with pytest.raises(ValueError, match="values: want numbers >= 0, got -1"):
        m.harmonic_mean([1, -1])


# ROUGE.


def test_words_are_lower_case_stems():
    assert words("The Author's names, (1985)!") == ["the", "author", "s", "name", "1985"]


@pytest.mark.parametrize(
    ("word", "stemmed"),
    [
        ("caresses", "caress"), ("ponies", "poni"), ("ties", "tie"), ("cats", "cat"), ("feed", "feed"), ("agreed", "agre"),
        ("plastered", "plaster"), ("motoring", "motor"), ("sing", "sing"), ("conflated", "conflat"), ("troubled", "troubl"),
        ("hopping", "hop"), ("falling", "fall"), ("filing", "file"), ("happy", "happi"), ("enjoy", "enjoy"), ("died", "die"),
        ("relational", "relat"), ("conditional", "condit"), ("formaliti", "formal"), ("sensibiliti", "sensibl"),
        ("triplicate", "triplic"), ("hopeful", "hope"), ("goodness", "good"), ("revival", "reviv"), ("adoption", "adopt"),
        ("effective", "effect"), ("rate", "rate"), ("cease", "ceas"), ("controll", "control"), ("roll", "roll"), ("skies", "sky"),
        ("geology", "geolog"), ("theoretically", "theoret"), ("is", "is"),
    ],
)  # fmt: skip
def test_stems(word, stemmed):
    """Porter's own examples, and what the extensions change."""
    assert stem(word) == stemmed


def test_stems_are_those_of_nltk():
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    from fastunlearn.evaluation import stemmer

    endings = (
        [s for s, _ in (*stemmer._STEP_2, *stemmer._STEP_3)] + list(stemmer._STEP_4) + ["ed", "ing", "ies", "logi"]
    )
    for start in ("a", "tr", "abl", "hopp", "fall", "sens", "triv", "oy", "conditi"):
        for end in endings:
            assert stem(start + end) == porter.stem(start + end)


def test_longest_common_subsequence():
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4
    assert longest_common_subsequence("abc", "xyz") == 0
    assert longest_common_subsequence("", "a") == 0


def test_rouge():
    # Said 5 words, right 4; shared: the, cat, sat; in order: the, cat, sat.
    r = rouge("the cat sat up there", "The cat, sat down")
    assert r.rouge1_recall == pytest.approx(3 / 4)
    assert r.rougeL_recall == pytest.approx(3 / 4)
    assert r.rougeL_f1 == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    # Order counts for L alone: of b a against a b one word is in order.
    assert rouge("b a", "a b")[::2] == pytest.approx((1.0, 0.5))
    # A word counts as often as it is there in both.
    assert rouge("a a a", "a b").rouge1_recall == 0.5
    assert rouge("", "a") == rouge("...", "a") == (0, 0, 0)
    assert rouge("writing novels", "writes a novel").rougeL_recall == pytest.approx(2 / 3)


def test_rouge_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    pairs = [
        ("Hsiao Yun-Hwa writes", "the author writing is Hsiao Yun-Hwa, 1985"),
        ("né à Paris", "a né paris"),
        ("x", "y"),
    ]
    for said, right in pairs:
        theirs, ours = scorer.score(right, said), rouge(said, right)
        assert ours.rouge1_recall == pytest.approx(theirs["rouge1"].recall)
        assert ours.rougeL_recall == pytest.approx(theirs["rougeL"].recall)
        assert ours.rougeL_f1 == pytest.approx(theirs["rougeL"].fmeasure)
