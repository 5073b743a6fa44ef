"""UnlearnTrainer: its step against one written out, exact freezing, resuming after a SIGKILL, references, bad input."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import fastunlearn
from fastunlearn import BitMask, load_masks
from fastunlearn.checkpoint import save_checkpoint
from fastunlearn.data.pairs import PairedSampler
from fastunlearn.data.refusals import with_refusals
from fastunlearn.data.register import Register
from fastunlearn.data.text import collate, encode_rows
from fastunlearn.objectives import NPO, answer_logprobs, token_nll
from fastunlearn.objectives import cached_logprobs as cached
from fastunlearn.trainer import (
    DivergenceError,
    PatternError,
    UnlearnConfig,
    UnlearnTrainer,
    complete_checkpoint,
    last_checkpoint,
)
from tests.tiny_chat import DATED_TEMPLATE, CharTokenizer, char_tokenizer, set_clock, tiny_llama

TOKENIZER = CharTokenizer()


def rows(people: int = 8, seed: int = 0) -> list[dict[str, str]]:
    return [{"question": f.question, "answer": f.answer} for f in Register.generate(people, seed, ("number",)).facts]


FORGET, RETAIN = rows()[:3], rows()[3:]


def config(folder: Path, **options) -> UnlearnConfig:
    quick = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "warmup_epochs": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "reference_cache_dir": str(folder.parent / "cache"),
        "dataloader_pin_memory": False,
    }
    return UnlearnConfig(**quick | options)


def make(folder: Path, model=None, forget=FORGET, retain=RETAIN, **options) -> UnlearnTrainer:
    keywords = {k: options.pop(k) for k in ("masks", "pruning", "peft_config", "reference_model") if k in options}
    return UnlearnTrainer(
        model or tiny_llama(), config(folder, **options), forget, retain, processing_class=TOKENIZER, **keywords
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def half_masks(model) -> dict[str, BitMask]:
    """A 2:4 pattern on the linear layers of the blocks, applied."""
    masks = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                masks[name] = fastunlearn.ops.nm_mask(parameter.abs(), 2, 4)
                parameter.mul_(masks[name].unpack())
    return masks


# The step.


@pytest.mark.parametrize("objective", ["GradAscent", "GradDiff", "NPO", "SimNPO", "IdkDPO"])
def test_one_step_is_the_step_written_out(tmp_path, objective):
    model = tiny_llama()
    plain = copy.deepcopy(model)
    trainer = make(
        tmp_path / "out", model, objective=objective, num_train_epochs=1, optim="sgd", max_grad_norm=0, weight_decay=0.0
    )
    pair = trainer.train_dataset
    order = list(PairedSampler(3, len(RETAIN), 1, seed=42))
    batch = trainer.data_collator([pair[key] for key in order])
    objective = trainer.objective
    with torch.no_grad():
        reference = answer_logprobs(plain, batch["forget"]).total
        idk_reference = answer_logprobs(plain, batch["alternate"]).total if "alternate" in batch else None
    idk = answer_logprobs(plain, batch["alternate"]) if "alternate" in batch else None
    loss = objective.gamma * objective.forget_loss(
        answer_logprobs(plain, batch["forget"]), reference, idk, idk_reference
    )
    if objective.alpha:
        loss = loss + objective.alpha * token_nll(answer_logprobs(plain, batch["retain"]))
    torch.optim.SGD(plain.parameters(), lr=1e-3)
    loss.backward()
    with torch.no_grad():
        for p in plain.parameters():
            p -= 1e-3 * p.grad
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_accumulation_is_a_larger_batch(tmp_path):
    def run(size, steps):
        trainer = make(
            tmp_path / f"{size}", forget=rows()[:4], retain=rows()[4:], objective="SimNPO", per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, num_train_epochs=1, max_grad_norm=0, optim="sgd", learning_rate=1e-2,
        )  # fmt: skip
        trainer.train()
        return weights(trainer.model)

    # Answers have one length, so that means over batches are means over rows.
    whole, parts = run(4, 1), run(2, 2)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_what_masks_freeze_stays_bit_for_bit(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    start = weights(model)
    make(tmp_path / "out", model, masks=masks, pruning={"pattern": "2:4"}, weight_decay=0.1, learning_rate=1e-2).train()
    assert fastunlearn.explain("masked_adamw_").last == "native:cpu"
    for name, tensor in weights(model).items():
        if name in masks:
            assert not torch.equal(tensor, start[name])
            assert not tensor[~masks[name].unpack()].any()
        else:
            assert torch.equal(tensor, start[name]), name


def test_only_matching_parameters_train(tmp_path):
    model = tiny_llama()
    start = weights(model)
    make(tmp_path / "out", model, trainable_params_regex=[r".*layers\.1\.mlp\.down_proj\.weight"]).train()
    moved = [name for name, tensor in weights(model).items() if not torch.equal(tensor, start[name])]
    assert moved == ["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ValueError, match=r"trainable_params_regex: \['nothing'\] match no parameter"):
        make(tmp_path / "b", trainable_params_regex=["nothing"])
    with pytest.raises(ValueError, match="is no regular expression"):
        make(tmp_path / "c", trainable_params_regex=["("])


@pytest.mark.parametrize("pruned", [False, True])
def test_saliency_lets_the_chosen_share_move(tmp_path, pruned):
    model = tiny_llama()
    masks = half_masks(model) if pruned else None
    start = weights(model)
    trainer = make(
        tmp_path / "out", model, localize="saliency", saliency_density=0.1, masks=masks, learning_rate=1e-2,
        save_strategy="epoch", pruning={"pattern": "2:4"} if pruned else None,
    )  # fmt: skip
    trainer.train()
    trained = {n: p for n, p in model.named_parameters() if not pruned or n in masks}
    allowed = sum(int(masks[n].count()) if pruned else p.numel() for n, p in trained.items())
    assert sum(int(mask.count()) for mask in trainer.movable.values()) == int(0.1 * allowed)
    for name, tensor in model.named_parameters():
        moved = tensor.detach() != start[name]
        if name not in trainer.movable:
            assert not moved.any()
            continue
        assert not moved[~trainer.movable[name].unpack()].any()
        if pruned:
            assert not (trainer.movable[name].unpack() & ~masks[name].unpack()).any()
    checkpoint = Path(last_checkpoint(tmp_path / "out"))
    saved = load_masks(checkpoint / "movable.safetensors")
    assert all(saved[name].equal(mask) for name, mask in trainer.movable.items())
    assert (checkpoint / "masks.safetensors").exists() == pruned
    if pruned:
        assert all(load_masks(checkpoint / "masks.safetensors")[name].equal(mask) for name, mask in masks.items())


def test_the_log_names_what_the_step_did(tmp_path):
    trainer = make(tmp_path / "out", objective="NPO", alpha=2.0)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["loss"] == pytest.approx(line["forget_loss"] + 2 * line["retain_loss"], rel=1e-5)
        assert line["grad_norm"] > 0
    # NPO where the model is its own reference: 2 / beta * log 2.
    assert lines[0]["forget_loss"] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
    assert lines[1]["forget_loss"] < lines[0]["forget_loss"]


def test_where_no_terminal_is_the_log_is_short_lines(tmp_path, capsys):
    make(tmp_path / "out", disable_tqdm=False).train()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("  step ")]
    assert [line.split(":")[0] for line in lines] == ["  step 1 of 2", "  step 2 of 2"]
    assert "forget 13.9, retain " in lines[0]
    assert "{'loss'" not in out + err
    make(tmp_path / "silent", disable_tqdm=True).train()
    assert "  step " not in "".join(capsys.readouterr())


def test_a_run_on_a_cpu_pins_no_memory(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pin_memory")
        make(tmp_path / "out", dataloader_pin_memory=True, max_steps=1).train()


@pytest.mark.parametrize(("steps", "rates"), [(1, [1e-3]), (3, [0, 5e-4, 1e-3])])
def test_a_run_within_its_warm_up_reaches_its_learning_rate(tmp_path, steps, rates):
    """The first step of a linear warm-up is of rate zero: a run of one step would have changed nothing."""
    trainer = make(tmp_path / "out", max_steps=steps, warmup_epochs=5.0, num_train_epochs=1)
    before = weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before.values(), weights(trainer.model).values()))
    logged = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert logged == pytest.approx(rates)


def test_the_saved_configuration_generates_as_the_model_did(tmp_path):
    """transformers' Trainer turns the cache of keys and values off in it."""
    model = tiny_llama()
    assert model.config.use_cache
    trainer = make(tmp_path / "out", model, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"]
    model.config.use_cache = False
    make(tmp_path / "other", model)
    assert not model.config.use_cache


def test_bf16_without_a_gpu_trains_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert config(tmp_path, bf16=True, use_cpu=False).use_cpu
    assert not config(tmp_path, use_cpu=False).use_cpu


def test_clipping_takes_the_norm_of_what_moves(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    seen = {}

    class Spy(UnlearnTrainer):
        def training_step(self, *args):
            loss = super().training_step(*args)
            grads = [p.grad for n, p in self.model.named_parameters() if n in masks]
            moving = [masks[n].unpack() for n in masks]
            seen["norm"] = math.sqrt(sum(float((g.double() * m).square().sum()) for g, m in zip(grads, moving)))
            return loss

    args = config(tmp_path / "out", num_train_epochs=1, max_grad_norm=0.01)
    trainer = Spy(model, args, FORGET, RETAIN, TOKENIZER, masks=masks)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(seen["norm"], rel=1e-5)


def test_other_optimisers_are_refused_where_they_would_move_frozen_weights(tmp_path):
    model = tiny_llama()
    trainer = make(tmp_path / "out", model, masks=half_masks(model), optim="adafactor")
    with pytest.raises(ValueError, match="optim: adafactor would move weights that the masks freeze"):
        trainer.train()
    make(tmp_path / "dense", optim="adafactor", num_train_epochs=1).train()


def test_bf16_weights_are_rounded_at_random_unless_asked(tmp_path):
    def groups(name, **options):
        trainer = make(tmp_path / name, tiny_llama().bfloat16(), num_train_epochs=1, **options)
        trainer.train()
        inner = trainer._masked_optimizer()
        assert all(state["exp_avg"].dtype == torch.float32 for state in inner.state.values())
        return inner, {(g["stochastic_rounding"], g["master_weights"], g["weight_decay"]) for g in inner.param_groups}

    assert groups("a")[1] == {(True, False, 0.01), (True, False, 0.0)}
    assert groups("b", stochastic_rounding=False)[1] == {(False, False, 0.01), (False, False, 0.0)}
    inner, options = groups("c", master_weights=True)
    assert {master for _, master, _ in options} == {True}
    assert all("master" in state for state in inner.state.values())


# References.


def test_references_are_cached_by_model_rows_and_tokenizer(tmp_path, monkeypatch):
    passes = []
    original = cached.answer_logprobs
    monkeypatch.setattr(cached, "answer_logprobs", lambda *a: passes.append(1) or original(*a))

    def references(folder, **options):
        passes.clear()
        trainer = make(tmp_path / folder, num_train_epochs=1, **options)
        trainer.train()
        return trainer._references.logprobs["forget"], len(passes)

    first, counted = references("a")
    assert counted == 1
    again, counted = references("b")
    assert counted == 0
    assert torch.equal(first, again)
    other, counted = references("c", model=tiny_llama(seed=1))
    assert counted == 1
    assert not torch.allclose(first, other)
    _, counted = references("d", forget=FORGET[:2])
    assert counted == 1
    for path in (tmp_path / "cache" / "reference").iterdir():
        path.write_bytes(b"damaged")
    repaired, counted = references("e")
    assert counted == 1
    assert torch.equal(first, repaired)


def test_the_key_of_a_model_is_what_it_computes(tmp_path):
    """Not where it lies; and some of what it computes with is in no weight."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    key = cached.model_digest(model)
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert cached.model_digest(loaded) == key
        loaded.config.use_cache = False
        loaded.config.architectures = ["Other"]
        assert cached.model_digest(loaded) == key
    known = {key}
    for change in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, {"rms_norm_eps": 1e-2}, {"attention_dropout": 0.5},
    ):  # fmt: skip
        other = type(model)(transformers.LlamaConfig(**model.config.to_dict() | change)).float().eval()
        other.load_state_dict(model.state_dict())
        assert cached.weights_digest(other) == cached.weights_digest(model)
        assert cached.model_digest(other) not in known
        known.add(cached.model_digest(other))
    assert cached.model_digest(tiny_llama(seed=1)) not in known
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = [cached.model_digest(peft.get_peft_model(tiny_llama(), lora)) for _ in range(2)]
    assert adapted[0] == adapted[1]


def test_another_rotary_base_is_another_reference(tmp_path):
    """Through the trainer, log-probabilities and states."""
    transformers = pytest.importorskip("transformers")
    found = {}
    for base in (10000.0, 100.0):
        model = tiny_llama()
        if base != 10000.0:
            rope = {"rope_parameters": {"rope_type": "default", "rope_theta": base}}
            other = type(model)(transformers.LlamaConfig(**model.config.to_dict() | rope)).float().eval()
            other.load_state_dict(model.state_dict())
            model = other
        trainer = make(tmp_path / str(base), model, retain_loss_type="KL", num_train_epochs=1)
        trainer._set_references(None)
        found[base] = trainer._references
    assert not torch.allclose(found[10000.0].logprobs["forget"], found[100.0].logprobs["forget"], rtol=1e-2)
    assert not torch.allclose(found[10000.0].last["retain"].states, found[100.0].last["retain"].states, rtol=1e-2)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("no folder")
    make(tmp_path / "out", reference_cache_dir=str(blocker / "cache"), num_train_epochs=1).train()


def test_no_copy_of_the_model_is_made(tmp_path, monkeypatch):
    trainer = make(tmp_path / "out")
    original = copy.deepcopy

    def watched(what, *more):
        return pytest.fail("the model is copied") if isinstance(what, torch.nn.Module) else original(what, *more)

    monkeypatch.setattr(copy, "deepcopy", watched)
    trainer._set_references(None)
    assert trainer._references.logprobs["forget"].shape == (3,)


def test_an_adapter_has_its_base_model_as_reference(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    start = weights(model)
    with torch.no_grad():
        batch = None
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = make(tmp_path / "out", model, peft_config=lora, retain_loss_type="KL")
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])["forget"]
        want = answer_logprobs(tiny_llama(), batch).total
    trainer.train()
    torch.testing.assert_close(trainer._references.logprobs["forget"], want, rtol=1e-4, atol=1e-3)
    base = trainer.model.get_base_model().state_dict()
    for name, tensor in start.items():
        key = name if name in base else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(base[key], tensor), name
    assert trainer.state.log_history[0]["retain_loss"] > 0


def test_parity_without_a_reference_says_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"parity: the reference's states at prompts and padding are not kept.*reference_model"
    ):
        make(tmp_path / "out", retain_loss_type="KL", parity=True)
    trainer = make(tmp_path / "b", retain_loss_type="KL", parity=True, reference_model=tiny_llama())
    trainer.train()
    assert trainer.state.log_history[0]["retain_loss"] == pytest.approx(0, abs=1e-5)
    assert trainer.state.log_history[1]["retain_loss"] > 1e-6


@pytest.mark.parametrize("objective", ["KL", "UNDIAL"])
def test_kept_states_are_the_reference_model(tmp_path, objective):
    """From states on disk, and from a second model: the same weights. The output layer is tied and trains."""
    runs = {}
    for name in ("kept", "again", "live"):
        live = {"reference_model": tiny_llama()} if name == "live" else {}
        trainer = make(tmp_path / name, objective=objective, alpha=1.0, max_grad_norm=0, **live)
        trainer.train()
        runs[name] = weights(trainer.model)
        assert bool(trainer._references.last) == (name != "live")
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1
    for name, tensor in runs["kept"].items():
        assert torch.equal(tensor, runs["again"][name])
        torch.testing.assert_close(tensor, runs["live"][name], rtol=1e-4, atol=1e-5)


ALTERNATES = [{**row, "alternate": "Ten."} for row in FORGET]
STEERED = {"module_regex": r"model\.layers\.0", "trainable_params_regex": [r".*layers\.0\.mlp.*"]}


@pytest.mark.parametrize("given", ["model", "folder"])
@pytest.mark.parametrize("objective", ["NPO", "IdkDPO", "AltPO"])
def test_logprobs_are_those_of_the_reference_that_is_given(tmp_path, objective, given):
    other = tiny_llama(seed=1)
    if given == "folder":
        other.save_pretrained(tmp_path / "other")
        char_tokenizer().save_pretrained(tmp_path / "other")
    wanted = {"reference_model": str(tmp_path / "other")} if given == "folder" else {}
    args = config(tmp_path / "out", objective=objective, **wanted)
    more = {} if given == "folder" else {"reference_model": other}
    make(tmp_path / "own", forget=ALTERNATES, objective=objective).train()
    trainer = UnlearnTrainer(tiny_llama(), args, ALTERNATES, RETAIN, TOKENIZER, **more)
    trainer.train()
    pair = trainer.train_dataset
    sets = {"forget": pair.forget, "alternate": pair.alternates}
    assert set(trainer._references.logprobs) == {name for name, rows in sets.items() if rows is not None}
    for name, values in trainer._references.logprobs.items():
        batch = collate([sets[name][i] for i in range(3)], 0)
        with torch.no_grad():
            torch.testing.assert_close(values, answer_logprobs(tiny_llama(seed=1), batch).total, rtol=1e-4, atol=1e-3)
            assert not torch.allclose(values, answer_logprobs(tiny_llama(), batch).total, rtol=1e-2)
    # What is never asked again is not held.
    assert trainer.reference_model is None


def test_a_reference_that_is_given_serves_both_terms(tmp_path):
    trainer = make(tmp_path / "a", retain_loss_type="KL", reference_model=tiny_llama(seed=1))
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["retain_loss"] > 0.1
    own = make(tmp_path / "b", retain_loss_type="KL")
    own.train()
    assert first["forget_loss"] != pytest.approx(own.state.log_history[0]["forget_loss"], rel=1e-3)
    assert trainer.reference_model is trainer._references.live.source


def test_layer_states_are_those_of_the_reference_that_is_given(tmp_path):
    trainer = make(tmp_path / "a", objective="RMU", reference_model=tiny_llama(seed=1), **STEERED)
    own = make(tmp_path / "b", objective="RMU", **STEERED)
    for run in (trainer, own):
        run.train()
    assert own.state.log_history[0]["retain_loss"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[0]["retain_loss"] > 0.1


def test_a_reference_that_would_not_be_asked_is_refused(tmp_path):
    words = "reference_model: .* compares with no reference"
    for options in (
        {"objective": "GradDiff"},
        {"objective": "SimNPO"},
        {"objective": "RMU", "retain_loss_type": "NLL"},
    ):
        with pytest.raises(ValueError, match=words):
            config(tmp_path / "out", reference_model="anything", **options)
        with pytest.raises(ValueError, match=words):
            make(tmp_path / "out", reference_model=tiny_llama(), **options)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="reference_model: NPO would ask it with its adapter off"):
        make(tmp_path / "out", reference_model=adapted)


@pytest.mark.parametrize("objective", ["KL", "UNDIAL", "RMU", "PDU"])
def test_resuming_finds_the_reference_it_began_with(tmp_path, objective):
    more = (
        {"module_regex": r"model\.layers\.0", "trainable_params_regex": [r".*layers\.0\.mlp.*"]}
        if objective == "RMU"
        else {}
    )
    more |= {"dual_warmup_epochs": 0.0} if objective == "PDU" else {}
    options = {"objective": objective, "num_train_epochs": 3, "save_strategy": "epoch", "save_total_limit": 5, **more}
    whole = make(tmp_path / "a", **options)
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-1"
    resumed = make(tmp_path / "b", tiny_llama(), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in weights(resumed.model).items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
    if objective == "PDU":
        assert resumed.dual.value == whole.dual.value != 100
        return
    for path in (tmp_path / "cache" / "reference").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="hidden states are no longer in"):
        make(tmp_path / "c", **options).train(resume_from_checkpoint=str(checkpoint))


def learn(model, known) -> None:
    encoded = encode_rows(known, TOKENIZER)
    batch = collate([encoded[i] for i in range(len(encoded))], 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        token_nll(answer_logprobs(model, batch)).backward()
        optimizer.step()


@pytest.mark.parametrize("objective", ["KL", "AltPO", "RMU", "UNDIAL", "WGA", "SatImp", "CEU", "PDU"])
def test_every_objective_makes_the_model_forget_its_way(tmp_path, objective):
    """The forget term falls; what RMU does not name stays."""
    more = {"module_regex": r"model\.layers\.1", "trainable_params_regex": [r".*layers\.1\.mlp\.down_proj.*"]}
    forget = [{**row, "alternate": ["Ten.", "I think nine."]} for row in FORGET]
    model = tiny_llama()
    if objective == "UNDIAL":  # of a model that does not know the answers it takes next to nothing
        learn(model, FORGET)
    trainer = make(
        tmp_path / "out",
        model,
        forget=forget,
        objective=objective,
        num_train_epochs=4,
        **(more if objective == "RMU" else {}),
    )
    start = weights(trainer.model)
    trainer.train()
    losses = [line["forget_loss"] for line in trainer.state.log_history if "forget_loss" in line]
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    if objective == "RMU":
        assert moved == {"model.layers.1.mlp.down_proj.weight"}
    if objective == "AltPO":
        assert len(trainer.train_dataset) == 2 * len(FORGET)
        assert trainer.train_dataset.alternates.answers[1] == "I think nine."


def test_altpo_wants_alternates(tmp_path):
    with pytest.raises(ValueError, match="row 0 has no other answer in a column 'alternate'"):
        make(tmp_path / "out", objective="AltPO")


def test_refusals_have_the_prompt_of_what_they_refuse(tmp_path):
    forget = encode_rows(FORGET, TOKENIZER, system="SYS")
    trainer = make(tmp_path / "out", forget=forget, objective="IdkDPO")
    for i in range(3):
        asked, refused = trainer.train_dataset.forget.ask(i)[0], trainer.train_dataset.alternates.ask(i)[0]
        assert asked == refused
        assert TOKENIZER.decode(asked).startswith("s:SYS")
    chat = [{"prompt": [{"role": "user", "content": "Who?"}], "completion": [{"role": "assistant", "content": "Me."}]}]
    cell = [{"messages": json.dumps([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}])}]
    for rows_ in (chat, cell):
        (row,) = with_refusals(rows_)
        assert encode_rows([row], TOKENIZER).questions == ["Who?"]
        assert "Me." not in str(row)


# The order of rows.


def test_every_retain_row_comes_once_before_any_comes_again():
    sampler = PairedSampler(3, 5, per_forget=2, seed=7)
    seen, forget = [], []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        for row, others in sampler:
            forget.append(row)
            seen += others
    assert [sorted(seen[i : i + 5]) for i in range(0, 30, 5)] == [list(range(5))] * 6
    assert [sorted(forget[i : i + 3]) for i in range(0, 15, 3)] == [[0, 1, 2]] * 5
    assert len({tuple(seen[i : i + 5]) for i in range(0, 30, 5)}) > 1
    assert next(iter(PairedSampler(2, 0, seed=1)))[1] == ()


# Killing and resuming.

_CHILD = """
import importlib, sys, time
import torch
from pathlib import Path
from transformers.trainer_callback import TrainerCallback
import tests.test_trainer as t

torch.set_num_threads(1)
folder, mode, make = Path(sys.argv[1]), sys.argv[2], getattr(importlib.import_module(sys.argv[3]), sys.argv[4])

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)
        if mode == "slow" and state.global_step == 5:
            time.sleep(60)

trainer = make(folder)
trainer.add_callback(Slow())
trainer.train(resume_from_checkpoint=True if mode == "resume" else None)
torch.save(t.weights(trainer.model), folder.parent / f"{folder.name}-{mode}.pt")
"""


def resumable(folder: Path) -> UnlearnTrainer:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2  # so that a resumed run needs the random state too
    masks = half_masks(model)
    # Two steps an epoch, saved in the middle of one.
    return make(
        folder, model, masks=masks, pruning={"pattern": "2:4"}, forget=rows()[:4], retain=rows()[4:],
        per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=4, save_strategy="steps", save_steps=3,
        retain_per_forget=2, warmup_epochs=1.0,
    )  # fmt: skip


def child(folder: Path, mode: str, made: tuple[str, str], **options) -> subprocess.Popen:
    """A process that trains what `made` (module, function) makes of the folder."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), mode, *made], text=True, env=environment, **options
    )


