"""MaskedAdamW: frozen entries to the bit, torch.optim's step where all may move."""

import pytest
import torch

from fastunlearn import BitMask, backend, explain, optim

SHAPES = [(130, 77), (3000,), (64, 3, 3, 3), (1,), (40, 64)]


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_frozen_entries_stay_and_the_rest_is_adamw(name: str, density: float) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    may = [torch.rand(shape) < density for shape in SHAPES]
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.double().requires_grad_() for p in start]
    masked = optim.MaskedAdamW(ours, [BitMask.pack(m) for m in may], lr=1e-2, weight_decay=0.1)
    dense = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    with backend(name):
        for _ in range(4):
            for p, q, m in zip(ours, theirs, may):
                grad = torch.randn(p.shape)
                p.grad, q.grad = grad.masked_fill(~m, float("nan")), grad.double()
            masked.step()
            dense.step()
        assert explain("masked_adamw_").last == f"{name}:cpu"
    for p, q, m, before in zip(ours, theirs, may, start):
        assert torch.equal(p[~m], before[~m])
        torch.testing.assert_close(p[m].double(), q[m], rtol=1e-5, atol=1e-5)
