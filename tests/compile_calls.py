"""A call of every public op at a size that varies, for counting what torch.compile makes of it over a run of ragged sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastunlearn import BitMask, ops

#: sizes of one run: none a multiple of another, one that comes again; 0 and 1 are always specialised
RAGGED = (24, 40, 56, 32, 72, 24)


@dataclass(frozen=True)
class Call:
    """run(*make(size)) is what is compiled; `unbacked`: sizes of the results depend on data (a flag of torch.compile, off by default)."""

    run: Callable[..., Any]
    make: Callable[[int], tuple[Any, ...]]
    unbacked: bool = False


def _normal(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def _mask(*shape: int, seed: int = 9) -> BitMask:
    return BitMask.pack(_normal(*shape, seed=seed) > 0)


def _half(rows: int) -> BitMask:
    """Of [rows, 8] every other entry."""
    return BitMask.pack(torch.arange(8 * rows).reshape(rows, 8) % 2 == 0)


def _blocks(rows: int, cols: int) -> Tensor:
    made = torch.zeros(-(-rows // 64), -(-cols // 64), dtype=torch.bool)
    made[0, 0] = True
    return made


def _square(d: int, seed: int = 0) -> Tensor:
    x = _normal(d, d, seed=seed)
    return x @ x.T / d + torch.eye(d)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _labels(n: int, length: int) -> Tensor:
    labels = torch.randint(0, 16, (n, length), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = -100
    return labels


def _saliency(scores: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    ops.saliency_accumulate_(scores, grads)
    return scores


def _adamw(
    params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], masks: list[BitMask]
) -> list[Tensor]:
    ops.masked_adamw_(params, grads, masks, m, v, [1], stochastic_rounding=False)
    return params


def _sgd(params: list[Tensor], grads: list[Tensor], masks: list[BitMask]) -> list[Tensor]:
    ops.masked_sgd_(params, grads, masks, [None], [1], stochastic_rounding=False)
    return params


def _hamu(params: list[Tensor], retain: list[Tensor], forget: list[Tensor]) -> list[Tensor]:
    ops.hamu_step_(params, retain, forget, lr=1e-3, share=0.5)
    return params


_W, _B = _normal(24, 64, seed=3), _normal(24, seed=4)
_LA, _LB = _normal(4, 64, seed=5), _normal(24, 4, seed=6)
_MASK = _mask(24, 64)
_NM = ops.nm_compress(_W, ops.nm_mask(_W.abs(), 2, 4), 2, 4)
_KERNEL, _KERNEL_MASK = _normal(24, 8, 3, 3), _mask(24, 8, 3, 3)
_TILES, _KERNEL_TILES = _blocks(24, 64), _blocks(24, 72)
_HEAD = _normal(16, 8, seed=7)

#: by the op's public name; a size is what changes in a run of it: tokens, samples, or the rows of a weight
CALLS: dict[str, Call] = {
    "block_weight_grad": Call(
        lambda g, x: ops.block_weight_grad(g, x, _TILES, 64), lambda n: (_normal(n, 24), _normal(n, 64, seed=1))
    ),
    "conv2d_block_weight_grad": Call(
        lambda g, x: ops.conv2d_block_weight_grad(g, x, _KERNEL_TILES, (3, 3), 64, padding=1),
        lambda n: (_normal(n, 24, 5, 5), _normal(n, 8, 5, 5, seed=1)),
    ),
    "bures_distance": Call(ops.bures_distance, lambda n: (_normal(n, 8), _normal(n, 8, seed=1))),
    "bures_geodesic": Call(
        lambda a, b: ops.bures_geodesic([a], [b], 0.5)[0], lambda n: (_normal(n, 8), _normal(n, 8, seed=1))
    ),
    "gram": Call(lambda a, b: ops.gram([[a], [b]]), lambda n: (_normal(n, 8), _normal(n, 8, seed=1))),
    "hamu_step_": Call(
        lambda p, r, f: _hamu([p], [r], [f]), lambda n: (_normal(n, 8), _normal(n, 8, seed=1), _normal(n, 8, seed=2))
    ),
    "informax": Call(
        lambda w, p, q: ops.informax([w], p, q, estimator="gaussian"), lambda n: (_normal(8, 6), _normal(n, 6), _normal(n, 6, seed=1))
    ),
    "row_entropy": Call(lambda w, x: ops.row_entropy([w], x), lambda n: (_normal(8, 6), _normal(n, 6))),
    "linear_divergence": Call(
        lambda h, r, y: _first(ops.linear_divergence(h, _HEAD, r, _HEAD, y, kind="kl")),
        lambda n: (_normal(2, n, 8, grad=True), _normal(2, n, 8, seed=1), _labels(2, n)),
    ),
    "linear_nll": Call(
        lambda h, y: _first(ops.linear_nll(h, _HEAD, y)), lambda n: (_normal(2, n, 8, grad=True), _labels(2, n))
    ),
    "masked_adamw_": Call(
        lambda p, g, m, v, mask: _adamw([p], [g], [m], [v], [mask]),
        lambda n: (_normal(n, 8), _normal(n, 8, seed=1), torch.zeros(4 * n), torch.zeros(4 * n), _half(n)),
    ),
    "masked_sgd_": Call(
        lambda p, g, mask: _sgd([p], [g], [mask]), lambda n: (_normal(n, 8), _normal(n, 8, seed=1), _half(n))
    ),
    "masked_grad_norm": Call(lambda g, mask: ops.masked_grad_norm([g], [mask]), lambda n: (_normal(n, 8), _mask(n, 8))),
    "masked_lora_linear": Call(
        lambda x, a, b: _first(ops.masked_lora_linear(x, _W, a, b, _MASK, 0.5, _B)),
        lambda n: (_normal(n, 64), _LA.clone().requires_grad_(), _LB.clone().requires_grad_()),
    ),
    "masked_lora_conv2d": Call(
        lambda x, a, b: _first(ops.masked_lora_conv2d(x, _KERNEL, a, b, _KERNEL_MASK, 0.5, padding=1)),
        lambda n: (_normal(n, 8, 5, 5), _normal(4, 72, grad=True), _normal(24, 4, grad=True)),
    ),
    "masked_lora_weight": Call(
        lambda w, a, b, mask: ops.masked_lora_weight(w, a, b, mask, 0.5),
        lambda n: (_normal(n, 64), _LA, _normal(n, 4), _mask(n, 64)),
    ),
    "nm_compress": Call(lambda w, mask: ops.nm_compress(w, mask, 2, 4).values, lambda n: (_normal(n, 16), ops.nm_mask(_normal(n, 16).abs(), 2, 4))),
    "nm_linear": Call(lambda x: _first(ops.nm_linear(x, _NM, _B)), lambda n: (_normal(n, 64, grad=True),)),
    "nm_mask": Call(lambda s: ops.nm_mask(s, 2, 4).bits, lambda n: (_normal(n, 16).abs(),)),
    "polar": Call(ops.polar, lambda n: (_normal(n, 8),)),
    "redistribution": Call(lambda s, mask: ops.redistribution([s], [mask]), lambda n: (_normal(n, 8).abs(), _mask(n, 8)), unbacked=True),
    "saliency_accumulate_": Call(
        lambda s, g: _saliency([s], [g]), lambda n: (torch.zeros(n, 8), _normal(n, 8))
    ),
    "sid_loss": Call(
        lambda t, f, e: _first(ops.sid_loss(t, f, e, torch.ones(2))),
        lambda n: (_normal(2, n, grad=True), _normal(2, n, seed=1, grad=True), _normal(2, n, seed=2)),
    ),
    "spectral_solve": Call(
        lambda w, s, t: ops.spectral_solve([w], s, t, lam=0.1), lambda n: (_normal(n, 8), _square(8), _square(8, 1))
    ),
    "spectral_trace": Call(
        lambda w, a: _first(ops.spectral_trace([w], a)), lambda n: (_normal(n, 8, grad=True), _square(8))
    ),
    "token_moments": Call(ops.token_moments, lambda n: (_normal(n, 8),)),
    "topk_mask": Call(lambda s: [m.bits for m in ops.topk_mask([s], density=0.5)], lambda n: (_normal(n, 8),)),
}  # fmt: skip
