"""The command: both stages, what it leaves behind, going on, a concept of a pipeline, one line for what is wrong."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from fastunlearn import load_masks
from fastunlearn.cli import main
from fastunlearn.cli import pecker as command
from fastunlearn.report.page import render
from fastunlearn.report.run_folder import load_run
from tests.methods.test_pecker import tiny_unet
from tests.proof import assert_equal

SMALL = [
    "max_steps=2",
    "per_device_train_batch_size=2",
    "saliency_batches=1",
    "use_cpu=true",
    "report_to=none",
    "save_strategy=no",
]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    for part, name in zip(tiny_unet(), ("unet", "scheduler")):
        part.save_pretrained(folder / name)
    return folder


def test_two_stages(model, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["pecker", "--model", str(model), "--forget_class", "0", "--override_class", "1", "--output", str(out)]
    assert main([*argv, "--distill_steps", "2", "granularity=tile", "block=64", "density=0.3", *SMALL]) == 0
    assert "saved to" in capsys.readouterr().out
    about = json.loads((out / "pecker.json").read_text())
    assert (about["forget"], about["override"], about["retain"], about["one_step"]) == ([0], [1], [1, 2], True)
    assert json.loads((out / "metrics.json").read_text())["gradient_products"] < 1
    # What its report shows: one image a class, before and after.
    run = load_run(out)
    assert [(s.part, s.prompt) for s in run.samples] == [
        ("forget", "class 0"),
        ("retain", "class 1"),
        ("retain", "class 2"),
    ]
    assert all(s.before_image and s.after_image for s in run.samples)
    assert run.asked["forget"] == "classes 0"
    assert "Masks by layer" in render([run])
    assert (out / "unet" / "config.json").is_file()
    assert any(not m.density for m in load_masks(out / "masks.safetensors").values())
    first = json.loads((out / "distilled" / "pecker.json").read_text())
    assert (first["method"], first["retain"], first["forget"]) == ("sid", [0, 1, 2], None)
    # The generator serves another run; what is there is not overwritten unasked.
    other = [*argv[:-1], str(tmp_path / "other"), "--generator", str(out / "distilled"), "method=sfd", *SMALL]
    assert main(other) == 0
    assert not (tmp_path / "other" / "masks.safetensors").exists()
    assert main(other) == 2
    assert main([*other, "overwrite_output_dir=true"]) == 0


def test_a_run_killed_in_either_stage_goes_on(model, tmp_path, capsys):
    argv = ["pecker", "--model", str(model), "--forget_class", "0", "--override_class", "1", "--distill_steps", "2"]
    argv += [*SMALL, "method=sfd", "save_strategy=steps", "save_steps=1", "ema_decay=0"]
    assert main([*argv, "--output", str(tmp_path / "whole")]) == 0
    whole = load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors")

    def killed(name, stage, complete):
        """What a kill leaves of a stage: a lock, its checkpoints, the last one half written."""
        out = tmp_path / name
        shutil.copytree(tmp_path / "whole" / "distilled", out / "distilled")
        if stage == 2:
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", out / "checkpoint-2")
        else:
            (out / "distilled" / "pecker.json").unlink()
            shutil.rmtree(out / "distilled" / "scheduler")
        folder = out if stage == 2 else out / "distilled"
        (folder / ".lock").touch()
        (folder / "checkpoint-2" / "trainer_state.json").unlink()
        if not complete and stage == 1:
            shutil.rmtree(folder / "checkpoint-1")
        return out

    for name, stage, complete, said in (
        ("begun", 1, False, ["first", "second"]),
        ("half", 1, True, ["second"]),
        ("distilled", 2, False, ["second"]),
    ):
        out = killed(name, stage, complete)
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the half checkpoint
            assert main([*argv, "--output", str(out), "resume_from_checkpoint=true"]) == 0
        printed = capsys.readouterr().out
        assert [s for s in ("first", "second") if f"no checkpoint of the {s} stage: it begins anew" in printed] == said
        assert_equal(load_file(out / "unet" / "diffusion_pytorch_model.safetensors"), whole)

    # What somebody put there is no leftover.
    out = killed("mine", 2, False)
    (out / "mine.txt").write_text("mine")
    with pytest.warns(RuntimeWarning, match="was not written to its end"):
        assert main([*argv, "--output", str(out), "resume_from_checkpoint=true"]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "retain"),
    [
        ([], [0, 1, 2]),
        (["--forget_class", "0", "--override_class", "1"], [0, 1, 2]),
        (["--forget_class", "0", "--override_class", "1", "--retain_class", "2"], [2, 0]),
    ],
)
def test_distillation_alone_draws_what_will_be_forgotten(model, tmp_path, words, retain):
    out = tmp_path / "out"
    assert main(["pecker", "--model", str(model), "--output", str(out), *words, "method=sid", *SMALL]) == 0
    about = json.loads((out / "pecker.json").read_text())
    assert (about["forget"], about["override"], about["retain"]) == (None, None, retain)


def test_distillation_alone_of_a_concept(tmp_path, monkeypatch):
    from fastunlearn.cli import _diffusion
    from tests.tiny_diffusion import tiny_pipeline

    pipe = tiny_pipeline()
    monkeypatch.setattr(_diffusion.PipelineArguments, "load", lambda self, trained=False: pipe)
    argv = [
        "pecker",
        "--model",
        "tiny",
        "--erase_concept",
        "Mosaic",
        "--surrogate_concept",
        "Photo",
        "--retain_concepts",
        "Van Gogh",
    ]
    argv += ["--template", "A Cat image in {} style.", "--output", str(tmp_path / "out"), "method=sid", *SMALL]
    assert main(argv) == 0
    about = json.loads((tmp_path / "out" / "pecker.json").read_text())
    assert (about["forget"], len(about["retain"])) == (None, 2)


def test_a_concept(tmp_path, monkeypatch):
    from fastunlearn.cli import _diffusion
    from tests.tiny_diffusion import tiny_pipeline

    pipe = tiny_pipeline()
    monkeypatch.setattr(_diffusion.PipelineArguments, "load", lambda self, trained=False: pipe)
    argv = [
        "pecker",
        "--model",
        "tiny",
        "--erase_concept",
        "Mosaic",
        "--surrogate_concept",
        "Photo",
        "--retain_concepts",
        "Van Gogh",
    ]
    argv += ["--template", "A Cat image in {} style.", "--output", str(tmp_path / "out"), "stages=single", *SMALL]
    assert main(argv) == 0
    assert json.loads((tmp_path / "out" / "pecker.json").read_text())["kappa"] == 4.5
    samples = load_run(tmp_path / "out").samples
    assert [s.prompt for s in samples] == ["A Cat image in Mosaic style.", "A Cat image in Van Gogh style."]
    assert all(s.before_image for s in samples)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--forget_class", "9", "--override_class", "1", "stages=single"],
            "forget_dataset: the model has classes 0 to 2, no class 9",
        ),
        (["--forget_class", "1", "--override_class", "1", "stages=single"], "override: 1 is to be forgotten"),
        (["--forget_class", "0", "--override_class", "1"], "generator: stages=two starts from a one-step generator"),
        (["--forget_class", "0"], "forget_class, override_class: say which labels"),
        (["--erase_concept", "Van Gogh"], "erase_concept: this model draws classes"),
        (["--forget_class", "0", "--override_class", "1", "stages=single", "density=1e-9"], "the mask selects nothing"),
    ],
)
def test_bad_input(model, tmp_path, capsys, words, said):
    status = command.main(["--model", str(model), "--output", str(tmp_path / "out"), *words, *SMALL])
    assert status == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("fastunlearn pecker: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--forget_class", "9", "--override_class", "1"], "forget_dataset: the model has classes 0 to 2, no class 9"),
        (["--forget_class", "0", "--override_class", "7"], "override: the model has classes 0 to 2, no class 7"),
        (["--forget_class", "1", "--override_class", "1"], "override: 1 is to be forgotten"),
        (["--forget_class", "0", "--override_class", "1", "--retain_class", "0"], "retain_dataset: 0 is to be forgotten"),
        (["--forget_class", "0", "--override_class", "1", "t_min=800"], "t_min, t_init, t_max: want"),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_the_first_stage(model, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    assert command.main(["--model", str(model), "--output", str(out), *words, "--distill_steps", "2", *SMALL]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_full_folder_is_refused_before_the_first_stage(model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    argv = ["--model", str(model), "--output", str(out), "--forget_class", "0", "--override_class", "1"]
    assert command.main([*argv, "--distill_steps", "2", *SMALL]) == 2
    assert "holds something already (mine.txt)" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_unknown_setting(model, tmp_path, capsys):
    argv = [
        "--model",
        str(model),
        "--output",
        str(tmp_path / "out"),
        "--forget_class",
        "0",
        "--override_class",
        "1",
        "method=pekker",
    ]
    with pytest.raises(SystemExit) as stopped:
        command.main([*argv, *SMALL])
    assert stopped.value.code == 2
    assert "method: 'pekker' is unknown" in capsys.readouterr().err
