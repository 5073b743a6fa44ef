"""SaliencyCollector: the scores of the naive loop, with one gradient alive at a time."""

from __future__ import annotations

import gc
import json
import warnings
import weakref

import pytest
import torch
from torch import nn

from fastunlearn import BitMask, ops, optim
from fastunlearn.localize.saliency import SaliencyCollector, matches
from fastunlearn.ops.saliency import KINDS
from tests.proof import assert_equal


def _model(width=16, layers=3, tied=True) -> nn.Module:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(width, 2 * width)
            self.down = nn.Linear(2 * width, width, bias=False)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, width)
            self.layers = nn.Sequential(*[Block() for _ in range(layers)])
            self.unused = nn.Linear(3, 3)
            self.head = nn.Linear(width, 11, bias=False)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.layers(self.embed(tokens)))

    torch.manual_seed(1)
    return Model()


def _loss(model, seed):
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def _naive(model, kind, seeds):
    """What a user writes without the collector."""
    scores = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    for seed in seeds:
        model.zero_grad()
        _loss(model, seed).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                g, w = p.grad.float(), p.detach().float()
                scores[name] += {"abs": g.abs(), "square": g * g, "signed": g, "weight_grad": (w * g).abs()}[kind]
    model.zero_grad()
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_naive_loop(kind):
    model = _model()
    want = _naive(model, kind, range(3))
    with SaliencyCollector(model, kind=kind) as collector:
        for seed in range(3):
            _loss(model, seed).backward()
            assert all(p.grad is None for p in model.parameters())
    assert set(collector.scores) == set(want)
    for name, score in collector.scores.items():
        torch.testing.assert_close(score, want[name], rtol=1e-6, atol=1e-9)
    assert collector.counts["embed.weight"] == 3
    assert collector.counts["unused.weight"] == 0
    assert collector.scores["unused.weight"].eq(0).all()
    # Outside the block everything is as before.
    _loss(model, 0).backward()
    assert model.embed.weight.grad is not None


def test_shared_parameter_counts_once():
    model = _model(tied=True)
    with SaliencyCollector(model) as collector:
        _loss(model, 0).backward()
    assert "head.weight" not in collector.scores
    assert collector.counts["embed.weight"] == 1
    named = [("a", model.embed.weight), ("b", model.head.weight)]
    assert list(SaliencyCollector(named).scores) == ["a"]


@pytest.mark.parametrize("kind", ["abs", "weight_grad"])
def test_bf16_model_has_fp32_scores(kind):
    model = _model().bfloat16()
    want = _naive(model, kind, [5])
    with SaliencyCollector(model, kind) as collector:
        _loss(model, 5).backward()
    assert {s.dtype for s in collector.scores.values()} == {torch.float32}
    for name, score in collector.scores.items():
        torch.testing.assert_close(score, want[name], rtol=1e-6, atol=0)


def test_goes_on_and_resets():
    model = _model()
    collector = SaliencyCollector(model)
    for seed in range(2):
        with collector:
            _loss(model, seed).backward()
    want = _naive(model, "abs", range(2))
    assert_equal(list(collector.scores.values()), list(want.values()))
    places = [s.data_ptr() for s in collector.scores.values()]
    collector.reset()
    assert all(s.eq(0).all() for s in collector.scores.values())
    assert not any(collector.counts.values())
    assert places == [s.data_ptr() for s in collector.scores.values()]


def test_one_gradient_lives_at_a_time():
    model = _model(layers=6, tied=False)
    most, references = [], []

    def count(parameter):
        alive = [p for p in model.parameters() if p.grad is not None]
        most.append(sum(p.grad.numel() for p in alive))
        references.append(weakref.ref(parameter.grad))
        # All gradients that came before are gone, wherever they may have been kept.
        assert sum(r() is not None for r in references) == 1

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    with SaliencyCollector(model):
        _loss(model, 0).backward()
    assert len(most) == 20
    assert max(most) == max(p.numel() for p in model.parameters())


