"""The plan: bytes are those of the run itself, the peak and the time those that a process then has."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastunlearn import optim
from fastunlearn.cli import plan as command
from fastunlearn.cli._run import ScriptArguments
from fastunlearn.parametrize import CompressedNM
from fastunlearn.report import plan as module
from fastunlearn.report.configurations import CONFIGURATIONS, configuration, shortened
from fastunlearn.report.plan import GIB, HARDWARE, PlanArguments, plan
from tests.parametrize.test_compressed_nm import loss_of, pruned

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    from tests.tiny_chat import tiny_llama

    tiny_llama().config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize("compressed", [False, True])
def test_bytes_are_those_of_the_run(folder, compressed):
    model, masks = pruned()
    named = None if compressed else masks
    if compressed:
        CompressedNM(model, masks, 2, 4)
    optimizer = optim.MaskedAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], named, lr=1e-3)
    loss_of(model, 0).backward()
    optimizer.step()
    said = plan(PlanArguments(folder, compressed=compressed, dtype="float32", sequence=16))
    assert said.bytes["weights"] == sum(p.nbytes for p in model.parameters())
    assert said.bytes["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert said.bytes["states"] == sum(t.nbytes for t in states)
    assert said.moving == sum(int(mask.count()) for mask in masks.values())
    assert said.parameters == sum(p.numel() for p in pruned()[0].parameters())
    # Bits of the trainer and of the optimiser; compressed layers have them among the weights.
    assert (said.bytes["masks"] > 0) == (not compressed)


def test_hamu_keeps_two_gradients_and_no_states(folder):
    one, two = (
        plan(PlanArguments(folder, method=method, compressed=True, dtype="float32", sequence=16))
        for method in ("sau", "sau+hamu")
    )
    assert two.bytes["gradients"] == 2 * one.bytes["gradients"]
    assert two.bytes["states"] == 0 < one.bytes["states"]


def test_layers_beyond_the_simulated_ones_are_added_up():
    """What two short stacks say of six layers is what six layers say of themselves."""
    a = PlanArguments("smollm2-135m", compressed=True, sequence=64, per_device_train_batch_size=2)
    config = shortened(configuration("smollm2-135m"), 6)
    rates = module.Rates(HARDWARE["h200"].flops, HARDWARE["h200"].copy, HARDWARE["h200"].launch)
    whole = module._simulate(a, config, 6, rates, 2**28)
    short = [module._simulate(a, config, count, rates, 2**28) for count in (2, 4)]
    made = module._extrapolated(short, (2, 4), 6)
    for one, other in zip(made.moments, whole.moments):
        assert one[0] == pytest.approx(other[0], rel=0.02)
        assert one[1] == pytest.approx(other[1], rel=1e-6)
    for name, seconds in whole.seconds.items():
        assert made.seconds[name] == pytest.approx(seconds, rel=0.02)


def _flops(make) -> float:
    from torch._subclasses.fake_tensor import FakeTensorMode

    rates = module.Rates(HARDWARE["h200"].flops, HARDWARE["h200"].copy, HARDWARE["h200"].launch)
    with FakeTensorMode(), module.Recorder(rates, [], lambda *_: 0) as recorder:
        make().sum().backward()
    return recorder.flops


@pytest.mark.parametrize("causal", [False, True])
def test_products_of_attention_count(causal):
    def make():
        q, k, v = (torch.empty(2, 4, 64, 16, requires_grad=True) for _ in range(3))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    # Two products forward, five backward; of a causal one half.
    assert _flops(make) == 7 * 2 * 2 * 4 * 64 * 64 * 16 / (2 if causal else 1)


@pytest.mark.parametrize("trains", [False, True])
def test_products_of_the_loss_count(trains):
    def make():
        hidden, weight = torch.empty(48, 32, requires_grad=True), torch.empty(100, 32, requires_grad=trains)
        return module.linear_nll(hidden, weight, torch.zeros(48, dtype=torch.int64), reduction="token")[0]

    # Logits and the gradient of what enters; a head that trains makes the logits again, and has a gradient of its own.
    assert _flops(make) == (4 if trains else 2) * 2 * 48 * 100 * 32


@pytest.mark.parametrize("method", ["open-unlearning", "sau+hamu"])
def test_operations_of_this_machine_are_run_and_timed(folder, method, monkeypatch):
    """What the rates say does not count then; one that was run is not run again."""
    slow = module.Hardware({2: 1.0, 4: 1.0}, 1.0, 1.0, 1e9, 1.0, 1.0, "this CPU", torch.device("cpu"))
    ran = []
    run = module.Recorder._run

    def counted(self, *args):
        before = len(self._times)
        seconds = run(self, *args)
        ran.append(len(self._times) - before)
        return seconds

    monkeypatch.setattr(module.Recorder, "_run", counted)
    said = plan(PlanArguments(folder, method, dtype="float32", sequence=16, per_device_train_batch_size=2), slow)
    parts = ("forget", "retain", *(["reference"] if method == "open-unlearning" else []))
    assert 0 < sum(said.seconds[part] for part in parts) < 30
    assert 0 < sum(ran) < len(ran) / 2


def test_checkpointing_and_more_processes_take_less():
    a = {"model_name_or_path": "smollm2-135m", "compressed": True, "sequence": 128}
    plain, again = (plan(PlanArguments(**a, gradient_checkpointing=on)) for on in (False, True))
    assert again.bytes["activations"] < 0.5 * plain.bytes["activations"]
    assert again.seconds["forget"] > plain.seconds["forget"]
    eight = plan(PlanArguments(**a, gpus=8))
    for name in ("weights", "gradients", "states"):
        assert eight.bytes[name] == pytest.approx(plain.bytes[name] / 8)
    assert eight.bytes["gathered"] > 0
    assert eight.seconds["traffic"] > 0 == plain.seconds.get("traffic", 0)


def test_the_8b_targets_by_arithmetic():
    """Compressed 2:4 takes at most 0.45 of the memory of open-unlearning's way, fits 72 GiB, and is no slower than 0.9 of it."""
    options = {"sequence": 512, "per_device_train_batch_size": 8, "gradient_checkpointing": True}
    theirs = plan(PlanArguments("llama-3.1-8b", "open-unlearning", **options))
    ours = plan(PlanArguments("llama-3.1-8b", "sau", compressed=True, **options))
    assert ours.peak <= 0.45 * theirs.peak
    assert ours.peak <= 72 * GIB
    assert ours.step <= 0.9 * theirs.step
    assert ours.parameters == 8_030_261_248


