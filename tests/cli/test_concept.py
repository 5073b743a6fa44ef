"""`fastunlearn spare`, `esd`, `ablate`, `salun` on a tiny pipeline on disk: what they write and what they refuse."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from tests.cli.test_diffusion import canvas as canvas
from tests.cli.test_diffusion import folder as folder
from tests.tiny_diffusion import tiny_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from safetensors.torch import load_file

from fastunlearn.cli import ablate, esd, finetune, salun, scapre, spare, uce
from fastunlearn.exporting import export_run
from fastunlearn.parametrize.partial_unet import load_partial_unet
from fastunlearn.pipelines import load_pipeline
from fastunlearn.report.page import render
from fastunlearn.report.run_folder import load_run

TRAIN = (
    "max_steps=2", "per_device_train_batch_size=2", "num_forget_images=3", "num_retain_images=3", "sampling_steps=2", "use_cpu=true",
    "guidance_scale=1",
)  # fmt: skip


def test_spare_leaves_the_adapter_and_the_weights(canvas, tmp_path, capsys):
    from peft import PeftModel

    import fastunlearn

    out = tmp_path / "out"
    words = ["--erase_concept", "mosaic", "--output", str(out), *TRAIN, "learning_rate=1e-2", "r=2"]
    assert spare.main(words) == 0
    assert sorted(os.listdir(out)) == [
        "_samples",
        "adapter",
        "metrics.json",
        "pytorch_lora_weights.safetensors",
        "unet.safetensors",
    ]
    assert "of 24 masked layers" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["method"], metrics["settings"]["variant"], metrics["steps"]) == ("spare", "per_weight", 2)
    assert metrics["storage_mib"] < (out / "adapter" / "adapter_model.safetensors").stat().st_size / 2**20
    assert set(metrics["mask_density"]["of the adapter"]) == {
        n for n in load_file(out / "unet.safetensors") if "attn" in n
    }
    # Before and after of what went and what stays, for the report.
    run = load_run(out)
    assert [s.part for s in run.samples] == ["forget"] * 3 + ["retain"] * 4
    assert any(s.before_image != s.after_image for s in run.samples)
    assert 'alt="after: ' in render([run])
    # The adapter on the base is the merged model.
    assert fastunlearn.MaskedLoraConfig
    merged = tiny_pipeline().unet
    load_partial_unet(merged, out / "unet.safetensors")
    again = PeftModel.from_pretrained(tiny_pipeline().unet, out / "adapter").merge_and_unload()
    mine = merged.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in again.state_dict().items())
    assert any(not torch.equal(tensor, mine[name]) for name, tensor in tiny_pipeline().unet.state_dict().items())
    # Nothing is overwritten without being asked.
    assert spare.main(words) == 2
    assert "overwrite" in capsys.readouterr().err
    # Another base is refused.
    with pytest.raises(ValueError, match="made for other weights"):
        PeftModel.from_pretrained(tiny_pipeline(seed=3).unet, out / "adapter")


@pytest.mark.parametrize(
    ("command", "more"), [(esd, ["ddim_steps=2", "train_method=u"]), (ablate, []), (salun, ["saliency_density=0.2"])]
)
def test_baselines_write_what_moved(canvas, tmp_path, command, more):
    out = tmp_path / "out"
    assert (
        command.main(
            ["--erase_concept", "Cat", "--output", str(out), *TRAIN, *more, "learning_rate=1e-3", "report_images=0"]
        )
        == 0
    )
    assert sorted(os.listdir(out)) == ["metrics.json", "unet.safetensors"]
    assert ("may move" in json.loads((out / "metrics.json").read_text())["mask_density"]) == (command is salun)
    before = tiny_pipeline().unet.state_dict()
    metrics = json.loads((out / "metrics.json").read_text())
    share = 0.2 if command is salun else 1
    assert metrics["trained"] == pytest.approx(share * metrics["weights"], rel=1e-3)
    moved = load_file(out / "unet.safetensors")
    share = sum(int((tensor != before[name]).sum()) for name, tensor in moved.items()) / sum(
        map(torch.numel, moved.values())
    )
    assert 0 < share <= (0.2 if command is salun else 1)
    if command is esd:
        assert not any("attn2." in name for name in moved)


def test_on_the_canvas_settings_are_those_of_its_table(tmp_path, capsys):
    from fastunlearn.cli._diffusion import canvas_defaults
    from fastunlearn.methods.concept_ablation import ConceptAblationConfig
    from fastunlearn.methods.esd import ESDConfig
    from fastunlearn.methods.recipes import DEFAULTS, OWN, SMALL

    def given(method, **values):
        return canvas_defaults(method, lambda v: v["names"])({"names": ["Pop Art"]} | values)

    tables = {m: SMALL | OWN.get(m, {}) | DEFAULTS[m]["style"] for m in ("spare", "lora", "salun")}
    assert given("spare") == tables["spare"]
    assert capsys.readouterr().out.startswith("canvas: max_steps=100 per_device_train_batch_size=8 ")
    fewer = given("spare", max_steps=3, learning_rate=1e-5)
    assert fewer == {n: v for n, v in tables["spare"].items() if n not in ("max_steps", "learning_rate")}
    assert "max_steps" not in given("spare", num_train_epochs=2.0)
    for config in (ESDConfig, ConceptAblationConfig):
        words = {name: value for name, value in given("esd", num_train_epochs=2.0).items() if name != "ddim_steps"}
        assert config(str(tmp_path), num_train_epochs=2.0, **words).max_steps == -1
    assert given("spare", variant="dense") == {n: v for n, v in tables["lora"].items() if n != "variant"}
    assert set(given("spare", variant="per_module")) <= set(SMALL)
    assert given("salun") == tables["salun"]
    assert given("uce", names=["Cat"]) == DEFAULTS["uce"]["object"]
    capsys.readouterr()
    # Nothing where something else was asked for, or nobody knows the kind; what is wrong is said later.
    assert given("spare", preset="tutorial") == given("salun", recipe="unlearncanvas") == {}
    assert given("spare", canvas_settings=False) == given("spare", model_name_or_path=str(tmp_path)) == {}
    assert given("uce", names=["Cat", "Pop Art"]) == given("uce", names=["nonsense"]) == {}
    assert capsys.readouterr().out == ""


def test_ablation_keeps_its_anchors_where_nothing_is_named(canvas, tmp_path, monkeypatch):
    from fastunlearn.methods.concept_ablation import ConceptAblationTrainer

    kept, sources = [], ConceptAblationTrainer._sources

    def seen(self, forget, retain, args):
        kept.append(retain)
        return sources(self, forget, retain, args)

    monkeypatch.setattr(ConceptAblationTrainer, "_sources", seen)
    words = ["--erase_concept", "Cat", *TRAIN]
    assert ablate.main([*words, "--output", str(tmp_path / "a")]) == 0
    assert ablate.main([*words, "--output", str(tmp_path / "b"), "--retain_concepts", "Fish"]) == 0
    assert kept[0] is None
    assert kept[1].prompts
    assert all("Fish" in text for text in kept[1].prompts)


def same(network, weights):
    """Whether a network has these weights, every one."""
    return all(torch.equal(tensor.cpu(), weights[name].cpu()) for name, tensor in network.state_dict().items())


def read(path):
    """The tiny U-Net with a file of weights over it."""
    unet = tiny_pipeline().unet
    load_partial_unet(unet, path)
    return unet


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (uce, ["--edit_concepts", "Cat", "lamb=0.1"]),
        (finetune, ["--erase_concept", "Cat", "train_method=selfattn", "max_steps=2", *TRAIN[2:5]]),
        (esd, ["--erase_concept", "Cat", *TRAIN, "train_method=selfattn", "ddim_steps=2", "learning_rate=1e-3"]),
        (spare, ["--erase_concept", "Cat", *TRAIN, "learning_rate=1e-2", "r=2"]),
        (
            spare,
            ["--erase_concept", "Cat", *TRAIN, "learning_rate=1e-2", "r=2", "variant=dense", "target_modules=to_q"],
        ),
    ],
)
def test_a_second_run_keeps_what_the_first_erased(canvas, tmp_path, capsys, command, more):
    first, out = tmp_path / "first", tmp_path / "out"
    assert uce.main(["--edit_concepts", "Mosaic", "--output", str(first), "report_images=0"]) == 0
    earlier = load_file(first / "unet.safetensors")
    words = [*more, "--weights", str(first / "unet.safetensors"), "report_images=0", "--save_pipeline"]
    assert command.main([*words, "--output", str(out)]) == 0
    want = load_pipeline(out / "pipeline").unet.state_dict()
    # The second file alone makes the model of both of the plain one.
    assert same(read(out / "unet.safetensors"), want)
    assert not same(read(first / "unet.safetensors"), want)
    assert set(earlier) <= set(load_file(out / "unet.safetensors"))
    digest = hashlib.sha256((first / "unet.safetensors").read_bytes()).hexdigest()
    said = json.loads((out / "metrics.json").read_text())
    assert said["earlier_weights"] == {"path": str(first / "unet.safetensors"), "sha256": digest}
    assert load_run(out).asked["earlier weights"] == str(first / "unet.safetensors")
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    assert (command is spare) == ("holds the change of --weights, too" in capsys.readouterr().out)
    # So do what is exported of it, an adapter's own folder too.
    for run in [out, *([out / "adapter"] if command is spare else [])]:
        merged = export_run(run, "merged", tmp_path / "merged", overwrite=True)
        assert same(load_pipeline(merged).unet, want)
    if command in (finetune, esd):
        return  # biases moved, which no LoRA holds
    lora = export_run(out, "diffusers", tmp_path / "lora.safetensors", rank=16)
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for name, tensor in pipeline.unet.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-4)


def test_an_adapter_whose_earlier_weights_are_gone(canvas, tmp_path):
    first, out = tmp_path / "first" / "unet.safetensors", tmp_path / "out"
    assert uce.main(["--edit_concepts", "Mosaic", "--output", str(first.parent), "report_images=0"]) == 0
    words = ["--erase_concept", "Cat", *TRAIN, "learning_rate=1e-2", "r=2", "variant=dense", "target_modules=to_q"]
    assert spare.main([*words, "--weights", str(first), "--output", str(out), "report_images=0"]) == 0
    want = read(out / "unet.safetensors").state_dict()
    (out / "unet.safetensors").unlink()
    # What comes first is applied first.
    assert same(load_pipeline(export_run(out, "merged", tmp_path / "merged")).unet, want)
    assert same(read(export_run(out, "partial", tmp_path / "both.safetensors")), want)
    for to in ("peft", "diffusers", "kohya"):
        with pytest.raises(
            ValueError, match=rf"to: {to} cannot hold this run \(its adapter goes on from .*; partial or merged"
        ):
            export_run(out, to, tmp_path / "lora")
    data = first.read_bytes()
    first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="which have changed; put that file back"):
        export_run(out, "merged", tmp_path / "no")
    first.unlink()
    with pytest.raises(ValueError, match="which are not there; put that file back"):
        export_run(out, "merged", tmp_path / "no")
    metrics = json.loads((out / "metrics.json").read_text()) | {"earlier_weights": {"path": 3}}
    (out / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=r"earlier_weights in its metrics\.json wants a path and a sha256"):
        export_run(out, "merged", tmp_path / "no")


def test_scapre_has_no_lora_of_a_second_edit(canvas, tmp_path, capsys):
    first, out = tmp_path / "first" / "unet.safetensors", tmp_path / "out"
    assert uce.main(["--edit_concepts", "Mosaic", "--output", str(first.parent), "report_images=0"]) == 0
    words = ["--concepts", "Pop Art", "--weights", str(first), "--output", str(out), "lora_rank=4"]
    assert scapre.main(words) == 2
    assert "would lack the change of --weights" in capsys.readouterr().err
    assert not out.exists()


def test_ablation_learns_from_images_of_its_anchor(folder, tmp_path, monkeypatch, capsys):
    from PIL import Image

    from tests.tiny_diffusion import draw

    images = tmp_path / "photos"
    images.mkdir()
    for i in range(3):
        Image.fromarray(draw("Cat", "Photo", np.random.default_rng(i))).save(images / f"{i}.png")
    words = ["--model", str(folder), "--erase_concept", "Mosaic", "--surrogate_concept", "Photo", *TRAIN]
    words += ["--template", "A Cat image in {} style.", "--output", str(tmp_path / "out")]
    assert ablate.main([*words, "--forget_images", str(images)]) == 2
    assert "give those, as anchor_images" in capsys.readouterr().err
    monkeypatch.setattr("fastunlearn.families.latents_of_prompts", lambda *_, **__: pytest.fail("drawn"))
    assert ablate.main([*words, "--anchor_images", str(images)]) == 0
    assert load_file(tmp_path / "out" / "unet.safetensors")


def test_what_the_record_and_the_hint_say(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "--model",
        str(folder),
        "--erase_concept",
        "Mosaic",
        "--surrogate_concept",
        "Photo",
        "--template",
        "A Cat image in {} style.",
    ]
    more = ["--retain_concepts", "Pop Art", "--output", str(out), *TRAIN, "r=2"]
    assert spare.main([*words, *more, "variant=dense"]) == 0
    assert f"fastunlearn sample --model {folder} --weights {out / 'unet.safetensors'}" in capsys.readouterr().out
    factors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert json.loads((out / "metrics.json").read_text())["trained"] == sum(map(torch.numel, factors.values()))


def test_bad_input_is_one_line(canvas, tmp_path, capsys):
    out = str(tmp_path / "out")
    for words, said in (
        (["--erase_concept", "mosaik"], "'mosaik' is unknown; did you mean Mosaic"),
        (["--erase_concept", "Mosaic", "--surrogate_concept", "Mosaic"], "is its own surrogate"),
        (["--erase_concept", "Mosaic", "--forget_images", str(tmp_path)], "holds no image"),
    ):
        assert spare.main([*words, "--output", out, *TRAIN]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.startswith("fastunlearn spare: ")
        assert err.count("\n") == 1
    assert spare.main(["--erase_concept", "Mosaic", "resume_from_checkpoint=true", "--output", out, *TRAIN]) == 2
    said = capsys.readouterr()
    assert "holds no complete checkpoint" in said.err
    assert "loading" not in said.out
    for command, words, said in (
        (esd, ["--forget_images", str(tmp_path)], "forget_images: they would not be looked at: points=trajectory"),
        (esd, ["--retain_concepts", "Pop Art"], "retain_concepts: with retain_alpha=0 nothing is kept by name"),
        (spare, ["--dtype", "float16"], "dtype: gradients and updates in float16 are lost where they are small"),
        (spare, ["--retain_images", str(tmp_path), "retain_alpha=0"], "retain_images: with retain_alpha=0"),
    ):
        assert command.main(["--erase_concept", "Mosaic", *words, "--output", out, *TRAIN]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop:
        spare.main(["--erase_concept", "Mosaic", "variant=per_wait", "--output", out, *TRAIN])
    assert stop.value.code == 2
    assert "variant: 'per_wait' is unknown; did you mean per_weight" in capsys.readouterr().err
    assert not (tmp_path / "out" / "unet.safetensors").exists()
