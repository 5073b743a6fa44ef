"""MaskedAdamW and MaskedSGD: frozen entries to the bit, torch.optim's step where all may move, every option."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fastunlearn import BitMask, backend, explain, ops, optim

SHAPES = [(130, 77), (3000,), (64, 3, 3, 3), (1,), (40, 64)]
BACKENDS = ["reference", "native", "triton"]
KINDS = {
    "adamw": (optim.MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (optim.MaskedSGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    "momentum": (
        optim.MaskedSGD,
        torch.optim.SGD,
        {"lr": 1e-2, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    ),
    "nesterov": (optim.MaskedSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "maximize": (
        optim.MaskedAdamW,
        torch.optim.AdamW,
        {"lr": 1e-2, "maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
    ),
}


def tensors(density: float, dtype: torch.dtype = torch.float32, shapes=SHAPES):
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return params, [torch.rand(shape) < density for shape in shapes]


def give_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_frozen_entries_stay_and_the_rest_is_torch(name: str, kind: str, density: float) -> None:
    masked_class, dense_class, options = KINDS[kind]
    ours, may = tensors(density)
    start = [p.detach().clone() for p in ours]
    same = [p.clone().requires_grad_() for p in start]
    double = [p.double().requires_grad_() for p in start]
    masked = masked_class(ours, [BitMask.pack(m) for m in may], **options)
    peers = [dense_class(same, **options), dense_class(double, **options)]
    op = "masked_adamw_" if masked_class is optim.MaskedAdamW else "masked_sgd_"
    with backend(name):
        for i in range(4):
            give_grads(ours, i)
            for p, q, r, m in zip(ours, same, double, may):
                q.grad, r.grad = p.grad.clone(), p.grad.double()
                p.grad.masked_fill_(~m, float("nan"))
            for optimizer in (masked, *peers):
                optimizer.step()
        assert density == 0 or explain(op).last == f"{name}:cpu"
    for p, q, r, m, before in zip(ours, same, double, may, start):
        assert torch.equal(p[~m], before[~m])
        if m.any():
            theirs = (q.double() - r)[m].abs().max()
            assert (p.double() - r)[m].abs().max() <= 2 * theirs + 1e-6 * r.abs().max().clamp(min=1)


@pytest.mark.parametrize("learning_rate", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_learning_rate_leaves_frozen_entries(learning_rate: float, kind: str) -> None:
    masked_class, _, options = KINDS[kind]
    params, may = tensors(0.3, torch.bfloat16)
    start = [p.detach().clone() for p in params]
    masked = masked_class(params, may, **{**options, "lr": learning_rate})
    for i in range(3):
        give_grads(params, i)
        masked.step()
    for p, m, before in zip(params, may, start):
        assert torch.equal(p[~m].view(torch.int16), before[~m].view(torch.int16))


@given(st.data(), st.integers(0, 2**31))
def test_any_mask_of_any_shape(data, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = data.draw(st.lists(st.integers(0, 30), max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    p = torch.randn(shape, generator=generator).to(dtype)
    if len(shape) > 1:
        p = p.transpose(0, data.draw(st.integers(0, len(shape) - 1)))
    m = torch.rand(p.shape, generator=generator) < data.draw(st.floats(0, 1))
    before = p.clone()
    masked = optim.MaskedAdamW([p.requires_grad_()], [m], lr=0.1)
    p.grad = torch.ones(p.shape, dtype=dtype)
    masked.step()
    assert torch.equal(p[~m], before[~m])
    assert bool((p[m] < before[m]).all())
    assert masked.state_dict()["state"] == {} or masked.state_dict()["state"][0]["exp_avg"].shape == p.shape


def test_memory_is_that_of_the_entries_that_may_move() -> None:
    params, may = tensors(0.1)
    masked = optim.MaskedAdamW(params, may)
    give_grads(params, 0)
    masked.step()
    for p, m in zip(params, may):
        for name in ("exp_avg", "exp_avg_sq"):
            assert masked.state[p][name].shape == (int(m.sum()),)
            assert masked.state[p][name].dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_redistribution_belongs_on_the_update(optimizer: str) -> None:
    """Why SAU's redistribution is a factor on the update: Adam divides a factor on the gradient out again. SGD does not."""
    rows, cols = 60, 90
    start, importance = torch.randn(rows, cols), torch.randn(rows, cols).square()
    may = torch.rand(rows, cols) < 0.5
    factors = ops.redistribution(importance, BitMask.pack(may))
    full = torch.zeros(rows, cols).masked_scatter_(may, factors)
    assert factors.std() > 0.3
    moved = {}
    for name in ("plain", "gradient", "update", "full"):
        p = start.clone().requires_grad_()
        options = {"eps": 1e-12} if optimizer == "AdamW" else {}
        scale = {"update": factors, "full": full}.get(name)
        masked = getattr(optim, f"Masked{optimizer}")(
            [p], [may], lr=1e-2, weight_decay=0.0, lr_scale=None if scale is None else [scale], **options
        )
        total = torch.zeros(int(may.sum()), dtype=torch.float64)
        for i in range(5):
            give_grads([p], i)
            # The update alone, free of what is lost when it is added to a larger weight.
            p.data[may] = 0
            if name == "gradient":
                p.grad *= full
            masked.step()
            total += p.detach()[may].double()
        moved[name] = total
    size = moved["plain"].norm()
    by_gradient, by_update = ((moved[name] - moved["plain"]).norm() / size for name in ("gradient", "update"))
    assert by_update > 0.3
    torch.testing.assert_close(moved["update"], moved["plain"] * factors.double(), rtol=1e-5, atol=1e-8)
    assert torch.equal(moved["update"], moved["full"])
    if optimizer == "AdamW":
        assert by_gradient < 1e-6
    else:
        assert by_gradient > 0.3
        torch.testing.assert_close(moved["gradient"], moved["update"], rtol=1e-5, atol=1e-8)


