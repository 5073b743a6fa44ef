"""SAU: the pattern holds, redistribution does what its equations say, the capacity meter measures, a resume keeps the factors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastunlearn import ops
from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
from fastunlearn.localize import nm_violations
from fastunlearn.methods import SAUConfig, SAUTrainer
from fastunlearn.methods import sau as sau_module
from fastunlearn.objectives import answer_logprobs, token_nll
from fastunlearn.parametrize.compressed_nm import compressed_layers, dense_state_dict
from fastunlearn.trainer import last_checkpoint
from tests.test_trainer import FORGET, RETAIN, half_masks, weights
from tests.tiny_chat import CharTokenizer, tiny_llama

TOKENIZER = CharTokenizer()


@pytest.fixture
def dense(tmp_path):
    """The dense model, saved, and the pruned one with its masks."""
    model = tiny_llama()
    save_checkpoint(tmp_path / "dense", model, TOKENIZER)
    return model


def config(tmp_path: Path, name: str = "out", **options) -> SAUConfig:
    quick = {
        "output_dir": str(tmp_path / name), "learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1, "warmup_epochs": 0, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "reference_cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    return SAUConfig(**quick | options)


def make(tmp_path: Path, model, masks, name: str = "out", **options) -> SAUTrainer:
    args = config(tmp_path, name, **options)
    return SAUTrainer(model, args, FORGET, RETAIN, TOKENIZER, masks=masks, pruning={"pattern": "2:4"})


def test_the_pattern_holds_and_the_rest_is_frozen(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    start = weights(model)
    make(tmp_path, model, masks, num_train_epochs=3, learning_rate=1e-2, weight_decay=0.1).train()
    assert nm_violations(model, masks, 2, 4) == []
    for name, tensor in weights(model).items():
        assert (name in masks) == (not torch.equal(tensor, start[name])), name


def test_what_was_not_pruned_trains_only_if_asked(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    start = weights(model)
    make(tmp_path, model, masks, train_unpruned=True, learning_rate=1e-2).train()
    assert nm_violations(model, masks, 2, 4) == []
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, start[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= moved
    assert set(masks) <= moved


def test_the_capacity_meter_is_the_share_of_the_forget_gradient(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    plain = copy.deepcopy(model)
    trainer = make(tmp_path, model, masks, objective="GradDiff")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])["forget"]
    token_nll(answer_logprobs(plain, batch)).backward()
    grads = {n: p.grad.double() for n, p in plain.named_parameters() if n in masks}
    inside = sum(float((g * masks[n].unpack()).square().sum()) for n, g in grads.items())
    whole = sum(float(g.square().sum()) for g in grads.values())
    trainer.train()
    logged = [line["capacity"] for line in trainer.state.log_history if "capacity" in line]
    assert logged == [pytest.approx((inside / whole) ** 0.5, rel=1e-4)]
    assert 0.1 < logged[0] < 1
    silent = make(tmp_path, plain, masks, "b", objective="GradDiff", capacity=False)
    silent.train()
    assert not [line for line in silent.state.log_history if "capacity" in line]


@pytest.mark.parametrize("importance", ["wanda", "weight_grad"])
def test_update_scales_the_update_by_the_factors(tmp_path, dense, importance):
    model = copy.deepcopy(dense)
    masks = half_masks(model)
    plain = copy.deepcopy(model)
    start = weights(model)
    options = {
        "redistribution": "update",
        "importance": importance,
        "dense_model": str(tmp_path / "dense"),
        "weight_decay": 0.0,
    }
    trainer = make(tmp_path, model, masks, **options)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])["forget"]
    name = "model.layers.1.mlp.down_proj.weight"
    if importance == "weight_grad":
        token_nll(answer_logprobs(plain, batch)).backward()
        scores = (dense.get_parameter(name) * plain.get_parameter(name).grad).abs().detach()
    else:
        seen = []
        layer = plain.get_submodule(name.removesuffix(".weight"))
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for row in trainer.train_dataset.forget:
            ids = torch.tensor([row["input_ids"]])
            plain(input_ids=ids)
        handle.remove()
        norm = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).norm(dim=0)
        scores = dense.get_parameter(name).detach().abs() * norm
    want = ops.redistribution(scores, masks[name])
    torch.testing.assert_close(trainer._factors[name], want, rtol=2e-3, atol=2e-4)
    assert float(want.std()) > 0.01
    # The first AdamW step moves every entry by lr (but where its gradient is as small as eps), so here by lr times its factor.
    moved = (weights(model)[name] - start[name])[masks[name].unpack()].abs()
    near = (moved / (1e-3 * trainer._factors[name]) - 1).abs() < 1e-2
    assert float(near.float().mean()) > 0.99


def test_a_resumed_run_keeps_the_factors(tmp_path, dense):
    def trainer(name, **options):
        model = copy.deepcopy(dense)
        masks = half_masks(model)
        return make(
            tmp_path, model, masks, name, redistribution="update", dense_model=str(tmp_path / "dense"), num_train_epochs=4,
            learning_rate=1e-2, save_strategy="steps", save_steps=2, **options,
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    first = trainer("cut")
    first.train()
    for path in Path(last_checkpoint(tmp_path / "cut")).parent.glob("checkpoint-4"):
        import shutil

        shutil.rmtree(path)
    second = trainer("cut")
    second.train(resume_from_checkpoint=True)
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


@pytest.mark.parametrize("importance", ["wanda", "weight_grad"])
def test_redistribution_goes_with_the_other_choices(tmp_path, dense, importance):
    name = "model.layers.1.mlp.down_proj.weight"
    for i, options in enumerate(
        ({"localize": "saliency", "saliency_density": 0.2}, {"trainable_params_regex": [name]})
    ):
        model = copy.deepcopy(dense)
        masks = half_masks(model)
        start = weights(model)
        trainer = make(
            tmp_path, model, masks, str(i), redistribution="update", importance=importance, dense_model=str(tmp_path / "dense"),
            **options,
        )  # fmt: skip
        trainer.train()
        moved = {n for n, t in weights(model).items() if not torch.equal(t, start[n])}
        assert name in moved
        assert moved == {name} if "trainable_params_regex" in options else moved <= set(masks)
        assert nm_violations(model, masks, 2, 4) == []


@pytest.mark.parametrize("localize", ["all", "saliency"])
def test_corrections_touch_only_what_may_move(tmp_path, dense, localize):
    model = copy.deepcopy(dense)
    masks = half_masks(model)
    start = weights(model)
    options = {"localize": localize} if localize == "saliency" else {"trainable_params_regex": [".*down_proj.weight"]}
    trainer = make(
        tmp_path,
        model,
        masks,
        redistribution="retain",
        dense_model=str(tmp_path / "dense"),
        learning_rate=0.0,
        **options,
    )
    trainer.train()
    moved = {n: t != start[n] for n, t in weights(model).items() if not torch.equal(t, start[n])}
    assert moved
    if localize == "saliency":
        assert not any((change & ~trainer.movable[n].unpack()).any() for n, change in moved.items())
    else:
        assert set(moved) <= {n for n in masks if n.endswith("down_proj.weight")}


def error_to(model, twin, rows, trainer) -> float:
    """Mean squared difference of the first block's outputs: what redistribution is to lower."""
    batch = trainer.data_collator([{"forget": row} for row in rows])["forget"]
    options = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    with torch.no_grad():
        a, b = (m.base_model(**options).hidden_states[1] for m in (model, twin))
    return float((a - b)[batch["attention_mask"].bool()].square().mean())


