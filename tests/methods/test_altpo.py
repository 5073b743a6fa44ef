"""Alternates drawn from a model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fastunlearn.data.register import Register
from fastunlearn.methods.altpo import sample_alternates
from tests.tiny_chat import CharTokenizer, tiny_llama

ROWS = [{"question": f.question, "answer": f.answer} for f in Register.generate(2).facts][:3]


def test_alternates_are_drawn_by_a_seed():
    model, before = tiny_llama(), torch.random.get_rng_state()
    options = {"count": 2, "max_new_tokens": 4}
    first = sample_alternates(model, CharTokenizer(), ROWS, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == sample_alternates(model, CharTokenizer(), ROWS, **options)
    assert first != sample_alternates(model, CharTokenizer(), ROWS, seed=1, **options)
    for row, old in zip(first, ROWS):
        assert row["question"] == old["question"]
        assert 1 <= len(row["alternate"]) <= 2
        assert len(set(row["alternate"])) == len(row["alternate"])
        assert old["answer"] not in row["alternate"]


def test_bad_rows():
    with pytest.raises(ValueError, match="row 0 has no question and answer"):
        sample_alternates(tiny_llama(), CharTokenizer(), [{"text": "a"}])
    with pytest.raises(ValueError, match="count: want at least 1"):
        sample_alternates(tiny_llama(), CharTokenizer(), ROWS, count=0)