def test_small_steps_move_bfloat16_in_expectation() -> None:
    """A step of 1e-5 is a hundredth of half a place at 1: lost when rounded to nearest, right on average when at random."""
    n, steps, lr = 200_000, 10, 1e-5
    moved = {}
    for stochastic in (True, False):
        p = torch.ones(n, dtype=torch.bfloat16).requires_grad_()
        masked = optim.MaskedAdamW(
            [p], [torch.ones(n, dtype=torch.bool)], lr=lr, weight_decay=0.0, stochastic_rounding=stochastic
        )
        for _ in range(steps):
            p.grad = torch.ones(n, dtype=torch.bfloat16)
            masked.step()
        moved[stochastic] = (1 - p.detach().double()).mean().item()
    assert moved[False] == 0
    place = 2**-8  # below 1
    assert abs(moved[True] - steps * lr) < 5 * (steps * lr * place / n) ** 0.5


def test_masters_hold_what_bfloat16_cannot() -> None:
    p = torch.ones(1000, dtype=torch.bfloat16).requires_grad_()
    may = torch.arange(1000) % 2 == 0
    masked = optim.MaskedAdamW([p], [may], lr=1e-5, weight_decay=0.0, master_weights=True)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        masked.step()
    # 300 steps, each rounded to half a place of fp32 below 1
    torch.testing.assert_close(masked.state[p]["master"], torch.full((500,), 1 - 300e-5), rtol=0, atol=300 * 2**-25)
    assert torch.equal(p[may], masked.state[p]["master"].bfloat16())
    assert bool((p[~may] == 1).all())


