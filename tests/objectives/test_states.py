"""Losses from hidden states are those from logits, for heads of every kind, and the fall back says why."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import fastunlearn
from fastunlearn.data.register import Register
from fastunlearn.data.text import collate, encode_rows
from fastunlearn.objectives import answer_kl, answer_logits, answer_logprobs, why_logits
from fastunlearn.objectives import states as module
from fastunlearn.objectives.logprobs import (
    Reference,
    divergence,
    divergence_of_logits,
    next_tokens,
    positions,
    token_logprobs,
)
from tests.tiny_chat import CharTokenizer, tiny_llama

transformers = pytest.importorskip("transformers")


def encode(people: int) -> dict[str, torch.Tensor]:
    rows = encode_rows(Register.generate(people).rows(), CharTokenizer())
    return collate([rows[i] for i in range(len(rows))], 0)


SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=4.0)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**{**SMALL, "num_key_value_heads": 2})),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """(model, the same with other weights)"""
    torch.manual_seed(0)
    return [MODELS[request.param]().float().eval() for _ in range(2)]


@pytest.fixture(scope="module")
def batch():
    return encode(2)


def gradients(loss, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True)


def assert_same(got, want):
    for g, w in zip(got, want):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5 * float(w.abs().max()) + 1e-7)


@pytest.mark.parametrize("head_trains", [True, False])
def test_logprobs_of_every_head(pair, batch, head_trains):
    model = pair[0]
    for p in model.get_output_embeddings().parameters():
        p.requires_grad_(head_trains)
    assert why_logits(model, batch) is None
    answers = answer_logprobs(model, batch)
    assert fastunlearn.explain("linear_nll").last == "reference:cpu"
    logits, labels, row = answer_logits(model, batch)
    token = -F.cross_entropy(logits.float(), labels, reduction="none")
    got, rows = token_logprobs(model, batch)
    torch.testing.assert_close(got, token, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows, row)
    weight = torch.arange(1.0, 1 + len(answers.total))
    want = token.new_zeros(len(weight)).index_add(0, row, token)
    assert_same(gradients((answers.total * weight).sum(), model), gradients((want * weight).sum(), model))


@pytest.mark.parametrize("kind", ["kl", "undial", "ce_u", "pdu"])
def test_divergences_of_every_head(pair, batch, kind):
    model, other = pair
    kept = positions(batch["labels"])
    labels = next_tokens(batch["labels"])[kept]
    has = kind in ("kl", "undial")
    reference = None
    wanted = answer_logits(other, batch)[0].detach()
    if has:
        head = other.get_output_embeddings()
        reference = Reference(module.last_states(other, batch, kept), head.weight.detach(), head.bias)
    got = divergence(model, batch, kept, labels, kind, reference, 2.0)
    want = divergence_of_logits(kind, answer_logits(model, batch)[0], wanted, labels, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert_same(gradients(got.mean(), model), gradients(want.mean(), model))


def test_the_output_layer_sees_one_state(batch):
    model, seen = tiny_llama(), []
    assert why_logits(model, batch) is None
    original = F.linear

    def watched(x, weight, bias=None):
        if weight is model.lm_head.weight:
            seen.append(tuple(x.shape))
        return original(x, weight, bias)

    F.linear = torch.nn.modules.linear.F.linear = watched
    try:
        answer_logprobs(model, batch)
    finally:
        F.linear = torch.nn.modules.linear.F.linear = original
    assert seen == [(1, 1, 64)]
    assert not model.lm_head._forward_pre_hooks


class Bent(transformers.LlamaForCausalLM):
    """Logits that are no scaled or capped ones of its output layer."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out


class OtherLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_fall_back_to_logits_says_why(batch):
    torch.manual_seed(0)
    bent = Bent(transformers.LlamaConfig(**SMALL)).eval()
    other = tiny_llama()
    head = OtherLinear(64, 128, bias=False)
    head.weight = other.lm_head.weight
    other.lm_head = head
    for model, words in ((bent, "not those of its output layer"), (other, "a OtherLinear, not a plain linear one")):
        assert words in why_logits(model, batch)
        with pytest.warns(UserWarning, match=words):
            answers = answer_logprobs(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none")
        torch.testing.assert_close(answers.total, -nll.sum(1), rtol=1e-5, atol=1e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            answer_logprobs(model, batch)
        assert float(answer_kl(model, model, batch)) == pytest.approx(0, abs=1e-6)
        stored = Reference(module.last_states(model, batch, positions(batch["labels"])))
        with pytest.raises(ValueError, match="hidden states do not serve"):
            answer_kl(model, stored, batch)


def test_hooks_on_the_output_layer_are_respected(batch):
    model = tiny_llama()
    handle = model.lm_head.register_forward_hook(lambda _, args, out: out * 0)
    assert "forward hooks" in why_logits(model, batch)
    with pytest.warns(UserWarning, match="forward hooks"):
        token = token_logprobs(model, batch)[0]
    torch.testing.assert_close(token, torch.full_like(token, -4.8520), rtol=1e-4, atol=0)  # ln 128
    handle.remove()
    assert why_logits(model, batch) is None


def test_autocast_is_kept(batch):
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        got = answer_logprobs(model, batch).total
        logits, labels, row = answer_logits(model, batch)
    token = -F.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(got, token.new_zeros(len(got)).index_add(0, row, token), rtol=2e-3, atol=0.05)
    assert got.dtype == torch.float32


def test_trying_a_model_is_no_pass_of_its_own(batch):
    """What watches activations must not see tokens that nobody asked for."""
    torch.manual_seed(0)
    for build in (tiny_llama, MODELS["gemma2"], MODELS["granite"]):
        model, seen = build().float().eval(), []
        model.model.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[:2]))
        first = answer_logprobs(model, batch).total
        assert seen == [batch["input_ids"].shape]
        torch.testing.assert_close(answer_logprobs(model, batch).total, first)
        logits, labels, row = answer_logits(model, batch)
        token = -F.cross_entropy(logits.float(), labels, reduction="none")
        torch.testing.assert_close(first, token.new_zeros(len(first)).index_add(0, row, token), rtol=1e-4, atol=1e-3)