def _peak(work, tmp_path) -> int:
    """Bytes of the CPU allocator at their highest, above what there was before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    total = highest = 0
    for event in events:
        total += event["args"]["Bytes"]
        highest = max(highest, total)
    return highest


def test_peak_memory_is_scores_and_one_gradient(tmp_path):
    """By the allocator's own count: a backward pass inside the collector needs no room for a second model."""
    layers, width = 12, 256
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    one = 4 * width * width
    x = torch.ones(2, width)

    def collect():
        with collector:
            model(x).sum().backward()

    collector = SaliencyCollector(model)
    collected = _peak(collect, tmp_path)
    plain = _peak(lambda: model(x).sum().backward(), tmp_path)
    assert plain > layers * one
    assert collected < 1.5 * one, (collected, one)


def test_selection_by_name_and_module():
    model = _model(tied=False)
    assert matches("layers.0.up.weight", "layers.*.up")
    assert matches("layers.0.up.weight", ["x", "*.weight"])
    assert not matches("layers.0.upper.weight", "layers.*.up")
    with SaliencyCollector(model, include="layers.*", exclude=["*.bias", "layers.1"]) as collector:
        _loss(model, 0).backward()
        assert all(p.grad is None for p in model.parameters())
    assert list(collector.scores) == [f"layers.{i}.{n}.weight" for i in (0, 2) for n in ("up", "down")]
    # Of parameters given by name, the others are the caller's.
    with SaliencyCollector({"up": model.layers[0].up.weight}) as collector:
        _loss(model, 0).backward()
        assert model.embed.weight.grad is not None
    assert collector.counts == {"up": 1}


def test_frozen_parameters_have_no_scores():
    model = _model(tied=False)
    model.embed.requires_grad_(False)
    with SaliencyCollector(model) as collector:
        _loss(model, 0).backward()
    assert "embed.weight" not in collector.scores


@pytest.mark.parametrize("kind", KINDS)
def test_scores_on_another_device(kind, monkeypatch):
    """Without a second device: the path that copies, told that there is one."""
    model = _model()
    want = _naive(model, kind, range(2))
    collector = SaliencyCollector(model, kind, scores_device="cpu")
    monkeypatch.setattr(collector, "_beside", lambda score, grad: False)
    with collector:
        for seed in range(2):
            _loss(model, seed).backward()
    for name, score in collector.scores.items():
        torch.testing.assert_close(score, want[name], rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [None, "cpu"])
def test_gpu(kind, where):
    model = _model().cuda()
    tokens = torch.randint(11, (4, 6), device="cuda")

    def backward():
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    backward()
    want = {}
    for name, p in model.named_parameters():
        g = torch.zeros_like(p) if p.grad is None else p.grad
        want[name] = {"abs": g.abs(), "square": g * g, "signed": g, "weight_grad": (p.detach() * g).abs()}[kind]
    model.zero_grad()
    with SaliencyCollector(model, kind, scores_device=where) as collector:
        backward()
    for name, score in collector.scores.items():
        assert score.device.type == (where or "cuda")
        torch.testing.assert_close(score.cpu(), want[name].cpu(), rtol=1e-5, atol=1e-7)


def test_an_optimiser_inside_is_told():
    model = _model()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.embed.weight.detach().clone()
    with SaliencyCollector(model):
        _loss(model, 0).backward()
        with pytest.warns(RuntimeWarning, match=r"SGD.step\(\) inside a SaliencyCollector moves nothing"):
            optimiser.step()
        assert torch.equal(model.embed.weight, before)
    optimiser.zero_grad()
    _loss(model, 0).backward()
    optimiser.step()
    assert not torch.equal(model.embed.weight, before)