@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
def test_channels_last_is_the_same_step(grad_format: torch.memory_format) -> None:
    start, may = torch.randn(8, 6, 5, 3), torch.rand(8, 6, 5, 3) < 0.4
    count = int(may.sum())
    scale = torch.rand(count)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = start.clone(memory_format=layout).requires_grad_()
        masked = optim.MaskedAdamW([p], [may], lr=0.1, lr_scale=[scale])
        for i in range(3):
            give_grads([p], i)
            p.grad = p.grad.clone(memory_format=grad_format)
            masked.step()
        results.append((p.detach(), masked.state_dict()["state"][0]["exp_avg"]))
    torch.testing.assert_close(*[r[0] for r in results], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*[r[1] for r in results], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_clipping_counts_only_what_may_move(name: str) -> None:
    params, may = tensors(0.3)
    peers = [p.detach().clone().requires_grad_() for p in params]
    masked = optim.MaskedSGD(params, may, lr=1.0, max_grad_norm=0.5)
    with backend(name):
        give_grads(params, 1)
        for p, q, m in zip(params, peers, may):
            q.grad = p.grad * m
            p.grad.masked_fill_(~m, float("inf"))
        masked.step()
        assert explain("masked_grad_norm").last == f"{name}:cpu"
    norm = torch.nn.utils.clip_grad_norm_(peers, 0.5)
    torch.optim.SGD(peers, lr=1.0).step()
    torch.testing.assert_close(masked.grad_norm, norm, rtol=1e-5, atol=0)
    for p, q in zip(params, peers):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_clip_masked_grad_norm() -> None:
    params, may = tensors(0.3)
    give_grads(params, 1)
    params.append(torch.ones(3).requires_grad_())  # no gradient
    masks = [*map(BitMask.pack, may), None]
    want = torch.cat([p.grad[m] for p, m in zip(params, may)]).double().norm()
    norm = optim.clip_masked_grad_norm_(params, masks, 1.0)
    torch.testing.assert_close(norm.double(), want, rtol=1e-6, atol=0)
    after = torch.cat([p.grad[m] for p, m in zip(params, may)]).norm()
    torch.testing.assert_close(after, torch.tensor(1.0), rtol=1e-4, atol=0)
    params[0].grad[may[0]] = float("nan")
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        optim.clip_masked_grad_norm_(params, masks, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="max_norm"):
        optim.clip_masked_grad_norm_(params, masks, 0.0)
    with pytest.raises(ValueError, match="masks: want 6"):
        optim.clip_masked_grad_norm_(params, masks[1:], 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_may_be_wider_than_parameters(dtype: torch.dtype) -> None:
    moved = []
    for grad_dtype in (torch.float32, dtype):
        p = torch.ones(64, dtype=dtype).requires_grad_()
        p.grad_dtype = grad_dtype
        p.grad = torch.full((64,), 0.5, dtype=grad_dtype)
        optim.MaskedSGD([p], lr=0.5).step()
        moved.append(p.detach())
    assert torch.equal(*moved)
    assert bool((moved[0] == 0.75).all())


def test_memory_that_moves_between_steps_is_followed() -> None:
    """Gradients made anew, state replaced, parameters given new storage, some without a gradient."""
    ours, may = tensors(0.4)
    plain = [p.detach().clone().requires_grad_() for p in ours]
    masked, reference = optim.MaskedAdamW(ours, may, lr=0.1), optim.MaskedAdamW(plain, may, lr=0.1)
    for i in range(6):
        for params in (ours, plain):
            give_grads(params, i)
            if i == 2:
                params[1].grad = None
        if i == 3:
            masked.state[ours[0]]["exp_avg"] = masked.state[ours[0]]["exp_avg"].clone()
            ours[2].data = ours[2].data.clone()
        if i == 4:
            masked.load_state_dict(masked.state_dict())
        masked.step()
        with backend("reference"):
            reference.step()
        masked.zero_grad(set_to_none=i % 2 == 0)
    for p, q in zip(ours, plain):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    assert [masked.state[p]["step"] for p in ours] == [6, 5, 6, 6, 6]


def test_gradients_are_not_kept_alive() -> None:
    params, may = tensors(0.4)
    masked = optim.MaskedAdamW(params, may)
    for i in range(4):
        give_grads(params, i)
        masked.step()
    assert len(masked._works) == 1
    assert masked._works[0].batch.grads == []
