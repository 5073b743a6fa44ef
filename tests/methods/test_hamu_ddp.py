"""Two gloo processes under DDP take the step of one: both reduce both gradients, and all compute the same certificate."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("transformers")

from tests.methods.test_hamu import FORGET, RETAIN, known_model, lines, options, weights
from tests.tiny_chat import CharTokenizer


def _train(folder: Path, update: str, **changes):
    from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer

    settings = options(
        folder, update=update, objective="GradDiff", warmup_epochs=0, optim="sgd", num_train_epochs=2, max_grad_norm=1.0,
        lr_scheduler_type="constant", hamu_share=0.3 if update == "hamu-q" else None, **changes,
    )  # fmt: skip
    trainer = UnlearnTrainer(known_model(), UnlearnConfig(**settings), FORGET, RETAIN, CharTokenizer())
    trainer.train()
    return trainer


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
    }  # fmt: skip
    torch.set_num_threads(1)
    for update in ("hamu-q", "pcgrad"):
        trainer = _train(Path(folder) / update, update, per_device_train_batch_size=1, gradient_accumulation_steps=2)
        assert trainer.args.world_size == 2
        assert trainer.state.global_step == 2
        torch.save(weights(trainer.accelerator.unwrap_model(trainer.model)), Path(folder) / f"{update}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.thorough
def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)
    for update in ("hamu-q", "pcgrad"):
        whole = _train(tmp_path / f"one-{update}", update, per_device_train_batch_size=4, gradient_accumulation_steps=1)
        first, second = (torch.load(tmp_path / f"{update}-{rank}.pt") for rank in (0, 1))
        for name, want in weights(whole.model).items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], want, rtol=1e-4, atol=1e-6)
    records = lines(tmp_path / "hamu-q")
    assert len(records) == 2
    assert all(r["holds"] for r in records)
    one = lines(tmp_path / "one-hamu-q")
    assert records[0]["forget_change"] == pytest.approx(one[0]["forget_change"], rel=0.05)
    assert json.dumps(records)