def test_what_does_not_fit_says_what_would_be_less():
    few = plan(PlanArguments("llama-3.1-8b", "sau", hardware="a100", per_device_train_batch_size=64))
    want = "gradient_checkpointing=true, a per_device_train_batch_size below 64, --compressed, more --gpus than 1"
    assert f"DOES NOT FIT 75 GiB\n  less memory: {want}\n" in few.text()
    large = PlanArguments(
        "llama-3.1-70b", "sau", compressed=True, gradient_checkpointing=True, per_device_train_batch_size=1
    )
    assert "less memory: more --gpus than 1\n" in plan(large).text()
    assert "less memory" not in plan(dataclasses.replace(large, gpus=64)).text()


@pytest.mark.parametrize("gpus", [8, 64])
def test_70b_on_8_and_64_gpus(gpus):
    said = plan(
        PlanArguments(
            "llama-3.1-70b",
            "sau",
            gpus=gpus,
            compressed=True,
            gradient_checkpointing=True,
            per_device_train_batch_size=4,
        )
    )
    assert said.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert said.fits
    # 9/16 of two bytes and 2 + 8 bytes for every survivor, cut by the number of processes.
    survivors = said.moving
    assert said.bytes["states"] == pytest.approx(8 * survivors / gpus)
    assert said.seconds["traffic"] >= 0
    assert "assumed" in said.text()


@pytest.mark.serial
@pytest.mark.parametrize("arm", [*(pytest.param(arm, marks=pytest.mark.thorough) for arm in "abc"), "d"])
def test_the_peak_is_within_a_tenth_of_what_is_measured(arm):
    """On this CPU, a model of SmolLM2's layers with fewer of them, in a process of its own."""
    code = f"""
import json, torch
torch.set_num_threads(1)
from benchmarks import large
from fastunlearn.report import configurations
configurations.CONFIGURATIONS["small"] = {{**configurations.CONFIGURATIONS["smollm2-135m"], "num_hidden_layers": 4, "vocab_size": 8192}}
case = large.Case("small", "{arm}", "cpu", "float32", 4, 128, False, 1)
print(json.dumps(large.measure(case)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["plan"]["peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert command.main(["--model", folder, "--compressed", "sequence=16", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    # A run's own default is another one, and takes twice as much.
    assert (ScriptArguments.dtype, PlanArguments.dtype) == ("float32", "bfloat16")
    assert "float32 unless it is told dtype=bfloat16" in shown
    for word in ("weights", "gradients", "states", "activations", "peak", "tokens/s", "assumed:"):
        assert word in shown
    said = json.loads(out.read_text())
    assert said["peak_bytes"] > 0
    assert said["assumptions"]
    assert command.main(["--model", folder, "--json", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "sauu"}, "method: 'sauu' is unknown; did you mean sau"),
        ({"hardware": "h20"}, "hardware: 'h20' is unknown"),
        ({"pattern": "2-4"}, "pattern: want n:m"),
        ({"pattern": "5:4"}, "pattern: want n:m"),
        ({"method": "unlearn", "compressed": True}, "compressed: of a dense model"),
        ({"gpus": 0}, "gpus: want at least 1"),
        ({"answer_share": 0.0}, "answer_share: want a number in"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        PlanArguments("smollm2-135m", **options)


def test_what_a_pattern_does_not_reach_is_told(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.tiny_chat import tiny_mixtral

    model = tiny_mixtral()
    model.config.save_pretrained(tmp_path / "experts")
    said = plan(PlanArguments(str(tmp_path / "experts"), sequence=16))
    linear = sum(m.weight.numel() for b in model.model.layers for m in b.modules() if isinstance(m, torch.nn.Linear))
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    assert (said.moving, said.unpruned) == (linear // 2, blocks - linear)
    assert f"{said.unpruned:,} weights of the blocks are not pruned" in said.text()
    transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match=r"pattern: 2:4 is for torch.nn.Linear layers inside the blocks.* GPT2LMHeadModel"
    ):
        plan(PlanArguments(str(tmp_path / "gpt2")))


def test_of_a_model_with_eyes_the_language_model_is_pruned(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**sizes, "num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128}
    eyes = {**sizes, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    made = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    made.save_pretrained(tmp_path / "eyes")
    said = plan(PlanArguments(str(tmp_path / "eyes"), sequence=16))
    assert said.moving == 6 * (2 * 32 * (32 + 16) + 3 * 32 * 48) // 2


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is none of smollm2-135m"):
        plan(PlanArguments(str(tmp_path / "nothing")))
    assert set(CONFIGURATIONS) >= {"llama-3.1-8b", "llama-3.1-70b"}
