"""Two gloo processes, gradients sharded by rows: the weights of one process; only inner products travel."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastunlearn import ops

SHAPES = [(6, 40), (7, 5), (9,), (2, 3, 3, 3), (1, 8)]


def _lists(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(4)]


def _steps(rank: int | None, world: int, group=None) -> list[torch.Tensor]:
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        lists = _lists(dtype)
        if rank is not None:
            lists = [
                [x.chunk(world)[rank].clone() if rank < len(x.chunk(world)) else x[:0].clone() for x in row]
                for row in lists
            ]
        params, first, second, forget = lists
        a = ops.hamu_step_(params, first, forget, lr=1e-2, ratio=0.5, max_grad_norm=1.0, process_group=group)
        b = ops.hamu_step_(params, [first, second], forget, lr=1e-2, ratio=0.5, process_group=group, step=2)
        out += [*params, a.values, b.values]
    return out


def _adam_steps(rank: int | None, world: int, group=None) -> list[torch.Tensor]:
    """Parameters after three steps in the geometry of Adam."""
    from fastunlearn.optim import HamuSGD

    def mine(row):
        return row if rank is None else [x.chunk(world)[rank] if rank < len(x.chunk(world)) else x[:0] for x in row]

    params, first, second, forget = map(mine, _lists())
    params = [p.clone() for p in params]

    def gradients():
        return [x.clone() for x in forget], [[x.clone() for x in row] for row in (first, second)]

    optimizer = HamuSGD(params, gradients, lr=1e-2, share=0.5, geometry="adam", process_group=group)
    for _ in range(3):
        optimizer.step()
    return params


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda t, *a, **k: (calls.append(t.numel()), all_reduce(t, *a, **k))
    out = _steps(rank, 2, dist.group.WORLD)
    # Pairs of groups and the sizes of two ranks, for every tensor; one all-reduce a step.
    assert calls == [len(SHAPES) * (3 + 2), len(SHAPES) * (6 + 2)] * 2
    # A bad gradient on one rank is told on every rank, and nothing moves.
    p = torch.zeros(3)
    g = torch.full((3,), float("nan") if rank else 1.0)
    with pytest.raises(ValueError, match="not finite"):
        ops.hamu_step_([p], [g], [torch.ones(3)], lr=0.1, process_group=dist.group.WORLD)
    assert not p.any()
    torch.save(out, Path(folder) / f"{rank}.pt")
    calls.clear()
    torch.save(_adam_steps(rank, 2, dist.group.WORLD), Path(folder) / f"adam-{rank}.pt")
    assert calls == [9, len(SHAPES) * (6 + 2)] * 3
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    whole = _steps(None, 1)
    count = len(SHAPES)
    for i, (one, a, b) in enumerate(zip(whole, *parts)):
        if i % (count + 2) >= count:
            # Rows that are cut elsewhere are summed in another order.
            torch.testing.assert_close(a, one, rtol=1e-6, atol=1e-9)
            assert torch.equal(a, b)
        elif one.dtype == torch.bfloat16:
            # Random bits by the number of the entry in the whole tensor: the same in all but ties of rounding.
            assert (torch.cat([a, b]) != one).float().mean() < 0.01
        else:
            torch.testing.assert_close(torch.cat([a, b]), one, rtol=1e-6, atol=1e-7)
    parts = [torch.load(tmp_path / f"adam-{rank}.pt") for rank in (0, 1)]
    for one, *cut in zip(_adam_steps(None, 1), *parts):
        torch.testing.assert_close(torch.cat(cut), one, rtol=1e-5, atol=1e-7)
