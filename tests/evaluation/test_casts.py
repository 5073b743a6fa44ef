"""An evaluation under autocast: every weight is cast once, numbers are autocast's own, the model is given back as it was."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastunlearn import ops
from fastunlearn._modes import cast_once
from fastunlearn.evaluation import greedy, scoring
from fastunlearn.evaluation.journal import Journal
from fastunlearn.evaluation.perplexity import perplexity
from fastunlearn.evaluation.runner import Runner
from fastunlearn.reference import linear_nll as reference
from tests.evaluation.test_scoring import QUESTIONS, prompts
from tests.tiny_chat import char_tokenizer, tiny_llama

BF16 = torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts casts of a model's weights."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.of[self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


def frozen_llama():
    return tiny_llama(3).requires_grad_(False)


def runner_of(model, **given):
    return Runner(model, char_tokenizer(), Journal(None, "", {}), stops=[0], autocast=BF16, progress=False, **given)


def plain():
    return torch.autocast("cpu", dtype=BF16)


def test_frozen_weights_are_cast_once_a_stage():
    model, asked = frozen_llama(), prompts(6)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with plain(), Casts(model) as slow:
        wanted = greedy.answer(model, asked, [0], 0, max_new_tokens=5)
    runner = runner_of(model, batch_size=2)
    with Casts(model) as casts:
        said = runner.answer("answers", asked, 5)
    linear = {name for name in before if "_proj" in name or "embed" in name}
    assert set(casts.of) == linear
    # Three batches of up to five steps.
    assert set(casts.of.values()) == {1}
    assert min(slow.of[name] for name in linear) == 5
    assert said == [runner.text(tokens) for tokens in wanted]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_scores_are_autocasts_to_the_last_bit():
    model = frozen_llama()
    with plain():
        wanted = [scoring.score_batch(model, [question], 0)[0] for question in QUESTIONS]
    with Casts(model) as casts:
        assert runner_of(model, budget=1).score("scores", QUESTIONS) == wanted
    # The head's is cast by the loss, outside autocast's memory.
    assert {count for name, count in casts.of.items() if "_proj" in name} == {1}
    text = torch.arange(24).view(3, 8)
    assert perplexity(model, text, dtype=BF16, progress=False) == perplexity(
        tiny_llama(3), text, dtype=BF16, progress=False
    )


def test_what_trains_is_left_alone_and_errors_give_back():
    model = frozen_llama()
    head = model.get_output_embeddings().weight.requires_grad_()
    seen = []

    def fails():
        with cast_once(model, BF16):
            seen.extend(p.requires_grad for p in model.parameters())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert all(seen)
    assert [p for p in model.parameters() if p.requires_grad] == [head]
    for dtype, kept in ((None, model), (BF16, model.bfloat16())):
        with cast_once(kept, dtype):
            assert torch.is_autocast_enabled("cpu") == (dtype is not None)
            assert sum(p.requires_grad for p in kept.parameters()) == 1


def test_cached_keys_are_what_attention_casts_them_to(monkeypatch):
    from transformers.cache_utils import DynamicCache

    def logits(model):
        seen = []
        hook = model.register_forward_hook(lambda _, args, out: seen.append((out.logits, out.past_key_values)))
        with plain():
            greedy.continue_batch(model, prompts(5), [6] * 5, [], 0)
        hook.remove()
        return [out for out, _ in seen], seen[-1][1].layers[0]

    ours, layer = logits(tiny_llama(1))
    monkeypatch.setattr(greedy, "_fixed_cache", lambda rows, length: DynamicCache())
    theirs, kept = logits(tiny_llama(1))
    assert (layer.keys.dtype, layer.values.dtype) == (BF16, BF16)
    assert kept.keys.dtype == torch.float32
    assert len(ours) == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_tokens_of_a_pass_by_device():
    model = tiny_llama()
    assert runner_of(model).budget == scoring.tokens_at_once(model) == 1024
    assert runner_of(model, budget=7).budget == 7
    assert scoring.tokens_at_once(model.to("meta")) == 8192


def test_without_gradients_none_is_made_of_logits(monkeypatch):
    asked = []
    rows_ = reference.rows_
    monkeypatch.setattr(reference, "rows_", lambda *args: (asked.append(args[-1]), rows_(*args))[1])
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
    with torch.no_grad():
        ops.linear_nll(hidden, weight, torch.arange(4))
    ops.linear_nll(hidden, weight, torch.arange(4))
    assert asked == [False, True]
