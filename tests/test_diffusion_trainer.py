"""DiffusionTrainer: its step against one written out, the teacher, counters, resuming after a SIGKILL, every family, bad input."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.tiny_diffusion import OBJECTS, prompt, tiny_flux, tiny_pipeline, tiny_sd3, tiny_v2, tiny_xl

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fastunlearn import sampling
from fastunlearn.data.concept_images import ConceptImages
from fastunlearn.data.images import Latents
from fastunlearn.diffusion_trainer import DiffusionConfig, DiffusionTrainer
from fastunlearn.families import family_of
from fastunlearn.methods.spare import SPAREConfig, SPARETrainer
from fastunlearn.objectives.diffusion import NoiseSchedule, denoiser, self_distillation_loss
from fastunlearn.resuming import last_checkpoint

FORGET = [{"text": prompt(thing, "Mosaic"), "surrogate": prompt(thing, "Photo")} for thing in OBJECTS]
RETAIN = [{"text": prompt(thing, style)} for thing in OBJECTS for style in ("Photo", "Pop Art", "Van Gogh")]
QUICK = {
    "max_steps": 3, "num_forget_images": 6, "num_retain_images": 9, "sampling_steps": 2, "guidance_scale": 1.0, "use_cpu": True,
    "disable_tqdm": True, "learning_rate": 1e-3, "logging_steps": 1,
}  # fmt: skip
MAKE = {"sd2": tiny_v2, "sdxl": tiny_xl, "sd3": tiny_sd3, "flux": tiny_flux}


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def make(folder, pipeline=None, forget=FORGET, retain=RETAIN, **options):
    return DiffusionTrainer(
        pipeline or tiny_pipeline(), DiffusionConfig(str(folder), **QUICK | options), forget, retain
    )


def test_a_step_is_the_step_written_out(tmp_path):
    pipeline = tiny_pipeline()
    plain, frozen = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.unet)
    trainer = make(
        tmp_path,
        pipeline,
        max_steps=1,
        train_method="full",
        optim="sgd",
        max_grad_norm=0,
        weight_decay=0.0,
        learning_rate=0.1,
    )
    seen = []
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: seen.append(prepare(inputs)) or seen[-1]
    result = trainer.train()
    [batch] = seen
    loss = 0.0
    for name, factor, other in (("forget", 0.3, "other"), ("retain", 1.0, "text")):
        part = batch[name]
        noised = NoiseSchedule.of(pipeline.scheduler).add_noise(part["latents"], part["noise"], part["timesteps"])
        assert torch.equal(noised, part["noised"])
        loss = loss + factor * self_distillation_loss(
            denoiser(plain), denoiser(frozen), noised, part["timesteps"], part["text"].hidden, part[other].hidden
        )
    assert result.training_loss == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 0.1 * parameter.grad
    moved = trainer.merge()
    assert set(moved) == {name for name, _ in plain.named_parameters()}
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(moved[name], tensor.detach(), rtol=1e-4, atol=1e-6)
    assert pipeline.unet is trainer.family.network


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointed_blocks_give_the_same_weights(tmp_path, name):
    if not hasattr(DiffusionConfig(str(tmp_path), **QUICK), name):
        pytest.skip(f"these arguments have no {name}")
    moved = {}
    for on in (False, True):
        trainer = make(tmp_path / str(on), max_steps=2, train_method="full", **{name: on})
        assert trainer.family.network.is_gradient_checkpointing is on
        assert not any(getattr(trainer.args, n, False) for n in ("gradient_checkpointing", "activation_checkpointing"))
        trainer.train()
        moved[on] = trainer.merge()
    for n, tensor in moved[False].items():
        torch.testing.assert_close(moved[True][n], tensor, rtol=1e-4, atol=1e-6)


def test_batches_are_of_their_counter_alone(tmp_path):
    one, two, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=7)
    rows = {"forget": {"index": torch.tensor([0, 3])}, "retain": {"index": torch.tensor([1, 2])}}
    first, again = one._prepare_inputs(rows), two._prepare_inputs(rows)
    assert torch.equal(first["forget"]["noise"], again["forget"]["noise"])
    assert not torch.equal(first["forget"]["noise"], first["retain"]["noise"])
    # The second micro-batch of a step, another step, another seed.
    two.state.global_step = 1
    for elsewhere in (one._prepare_inputs(rows), two._prepare_inputs(rows), other._prepare_inputs(rows)):
        assert not torch.equal(elsewhere["forget"]["noise"], first["forget"]["noise"])
    data = one.sets["forget"]
    assert torch.equal(first["forget"]["latents"], data.latents[[0, 3]])
    assert torch.equal(first["forget"]["other"].hidden, data.others.hidden[data.prompt[[0, 3]]])


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("variant", ["per_weight", "per_module"])
def test_every_family_unlearns(tmp_path, name, variant):
    pipeline = MAKE[name]()
    before = weights(family_of(pipeline, 16).network)
    config = SPAREConfig(str(tmp_path), **QUICK | {"resolution": 16, "variant": variant, "r": 2})
    trainer, moved = SPARETrainer.run(pipeline, config, FORGET, RETAIN)
    losses = [line["forget_loss"] for line in trainer.state.log_history if "forget_loss" in line]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
    after = weights(trainer.family.network)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert changed <= moved.keys()
    assert all(p.requires_grad for p in trainer.family.network.parameters())


def test_importance_draws_where_the_concept_matters(tmp_path):
    trainer = make(tmp_path, timesteps="importance", timestep_bins=4, train_method="xattn")
    trainer.train()
    divergence = trainer.divergence
    assert divergence.shape == (4,)
    assert (divergence > 0).all()
    t = trainer._timesteps(20_000, torch.Generator().manual_seed(0))
    share = torch.histc(t.double(), 4, 0, 1000) / 20_000
    wanted = divergence + 0.05 * divergence.mean()
    torch.testing.assert_close(share, wanted / wanted.sum(), rtol=0.1, atol=0.01)
    interval = make(tmp_path / "b", timesteps="interval", timestep_interval=[0.2, 0.4], train_method="xattn")
    interval.train()
    t = interval._timesteps(2000, torch.Generator().manual_seed(0))
    assert (int(t.min()), int(t.max())) == (200, 399)


def test_a_run_that_fails_leaves_the_pipeline_as_it_was(tmp_path):
    for kind, config in (
        (DiffusionTrainer, DiffusionConfig(str(tmp_path / "a"), **QUICK | {"train_method": "full"})),
        (SPARETrainer, SPAREConfig(str(tmp_path / "b"), **QUICK)),
    ):
        pipeline = tiny_pipeline()
        before = weights(pipeline.unet)
        broken = Latents(torch.full((2, 2, 8, 8), float("nan")), torch.zeros(2, dtype=torch.int64))
        forget = ConceptImages([FORGET[0]["text"]], [FORGET[0]["surrogate"]])
        retain = ConceptImages([RETAIN[0]["text"]], None, broken)
        with pytest.raises(ArithmeticError, match="the retain loss is nan in step 1"):
            kind.run(pipeline, config, forget, retain)
        after = weights(pipeline.unet)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(p.requires_grad for p in pipeline.unet.parameters())


CHILD = """
import os, signal, sys
from tests.test_diffusion_trainer import *
folder, method, kill = sys.argv[1:]
common = QUICK | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "timesteps": "importance", "timestep_bins": 3}
if method == "spare":
    trainer = SPARETrainer(tiny_pipeline(), SPAREConfig(folder, **common, lora_dropout=0.2), FORGET, RETAIN)