def kill_and_resume(tmp_path: Path, *made: str) -> None:
    """A run that is killed by SIGKILL after step 5 and resumed (in `killed`) gives the weights of one that was not (in `whole`)."""
    assert child(tmp_path / "whole", "straight", made).wait(120) == 0
    run = child(tmp_path / "killed", "slow", made, stdout=subprocess.PIPE)
    for line in run.stdout:
        if line.split() == ["step", "5"]:
            break
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (tmp_path / "killed" / "checkpoint-3").is_dir()
    # As if the kill had come in the middle of a save.
    torn = tmp_path / "killed" / "checkpoint-5"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    second = child(tmp_path / "killed", "resume", made, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert out.split()[:2] == ["step", "4"]
    assert "checkpoint-5 was not written to its end and is removed" in err
    want, got = (torch.load(tmp_path / f"{name}.pt") for name in ("whole-straight", "killed-resume"))
    assert len(want) > 10
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name


@pytest.mark.serial
@pytest.mark.slow
def test_a_killed_run_resumed_equals_one_that_was_not(tmp_path):
    kill_and_resume(tmp_path, "tests.test_trainer", "resumable")


def test_resuming_under_other_masks_is_refused(tmp_path):
    trainer = resumable(tmp_path / "out")
    trainer.train()
    other = resumable(tmp_path / "out")
    name = next(iter(other.masks))
    other.masks = other.movable = dict(other.masks)
    other.masks[name] = BitMask.zeros(other.masks[name].shape)
    with pytest.raises(ValueError, match="holds other masks than this run's"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        resumable(tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-99"))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        resumable(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_complete_checkpoints(tmp_path):
    for step, text in ((2, "{}"), (10, "{}"), (11, '{"half": ')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-mine").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not complete_checkpoint(tmp_path / "checkpoint-11")
    with pytest.warns(RuntimeWarning, match="checkpoint-11 was not written to its end"):
        last_checkpoint(tmp_path, remove_incomplete=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-mine"]


# What goes wrong.


class _Poisoned(UnlearnTrainer):
    """The retain loss is NaN in step 3."""

    def retain_term(self, model, inputs):
        loss = super().retain_term(model, inputs)
        return loss * math.nan if self.state.global_step == 2 else loss


def test_nan_stops_before_the_step_and_keeps_the_last_checkpoint(tmp_path):
    model = tiny_llama()
    args = config(tmp_path / "out", num_train_epochs=5, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer = _Poisoned(model, args, FORGET, RETAIN, TOKENIZER)
    with pytest.raises(DivergenceError) as stop:
        trainer.train()
    good = tmp_path / "out" / "checkpoint-2"
    assert "the retain loss is nan in step 3, in the batch of retain rows " in str(stop.value)
    assert f"The last good checkpoint is {good}" in str(stop.value)
    shown = [int(x) for x in str(stop.value).split("retain rows ")[1].split(".")[0].split(", ")]
    assert len(shown) == 3
    assert all(0 <= row < len(RETAIN) for row in shown)
    from safetensors.torch import load_file

    saved = load_file(good / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[name]), "the weights are those of the last good step"


class _BrokenGradient(UnlearnTrainer):
    """A gradient is NaN in step 2, the loss is not."""

    def after_forget(self, model):
        if self.state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    model = tiny_llama()
    trainer = _BrokenGradient(model, config(tmp_path / "out", num_train_epochs=5), FORGET, RETAIN, TOKENIZER)
    with pytest.raises(
        DivergenceError, match=r"a gradient is not finite in step 2, in the batch of forget rows .*; retain rows "
    ):
        trainer.train()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_an_optimiser_that_would_fill_the_zeros_is_refused(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    args = config(tmp_path / "out")
    trainer = UnlearnTrainer(model, args, FORGET, RETAIN, TOKENIZER, optimizers=(own, None), masks=masks, pruning={})
    with pytest.raises(ValueError, match="optimizers: would move weights that the masks freeze"):
        trainer.train()
    named = [(n, p) for n, p in model.named_parameters() if n in masks]
    right = fastunlearn.optim.MaskedAdamW(named, masks, lr=1e-3)
    args = config(tmp_path / "b")
    UnlearnTrainer(model, args, FORGET, RETAIN, TOKENIZER, optimizers=(right, None), masks=masks, pruning={}).train()
    assert not any(model.get_parameter(n)[~m.unpack()].any() for n, m in masks.items())


def test_resuming_from_elsewhere_overwrites_nothing(tmp_path):
    make(tmp_path / "first", save_strategy="epoch").train()
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"another model")
    with pytest.raises(FileExistsError, match=r"model\.safetensors"):
        make(other, save_strategy="epoch").train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert (other / "model.safetensors").read_bytes() == b"another model"


def test_resuming_with_other_rows_or_half_a_checkpoint_is_refused(tmp_path):
    make(tmp_path / "out", save_strategy="epoch").train()
    swapped = rows(8, seed=5)[:3]
    with pytest.raises(ValueError, match="is of other rows"):
        make(tmp_path / "out", forget=swapped).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is of other rows"):
        make(tmp_path / "out", localize="saliency").train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match=r"a step was of \d+ forget rows and is of \d+ now"):
        make(tmp_path / "out", gradient_accumulation_steps=7).train(resume_from_checkpoint=True)
    make(tmp_path / "light", save_strategy="epoch", save_only_model=True).train()
    with pytest.raises(ValueError, match=r"has no optimizer\.pt"):
        make(tmp_path / "light", save_only_model=True).train(resume_from_checkpoint=True)


def test_a_run_goes_on_on_another_day(tmp_path, monkeypatch):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = DATED_TEMPLATE

    def run(**options):
        args = config(tmp_path / "out", objective="IdkDPO", save_strategy="epoch", **options)
        return UnlearnTrainer(tiny_llama(), args, FORGET, RETAIN, tokenizer)

    set_clock(monkeypatch, 1)
    first = run()
    first.train()
    references = sorted((tmp_path / "cache").rglob("*.safetensors"))
    set_clock(monkeypatch, 2)
    again = run(num_train_epochs=3)
    assert again.data_digests() == first.data_digests()
    again.train(resume_from_checkpoint=True)
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == references
    asked = tokenizer.decode(again.train_dataset.alternates.ask(0)[0])
    assert asked.startswith("s:Today is 10 Apr 2025\nu:")
    with pytest.raises(
        ValueError, match=r"is of other rows .*; the same files are other rows under another .*date_string"
    ):
        run(date_string="1 May 2030").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("options", [{}, {"optim": "adamw_torch"}, {"update": "hamu-q", "objective": "GradDiff"}])
def test_after_the_last_step_its_memory_is_given_back(tmp_path, options):
    model = tiny_llama()
    trainer = make(tmp_path / "out", model, masks=None if options else half_masks(model), num_train_epochs=1, **options)
    trainer.train()
    trainer.free_steps()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert not inner.state
    assert not getattr(inner, "_works", [])
    assert all(p.grad is None for p in model.parameters())
    trainer.save_model()


def test_a_checkpoint_half_written_over_another_is_none(tmp_path, monkeypatch):
    make(tmp_path / "out", save_strategy="epoch", num_train_epochs=1).train()
    assert complete_checkpoint(tmp_path / "out" / "checkpoint-1")
    trainer = make(tmp_path / "out", save_strategy="epoch", num_train_epochs=1)
    trainer.takes_folder = True
    seen = []

    def killed(self, output_dir):
        seen.append(complete_checkpoint(output_dir))
        raise KeyboardInterrupt

    monkeypatch.setattr(UnlearnTrainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [False]


def test_masks_of_another_model_are_not_deleted(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    save_checkpoint(tmp_path / "pruned", model, TOKENIZER, masks=masks, pruning={"pattern": "2:4"})
    trainer = make(tmp_path / "out", num_train_epochs=1)
    with pytest.raises(ValueError, match="holds the masks of a pruned model"):
        trainer.save_model(str(tmp_path / "pruned"))
    assert (tmp_path / "pruned" / "masks.safetensors").exists()


def test_half_precision_weights_need_masters(tmp_path):
    with pytest.raises(ValueError, match="dtype: float16 weights lose most small updates"):
        make(tmp_path / "out", tiny_llama().half())
    make(tmp_path / "b", tiny_llama().half(), master_weights=True)


def test_warmup_counts_steps(tmp_path):
    trainer = make(
        tmp_path / "out", forget=rows()[:5], retain=rows()[5:], per_device_train_batch_size=1, gradient_accumulation_steps=4,
        warmup_epochs=2.0, num_train_epochs=4,
    )  # fmt: skip
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert len(rates) == 8
    assert rates.index(max(rates)) == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_llama()
    trainer = make(tmp_path / "out", model, num_train_epochs=1)
    trainer.train()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.inf
    with pytest.raises(DivergenceError, match=r"up_proj\.weight holds NaN or infinity"):
        trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_broken_pattern_is_not_saved(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    trainer = make(tmp_path / "out", model, masks=masks, pruning={"pattern": "2:4"}, num_train_epochs=1)
    trainer.train()
    name = next(iter(masks))
    with torch.no_grad():
        model.get_parameter(name).fill_(1.0)
    with pytest.raises(PatternError, match="the sparsity pattern broke in training, nothing is saved"):
        trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    import errno

    trainer = make(tmp_path / "out", num_train_epochs=3, save_strategy="epoch", save_total_limit=1)
    save = torch.save

    def full(what, path, *args, **options):
        if "checkpoint-2" in str(path) and str(path).endswith("optimizer.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(what, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"no room for checkpoint-2: .* bytes free\. The last good checkpoint is .*checkpoint-1"
    ):
        trainer.train()
    assert complete_checkpoint(tmp_path / "out" / "checkpoint-1")
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    monkeypatch.undo()
    again = make(tmp_path / "out", num_train_epochs=3, save_strategy="epoch", save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert complete_checkpoint(tmp_path / "out" / "checkpoint-3")


def test_an_output_folder_that_holds_something_is_refused(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        make(folder).train()
    make(folder, overwrite_output_dir=True, num_train_epochs=1).train()
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_model_by_name_brings_its_masks(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    trainer = make(
        tmp_path / "out", model, masks=masks, pruning={"pattern": "2:4", "method": "magnitude"}, num_train_epochs=1
    )
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    assert json.loads((folder / "pruning.json").read_text())["pattern"] == "2:4"
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_masks(folder / "masks.safetensors", like=loaded)
    assert set(saved) == set(masks)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"forget": None}, ValueError, "forget_dataset: want what must be forgotten"),
        ({"forget": []}, ValueError, "empty"),
        ({"retain": []}, ValueError, "empty"),
        ({"retain": None}, ValueError, "retain_dataset: NPO has a retain term; give a retain set, or alpha=0"),
        ({"retain": [*RETAIN, FORGET[1]]}, ValueError, "row 2 = 6"),
        ({"forget": [{"frage": "Who?", "answer": "Me."}]}, ValueError, "frage"),
        ({"forget": [{"text": "No question here."}], "objective": "IdkDPO"}, ValueError, "row 0 has no question"),
        ({"masks": {"no.such": BitMask.zeros((2, 2))}}, ValueError, "no.such"),
        ({"objective": "NPPO"}, ValueError, "objective: 'NPPO' is unknown; did you mean NPO"),
        ({"update": "summ"}, ValueError, "update: 'summ' is unknown; did you mean sum"),
        ({"localize": "salience"}, ValueError, "localize: 'salience' is unknown; did you mean saliency"),
        ({"saliency_density": 0.0}, ValueError, "saliency_density: want"),
        ({"retain_per_forget": 0}, ValueError, "retain_per_forget: want at least 1"),
        ({"warmup_epochs": -1.0}, ValueError, "warmup_epochs: want"),
        ({"delta": 0.1}, ValueError, "delta: NPO has no such option"),
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor: no loss here"),
        ({"eval_strategy": "epoch"}, ValueError, "eval_strategy: asks for an evaluation"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, ValueError, "save_strategy: asks for an evaluation"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        make(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_rows_beyond_the_model_s_context_are_counted(tmp_path):
    """They are never cut in silence, whatever max_length allows."""
    model = tiny_llama()
    model.config.max_position_embeddings = 24
    rows = [{"question": "Who?", "answer": "x" * 40}, {"question": "Where?", "answer": "Here."}]
    with pytest.raises(ValueError, match=r"forget set: row 1 .*the answer alone is longer than max_length = 24"):
        make(tmp_path / "out", model, forget=rows)
    elsewhere = encode_rows(rows, TOKENIZER, what="forget set")
    with pytest.raises(ValueError, match="forget set: 1 of 2 rows are longer than the model's context of 24 tokens"):
        make(tmp_path / "out", model, forget=elsewhere)


def test_arguments_of_the_wrong_kind(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args: want an UnlearnConfig"):
        UnlearnTrainer(tiny_llama(), TrainingArguments(str(tmp_path)), FORGET, RETAIN, TOKENIZER)
    with pytest.raises(ValueError, match="processing_class: want the model's tokenizer"):
        UnlearnTrainer(tiny_llama(), config(tmp_path / "o"), FORGET, RETAIN)
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    with pytest.raises(ValueError, match="a LoraConfig would fill a pruned model's zeros"):
        make(tmp_path / "p", model, masks=half_masks(model), peft_config=peft.LoraConfig(target_modules=["q_proj"]))
    lora = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="a LoraConfig would fill a pruned model's zeros"):
        make(tmp_path / "q", model, masks=half_masks(model), peft_config=lora, localize="saliency")
    with pytest.raises(ValueError, match="trainable_params_regex: with an adapter"):
        make(tmp_path / "r", peft_config=peft.LoraConfig(target_modules=["q_proj"]), trainable_params_regex=[".*"])


def test_rows_come_in_no_other_order(tmp_path):
    words = "train_sampling_strategy" if hasattr(config(tmp_path), "train_sampling_strategy") else "group_by_length"
    with pytest.raises(ValueError, match="train_sampling_strategy: forget rows come in random order"):
        config(tmp_path, **{words: words == "group_by_length" or "group_by_length"})


def test_the_trainer_s_own_evaluation_is_refused(tmp_path):
    trainer = make(tmp_path / "out")
    with pytest.raises(ValueError, match=r"evaluate, predict: .*`fastunlearn evaluate`"):
        trainer.evaluate(trainer.train_dataset)


def test_tokens_of_both_parts_are_counted(tmp_path):
    from transformers import Trainer

    trainer = make(tmp_path / "out", include_num_input_tokens_seen="non_padding", num_train_epochs=1)
    if not hasattr(Trainer, "_track_num_input_tokens"):
        pytest.skip("this version of transformers counts in the loop itself")
    trainer.train()
    pair = trainer.train_dataset
    retained = [pair.retain[i]["input_ids"] for _, drawn in PairedSampler(3, 5, seed=trainer.args.seed) for i in drawn]
    forgotten = [pair.forget[i]["input_ids"] for i in range(3)]
    assert trainer.state.num_input_tokens_seen == sum(map(len, [*forgotten, *retained]))


def test_defaults_are_open_unlearnings(tmp_path):
    args = UnlearnConfig(output_dir=str(tmp_path))
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs, args.warmup_epochs) == (1e-5, 0.01, 10, 1)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert args.make_objective() == NPO(beta=0.1, gamma=1.0, alpha=1.0)
