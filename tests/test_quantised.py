"""QLoRA: what is refused before any work, and, where bitsandbytes is installed, a run whose packed weights do not move."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
from fastunlearn.localize import prune
from fastunlearn.parametrize import lora
from fastunlearn.parametrize.masked_lora import MaskedLoraConfig
from fastunlearn.quantised import is_quantised, prepare
from fastunlearn.updates.hamu import CERTIFICATES
from tests.methods.test_hamu import FORGET, RETAIN, TOKENIZER, half_masks, make, options
from tests.tiny_chat import char_tokenizer, tiny_llama

TEXT = torch.arange(40).reshape(1, 40) * 7 % 127 + 1
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def packed_llama():
    """As a quantised model looks from outside: it says so, and one weight is no floating number."""
    model = tiny_llama()
    model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    return model


def test_without_an_adapter_nothing_could_move(tmp_path):
    with pytest.raises(ValueError, match="peft_config: the model's weights are quantised and do not move"):
        make(tmp_path / "out", packed_llama())


def test_masks_do_not_go_with_quantised_weights(tmp_path):
    adapter = peft.LoraConfig(**ADAPTER)
    with pytest.raises(ValueError, match="masks: masks say which weights may move or stay zero, and quantised weights"):
        make(tmp_path / "out", packed_llama(), masks=half_masks(tiny_llama()), peft_config=adapter)
    with pytest.raises(ValueError, match="peft_config: a MaskedLoraConfig adds to the weight itself"):
        prepare(packed_llama(), MaskedLoraConfig(variant="dense", target_modules=["q_proj"]))


def test_masks_beside_a_model_are_not_dropped_in_silence(tmp_path):
    model = tiny_llama()
    masks = prune(model, calibration=TEXT)
    save_checkpoint(tmp_path / "sparse", model, char_tokenizer(), masks=masks, pruning={"pattern": "2:4"})
    for choice in ("auto", "require"):
        with pytest.raises(ValueError, match=r"quantization_config: .*sparse has masks"):
            load_checkpoint(tmp_path / "sparse", quantization_config=object(), masks=choice)
    (tmp_path / "x.gguf").write_bytes(b"")
    for source in ("smollm2", tmp_path / "x.gguf"):
        with pytest.raises(ValueError, match="is a GGUF file, which is unpacked as it is read"):
            load_checkpoint(source, quantization_config=object())


def test_a_plain_model_is_left_alone():
    model = tiny_llama()
    assert prepare(model, peft.LoraConfig(**ADAPTER)) is model
    assert not is_quantised(model)
    assert is_quantised(lora(packed_llama(), peft.LoraConfig(**{**ADAPTER, "target_modules": ["q_proj"]})))


def test_norms_become_float32_and_packed_weights_stay():
    model = packed_llama()
    model.model.norm.to(torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    ready = prepare(model, peft.LoraConfig(**ADAPTER))
    assert ready.model.layers[0].mlp.up_proj.weight is weight
    assert weight.dtype == torch.uint8
    assert ready.model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in ready.parameters())


@pytest.mark.parametrize("objective", ["GradDiff", "NPO"])
def test_four_bits_and_an_adapter(tmp_path, objective):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from fastunlearn.methods import HAMUConfig, HAMUTrainer

    save_checkpoint(tmp_path / "base", tiny_llama(), char_tokenizer())
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    args = HAMUConfig(
        **options(tmp_path / "out", hamu_share=0.3, learning_rate=5e-2, num_train_epochs=3, objective=objective)
    )
    adapter = peft.LoraConfig(**ADAPTER)
    if objective == "GradDiff":
        trainer = HAMUTrainer(str(tmp_path / "base"), args, FORGET, RETAIN, TOKENIZER, adapter, four)
    else:
        # One that was used before, and is reordered by that.
        loaded = load_checkpoint(tmp_path / "base", quantization_config=four).model
        with torch.no_grad():
            loaded(input_ids=TEXT)
        trainer = HAMUTrainer(loaded, args, FORGET, RETAIN, TOKENIZER, adapter)
    # A forward pass in eval mode between two steps, as certificates need it, must not cost the next step its gradients.
    with torch.no_grad():
        trainer.model.eval()(input_ids=TEXT)
    packed = {n: p for n, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 14
    before = {n: p.detach().clone() for n, p in packed.items()}
    factors = copy.deepcopy({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(n.split(".")[-3].startswith("lora_") and p.dtype == torch.float32 for n, p in factors.items())
    ids = {"input_ids": TEXT, "labels": TEXT}
    trainer.model.train()(**ids).loss.backward()
    first = next(p for n, p in trainer.model.named_parameters() if "layers.0" in n and "lora_B" in n)
    assert first.grad.any()
    trainer.model.zero_grad()
    trainer.train()
    after = dict(trainer.model.named_parameters())
    for name, tensor in before.items():
        assert after[name].dtype == torch.uint8
        assert torch.equal(after[name], tensor)
    assert any(not torch.equal(after[n], t) for n, t in factors.items())
    records = [json.loads(line) for line in (tmp_path / "out" / CERTIFICATES).read_text().splitlines()]
    assert len(records) == 3
    assert sum(r["holds"] for r in records) >= 2
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
