"""Perplexity against transformers' own loss, and rows of tokens against the text they came from."""

from __future__ import annotations

import math

import pytest
import torch

from fastunlearn.evaluation.perplexity import chunk_tokens, perplexity
from tests.tiny_chat import CharTokenizer, tiny_llama


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 127, (5, 24))


def test_it_is_the_loss_of_transformers(tokens):
    model = tiny_llama()
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    expected = math.exp(loss)
    for batch_size in (1, 2, 5, 100):
        assert perplexity(model, tokens, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(tokens):
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert perplexity(model, tokens) == pytest.approx(model.config.vocab_size, rel=1e-6)


def test_autocast_runs_in_bf16(tokens):
    model = tiny_llama()
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    low = perplexity(model, tokens, dtype=torch.bfloat16)
    full = perplexity(model, tokens, dtype=torch.float32)
    handle.remove()
    assert seen == [torch.bfloat16] * 5 + [torch.float32] * 5
    assert low != full
    assert low == pytest.approx(full, rel=0.05)


def test_a_bf16_model_and_the_modes_of_its_modules(tokens):
    model = tiny_llama().to(torch.bfloat16).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert math.isfinite(perplexity(model, tokens))
    assert [module.training for module in model.modules()] == modes


def test_not_finite():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e30)
    assert perplexity(model, torch.randint(1, 127, (2, 8))) == math.inf
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert math.isnan(perplexity(model, torch.randint(1, 127, (2, 8))))


def test_chunks_are_the_text_in_order():
    text = "".join(chr(65 + i % 50) for i in range(103))
    rows = chunk_tokens(CharTokenizer(), text, 10)
    assert rows.shape == (10, 10)
    assert rows.dtype == torch.int64
    assert "".join(map(chr, rows.flatten().tolist())) == text[:100]
    assert torch.equal(chunk_tokens(CharTokenizer(), text, 10, limit=3), rows[:3])
    assert torch.equal(chunk_tokens(CharTokenizer(), text, 10, limit=30), rows)


def test_bad_input():
    model = tiny_llama()
    with pytest.raises(ValueError, match="text: 3 tokens do not fill a row of length 8"):
        chunk_tokens(CharTokenizer(), "abc", 8)
    with pytest.raises(ValueError, match="length: want rows of at least 2 tokens, got 1"):
        chunk_tokens(CharTokenizer(), "abc", 1)
    with pytest.raises(ValueError, match="limit: want at least 1"):
        chunk_tokens(CharTokenizer(), "abc", 2, limit=0)
    for wrong in (torch.ones(3, dtype=torch.int64), torch.ones(2, 3), torch.ones(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"tokens: want int64 \[rows >= 1, length >= 2\], got"):
            perplexity(model, wrong)
    with pytest.raises(ValueError, match="batch_size"):
        perplexity(model, torch.ones(2, 3, dtype=torch.int64), batch_size=0)
