"""`fastunlearn sau` and `unlearn` in two processes that shard: one model, one report, and refusals in both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
from fastunlearn.localize import prune
from fastunlearn.sharded import _torch_release
from tests.distributed.runs import rows
from tests.tiny_chat import char_tokenizer, tiny_llama

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(_torch_release() < (2, 12), reason="most runs shard compressed weights, which wants torch 2.12"),
]


@pytest.fixture
def world(tmp_path) -> Path:
    model = tiny_llama()
    masks = prune(model, method="magnitude", pattern="2:4", progress=False)
    save_checkpoint(tmp_path / "sparse", model, char_tokenizer(), masks=masks, pruning={"pattern": "2:4"})
    for name, first in (("forget", 0), ("retain", 100)):
        lines = [json.dumps(row) + "\n" for row in rows(4, first)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    return tmp_path


def line(world: Path, command: str, output: Path, processes: int, *more: str) -> list[str]:
    return [
        command, "--model", str(world / "sparse"), "--forget", str(world / "forget.jsonl"), "--retain", str(world / "retain.jsonl"),
        "--output", str(output), f"per_device_train_batch_size={2 // processes}", "gradient_accumulation_steps=1", "max_steps=2",
        "learning_rate=1e-3", "warmup_epochs=0", "eval_rows=1", "save_strategy=no", "use_cpu=true", "report_to=none", "disable_tqdm=true",
        f"reference_cache_dir={world / 'cache'}", *more,
    ]  # fmt: skip


def test_two_processes_do_what_one_does(world, processes):
    for count in (1, 2):
        folder = world / str(count)
        lines = [
            line(world, "sau", folder / "sau", count, "--compressed"),
            line(world, "unlearn", folder / "unlearn", count, "objective=SimNPO"),
            line(world, "sau", world / "full", count),
        ]
        processes.ask("commands", [lines, str(folder)], folder, count)
        for rank in range(count):
            said = (folder / f"said-{rank}.txt").read_text()
            assert json.loads((folder / f"codes-{rank}.json").read_text()) == [0, 0, 2], said
            # What the first process finds all are told; its tables come once.
            assert "holds something already (thesis.tex)" in said
            assert ("sparsity pattern 2:4: holds" in said) == (rank == 0)
    for name in ("sau", "unlearn"):
        one, two = (load_checkpoint(world / count / name, masks="require") for count in ("1", "2"))
        start = load_checkpoint(world / "sparse").model.state_dict()
        for key, tensor in one.model.state_dict().items():
            torch.testing.assert_close(two.model.state_dict()[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}, {key}")
        assert any(not torch.equal(tensor, start[key]) for key, tensor in one.model.state_dict().items())
        assert two.pruning == {"pattern": "2:4"}
        said = [json.loads((world / count / name / "metrics.json").read_text()) for count in ("1", "2")]
        assert said[1]["steps"] == 2
        for when in ("before", "after"):
            for part in ("forget", "retain"):
                a, b = (numbers[when][part]["answer_probability"] for numbers in said)
                assert b == pytest.approx(a, rel=1e-2)
