"""SparseGPT's sweep against the paper's formulas with an inverse for every column; compensation against least squares."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastunlearn import BitMask
from fastunlearn.localize import input_hessians, input_norms, obs_compensate, parse_pattern, sparsegpt_sweep
from fastunlearn.localize.patterns import select
from fastunlearn.localize.wanda import wanda_scores


def inputs(tokens: int, cols: int, seed: int = 0) -> Tensor:
    """Correlated float64 inputs [tokens, cols]: variances along random directions fall from 1 to 1e-3, as activations' do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.logspace(0, -1.5, cols, dtype=torch.float64)[:, None] * torch.randn(
        cols, cols, generator=generator, dtype=torch.float64
    )
    scale = torch.rand(cols, generator=generator, dtype=torch.float64) + 0.1
    return (torch.randn(tokens, cols, generator=generator, dtype=torch.float64) @ mix + 0.3) * scale


def hessian_of(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def naive(weight: np.ndarray, hessian: np.ndarray, damping: float, chosen) -> tuple[np.ndarray, np.ndarray]:
    """Frantar and Alistarh's algorithm 1 with the inverse Hessian of the columns left at every step.

    chosen(weight now, price of every column, j): None, or (past, bool [out, past - j]): what to keep of columns j to past.
    """
    h = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    w = weight.copy()
    cols = w.shape[1]
    price = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(cols)])
    keep = np.ones(w.shape, bool)
    for j in range(cols):
        choice = chosen(w, price, j)
        if choice is not None:
            keep[:, j : choice[0]] = choice[1]
        inverse = np.linalg.inv(h[j:, j:])
        error = np.where(keep[:, j], 0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0][None]
        w[~keep[:, j], j] = 0
    return w, keep


def best(scores: np.ndarray, k: int) -> np.ndarray:
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
    return keep


