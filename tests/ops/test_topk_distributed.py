"""topk_mask over a process group: the masks of the ranks together are those of one process, bit for bit."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastunlearn
from fastunlearn import _native, ops
from fastunlearn.ops import _topk_distributed
from tests.ops.test_topk import CASES
from tests.proof import assert_equal

PICKED = (
    "one",
    "list",
    "densities",
    "empty_tensors",
    "ragged",
    "large_abs",
    "bfloat16",
    "constant",
    "two_values",
    "scales",
    "all_nan",
    "many_nan",
    "inf_and_nan",
    "signed_zeros",
    "subnormals",
    "k_everything",
    "tensor",
    "tensor_k",
    "row",
)


def cuts(rows: int, world: int, seed: int) -> list[int]:
    """Where the runs of the ranks begin and end: uneven, some of them empty."""
    inner = torch.randint(0, rows + 1, (world - 1,), generator=torch.Generator().manual_seed(seed))
    return [0, *inner.sort().values.tolist(), rows]


def shard(t: torch.Tensor, rank: int, world: int, seed: int) -> torch.Tensor:
    if t.dim() == 0:
        return t if rank == 0 else t.new_empty(0)
    edges = cuts(t.shape[0], world, seed)
    return t[edges[rank] : edges[rank + 1]]


class Counted:
    """Counts the bytes that go into and come out of collectives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes = 0
        for name in ("all_reduce", "all_gather_into_tensor"):
            monkeypatch.setattr(dist, name, self.wrap(getattr(dist, name)))

    def wrap(self, call):
        def counted(*tensors, **named):
            self.bytes += sum(t.numel() * t.element_size() for t in tensors) * (2 if len(tensors) == 1 else 1)
            return call(*tensors, **named)

        return counted


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    assert dist.get_world_size() == world
    group = dist.group.WORLD
    monkeypatch = pytest.MonkeyPatch()
    counted = Counted(monkeypatch)
    warnings.simplefilter("ignore")
    for seed, name in enumerate(PICKED):
        scores, arguments = CASES[name]
        scope = arguments.get("scope", "global")
        if scope == "row":
            scores = [t for t in scores if t.dim() > 1]
        several = isinstance(arguments.get("density"), list)
        for backend in ("native", "reference"):
            with fastunlearn.backend(backend):
                want = ops.topk_mask(scores, **arguments)
                mine = [shard(t, rank, world, seed + i) for i, t in enumerate(scores)]
                counted.bytes = 0
                got = ops.topk_mask(mine, **arguments, process_group=group)
            densities = len(want) if several else 1
            if scope == "row":
                assert counted.bytes == 0
            else:
                assert counted.bytes <= _topk_distributed.traffic(len(scores), densities, world, scope), name
            for g, w in zip(got if several else [got], want if several else [want]):
                for i, (a, b, t) in enumerate(zip(g, w, scores)):
                    assert torch.equal(a.unpack(), shard(b.unpack(), rank, world, seed + i)), (name, backend, rank, i)
                    assert a.shape == shard(t, rank, world, seed + i).shape
    # float64 on one rank only, and lists that do not match.
    t = torch.randn(40, 9, dtype=torch.float64)
    dist.broadcast(t, 0)
    mine = shard(t, rank, world, 5)
    got = ops.topk_mask([mine if rank == 0 else mine.double()], 0.3, process_group=group)[0]
    assert torch.equal(got.unpack(), shard(ops.topk_mask([t], 0.3)[0].unpack(), rank, world, 5))
    for bad, match in (([mine] * (1 + rank), "different lengths"), ([mine], "k=361 for 360")):
        with pytest.raises(ValueError, match=match):
            ops.topk_mask(bad, k=361, process_group=group)
    monkeypatch.undo()
    Path(folder, f"done{rank}").write_text(str(dist.get_world_size()))
    dist.destroy_process_group()


def pieces(name: str, key: str, device: str, simt_module: ModuleType | None = None) -> None:
    scores, _ = CASES[name]
    with fastunlearn.backend("reference"):
        plain = _topk_distributed._Shard(scores, key == "abs")
    with fastunlearn.backend("native"):
        native = _topk_distributed._Shard([t.to(device) for t in scores], key == "abs")
    assert (plain.native, native.native) == (False, True)
    bodies = [] if simt_module is None else [simt_module]
    for shift, bins, low in (
        (21, 2048, 0),
        (24, 256, 0),
        (10, 2048, 0xBF800000),
        (0, 1024, 0x80000000),
        (16, 256, 1 << 30),
    ):
        lo = [low] * len(scores)
        want = plain.histogram(lo, shift, bins)
        assert torch.equal(native.histogram(lo, shift, bins), want)
        for module in bodies:
            with _native.host_cuda(module):
                assert torch.equal(native.histogram(lo, shift, bins), want)
    for threshold, take in ((0x3F800001, 700), (0x80000000, 3), (0x40000001, 0), (0xFFFFFFFF, 0), (0xBF800000, 10**9)):
        parts = [threshold] * len(scores), [take] * len(scores)
        want = plain.write(*parts)
        assert_equal(native.write(*parts), want)
        for module in bodies:
            with _native.host_cuda(module):
                assert_equal(native.write(*parts), want)


@pytest.mark.parametrize("name", ["list", "ragged", "bfloat16", "two_values", "inf_and_nan", "empty_tensors"])
@pytest.mark.parametrize("key", ["value", "abs"])
def test_pieces_of_a_shard(name: str, key: str, simt_module: ModuleType):
    """Histograms and bits of one rank: C++ and the CUDA bodies against plain PyTorch."""
    pieces(name, key, "cpu", simt_module)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PICKED)
@pytest.mark.parametrize("key", ["value", "abs"])
def test_pieces_of_a_shard_on_a_gpu(name: str, key: str):
    pieces(name, key, "cuda")


@pytest.mark.serial
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.thorough), 4])
def test_shards_equal_one_process(world: int, tmp_path: Path):
    assert not dist.is_initialized()
    mp.spawn(work, (world, os.fspath(tmp_path)), nprocs=world)
    assert [(tmp_path / f"done{r}").read_text() for r in range(world)] == [str(world)] * world


def test_traffic_does_not_grow_with_the_scores():
    """The bound the ranks are held to, in bytes: SmolLM2-135M, one density, 8 ranks."""
    assert _topk_distributed.traffic(211, 1, 8) < 128 * 1024
    assert _topk_distributed.traffic(211, 1, 8, "tensor") < 4 * 1024 * 1024
