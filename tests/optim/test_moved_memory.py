"""The step writes through addresses: what moves is followed, what no longer fits is refused, autograd is told."""

from __future__ import annotations

import pytest
import torch

from fastunlearn import BitMask, backend, optim

BACKENDS = ["reference", "native", "triton"]
SHAPES = [(64, 64), (40,), (6, 5, 3, 3)]


def setup(kind: type = optim.MaskedAdamW, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(5)
    params = [torch.randn(s).to(dtype).requires_grad_() for s in SHAPES]
    masks = [torch.rand(s) < 0.4 for s in SHAPES]
    return params, masks, kind(params, masks, lr=0.1, **options)


def step(params, optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)
    optimizer.step()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "master"])
def test_state_may_move_under_its_tensor(name: str, key: str) -> None:
    """Offloading: `state[k].data = ...` leaves the tensor the same object; what it held before must not be written."""
    results = []
    for moves in (False, True):
        params, _, optimizer = setup(dtype=torch.bfloat16, master_weights=True)
        with backend(name):
            for i in range(4):
                step(params, optimizer, i)
                before = []
                for p in params:
                    held = optimizer.state[p][key].data
                    before.append((held, held.clone()))
                    if moves:
                        optimizer.state[p][key].data = held.clone()
                if moves and i == 3:
                    step(params, optimizer, 4)
                    assert all(torch.equal(held, copy) for held, copy in before)
            if not moves:
                step(params, optimizer, 4)
        results.append([optimizer.state[p][key].clone() for p in params] + [p.detach().clone() for p in params])
    for one, other in zip(*results):
        assert torch.equal(one, other)


def _cast(p, optimizer):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to(torch.bfloat16)


def _cast_data(p, optimizer):
    optimizer.state[p]["exp_avg_sq"].data = optimizer.state[p]["exp_avg_sq"].data.half()


def _shorten(p, optimizer):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"][:-1].clone()


def _stride(p, optimizer):
    optimizer.state[p]["exp_avg"] = torch.zeros(2 * len(optimizer.state[p]["exp_avg"]))[::2]


def _smaller(p, optimizer):
    p.grad = None
    p.data = torch.zeros(100)


def _transposed(p, optimizer):
    p.grad = None
    p.data = p.data.t()


def _double(p, optimizer):
    p.grad = None
    p.data = p.data.double()


def _elsewhere(p, optimizer):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to("meta")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_cast, TypeError, "bfloat16.*float32"),
        (_cast_data, TypeError, "float16.*float32"),
        (_shorten, ValueError, "want a contiguous tensor of shape"),
        (_stride, ValueError, "want a contiguous tensor of shape"),
        (_smaller, ValueError, r"has shape \(100,\), its mask was made for \(64, 64\); rebuild the optimiser"),
        (_transposed, ValueError, "strides"),
        (_double, TypeError, "float64.*rebuild the optimiser"),
        (_elsewhere, ValueError, "meta.*rebuild the optimiser"),
    ],
)
def test_what_no_longer_fits_is_refused(name: str, change, error, words: str) -> None:
    params, _, optimizer = setup()
    with backend(name):
        step(params, optimizer)
        change(params[0], optimizer)
        before = [p.detach().clone() for p in params]
        with pytest.raises(error, match=words):
            step(params, optimizer, 1)
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    assert [optimizer.state[p]["step"] for p in params] == [1, 1, 1]


def test_a_parameter_that_changes_device_is_refused() -> None:
    params, _, optimizer = setup()
    step(params, optimizer)
    moved = torch.nn.Parameter(params[1].detach().to("meta"))
    entry = optimizer._entries[params[1]]
    optimizer.param_groups[0]["params"][1] = moved
    optimizer._entries[moved] = entry
    moved.grad = torch.zeros(40, device="meta")
    with pytest.raises(ValueError, match="is on meta, its mask was made for cpu; rebuild the optimiser"):
        optimizer.step()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", [optim.MaskedAdamW, optim.MaskedSGD])
def test_autograd_sees_the_step(name: str, kind: type) -> None:
    params, _, optimizer = setup(kind)
    with backend(name):
        for i in range(3):
            before = [p._version for p in params]
            x = torch.ones(64, requires_grad=True)
            stale = (params[0] @ x).sum()
            step(params, optimizer, i)
            assert all(p._version > old for p, old in zip(params, before))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                stale.backward()


@pytest.mark.parametrize("shape", [(64, 64), (128,), (7, 5)])
def test_a_mask_may_change_once_the_optimiser_is_made(shape) -> None:
    p = torch.zeros(shape, requires_grad=True)
    may = torch.rand(shape) < 0.5
    mask = BitMask.pack(may)
    optimizer = optim.MaskedSGD([p], [mask], lr=1.0)
    mask.bits.fill_(0)
    p.grad = torch.ones(shape)
    optimizer.step()
    assert torch.equal(p.detach() != 0, may)
