"""A linear layer with a compressed N:M weight W in plain PyTorch: y = x W^T + b, dx = dy W, dvalues = (dy^T x) where W has bits.

The gradient of the values is that of the dense weight, read at the survivors: what moves is all that is ever computed with.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastunlearn.reference.nm_tensor import nm_expand, nm_gather


def nm_linear(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, cols], values and bits of W [rows, cols], bias [rows] -> [tokens, rows]."""
    return F.linear(x, nm_expand(values, bits, x.shape[1]), bias)


def nm_linear_backward(
    grad: Tensor, x: Tensor | None, values: Tensor, bits: Tensor, cols: int, n: int, m: int, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dvalues) of grad [tokens, rows]; dvalues only where x is given."""
    dx = grad @ nm_expand(values, bits, cols) if needs_x else None
    return dx, nm_gather(grad.T @ x, bits, n, m) if x is not None else None