def test_retain_corrects_survivors_towards_the_dense_outputs(tmp_path, dense):
    model = copy.deepcopy(dense)
    masks = half_masks(model)
    trainer = make(tmp_path, model, masks, redistribution="retain", dense_model=str(tmp_path / "dense"))
    before = error_to(model, dense, trainer.train_dataset.retain, trainer)
    trainer.prepare_weights()
    after = error_to(model, dense, trainer.train_dataset.retain, trainer)
    assert after < 0.9 * before
    assert nm_violations(model, masks, 2, 4) == []


def test_obs_carries_a_dense_update_over(tmp_path, dense):
    unlearned = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in unlearned.named_parameters():
            if "layers" in name and p.dim() == 2:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    save_checkpoint(tmp_path / "unlearned", unlearned, TOKENIZER)
    model = copy.deepcopy(dense)
    masks = half_masks(model)
    start = weights(model)
    trainer = make(
        tmp_path, model, masks, redistribution="obs", dense_model=str(tmp_path / "dense"),
        dense_unlearned_model=str(tmp_path / "unlearned"),
    )  # fmt: skip
    trainer.prepare_weights()
    assert nm_violations(model, masks, 2, 4) == []
    # On the first layer, whose inputs are the same in all models: nearer to the dense update's effect than dropping it.
    name = "model.layers.0.self_attn.q_proj.weight"
    seen = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for row in trainer.train_dataset.forget:
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    x = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen])
    wanted = unlearned.get_parameter(name).detach() - dense.get_parameter(name).detach()
    dropped = wanted * masks[name].unpack()
    carried = model.get_parameter(name).detach() - start[name]
    assert float(((carried - wanted) @ x.T).norm()) < 0.95 * float(((dropped - wanted) @ x.T).norm())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"redistribution": "updates"}, "redistribution: 'updates' is unknown; did you mean update"),
        ({"redistribution": "update"}, "dense_model: redistribution=update needs the model before pruning"),
        (
            {"redistribution": "update", "dense_model": "d", "update": "hamu-q"},
            "redistribution: update is a factor on the step",
        ),
        ({"redistribution": "obs", "dense_model": "d"}, "dense_unlearned_model: redistribution=obs needs"),
        ({"importance": "wand"}, "importance: 'wand' is unknown; did you mean wanda"),
        ({"redistribution_beta": 2.0}, "redistribution_beta: want a number in"),
        ({"redistribution_clip": 0.5}, "redistribution_clip: want a number >= 1"),
        ({"calibration_rows": 0}, "calibration_rows: want at least 1"),
    ],
)
def test_bad_options(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **options)


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="masks: SAU unlearns a pruned model, and this one has none; `fastunlearn prune`"
    ):
        SAUTrainer(tiny_llama(), config(tmp_path), FORGET, RETAIN, TOKENIZER)