def test_another_models_optimiser_is_not():
    model, other = _model(), nn.Linear(2, 2)
    optimiser = torch.optim.SGD(other.parameters(), lr=1.0)
    with SaliencyCollector(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        other(torch.ones(1, 2)).sum().backward()
        optimiser.step()


def test_masks():
    model = _model()
    with SaliencyCollector(model, include="*.weight") as collector:
        _loss(model, 0).backward()
    masks = collector.masks(density=0.1)
    assert list(masks) == list(collector.scores)
    assert all(isinstance(m, BitMask) for m in masks.values())
    total = sum(s.numel() for s in collector.scores.values())
    assert sum(int(m.count()) for m in masks.values()) == total // 10
    want = ops.topk_mask(list(collector.scores.values()), 0.1)
    assert all(a.equal(b) for a, b in zip(masks.values(), want))
    several = collector.masks(density=[0.1, 0.5], scope="tensor")
    assert [int(m["embed.weight"].count()) for m in several] == [17, 88]
    assert sum(int(m.count()) for m in collector.masks(k=7).values()) == 7


def test_signed_sums_before_the_modulus():
    """Two batches that cancel leave nothing to SalUn, and everything to SPARE."""
    weight = nn.Parameter(torch.zeros(2))
    masks = {}
    for kind in ("signed", "abs"):
        with SaliencyCollector({"w": weight}, kind=kind) as collector:
            for sign in (1.0, -1.0):
                (weight * torch.tensor([5.0 * sign, -1.0])).sum().backward()
        masks[kind] = collector.masks(k=1)["w"].unpack().tolist()
    assert collector.scores["w"].tolist() == [10.0, 2.0]
    assert masks == {"signed": [False, True], "abs": [True, False]}


def test_sparse_gradients():
    embed = nn.Embedding(7, 3, sparse=True)
    with SaliencyCollector(embed) as collector:
        embed(torch.tensor([2, 2, 5])).sum().backward()
    assert collector.scores["weight"].sum(1).tolist() == [0, 0, 6, 0, 0, 3, 0]


def test_two_collectors_at_once_are_refused():
    model = _model()
    with SaliencyCollector(model), SaliencyCollector(model), pytest.raises(RuntimeError, match="freed before"):
        _loss(model, 0).backward()


def test_error_inside_leaves_no_hooks():
    model = _model()
    with pytest.raises(KeyError), SaliencyCollector(model):
        raise KeyError
    _loss(model, 0).backward()
    assert model.embed.weight.grad is not None


def test_bad_input():
    model = _model()
    with pytest.raises(ValueError, match="kind: want one of"):
        SaliencyCollector(model, kind="max")
    with pytest.raises(ValueError, match="include: 'layer' fits no parameter"):
        SaliencyCollector(model, include="layer")
    with pytest.raises(ValueError, match="exclude: 'x' fits no"):
        SaliencyCollector(model, exclude=["*.bias", "x"])
    with pytest.raises(ValueError, match="no parameter left"):
        SaliencyCollector(_model().requires_grad_(False))
    with pytest.raises(TypeError, match="want a module or named parameters, got Tensor"):
        SaliencyCollector(torch.zeros(3))
    with pytest.raises(TypeError, match=r"want \(name, parameter\) pairs"):
        SaliencyCollector(list(model.parameters()))
    with pytest.raises(ValueError, match="no backward pass has been counted"):
        SaliencyCollector(model).masks(0.5)
    _loss(model, 0).backward()
    with pytest.raises(ValueError, match=r"holds a gradient from before.*zero_grad"):
        SaliencyCollector(model).__enter__()
    model.zero_grad()
    collector = SaliencyCollector(model)
    with collector, pytest.raises(RuntimeError, match="already collecting"):
        collector.__enter__()


def test_masks_go_to_an_optimiser_where_some_parameters_are_frozen():
    """The way of the docstring: masks cover what is trained, and the optimiser gets just that."""
    model = _model()
    model.layers[0].requires_grad_(False)
    with SaliencyCollector(model) as collector:
        _loss(model, 0).backward()
    masks = collector.masks(density=0.1)
    assert set(masks) == {n for n, p in model.named_parameters() if p.requires_grad}
    trained = [(n, p) for n, p in model.named_parameters() if n in masks]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = optim.MaskedAdamW(trained, masks, lr=0.1)
    _loss(model, 0).backward()
    optimiser.step()
    for name, p in model.named_parameters():
        moved = p.detach() != before[name]
        assert not (moved & ~masks[name].unpack()).any() if name in masks else not moved.any()
    assert (model.embed.weight != before["embed.weight"]).any()
