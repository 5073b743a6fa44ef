"""SaliencyCollector on replicas (DistributedDataParallel, gloo): the ranks add up to one process; misuse is refused."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastunlearn.localize.saliency import SaliencyCollector
from fastunlearn.ops.saliency import KINDS

WORLD = 2


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))


def _batches() -> list[torch.Tensor]:
    return [torch.randn(6, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        ddp = DistributedDataParallel(_model())
        with pytest.raises(TypeError, match=r"collect on model.module inside `with model.no_sync\(\):`"):
            SaliencyCollector(ddp)
        # The wrapper has run before, as it has in a trainer.
        ddp(_batches()[rank]).square().mean().backward()
        ddp.zero_grad()
        for kind in KINDS:
            for through in (ddp, ddp.module):
                with ddp.no_sync(), SaliencyCollector(ddp.module, kind=kind) as collector:
                    for batch in _batches()[rank::WORLD]:
                        through(batch).square().mean().backward()
                        assert all(p.grad is None for p in ddp.parameters())
                collector.all_reduce()
                out = (collector.scores, collector.counts, {n: m.bits for n, m in collector.masks(density=0.3).items()})
                torch.save(out, Path(folder) / f"{kind}.{through is ddp}.{rank}.pt")
        with pytest.raises(RuntimeError, match="of all ranks already"):
            collector.all_reduce()
        with pytest.raises(RuntimeError, match="reset"):
            collector.__enter__()
        with pytest.raises(ValueError, match="process_group: after all_reduce"):
            collector.masks(density=0.3, process_group=dist.group.WORLD)
        collector.reset()
        with collector, pytest.raises(RuntimeError, match="after the block"):
            collector.all_reduce()
        # The wrapper at work writes gradients again: refused when the block ends, and by the next pass.
        with pytest.raises(RuntimeError, match="back after it was counted"), SaliencyCollector(ddp.module):
            ddp(_batches()[rank]).square().mean().backward()
        ddp.zero_grad()
        with SaliencyCollector(ddp.module):
            ddp(_batches()[rank]).square().mean().backward()
            with pytest.raises(RuntimeError, match="back after it was counted"):
                ddp.module(_batches()[rank]).square().mean().backward()
            ddp.zero_grad()
        # Nobody leaves while the other still talks; and what holds the group goes before it, not with the interpreter.
        dist.barrier()
        del ddp, through, collector
        gc.collect()
    finally:
        dist.destroy_process_group()


@pytest.mark.serial
def test_replicas_add_up_to_one_process(tmp_path):
    mp.spawn(work, (os.fspath(tmp_path),), nprocs=WORLD)
    for kind in KINDS:
        model = _model()
        with SaliencyCollector(model, kind=kind) as collector:
            for batch in _batches():
                model(batch).square().mean().backward()
        for through in (True, False):
            parts = [torch.load(tmp_path / f"{kind}.{through}.{rank}.pt") for rank in range(WORLD)]
            for scores, counts, bits in parts:
                assert counts == collector.counts
                for name, score in collector.scores.items():
                    torch.testing.assert_close(scores[name], score, rtol=1e-5, atol=1e-7)
                    assert torch.equal(scores[name], parts[0][0][name])
                    assert torch.equal(bits[name], parts[0][2][name])


def test_without_a_process_group():
    model = _model()
    with SaliencyCollector(model) as collector:
        model(_batches()[0]).sum().backward()
    with pytest.raises(RuntimeError, match="init_process_group first"):
        collector.all_reduce()
