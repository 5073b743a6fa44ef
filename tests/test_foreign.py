"""Liger's kernels, bitsandbytes' optimisers and trackers inside our trainers; stand-ins do what those packages document."""

from __future__ import annotations

import sys
import types
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.integrations import integration_utils, liger
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastunlearn.methods.hamu import HAMUConfig, HAMUTrainer
from fastunlearn.methods.sau import SAUConfig, SAUTrainer
from tests.test_trainer import FORGET, RETAIN, TOKENIZER, config, half_masks, make, weights
from tests.tiny_chat import tiny_llama

QUICK = {
    "learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "warmup_epochs": 0,
    "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
}  # fmt: skip


def sau(folder, **options):
    model = tiny_llama()
    masks = half_masks(model)
    args = SAUConfig(
        **QUICK | {"output_dir": str(folder), "reference_cache_dir": str(folder.parent / "cache")} | options
    )
    return SAUTrainer(model, args, FORGET, RETAIN, TOKENIZER, masks=masks, pruning={"pattern": "2:4"})


# ---- Liger ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """liger-kernel as its monkey patch of Llama is: a forward pass that in training, given labels, returns no logits; exchanged MLPs
    and norms. Counts what is called.
    """
    calls: Counter[str] = Counter()

    def forward(self, input_ids=None, attention_mask=None, labels=None, shift_labels=None, skip_logits=None, **given):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **given)[0]
        if skip_logits is None:
            skip_logits = self.training and (labels is not None or shift_labels is not None)
        calls["fused" if skip_logits else "logits"] += 1
        return CausalLMOutputWithPast(logits=None if skip_logits else self.lm_head(hidden))

    def mlp(self, x):
        calls["mlp"] += 1
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def norm(self, x):
        calls["norm"] += 1
        return type(self).forward(self, x)

    def apply(model, rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True):
        model.forward = types.MethodType(forward, model)
        for layer in model.model.layers:
            layer.mlp.forward = types.MethodType(mlp, layer.mlp)
            layer.input_layernorm.forward = types.MethodType(norm, layer.input_layernorm)

    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = apply
    package.transformers = inner
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    # The stand-in runs on a CPU.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return calls


RMU = {"module_regex": r"model\.layers\.1", "trainable_params_regex": [r"model\.layers\.[01]\.mlp\.down_proj\.weight"]}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "NPO", "retain_loss_type": "KL"},
        {"objective": "UNDIAL"},
        {"objective": "RMU", **RMU},
        {"objective": "GradDiff", "update": "pcgrad", "gradient_checkpointing": True},
    ],
    ids=lambda options: options["objective"],
)
def test_losses_are_what_they_were_with_liger(tmp_path, calls, options):
    after = []
    for on in (False, True):
        trainer = make(tmp_path / str(on), max_steps=2, use_liger_kernel=on, **options)
        trainer.train()
        after.append(weights(trainer.model))
        assert bool(calls) == on
    assert calls["fused"] == 0
    # UNDIAL has no retain term: one pass a step.
    assert min(calls["logits"], calls["mlp"], calls["norm"]) >= 2
    for name, weight in after[0].items():
        torch.testing.assert_close(after[1][name], weight, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


def test_liger_on_survivors_and_on_an_adapter(tmp_path, calls):
    from peft import LoraConfig

    after = []
    for on in (False, True):
        trainer = sau(tmp_path / str(on), objective="GradDiff", compressed=True, use_liger_kernel=on)
        trainer.train()
        after.append(weights(trainer.model))
    assert all(torch.allclose(after[0][name].float(), after[1][name].float(), atol=1e-6) for name in after[0])
    assert calls["mlp"] > 0
    calls.clear()
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    make(tmp_path / "lora", max_steps=1, use_liger_kernel=True, peft_config=lora, objective="NPO").train()
    assert calls["logits"] > 0
    assert calls["fused"] == 0


def test_what_liger_cannot(tmp_path, calls, monkeypatch):
    with pytest.raises(ValueError, match="liger_kernel_config: cross_entropy replaces torch's own"):
        config(tmp_path, use_liger_kernel=True, liger_kernel_config={"cross_entropy": True})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="use_liger_kernel: its kernels run on a GPU, and training is on the CPU"):
        config(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="needs liger-kernel: pip install liger-kernel"):
        config(tmp_path, use_liger_kernel=True)
    pytest.importorskip("diffusers")
    from fastunlearn.diffusion_trainer import DiffusionConfig

    with pytest.raises(ValueError, match="for language models alone"):
        DiffusionConfig(output_dir=str(tmp_path), use_liger_kernel=True)


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bitsandbytes(monkeypatch):
    """The package, or an AdamW of torch's that takes its arguments."""
    from transformers import trainer_optimizer

    try:
        import bitsandbytes

        return bitsandbytes
    except ImportError:
        pass

    class AdamW(torch.optim.AdamW):
        def __init__(self, params, lr, betas, eps, optim_bits, is_paged):
            self.bits = optim_bits
            super().__init__(params, lr=lr, betas=betas, eps=eps)

    class Manager:
        get_instance = classmethod(lambda cls: cls())

        def register_module_override(self, module, name, what):
            assert (name, what) == ("weight", {"optim_bits": 32})

    package, inner = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    AdamW.__module__ = "bitsandbytes.optim.adamw"
    inner.AdamW, inner.Lion, inner.RMSprop, inner.GlobalOptimManager = AdamW, None, None, Manager
    package.optim = inner
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", inner)
    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: True)
    return package