else:
    trainer = DiffusionTrainer(tiny_pipeline(), DiffusionConfig(folder, **common, train_method="xattn", localize="saliency",
                                                               saliency_density=0.3), FORGET, RETAIN)
step = trainer.training_step
def dying(*args, **options):
    if kill == "kill" and trainer.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **options)
trainer.training_step = dying
trainer.train(resume_from_checkpoint=True if kill == "resume" else None)
torch.save(trainer.merge(), folder + "/weights.pt")
"""


def child(folder: Path, method: str, kill: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CHILD, str(folder), method, kill]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spare", pytest.param("weights", marks=pytest.mark.thorough)])
def test_resume_after_a_kill_is_the_run_without_it(tmp_path, method):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = child(whole, method, "no")
    assert done.returncode == 0, done.stderr[-3000:]
    assert child(broken, method, "kill").returncode == -signal.SIGKILL
    assert last_checkpoint(broken).endswith("checkpoint-4")
    done = child(broken, method, "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = torch.load(whole / "weights.pt"), torch.load(broken / "weights.pt")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_of_other_data_or_another_variant_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    SPARETrainer(tiny_pipeline(), SPAREConfig(str(tmp_path), **QUICK | options), FORGET, RETAIN).train()

    def again(pipeline=None, forget=FORGET, **more):
        config = SPAREConfig(str(tmp_path), **QUICK | options | {"max_steps": 4} | more)
        SPARETrainer(pipeline or tiny_pipeline(), config, forget, RETAIN).train(resume_from_checkpoint=True)

    with pytest.raises(ValueError, match="is of other rows"):
        again(forget=FORGET[:2])
    with pytest.raises(ValueError, match="is of other rows"):
        again(tiny_pipeline(seed=3))
    with pytest.raises(ValueError, match="is of another variant than dense"):
        again(variant="dense")
    with pytest.raises(ValueError, match="trains other weights than this run"):
        again(r=3)
    again()


def test_latents_are_kept_and_found_again(tmp_path, monkeypatch):
    options = {"cache_dir": str(tmp_path / "cache"), "train_method": "xattn"}
    first = make(tmp_path / "a", **options)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    monkeypatch.setattr("fastunlearn.families.latents_of_prompts", lambda *_, **__: pytest.fail("drawn again"))
    second = make(tmp_path / "b", **options)
    for name in ("forget", "retain"):
        assert torch.equal(first.sets[name].latents, second.sets[name].latents)
        assert torch.equal(first.sets[name].prompt, second.sets[name].prompt)


def test_how_many_images_are_drawn_at_once(tmp_path, monkeypatch):
    sizes, draw_batch = [], sampling.sample_latents
    monkeypatch.setattr(
        sampling,
        "sample_latents",
        lambda p, text, start, **o: sizes.append(len(start)) or draw_batch(p, text, start, **o),
    )
    options = {"cache_dir": str(tmp_path / "cache"), "train_method": "xattn"}
    usual = make(tmp_path / "a", train_method="xattn")
    assert sizes == [3, 3, 9]  # two rounds of three prompts, one of nine
    sizes.clear()
    few = make(tmp_path / "b", sampling_batch_size=2, **options)
    assert sizes == [2, 1, 2, 1, 2, 2, 2, 2, 1]
    torch.testing.assert_close(few.sets["retain"].latents, usual.sets["retain"].latents, atol=1e-3, rtol=1e-3)
    # They are the same images: found again, and no other run.
    make(tmp_path / "c", sampling_batch_size=4, **options)
    assert len(sizes) == 9
    assert few.data_digests() == usual.data_digests()
    with pytest.raises(ValueError, match="sampling_batch_size: want at least 1, got 0"):
        make(tmp_path / "d", sampling_batch_size=0)


def test_the_key_of_kept_latents(tmp_path):
    """Latents are found again only by a pipeline that would make the same."""
    cache = tmp_path / "cache"

    def files(pipeline, **options):
        make(tmp_path / "a", pipeline, cache_dir=str(cache), train_method="xattn", **options)
        return len(list(cache.glob("*.safetensors")))

    assert files(tiny_pipeline()) == 2
    assert files(tiny_pipeline()) == 2
    vae, text, noise = tiny_pipeline(), tiny_pipeline(), tiny_pipeline()
    with torch.no_grad():
        next(vae.vae.parameters()).add_(1)
        next(text.text_encoder.parameters()).add_(1)
    noise.scheduler = type(noise.scheduler).from_config(noise.scheduler.config, steps_offset=0)
    assert files(vae) == 4
    assert files(text) == 6
    assert files(noise) == 8
    assert files(tiny_pipeline(), bf16=True) == 10


def test_what_is_measured_first_is_alike_on_every_process(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    seen = []
    for process in (0, 1):
        monkeypatch.setattr(type(trainer.args), "process_index", process)
        seen.append(
            [torch.randn(4, generator=trainer._generator(*counter)) for counter in ((-1, 0), (-2, 3), (0, 0, 0))]
        )
    (saliency, divergence, step), (saliency_, divergence_, step_) = seen
    assert torch.equal(saliency, saliency_)
    assert torch.equal(divergence, divergence_)
    assert not torch.equal(step, step_)


def test_the_teacher_stays_over_two_runs(tmp_path):
    pipeline = tiny_pipeline()
    before = weights(pipeline.unet)
    trainer = make(tmp_path, pipeline, train_method="full", overwrite_output_dir=True)
    trainer.train()
    trainer.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(pipeline.unet).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer._frozen).items())


def test_the_copied_teacher_has_the_students_precision(tmp_path):
    trainer = make(tmp_path, train_method="xattn", bf16=True, max_steps=1)
    trainer.before_training(None)
    seen = []
    trainer._frozen.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    part = trainer._prepare_inputs({"forget": {"index": torch.arange(2)}})["forget"]
    with torch.no_grad():
        trainer.teacher(trainer.model)(part["noised"], part["timesteps"], part["text"])
    assert seen == [True]


@pytest.mark.parametrize(("name", "scale"), [("sd1", 7.5), ("sdxl", 5.0), ("sd3", 7.0), ("flux", 3.5)])
def test_images_are_drawn_with_the_guidance_of_the_family(tmp_path, monkeypatch, name, scale):
    family = family_of((MAKE | {"sd1": tiny_pipeline})[name](), 16)
    asked = []

    def drawn(self, prompts, count, **options):
        asked.append(options["guidance_scale"])
        return Latents(torch.zeros(1, *self.latent_shape), torch.zeros(1, dtype=torch.int64))

    monkeypatch.setattr(type(family), "draw", drawn)
    for given in (None, 2.0):
        make(tmp_path, family.pipeline, resolution=16, guidance_scale=given, train_method="xattn")
    assert asked == [scale, scale, 2.0, 2.0]


def test_a_refused_run_has_drawn_nothing_and_changed_nothing(tmp_path, monkeypatch):
    from peft import LoraConfig

    monkeypatch.setattr("fastunlearn.families.latents_of_prompts", lambda *_, **__: pytest.fail("drawn"))
    pipeline = tiny_pipeline()
    for config, options, words in (
        (None, {"train_method": "xatn"}, "train_method: 'xatn' is unknown; did you mean xattn"),
        (LoraConfig(r=2, target_modules=["to_q"], bias="all"), {}, "peft_config: bias='all' trains"),
        (LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]), {}, "modules_to_save="),
        (LoraConfig(r=2, target_modules=["to_q"]), {"localize": "saliency"}, "localize: saliency chooses among"),
        (
            LoraConfig(r=2, target_modules=["to_q"]),
            {"trainable_params_regex": [".*"]},
            "with an adapter only the adapter trains",
        ),
        (None, {"trainable_params_regex": [".*"]}, "trainable_params_regex: chooses among the weights of train_method"),
        (
            None,
            {"train_method": "xattn", "trainable_params_regex": ["conv_in.*"]},
            "match no parameter of train_method=xattn",
        ),
        (None, {"train_method": "xattn", "trainable_params_regex": ["("]}, "is no regular expression"),
    ):
        args = DiffusionConfig(str(tmp_path), **QUICK | options)
        with pytest.raises(ValueError, match=words):
            DiffusionTrainer(pipeline, args, FORGET, RETAIN, peft_config=config)
        assert all(p.requires_grad for p in pipeline.unet.parameters())
    monkeypatch.undo()
    # What PEFT refuses itself is found later; the flags are back all the same.
    with pytest.raises(ValueError, match="to_w"):
        DiffusionTrainer(
            pipeline, DiffusionConfig(str(tmp_path), **QUICK), FORGET, RETAIN,
            peft_config=LoraConfig(r=2, target_modules=["to_w"]),
        )  # fmt: skip
    assert all(p.requires_grad for p in pipeline.unet.parameters())


def test_an_adapter_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = SPARETrainer(tiny_pipeline(), SPAREConfig(str(tmp_path), **QUICK | {"variant": "dense"}), FORGET, RETAIN)
    trainer.train()
    trainer.save_model()
    old = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    rename = Path.rename

    def failing(self, target):
        if self.suffix == ".tmp":
            raise OSError("no room")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no room"):
        trainer.save_model()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == old
    monkeypatch.undo()
    trainer.save_model()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".adapter")]


def test_bad_input(tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match=r"surrogates: .* is its own surrogate"):
        make(tmp_path, forget=[{"text": "a Cat", "surrogate": "A cat"}])
    with pytest.raises(ValueError, match=r"surrogates: .* is its own surrogate"):
        make(tmp_path, forget=[{"text": "a Cat", "surrogate": "a  Cat"}])
    with pytest.raises(ValueError, match="row 0 wants text and surrogate, it has text"):
        make(tmp_path, forget=RETAIN)
    with pytest.raises(ValueError, match="retain_dataset: a retain term needs one"):
        make(tmp_path, retain=None)
    with pytest.raises(ValueError, match=r"retain_dataset: 'A Cat image in Mosaic style.' is to be forgotten, too"):
        make(tmp_path, retain=[*RETAIN, {"text": FORGET[0]["text"]}])
    with pytest.raises(ValueError, match="forget_dataset: want what must be forgotten"):
        make(tmp_path, forget=None)
    with pytest.raises(ValueError, match="nothing trains"):
        make(tmp_path).train()
    half = tiny_pipeline()
    half.unet.half()
    for config in (
        DiffusionConfig(str(tmp_path), **QUICK | {"train_method": "full"}),
        SPAREConfig(str(tmp_path), **QUICK),
    ):
        kind = SPARETrainer if isinstance(config, SPAREConfig) else DiffusionTrainer
        with pytest.raises(
            ValueError, match="in float16 are lost where they are small; load the pipeline in bfloat16 or float32"
        ):
            kind(half, config, FORGET, RETAIN)
    with pytest.raises(ValueError, match="load the pipeline in bfloat16 or float32"):
        DiffusionTrainer(
            half,
            DiffusionConfig(str(tmp_path), **QUICK),
            FORGET,
            RETAIN,
            peft_config=LoraConfig(r=2, target_modules=["to_q"]),
        )
    with pytest.raises(TypeError, match="args: want a DiffusionConfig"):
        DiffusionTrainer(tiny_pipeline(), object(), FORGET, RETAIN)
    for options, words in (
        ({"timesteps": "importanc"}, "timesteps: 'importanc' is unknown; did you mean importance"),
        ({"timesteps": "interval"}, "timestep_interval: goes with timesteps=interval"),
        ({"timesteps": "interval", "timestep_interval": [0.4, 0.2]}, r"want low and high in \[0, 1\]"),
        ({"num_forget_images": 0}, "num_forget_images: want at least 1"),
        ({"forget_alpha": float("nan")}, "forget_alpha: want a finite number"),
        ({"retain_groups": "group"}, "retain_groups: is for rows of text"),
        ({"update": "hamu-q", "retain_alpha": 0.0}, "needs a retain term; retain_alpha is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            DiffusionConfig(str(tmp_path), **QUICK | options)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("localize", ["all", "saliency"])
def test_a_regex_narrows_what_trains(tmp_path, localize):
    pipeline = tiny_pipeline()
    before = weights(pipeline.unet)
    options = {"train_method": "xattn", "trainable_params_regex": [r"up_blocks\..*to_k\.weight"], "localize": localize}
    trainer = make(tmp_path, pipeline, **options)
    trainer.train()
    moved = {name for name, tensor in weights(pipeline.unet).items() if not torch.equal(tensor, before[name])}
    assert moved == {n for n in before if n.startswith("up_blocks.") and n.endswith("attn2.to_k.weight")}
    assert trainer.merge().keys() == moved


def test_two_gradients_become_one_by_any_update(tmp_path):
    pipeline = tiny_pipeline()
    before = weights(pipeline.unet)
    trainer = make(tmp_path, pipeline, update="pcgrad", train_method="xattn")
    trainer.train()
    assert trainer.state.global_step == 3
    moved = [name for name, tensor in weights(pipeline.unet).items() if not torch.equal(tensor, before[name])]
    assert moved
    assert all("attn2." in name for name in moved)