@pytest.mark.parametrize("block_size", [1, 6, 8, 128])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (3, 4)])
def test_nm_is_the_paper(n, m, block_size):
    weight, hessian = torch.randn(7, 24, dtype=torch.float64), hessian_of(inputs(60, 24))

    def chosen(w, price, j):
        return (j + m, best(w[:, j : j + m] ** 2 / price[j : j + m], n)) if j % m == 0 else None

    expected, keep = naive(weight.numpy(), hessian.numpy(), 0.01, chosen)
    got, mask = sparsegpt_sweep(weight, hessian, (n, m), block_size=block_size)
    assert np.array_equal(mask.unpack().numpy(), keep)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-10)
    low, mask = sparsegpt_sweep(weight.float(), hessian.float(), (n, m), block_size=block_size)
    assert low.dtype == torch.float32
    assert np.array_equal(mask.unpack().numpy(), keep)
    np.testing.assert_allclose(low.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("block_size", [5, 8, 30, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_unstructured_is_the_paper_with_rows(sparsity, block_size):
    cols = 30
    weight, hessian = torch.randn(7, cols, dtype=torch.float64), hessian_of(inputs(60, cols))
    density = parse_pattern(sparsity).density

    def count(end):
        return int(np.floor(density * end + 1e-9))

    def chosen(w, price, j):
        if j % block_size:
            return None
        past = min(j + block_size, cols)
        return past, best(w[:, j:past] ** 2 / price[j:past], count(past) - count(j))

    expected, keep = naive(weight.numpy(), hessian.numpy(), 0.05, chosen)
    got, mask = sparsegpt_sweep(weight, hessian, sparsity, damping=0.05, block_size=block_size)
    assert np.array_equal(mask.unpack().numpy(), keep)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-10)
    assert mask.unpack().sum(1).tolist() == [count(cols)] * 7


def test_two_columns_by_hand():
    """H = [[2, 1], [1, 2]]: H^-1 = [[2, -1], [-1, 2]] / 3, prices 2/3 and 1/2; both columns cost the same."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    weight = torch.tensor([[2.0, 5.0], [5.0, 2.0], [2.0, 1.0]])
    got, mask = sparsegpt_sweep(weight, hessian, "1:2", damping=0.0)
    # scores w0^2 * 3/2 and w1^2 * 2: (6, 50), (37.5, 8), (6, 2). Removing w0 adds w0 / 2 to w1; w1 has nobody to its right.
    assert mask.unpack().tolist() == [[False, True], [True, False], [True, False]]
    assert torch.allclose(got, torch.tensor([[0.0, 6.0], [5.0, 0.0], [2.0, 0.0]]))


def output_error(change: Tensor, x: Tensor) -> float:
    return float((change.double() @ x.T).square().sum())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_outputs_suffer_less_than_from_wanda_and_magnitude(pattern):
    x, weight = inputs(400, 64), torch.randn(48, 64)
    read = parse_pattern(pattern)
    got, mask = sparsegpt_sweep(weight, hessian_of(x).float(), pattern)
    wanda = select(wanda_scores(weight, x.float().norm(dim=0)), read)
    magnitude = select(weight.abs(), read)
    errors = [output_error(w - weight, x) for w in (got, weight * wanda.unpack(), weight * magnitude.unpack())]
    assert errors[0] < 0.8 * errors[1]
    assert errors[1] < 0.9 * errors[2]
    # With Wanda's mask the compensation helps too, and the exact solution most.
    sweep = output_error(obs_compensate(weight, wanda, hessian_of(x).float()) - weight, x)
    exact = output_error(obs_compensate(weight, wanda, hessian_of(x).float(), exact=True) - weight, x)
    assert exact < sweep < 0.9 * errors[1]
    assert mask.density == read.density


def least_squares(delta: Tensor, kept: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """min over d with the mask's support of ||(d - delta) X||^2 + damping: lstsq on the square root of the damped Hessian."""
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    root = torch.linalg.cholesky(h).T  # ||root v||^2 = v^T H v
    out = torch.zeros_like(delta)
    for row, inside, result in zip(delta, kept, out):
        result[inside] = torch.linalg.lstsq(root[:, inside], root @ row).solution
    return out


@pytest.mark.parametrize("kind", ["2:4", "4:8", "50%", "random"])
@pytest.mark.parametrize("cols", [8, 32])
def test_compensation_against_least_squares(kind, cols):
    x, delta = inputs(40, cols), torch.randn(9, cols, dtype=torch.float64)
    hessian = hessian_of(x)
    if kind == "random":
        kept = torch.rand(9, cols) < 0.4
        kept[0], kept[1] = False, True
    else:
        kept = select(torch.rand(9, cols), parse_pattern(kind)).unpack()
    mask, damping = BitMask.pack(kept), 0.01
    best = least_squares(delta, kept, hessian, damping)
    exact = obs_compensate(delta, mask, hessian, exact=True)
    assert torch.allclose(exact, best, atol=1e-9, rtol=0)
    assert bool((exact[~kept] == 0).all())

    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)

    def cost(d: Tensor) -> Tensor:
        return ((d - delta) @ damped * (d - delta)).sum(1)

    sweep = obs_compensate(delta, mask, hessian)
    assert bool((sweep[~kept] == 0).all())
    dropped = cost(delta * kept)
    assert bool((cost(best) <= cost(sweep) + 1e-9).all())
    assert cost(sweep).sum() <= dropped.sum()
    # How near it gets: of what the best update wins back of the dropped effect, the sweep, which looks to the right only, wins a part.
    won = (dropped.sum() - cost(sweep).sum()) / (dropped.sum() - cost(best).sum())
    assert won > 0.25
    # Conjugate gradients take it the rest of the way, and never back.
    costs = [cost(obs_compensate(delta, mask, hessian, steps=steps)) for steps in (0, 1, 4, 16, 4 * cols)]
    assert all(bool((later <= earlier + 1e-9).all()) for earlier, later in pairwise(costs))
    assert torch.allclose(costs[-1], cost(best), rtol=1e-6, atol=1e-9)
    low = obs_compensate(delta.float(), mask, hessian.float(), steps=16)
    assert low[~kept].abs().max() == 0
    assert cost(low.double()).sum() <= costs[2].sum() * 1.001
    if kind == "random":
        assert torch.equal(sweep[1], delta[1])
        assert not sweep[0].any()


def test_the_sweep_does_not_depend_on_its_blocks_and_stays_near_float64():
    x, delta = inputs(200, 96), torch.randn(16, 96, dtype=torch.float64)
    mask, hessian = select(torch.rand(16, 96), parse_pattern("2:4")), hessian_of(x)
    wide = obs_compensate(delta, mask, hessian, block_size=1)
    for block_size in (7, 32, 96, 1000):
        assert torch.allclose(obs_compensate(delta, mask, hessian, block_size=block_size), wide, atol=1e-10, rtol=0)
    low = obs_compensate(delta.float(), mask, hessian.float())
    assert torch.allclose(low.double(), wide, atol=1e-4, rtol=0)
    half = obs_compensate(delta.bfloat16(), mask, hessian.float())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.double(), wide, atol=0.05, rtol=0)
    assert torch.equal(half, obs_compensate(delta.bfloat16().float(), mask, hessian.float()).bfloat16())
    # The scale of H says nothing.
    assert torch.allclose(obs_compensate(delta, mask, 1000 * hessian), wide, atol=1e-10, rtol=0)


