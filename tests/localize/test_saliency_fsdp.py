"""SaliencyCollector on sharded parameters (FSDP2, gloo): shards of the scores and masks of one process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastunlearn.localize.saliency import SaliencyCollector

WORLD = 2


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5, bias=False))


def _batches() -> list[torch.Tensor]:
    return [torch.randn(6, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def work(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        assert dist.get_world_size() == WORLD
        mesh = dist.init_device_mesh("cpu", (WORLD,))
        for kind in ("abs", "signed", "weight_grad"):
            model = _model()
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            with SaliencyCollector(model, kind=kind) as collector:
                for batch in _batches():
                    # Every rank sees half of the batch; FSDP averages the gradients.
                    model(batch[rank::WORLD]).square().mean().backward()
                    assert all(p.grad is None for p in model.parameters())
            masks = collector.masks(density=0.3, process_group=dist.group.WORLD)
            out = {n: (s, masks[n].unpack()) for n, s in collector.scores.items()}
            torch.save(out, Path(folder) / f"{kind}.{rank}.pt")
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # At the end of a process gloo's threads now and then abort it ("terminate called without an active exception").
    os._exit(0)


@pytest.mark.serial
def test_shards_of_the_scores_of_one_process(tmp_path):
    mp.spawn(work, (os.fspath(tmp_path),), nprocs=WORLD)
    for kind in ("abs", "signed", "weight_grad"):
        model = _model()
        with SaliencyCollector(model, kind=kind) as collector:
            for batch in _batches():
                model(batch).square().mean().backward()
        masks = collector.masks(density=0.3)
        parts = [torch.load(tmp_path / f"{kind}.{rank}.pt") for rank in range(WORLD)]
        for name, score in collector.scores.items():
            torch.testing.assert_close(torch.cat([p[name][0] for p in parts]), score, rtol=1e-4, atol=1e-6)
            assert torch.equal(torch.cat([p[name][1] for p in parts]), masks[name].unpack()), name
