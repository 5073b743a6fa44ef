"""FSDP2 on gloo: several processes take the steps of one; checkpoints of any number of them; what one meets all are told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.distributed.runs import ended, launch, separately, weights

pytestmark = pytest.mark.serial

RUNS: dict[str, dict[str, Any]] = {
    "masked": {},
    "compressed": {"options": {"compressed": True}},
    "hamu": {"method": "hamu", "options": {"hamu_share": 0.3, "compressed": True}},
    "masked hamu": {"method": "hamu", "options": {"hamu_share": 0.3}},
    "pcgrad": {"options": {"update": "pcgrad"}},
    "gru": {"options": {"update": "gru", "compressed": True}},
    "dense": {"method": "unlearn", "pruned": False},
    "npo, blocks again": {"options": {"objective": "NPO", "compressed": True, "gradient_checkpointing": True}},
    "saliency": {"options": {"localize": "saliency", "saliency_density": 0.2}},
}
#: the same step in micro-batches of one row
ACCUMULATED = ("compressed", "masked hamu", "pcgrad")
#: by four processes too
BY_FOUR = ("masked", "compressed", "masked hamu", "gru")


def with_options(run: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**run, "options": {**run.get("options", {}), **options}}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    for processes in (1, 2, 4):
        runs = {name: RUNS[name] for name in BY_FOUR} if processes == 4 else dict(RUNS)
        if processes == 2:
            for name in ACCUMULATED:
                options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
                runs[f"{name}, accumulated"] = with_options(RUNS[name], **options)
        bf16 = {"method": "sau", "dtype": "bfloat16", "options": {"compressed": True}}
        runs["bfloat16"] = bf16
        if processes == 1:
            runs["bfloat16 masked"] = {**bf16, "options": {}}
            runs["exact"] = {"dtype": "float32", "start": "bfloat16"}
        ended(launch(runs, folder / str(processes), processes, 400))
    return folder


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize(("name", "processes"), [*((name, 2) for name in RUNS), *((name, 4) for name in BY_FOUR)])
def test_ten_steps_are_those_of_one_process(outcomes, name, processes):
    one, several = weights(outcomes / "1" / name), weights(outcomes / str(processes) / name)
    for key, tensor in one.items():
        torch.testing.assert_close(several[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}, {key}")
    assert any(not torch.equal(one[key], tensor) for key, tensor in weights(outcomes / "1" / "dense").items())


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulation_does_not_mix_the_two_gradients(outcomes, name):
    one, several = weights(outcomes / "1" / name), weights(outcomes / "2" / f"{name}, accumulated")
    for key, tensor in one.items():
        torch.testing.assert_close(several[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}, {key}")


@pytest.mark.parametrize("processes", [2, 4])
def test_bfloat16_is_as_far_from_fp32_as_one_process_is(outcomes, processes):
    def error(folder: Path) -> float:
        exact, got = weights(outcomes / "1" / "exact"), weights(folder)
        return sum(float((got[key].double() - exact[key].double()).square().sum()) for key in exact) ** 0.5

    assert error(outcomes / str(processes) / "bfloat16") <= 2 * error(outcomes / "1" / "bfloat16 masked")


def test_a_checkpoint_goes_from_two_to_four_to_one(tmp_path):
    """Three steps each; together the run of one process that was not interrupted."""
    runs = {"adam": {"options": {"compressed": True}}, "gru": {"options": {"update": "gru"}},
            "hamu": {"method": "hamu", "options": {"hamu_share": 0.3}}}  # fmt: skip
    common = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
    ended(launch({n: with_options(r, **common, max_steps=9) for n, r in runs.items()}, tmp_path / "whole", 1))
    for i, processes in enumerate((2, 4, 1)):
        parts = {
            n: {**with_options(r, **common, max_steps=3 * (i + 1)), "resume": i > 0, "save": i == 1}
            for n, r in runs.items()
        }
        ended(launch(parts, tmp_path / "parts", processes))
        assert (tmp_path / "parts" / "adam" / "out" / f"checkpoint-{3 * (i + 1)}" / "sharded").is_dir() == (
            processes > 1
        )
    for name in runs:
        whole, parts_ = weights(tmp_path / "whole" / name), weights(tmp_path / "parts" / name)
        for key, tensor in whole.items():
            torch.testing.assert_close(parts_[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}, {key}")
    # What four processes saved at their end is an ordinary model.
    import transformers

    from fastunlearn.checkpoint import load_checkpoint

    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "adam" / "out")
    assert saved.lm_head.weight is saved.get_input_embeddings().weight
    assert load_checkpoint(tmp_path / "parts" / "adam" / "out", masks="require").pruning == {"pattern": "2:4"}


def test_a_killed_run_goes_on_exactly(tmp_path):
    """SIGKILL of every process in step 4 and, gone on, in step 5, a checkpoint after every second step."""
    run = {"options": {"compressed": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}}
    ended(launch({"run": run}, tmp_path / "whole", 2))
    for step in (4, 5):
        again = {**run, "resume": step > 4}
        assert launch({"run": {**again, "kill_at": step}}, tmp_path / "cut", 2).returncode != 0
    ended(launch({"run": {**run, "resume": True}}, tmp_path / "cut", 2))
    whole, cut = weights(tmp_path / "whole" / "run"), weights(tmp_path / "cut" / "run")
    assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items())


def test_what_one_process_meets_all_are_told(tmp_path):
    compressed = {"options": {"compressed": True}, "fails": True}
    runs = {
        "density": {"spoil": "density", "fails": True},
        "zeros": {"spoil": "zeros", "fails": True},
        "nan": {**compressed, "nan_at": 2, "nan_rank": 1},
        "no checkpoint": {"resume": str(tmp_path / "nothing"), "fails": True},
        "offered": {"options": {"redistribution": "retain", "dense_model": "x"}, "fails": True},
    }
    ended(launch(runs, tmp_path, 2))

    def said(name: str, rank: int) -> str:
        return (tmp_path / name / f"error-{rank}.txt").read_text()

    for rank in (0, 1):
        assert "redistribution: retain runs the blocks one by one" in said("offered", rank)
        assert "masks: they differ between processes; the first that does is model.layers.0" in said("density", rank)
        assert "of density 0.5000, 0.2" in said("density", rank)
        assert "not zero outside the mask" in said("zeros", rank)
        assert "is no complete checkpoint" in said("no checkpoint", rank)
        assert "DivergenceError" in said("nan", rank)
    assert said("zeros", 0).startswith("ValueError: process 1 of 2:")
    assert "in the batch of forget rows" in said("nan", 1)
    assert "of another process" in said("nan", 0)


def test_when_a_process_dies_the_others_stop_with_a_message(tmp_path):
    processes = separately({"run": {"kill_at": 3, "kill_rank": 1, "kill_alone": True}}, tmp_path, 2)
    try:
        assert processes[1].wait(200) == -9
        start = time.monotonic()
        _, said = processes[0].communicate(timeout=60)
        assert time.monotonic() - start < 60
        assert processes[0].returncode not in (0, -9)
        assert "process" in said or "peer" in said, said[-2000:]
        assert "fastunlearn:" in said, said[-2000:]
    finally:
        for process in processes:
            process.kill()
