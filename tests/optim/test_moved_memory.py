"""The step writes through addresses: what moves is followed, what no longer fits is refused, autograd is told."""

from __future__ import annotations

import pytest
import torch

from fastunlearn import BitMask, backend, ops, optim

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


@pytest.mark.parametrize("name", ["native", "triton"])
def test_new_gradients_keep_the_tables(name: str) -> None:
    params, masks, optimizer = setup(dtype=torch.bfloat16, max_grad_norm=1.0)
    twins = [p.detach().clone().requires_grad_() for p in params]
    twin = optim.MaskedAdamW(twins, masks, lr=0.1, max_grad_norm=1.0)
    kept, alive = [], []
    with backend(name):
        for _ in range(4):
            for p, q in zip(params, twins):
                p.grad = torch.randn(p.shape).bfloat16()
                q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
            alive.append([p.grad for p in params])  # so that the next ones lie elsewhere
            optimizer.step()
            twin.step()
            work = optimizer._works[0]
            kept.append((work.batch, work.tables.launches, work.norm_tables[None].launches))
            assert work.batch.grad_addresses == [g.data_ptr() for g in alive[-1]]
            assert all(torch.equal(p, q) for p, q in zip(params, twins))
    assert all(a is b for later in kept[1:] for a, b in zip(later, kept[0]))


@pytest.mark.parametrize("name", ["native", "triton"])
def test_blocks_stay_when_parameters_move_and_go_when_types_change(name: str) -> None:
    params, _, optimizer = setup()
    with backend(name):
        step(params, optimizer, 0)
        launches = optimizer._works[0].tables.launches
        params[0].data = params[0].data.clone()
        step(params, optimizer, 1)
        assert optimizer._works[0].tables.launches is launches
        before = params[1].detach().clone()
        params[1].grad = None
        params[1].data = params[1].data.bfloat16()
        step(params, optimizer, 2)
        if name == "triton":
            assert optimizer._works[0].tables.launches is not launches
        assert 0.01 < (params[1].detach() - before).abs().max() < 0.3


def test_momentum_may_be_turned_on() -> None:
    p = torch.zeros(4, requires_grad=True)
    q = torch.zeros(4, requires_grad=True)
    masked, dense = optim.MaskedSGD([p], lr=0.1), torch.optim.SGD([q], lr=0.1)
    p.grad = q.grad = torch.arange(4.0)
    for i in range(4):
        for optimizer in (masked, dense):
            optimizer.param_groups[0]["momentum"] = 0.9 if i > 1 else 0.0
            optimizer.step()
    torch.testing.assert_close(p, q)


def test_a_captured_step_is_refused(monkeypatch) -> None:
    params, _, optimizer = setup()
    step(params, optimizer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    step(params, optimizer, 1)  # on a CPU there is nothing to capture
    for work in optimizer._works:
        work.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        step(params, optimizer, 2)
    assert [optimizer.state[p]["step"] for p in params] == [2, 2, 2]


@pytest.mark.parametrize("name", ["triton"])
def test_bool_masks_where_triton_is_asked_for(name: str) -> None:
    with backend(name):
        params, _, optimizer = setup()
        step(params, optimizer)
    assert optimizer.state[params[0]]["step"] == 1


def test_lazily_negated_gradients() -> None:
    """What a view is counts, also when it comes after tables were made for gradients that are none."""
    steps = [torch.randn(6, 10, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    ends = []
    for lazy in (False, True):
        param = torch.nn.Parameter(torch.ones(6, 10))
        optimizer = optim.MaskedAdamW([param], None, lr=0.1)
        for i, g in enumerate(steps):
            param.grad = torch._neg_view(g) if lazy and i in (0, 2) else (-g if i in (0, 2) else g.clone())
            optimizer.step()
        ends.append(param.detach().clone())
    assert torch.equal(*ends)


def test_lazily_negated_parameters_are_refused() -> None:
    bits = torch.ones(6, 10, dtype=torch.bool)
    state = [torch.zeros(60)], [torch.zeros(60)]
    with pytest.raises(TypeError, match="the parameter is a lazily negated view"):
        ops.masked_adamw_([torch._neg_view(torch.ones(6, 10))], [torch.ones(6, 10)], [bits], *state, [1])
    with pytest.raises(TypeError, match="is a lazily negated view"):
        ops.masked_adamw_(
            [torch.ones(6, 10)], [torch.ones(6, 10)], [bits], [torch._neg_view(state[0][0])], state[1], [1]
        )