def test_eight_bit_states_where_nothing_is_masked(tmp_path, bitsandbytes):
    start = weights(tiny_llama())
    after = []
    for optim in ("adamw_torch", "adamw_bnb_8bit"):
        trainer = make(tmp_path / optim, max_steps=3, objective="GradDiff", optim=optim)
        trainer.train()
        after.append(weights(trainer.model))
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(inner, bitsandbytes.optim.AdamW)
    apart = sum(float((after[0][n] - after[1][n]).square().sum()) for n in start)
    moved = sum(float((after[0][n] - start[n]).square().sum()) for n in start)
    # Eight bits a state: near the steps of 32, not equal to them.
    assert apart < 0.05 * moved


def test_eight_bit_states_of_survivors(tmp_path, bitsandbytes):
    """compressed=true leaves nothing to mask: the optimiser sees survivors only, and the pattern holds."""
    trainer = sau(tmp_path / "out", objective="GradDiff", compressed=True, optim="adamw_bnb_8bit")
    trainer.train()
    trainer.save_model()
    again = sau(tmp_path / "dense", objective="GradDiff")
    again.train()
    kept = again.model.state_dict()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in again.masks.items():
        assert bool((saved[name][~mask.unpack()] == 0).all()), name
        torch.testing.assert_close(saved[name], kept[name], rtol=0, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"adamw_bnb_8bit would move weights that the masks freeze; .* compressed=true"
    ):
        sau(tmp_path / "masked", objective="GradDiff", optim="adamw_bnb_8bit").train()
    options = {"redistribution": "update", "dense_model": str(tmp_path / "d"), "importance": "wanda"}
    tiny_llama().save_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match="takes no factors on the update of single entries"):
        sau(tmp_path / "scaled", objective="GradDiff", compressed=True, optim="adamw_bnb_8bit", **options).train()


def test_what_another_optimiser_cannot(tmp_path):
    with pytest.raises(ValueError, match="adafactor keeps no fp32 copies"):
        make(tmp_path / "a", max_steps=1, optim="adafactor", master_weights=True).train()
    with pytest.warns(UserWarning, match="adafactor rounds bfloat16 weights to nearest"):
        make(tmp_path / "b", tiny_llama().bfloat16(), max_steps=1, optim="adafactor", objective="GradDiff").train()


# ---- trackers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch):
    """What a tracker that report_to names is told."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tiny", Tracker)
    return seen


def test_a_tracker_is_told_of_capacity_and_density(tmp_path, lines):
    sau(tmp_path / "out", objective="GradDiff", report_to="tiny", localize="saliency", saliency_density=0.1).train()
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    assert all({"capacity", "forget_loss", "retain_loss", "grad_norm"} <= set(line) for line in steps)
    # Of the masked weights, in the first line: what saliency chose of what pruning left.
    assert [line.get("mask_density") for line in steps] == [pytest.approx(0.1, abs=0.06), None]
    assert all(isinstance(value, int | float) for line in lines for value in line.values())


def test_a_tracker_is_told_of_certificates(tmp_path, lines):
    args = HAMUConfig(**QUICK | {"output_dir": str(tmp_path), "report_to": "tiny", "certificate_every": 1})
    HAMUTrainer(tiny_llama(), args, FORGET, RETAIN, TOKENIZER).train()
    steps = [line for line in lines if "loss" in line]
    assert {"hamu_s", "hamu_holds", "hamu_hardness"} <= set(steps[0])
    assert not any("mask_density" in line for line in lines)


def test_a_tracker_is_told_of_an_adapter_s_masks(tmp_path, lines):
    pytest.importorskip("peft")
    from fastunlearn import MaskedLoraConfig

    model = tiny_llama()
    masks = {n: m for n, m in half_masks(model).items() if "q_proj" in n}
    make(tmp_path / "out", model, max_steps=1, objective="GradDiff", report_to="tiny", peft_config=MaskedLoraConfig(r=2, masks=masks)).train()  # fmt: skip
    assert next(line for line in lines if "loss" in line)["mask_density"] == 0.5