def test_a_dense_model_that_does_not_fit_is_refused(tmp_path, dense):
    model = tiny_llama()
    masks = half_masks(model)
    import transformers

    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )
    save_checkpoint(tmp_path / "other", other, TOKENIZER)
    with pytest.raises(ValueError, match=r"dense_model: .*shape"):
        make(tmp_path, model, masks, redistribution="update", dense_model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="dense_model: there is no "):
        make(tmp_path, model, masks, redistribution="update", dense_model=str(tmp_path / "nothing"))


def test_the_docs_call_redistribution_a_reconstruction():
    assert "RECONSTRUCTION" in (sau_module.__doc__ or "")
    assert "reconstruction" in SAUConfig.__dataclass_fields__["redistribution"].metadata["help"]


@pytest.mark.parametrize("chosen", [False, True])
def test_an_adapter_keeps_to_the_survivors(tmp_path, chosen):
    """Merged, the model has its pattern still; an ordinary adapter fills it, and is refused."""
    peft = pytest.importorskip("peft")
    from fastunlearn import MaskedLoraConfig
    from fastunlearn.parametrize.masked_lora import check_merged, masked_layers

    model = tiny_llama()
    masks = half_masks(model)
    pruned = copy.deepcopy(model)
    own = (
        {name: ops.nm_mask(mask.unpack().float().roll(1, 1), 2, 4) for name, mask in masks.items()} if chosen else None
    )
    peft_config = MaskedLoraConfig(r=4, masks=own, target_modules=["q_proj", "down_proj"])
    args = config(tmp_path, num_train_epochs=2, learning_rate=1e-2, save_strategy="epoch")
    trainer = SAUTrainer(model, args, FORGET, RETAIN, TOKENIZER, peft_config, masks=masks, pruning={"pattern": "2:4"})
    trainer.train()
    trainer.save_model()
    assert {"adapter_config.json", "masks.safetensors", "pruning.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    for name, layer in masked_layers(trainer.model):
        assert not (layer.mask("default").unpack() & ~masks[f"{name}.weight"].unpack()).any()
    again = SAUTrainer(
        copy.deepcopy(pruned), config(tmp_path, num_train_epochs=3, learning_rate=1e-2, save_strategy="epoch"), FORGET, RETAIN,
        TOKENIZER, peft_config, masks=masks, pruning={"pattern": "2:4"},
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    merged = trainer.model.merge_and_unload()
    assert nm_violations(merged, masks, 2, 4) == []
    moved = [name for name, tensor in weights(merged).items() if not torch.equal(tensor, weights(pruned)[name])]
    assert moved
    assert all("q_proj" in name or "down_proj" in name for name in moved)
    save_checkpoint(tmp_path / "merged", merged, TOKENIZER, masks=masks, pruning={"pattern": "2:4"})

    ordinary = peft.get_peft_model(
        copy.deepcopy(pruned), MaskedLoraConfig(target_modules=["q_proj"], init_lora_weights="random")
    )
    with pytest.raises(ValueError, match=r"merged, it fills [\d,]+ entries of model.layers.0.self_attn.q_proj"):
        check_merged(ordinary, masks)
    assert nm_violations(ordinary.merge_and_unload(), masks, 2, 4)

    def refused(words, adapter=peft_config, **options):
        with pytest.raises(ValueError, match=words):
            SAUTrainer(
                copy.deepcopy(pruned), config(tmp_path, "other", **options), FORGET, RETAIN, TOKENIZER, adapter, masks=masks,
                pruning={"pattern": "2:4"},
            )  # fmt: skip

    refused("a LoraConfig would fill a pruned model's zeros", peft.LoraConfig(target_modules=["q_proj"]))
    refused("redistribution and train_unpruned change weights", train_unpruned=True)
    refused("localize: chooses weights", localize="saliency")
    tiles = {name: torch.ones(1, 1, dtype=torch.bool) for name in masks}
    refused("tiles hold entries that pruning removed", MaskedLoraConfig(masks=tiles, block=128))


# Compressed weights.


def pair_of_runs(tmp_path, dtype=torch.float32, trainer_class=SAUTrainer, config_class=SAUConfig, **options):
    """The weights after the same run dense with masks and compressed."""
    out = []
    for compressed in (False, True):
        model = tiny_llama().to(dtype)
        masks = half_masks(model)
        settings = {**vars_of(tmp_path, f"{compressed}"), **options, "compressed": compressed}
        trainer = trainer_class(
            model, config_class(**settings), FORGET, RETAIN, TOKENIZER, masks=masks, pruning={"pattern": "2:4"}
        )
        trainer.train()
        assert bool(compressed_layers(trainer.model)) == compressed
        out.append((dense_state_dict(trainer.model), trainer))
    return out


def vars_of(tmp_path: Path, name: str) -> dict:
    return {
        "output_dir": str(tmp_path / name), "learning_rate": 1e-2, "num_train_epochs": 4, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1, "warmup_epochs": 0, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "reference_cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"redistribution": "update"},
        {"redistribution": "update", "importance": "weight_grad"},
        {"localize": "saliency", "saliency_density": 0.2},
        {"localize": "saliency", "saliency_density": 0.2, "redistribution": "update"},
        {"redistribution": "retain"},
        {"objective": "GradDiff", "update": "pcgrad"},
        {"objective": "GradDiff", "update": "hamu-q", "hamu_share": 0.3, "optim": "sgd", "learning_rate": 1e-3},
        {"train_unpruned": True},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: "-".join(f"{v}" for v in options.values()) or "plain",
)
def test_compressed_is_the_same_run(tmp_path, dense, options):
    if "redistribution" in options:
        options = {**options, "dense_model": str(tmp_path / "dense")}
    (a, _), (b, trainer) = pair_of_runs(tmp_path, **options)
    start = tiny_llama().state_dict()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    assert any(not torch.equal(a[name], start[name] * trainer.masks[name].unpack()) for name in trainer.masks)
    assert all(layer.weight.numel() * 2 == layer.shape.numel() for layer in trainer.compressed.layers.values())


def test_a_compressed_hamu_run(tmp_path):
    from fastunlearn.methods import HAMUConfig, HAMUTrainer

    (a, one), (b, two) = pair_of_runs(
        tmp_path, trainer_class=HAMUTrainer, config_class=HAMUConfig, hamu_share=0.3, learning_rate=1e-3
    )
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert one.certificates.summary()["held"] == two.certificates.summary()["held"]


def test_a_compressed_run_is_saved_as_an_ordinary_model(tmp_path):
    from tests.tiny_chat import char_tokenizer

    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    masks = half_masks(model)
    args = config(tmp_path, compressed=True, save_strategy="epoch")
    trainer = SAUTrainer(model, args, FORGET, RETAIN, char_tokenizer(), masks=masks, pruning={"pattern": "2:4"})
    trainer.train()
    trainer.save_model()
    ids = torch.arange(40).view(2, 20)
    for folder in (tmp_path / "out", last_checkpoint(tmp_path / "out")):
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
        assert nm_violations(again, masks, 2, 4) == []
        assert load_checkpoint(folder, masks="require").masks.keys() == masks.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_compressed_run_is_exact(tmp_path, dtype):
    import shutil

    def trainer(name):
        model = tiny_llama().to(dtype)
        return make(
            tmp_path, model, half_masks(model), name, compressed=True, num_train_epochs=4, learning_rate=1e-2,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    trainer("cut").train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    second = trainer("cut")
    second.train(resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_what_cannot_be_compressed_is_refused_before_any_work(tmp_path):
    model = tiny_llama()
    masks = half_masks(model)
    with pytest.raises(ValueError, match="compressed: wants a model pruned n:m"):
        SAUTrainer(
            model, config(tmp_path, compressed=True), FORGET, RETAIN, TOKENIZER, masks=masks, pruning={"pattern": "50%"}
        )
    with pytest.raises(ValueError, match="does not divide"):
        SAUTrainer(
            model, config(tmp_path, compressed=True), FORGET, RETAIN, TOKENIZER, masks=masks, pruning={"pattern": "3:7"}
        )
    pytest.importorskip("peft")
    from fastunlearn import MaskedLoraConfig

    args, adapter = config(tmp_path, compressed=True), MaskedLoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="compressed: with an adapter the pruned weights do not move"):
        SAUTrainer(model, args, FORGET, RETAIN, TOKENIZER, adapter, masks=masks, pruning={"pattern": "2:4"})
    name = next(iter(masks))
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    with pytest.raises(ValueError, match="not zero outside the mask"):
        make(tmp_path, model, masks, compressed=True)