def test_sweep_with_its_own_mask_is_sparsegpt():
    x, weight = inputs(200, 64).float(), torch.randn(16, 64)
    hessian = hessian_of(x)
    for pattern in ("2:4", "60%"):
        pruned, mask = sparsegpt_sweep(weight, hessian, pattern, block_size=16)
        assert torch.equal(obs_compensate(weight, mask, hessian, block_size=16), pruned)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_columns_go_first_and_keep_their_value(damping):
    x = inputs(200, 16).float()
    dead = [1, 2, 8, 9, 10, 11]
    x[:, dead] = 0
    hessian = hessian_of(x)
    weight = torch.randn(5, 16)
    weight[:, dead] *= 100
    got, mask = sparsegpt_sweep(weight, hessian, "2:4", damping=damping)
    kept = mask.unpack()
    assert not kept[:, 1:3].any()
    assert got.isfinite().all()
    largest = weight[:, 8:12].abs().topk(2).indices.sort().values
    assert torch.equal(kept[:, 8:12].nonzero()[:, 1].view(5, 2), largest)
    assert torch.equal(got[:, 8:12], weight[:, 8:12] * kept[:, 8:12])
    # Nothing at all: magnitude.
    got, mask = sparsegpt_sweep(weight, torch.zeros(16, 16), "2:4", damping=damping)
    assert mask.equal(select(weight.abs(), parse_pattern("2:4")))
    assert torch.equal(got, weight * mask.unpack())
    exact = obs_compensate(weight, mask, hessian, damping=damping or 0.01, exact=True)
    assert torch.allclose(exact[:, dead], (weight * mask.unpack())[:, dead])


def test_hessians_of_layers():
    first, second, other, unused = (nn.Linear(5, 3) for _ in range(4))
    batches = [torch.randn(2, 4, 5), torch.randn(7, 5)]
    with input_hessians({"a": first, "b": second, "c": other, "d": unused}) as hessians:
        for x in batches:
            first(x)
            second(x)
            other(2 * x)
            x.add_(1)  # written to: the product of before does not hold any more
            other(x)
    plain = [x - 1 for x in batches]
    flat = torch.cat([x.reshape(-1, 5) for x in plain]).double()
    assert set(hessians) == {"a", "b", "c"}
    assert torch.allclose(hessians["a"].double(), hessian_of(flat), atol=1e-5)
    assert torch.equal(hessians["a"], hessians["b"])
    assert hessians["a"].data_ptr() != hessians["b"].data_ptr()
    both = torch.cat([2 * flat, flat + 1])
    assert torch.allclose(hessians["c"].double(), hessian_of(both), atol=1e-5)
    with input_norms({"a": first}) as norms:
        first(torch.cat([x.reshape(-1, 5) for x in plain]))
    assert torch.allclose(norms["a"], (hessians["a"].diagonal() * len(flat) / 2).sqrt(), rtol=1e-4)
    first(batches[0])
    assert torch.allclose(hessians["a"].double(), hessian_of(flat), atol=1e-5)  # the hooks are gone


