"""Drop-in ops in a loop of one's own, without any language model: forget one class by moving a tenth of the weights.

A small classifier learns five classes of points. Then one class is unlearned by descent on random labels (as SalUn does) on the
weights that its gradients say matter most, the others stay as they are, bit for bit:

    ops.saliency_accumulate_ + ops.topk_mask -> which weights may move: one bit each
    optim.MaskedAdamW                        -> moves them, and keeps state for them alone

Run it with `python examples/masked_optimiser.py` (a few seconds on any CPU; needs torch alone).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastunlearn import ops, optim

CLASSES, FORGET = 5, 3


def points(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around as many centres as there are classes, and their classes."""
    centres = 3 * torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    return centres[labels] + torch.randn(n, 16, generator=generator), labels


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, chosen: torch.Tensor) -> float:
    return float((model(x[chosen]).argmax(1) == y[chosen]).float().mean())


def main(density: float = 0.1, steps: int = 100) -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    x, y = points(2000, 1)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        plain.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain.step()
    plain.zero_grad()

    go = y == FORGET
    weights = list(model.parameters())
    F.cross_entropy(model(x[go]), y[go]).backward()
    scores = [torch.zeros_like(p) for p in weights]
    ops.saliency_accumulate_(scores, [p.grad for p in weights])
    masks = ops.topk_mask(scores, density)

    before = [p.detach().clone() for p in weights]
    optimizer = optim.MaskedAdamW(weights, masks, lr=1e-2, weight_decay=0.0)
    other = (FORGET + 1 + torch.randint(CLASSES - 1, (int(go.sum()),))) % CLASSES
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(x[go]), other) + F.cross_entropy(model(x[~go]), y[~go])).backward()
        optimizer.step()

    test_x, test_y = points(1000, 2)
    found = {
        "forgotten class": accuracy(model, test_x, test_y, test_y == FORGET),
        "other classes": accuracy(model, test_x, test_y, test_y != FORGET),
        "weights that moved": sum(int((p != b).sum()) for p, b in zip(weights, before))
        / sum(map(torch.numel, weights)),
        "frozen weights that moved": sum(
            int(((p != b) & ~m.unpack()).sum()) for p, b, m in zip(weights, before, masks)
        ),
    }
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    return found


if __name__ == "__main__":
    main()
