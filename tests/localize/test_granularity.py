"""Units of masks: tiles, rows, whole tensors, by summed saliency."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from fastunlearn.localize import SaliencyCollector, structured_masks, unit_mask, unit_scores


def _scores():
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear": (150, 200), "conv": (70, 9, 3, 3), "bias": (150,), "scalar": ()}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def test_sums_of_tiles_are_those_of_slices():
    scores = _scores()
    for name, score in scores.items():
        matrix = score.reshape(1 if score.dim() < 2 else score.shape[0], -1)
        tiles = unit_scores(score, "tile", 64)
        for r in range(tiles.shape[0]):
            for c in range(tiles.shape[1]):
                want = matrix[r * 64 : (r + 1) * 64, c * 64 : (c + 1) * 64].sum()
                torch.testing.assert_close(tiles[r, c], want, msg=f"{name} {r} {c}")
        torch.testing.assert_close(unit_scores(score, "row"), matrix.sum(1))
        torch.testing.assert_close(unit_scores(score, "module"), matrix.sum().view(1))
        assert torch.equal(unit_scores(score, "weight"), score)


@pytest.mark.hypothesis
@hypothesis.given(
    st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 7, 32, 64]), st.floats(0, 1), st.integers(0, 99)
)
def test_whole_units_and_the_highest(rows, cols, block, density, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {"a": torch.rand(rows, cols, generator=generator), "b": torch.rand(cols, generator=generator)}
    masks = structured_masks(scores, density, granularity="tile", block=block)
    sums, chosen = [], []
    for name, score in scores.items():
        own = unit_scores(score, "tile", block)
        mask = masks[name].unpack()
        assert mask.shape == score.shape
        share = unit_scores(mask.float(), "tile", block) / unit_scores(torch.ones_like(score), "tile", block)
        assert bool(((share == 0) | (share == 1)).all())
        assert torch.equal(unit_mask(share == 1, score.shape, "tile", block).unpack(), mask)
        sums.append(own.flatten())
        chosen.append((share == 1).flatten())
    sums, chosen = torch.cat(sums), torch.cat(chosen)
    assert int(chosen.sum()) == int(density * len(sums))
    if 0 < int(chosen.sum()) < len(sums):
        assert sums[chosen].min() >= sums[~chosen].max()


def test_rows_and_modules():
    scores = _scores()
    rows = structured_masks(scores, k=10, granularity="row")
    picked = torch.cat([mask.unpack().reshape(len(mask.bits), -1).any(1) for mask in rows.values()])
    assert int(picked.sum()) == 10
    modules = structured_masks(scores, k=1, granularity="module")
    assert {name: float(mask.density) for name, mask in modules.items()} == {
        "linear": 1,
        "conv": 0,
        "bias": 0,
        "scalar": 0,
    }
    several = structured_masks(scores, [0.1, 0.5], granularity="row")
    assert [sum(int(m.count()) for m in masks.values()) > 0 for masks in several] == [True, True]
    per_tensor = structured_masks({"linear": scores["linear"]}, 0.5, granularity="row", scope="tensor")
    assert int(per_tensor["linear"].unpack().any(1).sum()) == 75


def test_signed_sums_count_by_their_size():
    scores = {"a": torch.tensor([[1.0, -1.0], [0.5, 0.6]])}
    assert structured_masks(scores, k=1, granularity="row", key="abs")["a"].unpack().tolist() == [
        [True] * 2,
        [False] * 2,
    ]
    assert structured_masks(scores, k=1, granularity="row")["a"].unpack().tolist() == [[False] * 2, [True] * 2]


@pytest.mark.parametrize("kind", ["abs", "signed"])
def test_a_collector_chooses_units(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 130), nn.ReLU(), nn.Linear(130, 70))
    with SaliencyCollector(model, kind=kind) as collector:
        for _ in range(3):
            model(torch.randn(8, 100)).square().mean().backward()
    key = "abs" if kind == "signed" else "value"
    for granularity in ("tile", "row", "module"):
        got = collector.masks(0.5, granularity=granularity, block=64)
        want = structured_masks(collector.scores, 0.5, granularity=granularity, block=64, key=key)
        assert all(got[name].equal(want[name]) for name in want)
    two = collector.masks([0.2, 0.5], granularity="tile", block=64)
    assert len(two) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "column"}, "granularity: want one of weight, tile, row, module, got 'column'"),
        ({"block": 0}, "block: want a whole number of at least 1, got 0"),
        ({"granularity": "row", "scope": "row"}, "scope: 'row' chooses within rows"),
        ({"granularity": "module", "scope": "tensor"}, "scope: 'tensor' chooses within tensors"),
        ({"density": 2.0}, "density"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        structured_masks(_scores(), **{"density": 0.5, **options})


def test_no_units_across_shards():
    model = nn.Linear(10, 10)
    with SaliencyCollector(model) as collector:
        model(torch.randn(8, 10)).sum().backward()
    with pytest.raises(ValueError, match="process_group: with shards granularity='tile'"):
        collector.masks(0.5, granularity="tile", process_group=object())