def test_hessians_are_fp32_under_autocast_and_of_bf16():
    layer = nn.Linear(8, 3)
    x = torch.randn(64, 8).bfloat16()
    expected = hessian_of(x.double())
    with torch.autocast("cpu", torch.bfloat16), input_hessians({"l": layer}) as hessians:
        layer(x)
    assert hessians["l"].dtype == torch.float32
    assert torch.allclose(hessians["l"].double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sparsegpt_sweep(weight, hessians["l"], "2:4")
        carried = obs_compensate(weight, inside[1], hessians["l"])
    assert torch.equal(inside[0], sparsegpt_sweep(weight, hessians["l"], "2:4")[0])
    assert torch.equal(carried, inside[0])


class Precisions(TorchDispatchMode):
    """What is allowed of fp32 when a product runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            self.seen += [(torch.get_float32_matmul_precision(), *(b.fp32_precision for b in backends))]
        return func(*args, **(kwargs or {}))


def _precisions():
    backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return [b.fp32_precision for b in backends]


@pytest.mark.parametrize("way", ["medium", "allow_tf32", "fp32_precision", "inherited"])
def test_products_are_fp32_whatever_is_allowed(way):
    weight, x = torch.randn(6, 20), torch.randn(64, 20)
    before = _precisions()
    try:
        if way == "medium":
            torch.set_float32_matmul_precision("medium")
        elif way == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif way == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.backends.fp32_precision = "tf32"
        allowed = _precisions()
        with Precisions() as mode:
            layer = nn.Identity()  # without a product of its own
            with input_hessians({"l": layer}) as hessians:
                layer(x)
            assert mode.seen
            _, mask = sparsegpt_sweep(weight, hessians["l"], "2:4", block_size=8)
            obs_compensate(weight, mask, hessians["l"], block_size=8, steps=2)
        assert len(mode.seen) > 4
        assert set(mode.seen) == {("highest", "ieee", "ieee")}
        assert _precisions() == allowed
        if way == "medium":
            assert torch.get_float32_matmul_precision() == "medium"
        if way == "inherited":
            torch.backends.fp32_precision = "none"
            assert _precisions()[1] == "none"
    finally:
        torch.set_float32_matmul_precision("highest")
        backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


@pytest.mark.parametrize("outside", [False, True])
def test_hessians_in_inference_mode(outside):
    """Inference tensors count no writes: a buffer that is used again gives no old product."""
    layer, other = nn.Linear(5, 3), nn.Linear(5, 2)
    first, second = torch.randn(8, 5), torch.randn(8, 5)
    modes = torch.inference_mode(outside), input_hessians({"a": layer, "b": other}), torch.inference_mode()
    with modes[0], modes[1] as hessians, modes[2]:
        x = first.clone()
        layer(x)
        x.copy_(second)
        other(x)
        layer(x)
    both = torch.cat([first, second]).double()
    assert torch.allclose(hessians["a"].double(), hessian_of(both), atol=1e-5)
    assert torch.allclose(hessians["b"].double(), hessian_of(second.double()), atol=1e-5)


def test_bad_input():
    weight, hessian = torch.randn(4, 8), hessian_of(inputs(40, 8)).float()
    mask = BitMask.ones((4, 8))
    with pytest.raises(ValueError, match=r"hessian: want \[in, in\] = \(8, 8\) for a weight \(4, 8\), got \(4, 4\)"):
        sparsegpt_sweep(weight, hessian[:4, :4], "2:4")
    with pytest.raises(ValueError, match=r"mask: want shape \(4, 8\) on cpu as delta, got \(8, 4\)"):
        obs_compensate(weight, BitMask.ones((8, 4)), hessian)
    with pytest.raises(ValueError, match="8 columns are no multiple of m = 3"):
        sparsegpt_sweep(weight, hessian, "1:3")
    with pytest.raises(ValueError, match="damping: want a share of the mean diagonal >= 0, got -1"):
        sparsegpt_sweep(weight, hessian, "2:4", damping=-1)
    with pytest.raises(ValueError, match="block_size: want at least 1 column, got 0"):
        obs_compensate(weight, mask, hessian, block_size=0)
    with pytest.raises(ValueError, match=r"delta: want floating \[out, in\], got torch.int64 \(4, 8\)"):
        obs_compensate(weight.long(), mask, hessian)
    for bad in (float("nan"), float("inf")):
        broken = hessian.clone()
        broken[2, 3] = bad
        with pytest.raises(ValueError, match="hessian: want finite entries"):
            sparsegpt_sweep(weight, broken, "2:4")
    with pytest.raises(ValueError, match=r"steps: want an int >= 0, and none with exact=True; got 3, exact=True"):
        obs_compensate(weight, mask, hessian, steps=3, exact=True)
    few = inputs(3, 8).float()  # rank 3 of 8
    with pytest.raises(ValueError, match="not positive definite with this damping; give a larger one"):
        sparsegpt_sweep(weight, -hessian + 2 * torch.diag(hessian.diagonal()) - 50 * (1 - torch.eye(8)), "2:4")
    got, _ = sparsegpt_sweep(weight, hessian_of(few), "2:4")
    assert got.isfinite().all()
