"""HAMU in the trainer: certificates against measured losses, policies, groups, other methods' parts, resuming."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import fastunlearn
from fastunlearn import ops
from fastunlearn.data.pairs import PairedSampler
from fastunlearn.data.text import collate, encode_rows
from fastunlearn.methods import HAMUConfig, HAMUTrainer, SAUConfig, SAUTrainer
from fastunlearn.objectives import answer_logprobs, token_nll
from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer
from fastunlearn.updates.hamu import CERTIFICATES
from tests.test_trainer import half_masks, kill_and_resume, rows, weights
from tests.tiny_chat import CharTokenizer, tiny_llama

TOKENIZER = CharTokenizer()
ROWS = rows(12)
FORGET, RETAIN = ROWS[:4], ROWS[4:]

_known: dict[str, torch.Tensor] = {}


def known_model():
    """The tiny model after some steps on all rows: gradients of rows that a model half knows."""
    model = tiny_llama()
    if not _known:
        known = encode_rows(ROWS, TOKENIZER)
        batch = collate([known[i] for i in range(len(known))], 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            loss = token_nll(answer_logprobs(model, batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _known.update({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    model.load_state_dict(_known)
    return model


def options(folder: Path, **changes):
    quick = {
        "output_dir": str(folder), "learning_rate": 2e-3, "num_train_epochs": 2, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": "none",
        "dataloader_pin_memory": False, "certificate_every": 1, "reference_cache_dir": str(folder.parent / "cache"),
    }  # fmt: skip
    return quick | changes


def make(folder: Path, model=None, forget=FORGET, retain=RETAIN, *, kind=HAMUTrainer, arguments=HAMUConfig, **changes):
    keywords = {k: changes.pop(k) for k in ("masks", "pruning", "peft_config") if k in changes}
    args = arguments(**options(folder, **changes))
    return kind(known_model() if model is None else model, args, forget, retain, TOKENIZER, **keywords)


def lines(folder: Path):
    return [json.loads(line) for line in (folder / CERTIFICATES).read_text().splitlines()]


def nll(model, some):
    encoded = encode_rows(some, TOKENIZER)
    with torch.no_grad():
        return float(token_nll(answer_logprobs(model.eval(), collate([encoded[i] for i in range(len(some))], 0))))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("update", ["hamu-q", "hamu-u"])
def test_certificates_hold(tmp_path, update, seed):
    model = known_model()
    before = nll(model, FORGET), nll(model, RETAIN)
    trainer = make(
        tmp_path / "out",
        model,
        update=update,
        hamu_share=0.3,
        num_train_epochs=24,
        per_device_train_batch_size=4,
        seed=seed,
    )
    trainer.train()
    records = lines(tmp_path / "out")
    assert [r["step"] for r in records] == list(range(1, 25))
    assert sum(r["holds"] for r in records) >= 0.95 * len(records)
    assert all(r["unharmed"] for r in records if r["holds"])
    for r in records:
        assert r["taken"]
        assert 0 < r["s"] <= 1
        assert 0 <= r["hardness"] <= 1
        assert r["groups"] == ["retain"]
        assert "held_out_change" in r
    after = nll(model, FORGET), nll(model, RETAIN)
    # What the certificates promise, step by step, adds up: forgotten, and what must stay is no worse.
    assert after[0] > before[0]
    assert after[1] < before[1] + 1e-3
    log = trainer.state.log_history[0]
    assert log["hamu_holds"] == records[0]["holds"]
    assert log["hamu_s"] == pytest.approx(records[0]["s"])
    summary = trainer.certificates.summary()
    assert (summary["steps"], summary["checked"]) == (24, 24)
    assert summary["held"] >= 23
    assert summary["unharmed"] >= summary["held"]


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_certificates_of_bf16_runs_are_measured_in_fp32(tmp_path, how):
    """bf16 does not tell losses apart that differ by what a step changes."""
    model = known_model() if how == "autocast" else known_model().bfloat16()
    plain = copy.deepcopy(model).float()
    before = nll(plain, FORGET)
    trainer = make(tmp_path / "out", model, num_train_epochs=1, hamu_share=0.3, bf16=how == "autocast")
    trainer.train()
    plain.load_state_dict(weights(trainer.model))
    (record,) = lines(tmp_path / "out")
    assert record["forget_change"] == pytest.approx(nll(plain, FORGET) - before, rel=2e-2)
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {dtype}
    own = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    assert all(isinstance(p, torch.nn.Parameter) for p in own)
    # Back in the trainer's own precision.
    assert ("forward" in vars(model)) == (how == "autocast")


def test_no_room_to_measure(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("fastunlearn.trainer.in_fp32", full)
    with pytest.warns(UserWarning, match="certificate_every: there is no room to take the losses in fp32"):
        make(tmp_path / "out", num_train_epochs=2).train()
    assert [r["step"] for r in lines(tmp_path / "out") if "holds" not in r] == [1, 2]


def test_held_out_rows_are_of_no_process_s_step(tmp_path, monkeypatch):
    """Where another process has all rows but one in its step, that one is held out; none in any process where there is none."""
    trainer = make(tmp_path / "out")
    batch = trainer.data_collator([trainer.train_dataset[(i, (i,))] for i in range(2)])
    trainer._step_batches = [batch]
    elsewhere = torch.ones(len(RETAIN))
    elsewhere[:3] = 0
    monkeypatch.setattr("fastunlearn.certified.summed", lambda used, device: used + elsewhere)
    assert trainer._held_out()["retain"]["index"].tolist() == [2]
    elsewhere[2] = 1
    assert trainer._held_out() is None


def test_one_step_is_the_step_written_out(tmp_path):
    model = known_model()
    plain = copy.deepcopy(model)
    trainer = make(tmp_path / "out", model, num_train_epochs=1, hamu_share=0.3, objective="SimNPO", hamu_scope="global")
    batch = trainer.data_collator([trainer.train_dataset[key] for key in PairedSampler(4, len(RETAIN), 1, seed=42)])
    forget = trainer.objective.gamma * trainer.objective.forget_loss(answer_logprobs(plain, batch["forget"]))
    params = list(plain.parameters())
    a = torch.autograd.grad(forget, params, allow_unused=True)
    r = torch.autograd.grad(token_nll(answer_logprobs(plain, batch["retain"])), params, allow_unused=True)
    want = ops.hamu_step_(
        params, list(r), [-x for x in a], lr=2e-3, share=0.3, max_grad_norm=1.0, scope="global"
    )  # fmt: skip
    trainer.train()
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-5, atol=1e-7)
    (record,) = lines(tmp_path / "out")
    for name in ("s", "capacity", "kappa", "predicted_forget"):
        assert record[name] == pytest.approx(getattr(want, name), rel=1e-3)


@pytest.mark.parametrize("update", ["hamu-q", "pcgrad", "gru"])
def test_accumulation_is_a_larger_batch(tmp_path, update):
    def run(size, steps):
        trainer = make(
            tmp_path / f"{size}", kind=UnlearnTrainer, arguments=UnlearnConfig, update=update, objective="GradDiff",
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, num_train_epochs=1, max_grad_norm=1.0,
            optim="sgd", warmup_epochs=0, hamu_share=0.3 if update == "hamu-q" else None,
        )  # fmt: skip
        trainer.train()
        return weights(trainer.model), trainer

    (whole, one), (parts, other) = run(4, 1), run(2, 2)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)
    if update == "hamu-q":
        first, second = lines(one.output), lines(other.output)
        assert first[0]["forget_change"] == pytest.approx(second[0]["forget_change"], rel=1e-2)
        assert second[0]["holds"]


def test_frozen_weights_stay_bit_for_bit_with_sau(tmp_path):
    model = known_model()
    masks = half_masks(model)
    start = weights(model)
    trainer = make(
        tmp_path / "out", model, kind=SAUTrainer, arguments=SAUConfig, update="hamu-q", objective="GradDiff", hamu_share=0.2,
        warmup_epochs=0, lr_scheduler_type="constant", masks=masks, pruning={"pattern": "2:4"},
    )  # fmt: skip
    trainer.train()
    moved = weights(model)
    for name, tensor in moved.items():
        if name in masks:
            kept = masks[name].unpack()
            assert not tensor[~kept].any()
            assert not torch.equal(tensor, start[name])
        else:
            assert torch.equal(tensor, start[name]), name
    assert all(r["holds"] for r in lines(tmp_path / "out"))
    assert "capacity" in trainer.state.log_history[0]


def test_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = known_model()
    start = weights(model)
    adapter = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = make(
        tmp_path / "out", model, hamu_share=0.3, learning_rate=5e-2, num_train_epochs=4, peft_config=adapter
    )  # fmt: skip
    trainer.train()
    state = weights(trainer.model)
    assert any("lora_B" in name and tensor.any() for name, tensor in state.items())
    for name, tensor in start.items():
        inside = [other for other in state if other.replace("base_model.model.", "").replace("base_layer.", "") == name]
        assert len(inside) == 1
        assert torch.equal(state[inside[0]], tensor)
    # B starts at zero, so A has no gradient in the first step: its balls have no radius.
    assert len(lines(tmp_path / "out")) == 4
    assert sum(r["holds"] for r in lines(tmp_path / "out")) >= 3


def test_groups_are_kept_each_by_itself(tmp_path):
    retain = [{**row, "tenant": "abc"[i % 3]} for i, row in enumerate(RETAIN)]
    trainer = make(tmp_path / "out", retain=retain, retain_groups="tenant", hamu_share=0.2, num_train_epochs=6)
    trainer.train()
    records = lines(tmp_path / "out")
    assert len(records) == 6
    for r in records:
        assert r["groups"] == ["a", "b", "c"]
        assert len(r["retain_change"]) == len(r["predicted_retain"]) == 3
    assert sum(r["holds"] for r in records) >= 5
    budgets = make(
        tmp_path / "u", retain=retain, retain_groups="tenant", update="hamu-u", retain_budgets=[0.0, 0.001, 0.01],
        num_train_epochs=2,
    )  # fmt: skip
    budgets.train()
    for r in lines(tmp_path / "u"):
        assert all(p <= b + 1e-6 for p, b in zip(r["predicted_retain"], [0.0, 0.001, 0.01]))


def test_groups_are_drawn_in_turn():
    groups = [0, 0, 1, 0, 1, 2]
    sampler = PairedSampler(4, 6, per_forget=3, seed=1, groups=groups)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for _, drawn in sampler:
            assert [groups[i] for i in drawn] == [0, 1, 2]
    sampler.set_epoch(0)
    first = [drawn[0] for _, drawn in sampler][:3]
    assert sorted(first) == [0, 1, 3]


# The same answers to almost the same questions: whatever forgets the ones forgets the others.
TWINS = [{**row, "question": row["question"] + "?"} for row in FORGET]


def test_stop_leaves_the_flagged_step_out(tmp_path):
    model = tiny_llama()
    start = weights(model)
    trainer = make(tmp_path / "out", model, retain=TWINS, hamu_share=0.99, on_flag="stop")
    with pytest.warns(
        UserWarning, match="training ends: step 1 is flagged: damage to what must stay cannot be avoided"
    ):
        trainer.train()
    (record,) = lines(tmp_path / "out")
    assert record["flagged"]
    assert not record["taken"]
    assert record["hardness"] > 0.1
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, start[name])


def test_hardness_rises_with_duplicates_in_the_retain_set(tmp_path):
    def hardness(retain, name):
        make(tmp_path / name, tiny_llama(), retain=retain, hamu_share=0.05, num_train_epochs=1).train()
        return lines(tmp_path / name)[0]["hardness"]

    assert hardness(TWINS, "twins") > hardness(RETAIN, "others") + 0.1


def test_backtrack_halves_the_steps(tmp_path):
    trainer = make(
        tmp_path / "out",
        tiny_llama(),
        retain=TWINS,
        hamu_share=0.99,
        on_flag="backtrack",
        certificate_every=0,
        num_train_epochs=3,
    )
    trainer.train()
    records = lines(tmp_path / "out")
    assert [r["lr"] for r in records] == pytest.approx([2e-3 / 2**i for i in range(3)])
    assert all(r["flagged"] and r["taken"] for r in records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backtrack_after_a_failed_check(tmp_path, monkeypatch, dtype):
    """Of bf16 weights a check fails by what rounding at random adds, which shorter steps do not cure."""
    monkeypatch.setattr("fastunlearn.ops.Certificate.holds", lambda *_: False)
    trainer = make(tmp_path / "out", known_model().to(dtype), hamu_share=0.1, on_flag="backtrack", num_train_epochs=2)
    trainer.train()
    first, second = (r["lr"] for r in lines(tmp_path / "out") if not r["flagged"])
    assert second == pytest.approx(first / 2 if dtype == torch.float32 else first)


def test_more_than_the_ball_holds(tmp_path):
    with pytest.raises(ValueError, match="largest feasible Q of this step is"):
        make(tmp_path / "a", hamu_ratio=5.0).train()
    trainer = make(tmp_path / "b", hamu_ratio=5.0, on_infeasible="largest", num_train_epochs=2)
    trainer.train()
    assert all(r["s"] == pytest.approx(1) for r in lines(tmp_path / "b"))


def test_adamw_says_that_the_guarantee_is_void(tmp_path):
    model = known_model()
    start = weights(model)
    with pytest.warns(UserWarning, match="the guarantee is void"):
        trainer = make(tmp_path / "out", model, hamu_base="adamw", learning_rate=1e-4, hamu_share=0.3)
    trainer.train()
    assert not (tmp_path / "out" / CERTIFICATES).exists()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights(model).items())
    assert "exp_avg" in next(iter(trainer._masked_optimizer().state.values()))


def test_what_adamw_is_passed_is_the_step(tmp_path):
    """The opposite of the change over the learning rate; nothing where the policies leave the step out."""

    def gradient(name, **changes):
        with pytest.warns(UserWarning, match="the guarantee is void"):
            trainer = make(tmp_path / name, hamu_base="adamw", **changes)
        pair = trainer.train_dataset
        batch = trainer.data_collator([pair[key] for key in PairedSampler(4, len(pair.retain), 1, seed=42)])
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model, batch)
        return {n: p.grad for n, p in trainer.model.named_parameters()}, trainer.update

    make(tmp_path / "sgd", model := known_model(), num_train_epochs=1, hamu_q=2e-7).train()
    got, _ = gradient("adamw", hamu_q=2e-7)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], (known_model().get_parameter(name) - p) / 2e-3, rtol=1e-3, atol=1e-4)
    got, update = gradient("stop", model=tiny_llama(), retain=TWINS, hamu_share=0.99, on_flag="stop")
    assert all(grad is None for grad in got.values())
    assert update.stop.startswith("step 1 is flagged")
    _, update = gradient("largest", hamu_ratio=5.0, on_infeasible="largest")
    assert update.optimizer.certificate.s == pytest.approx(1)


def test_what_hamu_cannot_start_with(tmp_path):
    model = known_model()
    given = (model, HAMUConfig(**options(tmp_path / "out")), FORGET, RETAIN, TOKENIZER)
    with pytest.raises(ValueError, match="optimizers: update=hamu-q takes its steps itself"):
        HAMUTrainer(*given, optimizers=(torch.optim.SGD(model.parameters(), 1e-3), None))
    for changes in ({"objective": "KL"}, {"objective": "NPO", "retain_loss_type": "KL"}, {"objective": "RMU"}):
        with pytest.raises(ValueError, match=r"update: hamu-q has no gradient to keep by .* set retain_loss_type=NLL"):
            make(tmp_path / "out", **changes)
    trainer = HAMUTrainer(
        model,
        HAMUConfig(**options(tmp_path / "kl", objective="KL")),
        FORGET,
        RETAIN,
        TOKENIZER,
        reference_model=tiny_llama(),
    )
    assert trainer.objective.retain_loss_type == "KL"


@pytest.mark.parametrize("update", ["hamu-q", "hamu-q, adam", "gru"])
def test_resuming_is_not_having_stopped(tmp_path, update):
    update, _, geometry = update.partition(", ")

    def trainer(folder):
        # bf16: the random numbers of rounding must go on, too.
        return make(
            folder, known_model().bfloat16(), kind=UnlearnTrainer, arguments=UnlearnConfig, update=update, objective="GradDiff",
            per_device_train_batch_size=2, num_train_epochs=3, save_strategy="steps", save_steps=2, save_total_limit=None,
            optim="sgd", warmup_epochs=0, hamu_share=0.2 if update == "hamu-q" else None, on_infeasible="largest", on_flag="backtrack",
            hamu_geometry=geometry or "euclidean",
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.train()
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    if update == "hamu-q":
        # A run that was killed after a step that no checkpoint holds.
        text = (tmp_path / "whole" / CERTIFICATES).read_text().splitlines()[:5]
        (tmp_path / "again" / CERTIFICATES).write_text("\n".join(text) + "\n")
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=True)
    want, got = weights(whole.model), weights(again.model)
    for name in want:
        assert torch.equal(want[name], got[name]), name
    if update == "hamu-q":
        first, second = lines(tmp_path / "whole"), lines(tmp_path / "again")
        assert first == second
        assert len(first) == 6


def resumable(folder):
    # bf16: the random numbers of rounding must go on, too, and what backtracking has made of the steps.
    return make(
        folder, known_model().bfloat16(), retain=TWINS + RETAIN, per_device_train_batch_size=2, num_train_epochs=4, save_strategy="steps",
        save_steps=3, hamu_share=0.9, on_flag="backtrack", certificate_every=2,
    )  # fmt: skip


@pytest.mark.serial
@pytest.mark.thorough
def test_a_killed_run_resumed_equals_one_that_was_not(tmp_path):
    kill_and_resume(tmp_path, __name__, "resumable")
    whole = lines(tmp_path / "whole")
    assert [r["step"] for r in whole] == list(range(1, 9))
    assert lines(tmp_path / "killed") == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"update": "hamu"}, "update: 'hamu' is unknown; did you mean"),
        ({"update": "pcgrad"}, "update: HAMU is hamu-q or hamu-u"),
        ({"alpha": 0.0}, "update: hamu-q needs a retain term"),
        ({"objective": "GradAscent"}, "update: hamu-q needs a retain term; GradAscent has none"),
        ({"master_weights": True}, "master_weights: update=hamu-q rounds"),
        ({"on_flag": "halt"}, "on_flag: 'halt' is unknown"),
        ({"hamu_scope": "layer"}, "hamu_scope: 'layer' is unknown"),
        ({"hamu_ratio": 0.5, "hamu_q": 1e-4}, "hamu_ratio, hamu_q: give one"),
        ({"hamu_ratio": -1.0}, "hamu_ratio: want a number >= 0"),
        ({"certificate_every": -1}, "certificate_every: want a number >= 0"),
        ({"hamu_share": 1.5}, r"hamu_share: want a number in \[0, 1\], got 1.5"),
        ({"hamu_q": float("inf")}, "hamu_q: want a number >= 0, got inf"),
        ({"retain_budgets": [0.0, 0.1]}, "retain_budgets: want one number, or retain_groups .* got 2"),
        ({"retain_budgets": [float("nan")]}, "retain_budgets: want finite numbers"),
        ({"retain_groups": "tenant", "hamu_allocation": "norms"}, "hamu_allocation: norms is without groups"),
        ({"update": "hamu-u", "retain_budgets": [0.1], "hamu_allocation": "norms"}, "hamu_allocation: norms is without"),
        ({"retain_groups": "tenant", "hamu_rule": "paper"}, "hamu_rule: paper is without retain_groups"),
        ({"hamu_geometry": "cone"}, "hamu_geometry: 'cone' is unknown"),
        ({"hamu_geometry": "adam", "hamu_base": "adamw"}, "hamu_geometry: adam is of HAMU's own step"),
        ({"hamu_geometry": "adam", "hamu_ratio": 0.5}, "hamu_ratio: of clipped gradients"),
        ({"hamu_base": "adamw", "on_flag": "backtrack"}, "on_flag: backtrack makes steps shorter"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm: want 0 \(no clipping\) or more, got -1"),
        ({"learning_rate": 0.0}, "learning_rate: want more than 0, got 0"),
        ({"update": "hamu-u", "retain_budgets": [0.0], "hamu_ratio": 0.1}, "retain_budgets: with update=hamu-u"),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        HAMUConfig(**options(tmp_path / "out", **changes))


def test_bad_groups(tmp_path):
    retain = [{**row, "tenant": "ab"[i % 2]} for i, row in enumerate(RETAIN)]
    with pytest.raises(
        ValueError, match=r"retain_groups: retain set, rows 1, .* nothing in 'tenant' \(columns: question, answer\)"
    ):
        make(tmp_path / "out", retain_groups="tenant")
    blank = [*retain[:3], {**retain[3], "tenant": ""}]
    with pytest.raises(ValueError, match=r"retain set, row 4 \(counted from 1\): nothing in 'tenant'"):
        make(tmp_path / "out", retain=blank, retain_groups="tenant")
    with pytest.raises(ValueError, match=r"retain_budgets: want 2, one for each group \(a, b\), got 3"):
        make(tmp_path / "out", retain=retain, retain_groups="tenant", retain_budgets=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="retain_per_forget: a batch has 1 retain rows and there are 2 groups"):
        make(tmp_path / "out", retain=retain, retain_groups="tenant", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="retain_groups: is for update=hamu-q"):
        UnlearnConfig(**options(tmp_path / "out", retain_groups="tenant"))
    with pytest.raises(TypeError, match="args: want a HAMUConfig, got UnlearnConfig"):
        HAMUTrainer(tiny_llama(), UnlearnConfig(**options(tmp_path / "out")), FORGET, RETAIN, TOKENIZER)
    assert fastunlearn.HAMUTrainer is HAMUTrainer
