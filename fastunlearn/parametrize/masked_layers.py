"""Linear layers and convolutions whose backward pass makes the gradient of what may move, and leaves the rest out.

A mask of weights becomes whichever is least work: nothing (the parameter is frozen), some tiles (`ops.block_weight_grad`), some rows (a
product with the gradients of those outputs), or the whole product, where single weights are spread over all of it. PECKER (arXiv
2604.05634) claims less gradient computation; how is not known, so units that stay or go as a whole are a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastunlearn.ops.block_weight_grad import block_weight_grad, conv2d_block_weight_grad
from fastunlearn.ops.mask import BitMask, rows_cols
from fastunlearn.reference.block_weight_grad import spread

#: Work of a gradient by tiles of a side, as (share of the dense product for each share of tiles, what is always there).
_COST = {128: (1.25, 0.05), 64: (2.2, 0.05)}
DENSE, ROWS, TILES = "dense", "rows", "tiles"


class Where(NamedTuple):
    """Which part of a weight's gradient is made.

    Attributes:
        kind: dense, rows or tiles.
        units: rows: int64 [n]; tiles: bool [ceil(rows / block), ceil(cols / block)]; None.
        block: side of a tile; 0 for another kind.
        off: bool of the weight's shape: what is made and must not move; None where there is none.
        share: of the dense product that is computed.
    """

    kind: str
    units: Tensor | None
    block: int
    off: Tensor | None
    share: float


def choose(may_move: Tensor) -> Where:
    """The cheapest way to the gradient of these entries (bool, of the weight's shape), by counting products."""
    rows, cols = rows_cols(may_move.shape)
    flat = may_move.reshape(rows, cols)
    ways = [(1.0, Where(DENSE, None, 0, None, 1.0))]
    some = flat.any(1)
    share = int(some.sum()) / max(rows, 1)
    ways.append((share + 0.02, Where(ROWS, some.nonzero()[:, 0], 0, None, share)))
    for block, (each, always) in _COST.items():
        down, across = -(-rows // block), -(-cols // block)
        padded = F.pad(flat, (0, across * block - cols, 0, down * block - rows))
        tiles = padded.view(down, block, across, block).any(3).any(1)
        share = int(tiles.sum()) / max(tiles.numel(), 1)
        ways.append((share * each + always, Where(TILES, tiles, block, None, share)))
    best = min(ways, key=lambda way: way[0])[1]
    made = torch.ones_like(flat)
    if best.kind == ROWS:
        made = some[:, None].expand_as(flat)
    elif best.kind == TILES:
        assert best.units is not None
        made = spread(best.units, best.block, rows, cols)
    if torch.equal(made, flat):
        return best
    return best._replace(off=(made & ~flat).view(may_move.shape))


def _finish(grad: Tensor, off: Tensor | None, weight: Tensor) -> Tensor:
    grad = grad.view(weight.shape)
    if off is not None:
        grad = grad.masked_fill_(off, 0)
    return grad.to(weight.dtype)


def _linear_weight_grad(dy: Tensor, x: Tensor, kind: str, index: Tensor | None, block: int) -> Tensor:
    """dW [rows, cols] of dy [tokens, rows]."""
    if kind == DENSE or index is None:
        return dy.T @ x
    if kind == TILES:
        return block_weight_grad(dy, x, index, block)
    return dy.new_zeros(dy.shape[1], x.shape[1]).index_copy_(0, index, dy[:, index].T @ x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, index: Tensor | None, block: int, off: Tensor | None
    ) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.kind, index, ctx.block, off = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, index, off)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, index, off = ctx.saved_tensors
        dx = dw = db = None
        flat = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = (flat @ weight.to(dy.dtype)).view(*dy.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            dw = _linear_weight_grad(flat, x.reshape(-1, x.shape[-1]), ctx.kind, index, ctx.block)
            dw = _finish(dw, off, weight)
        if ctx.needs_input_grad[2]:
            db = flat.sum(0).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None


#: stride, padding, dilation, two numbers each; groups
_Options = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def _conv_backward(dy: Tensor, x: Tensor, weight: Tensor, options: _Options, wanted: list[bool]) -> Any:
    stride, padding, dilation, groups = options
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )


def _conv_weight_grad(
    dy: Tensor, x: Tensor, shape: torch.Size, kind: str, index: Tensor | None, block: int, options: _Options
) -> Tensor:
    """dW of `shape`, or as its matrix."""
    stride, padding, dilation, groups = options
    if kind == TILES and index is not None:
        return conv2d_block_weight_grad(
            dy, x, index, (shape[2], shape[3]), block, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
    like = dy.new_empty(1)
    if kind == DENSE or index is None or groups > 1:
        made: Tensor = _conv_backward(dy, x, like.expand(shape), options, [False, True, False])[1]
        if kind == DENSE or index is None:
            return made.contiguous()
        some = made[index]
    elif not len(index):
        return dy.new_zeros(shape)
    else:
        some = _conv_backward(dy[:, index], x, like.expand(len(index), *shape[1:]), options, [False, True, False])[1]
    return dy.new_zeros(shape).index_copy_(0, index, some)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, index: Tensor | None, block: int, off: Tensor | None,
        options: _Options,
    ) -> Tensor:  # fmt: skip
        stride, padding, dilation, groups = options
        b = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), b, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.kind, index, ctx.block, off, ctx.options = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, index, off)
        ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, index, off = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            # The gradient of the input needs the input's shape only.
            like = x if x is not None else dy.new_empty(1).expand(ctx.x_shape)
            dx = _conv_backward(dy, like, weight.to(dy.dtype), ctx.options, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            dw = _conv_weight_grad(dy, x, weight.shape, ctx.kind, index, ctx.block, ctx.options)
            dw = _finish(dw, off, weight)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3)).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None, None


class _Masked(nn.Module):
    """What both layers keep: the buffers go where the module goes, and into no state_dict."""

    kind: str
    block: int
    share: float

    def _mask(self, mask: BitMask | Tensor) -> None:
        weight: Tensor = self.weight  # type: ignore[assignment]
        may_move = mask.unpack() if isinstance(mask, BitMask) else mask
        if may_move.dtype != torch.bool or may_move.shape != weight.shape:
            raise ValueError(
                f"mask: want a mask of the weight's shape {tuple(weight.shape)}, got {may_move.dtype} {tuple(may_move.shape)}"
            )
        where = choose(may_move.to(weight.device))
        self.kind, self.block, self.share = where.kind, where.block, where.share
        self.register_buffer("_index", where.units, persistent=False)
        self.register_buffer("_off", where.off, persistent=False)

    def _amp(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(kind))
        return x

    def extra_repr(self) -> str:
        how = f"tiles of {self.block}" if self.kind == TILES else self.kind
        return f"{super().extra_repr()}, gradient: {how}, {self.share:.0%}"


class MaskedLinear(_Masked, nn.Linear):
    """nn.Linear whose weight gradient is made where a mask has a bit set, and is exactly zero elsewhere.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        mask: BitMask or bool, of the weight's shape; None: every entry.

    Raises:
        ValueError: a mask of another shape or type.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        mask: BitMask | Tensor | None = None,
    ):  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._mask(torch.ones_like(self.weight, dtype=torch.bool) if mask is None else mask)

    @classmethod
    def of(cls, layer: nn.Linear, mask: BitMask | Tensor) -> MaskedLinear:
        """The same layer, its parameters and hooks with it."""
        return _swapped(cls, layer, mask)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _Linear.apply(
            self._amp(input), self.weight, self.bias, self.kind, self._index, self.block, self._off
        )
        return out


class MaskedConv2d(_Masked, nn.Conv2d):
    """nn.Conv2d whose weight gradient is made where a mask has a bit set, and is exactly zero elsewhere.

    Args: as nn.Conv2d; mask: BitMask or bool, of the weight's shape; None: every entry.

    Raises:
        ValueError: a mask of another shape or type.
    """

    def __init__(self, *args: Any, mask: BitMask | Tensor | None = None, **options: Any):
        nn.Conv2d.__init__(self, *args, **options)
        self._mask(torch.ones_like(self.weight, dtype=torch.bool) if mask is None else mask)

    @classmethod
    def of(cls, layer: nn.Conv2d, mask: BitMask | Tensor) -> MaskedConv2d:
        """The same layer, its parameters and hooks with it."""
        return _swapped(cls, layer, mask)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = (0, 0) if isinstance(self.padding, str) else self.padding
        if self.padding_mode != "zeros" or self.padding == "same":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode), (0, 0)
        options = (tuple(self.stride), tuple(padding), tuple(self.dilation), self.groups)
        out: Tensor = _Conv2d.apply(
            self._amp(input), weight, bias, self.kind, self._index, self.block, self._off, options
        )
        return out


def _recast(cls: Any, layer: Any) -> Any:
    """The layer as another class, with its parameters and hooks."""
    new = cls.__new__(cls)
    # Containers of their own: what is registered on one is not on the other.
    new.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
    return new


def _swapped(cls: Any, layer: Any, mask: BitMask | Tensor) -> Any:
    new = _recast(cls, layer)
    new._mask(mask)
    return new


def plain_layer(layer: nn.Module) -> nn.Module:
    """nn.Linear or nn.Conv2d of a masked layer; any other layer as it is."""
    if not isinstance(layer, (MaskedLinear, MaskedConv2d)):
        return layer
    new = _recast(nn.Linear if isinstance(layer, MaskedLinear) else nn.Conv2d, layer)
    for name in ("_index", "_off"):
        new._buffers.pop(name, None)
        new._non_persistent_buffers_set = new._non_persistent_buffers_set - {name}
    for name in ("kind", "block", "share"):
        new.__dict__.pop(name, None)
    return new


def plain_model(model: nn.Module) -> nn.Module:
    """The model, changed in place: torch's own layers for masked ones, whose gradients are whole again; its parameters stay."""
    for name, layer in list(model.named_modules()):
        if name and isinstance(layer, (MaskedLinear, MaskedConv2d)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, plain_layer(layer))
    return model


@dataclass
class MaskedModel:
    """What `mask_model` did.

    Attributes:
        layers: name of a layer -> how its weight's gradient is made: "tiles of 128, 12%", "rows, 9%", "dense".
        frozen: parameters that no longer require a gradient.
        share: of the products of all masked weights' gradients that is still computed.
    """

    layers: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    share: float = 1.0


def mask_model(model: nn.Module, masks: Mapping[str, BitMask | Tensor]) -> MaskedModel:
    """Swaps in layers that make no gradient off the masks, and freezes what has no set bit; forward passes stay as they were.

    The layers keep their parameters: optimisers, hooks and state_dicts go on as before. A parameter without a mask, and one that is
    no weight of an nn.Linear or nn.Conv2d (a norm, a bias), keeps its whole gradient unless no bit of its mask is set; what may move
    of it is then the optimiser's matter (`optim.MaskedAdamW`). Call it again with other masks to change them.

    Args:
        model: changed in place.
        masks: parameter name -> BitMask or bool of its shape. A parameter that had no set bit before and has one now trains again.

    Returns:
        `MaskedModel`.

    Raises:
        ValueError: a mask is of no parameter, of another shape, or no mask has a bit set (nothing could move).
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(masks) - set(parameters))
    if unknown:
        raise ValueError(f"masks: {len(unknown)} belong to no parameter of the model, the first is {unknown[0]!r}")
    sizes: dict[int, int] = {}
    for name, mask in masks.items():
        if tuple(mask.shape) != tuple(parameters[name].shape):
            raise ValueError(f"masks: {name} has shape {tuple(parameters[name].shape)}, its mask {tuple(mask.shape)}")
        sizes[id(parameters[name])] = int(mask.count() if isinstance(mask, BitMask) else mask.sum())
    if masks and not any(sizes.values()):
        raise ValueError("masks: no bit is set in any of them: nothing could move")
    out = MaskedModel()
    of = {id(parameters[name]): mask for name, mask in masks.items()}
    for name in masks:
        moves = sizes[id(parameters[name])] > 0
        parameters[name].requires_grad_(moves)
        if not moves:
            out.frozen.append(name)
    made = whole = 0.0
    for name, layer in list(model.named_modules()):
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or id(weight) not in of:
            continue
        cls = MaskedLinear if type(layer) in (nn.Linear, MaskedLinear) else MaskedConv2d
        if type(layer) not in (nn.Linear, nn.Conv2d, MaskedLinear, MaskedConv2d):
            continue
        whole += math.prod(weight.shape)
        if not sizes[id(weight)]:
            continue
        new = cls.of(layer, of[id(weight)])
        parent, _, own = name.rpartition(".")
        if not name:
            raise ValueError(f"model: is a single {type(layer).__name__}; use {cls.__name__}.of(layer, mask)")
        # Where every entry may move torch's own layer does as well, and to the same bits.
        whole_mask = new.kind == DENSE and new._off is None
        setattr(model.get_submodule(parent), own, plain_layer(new) if whole_mask else new)
        made += new.share * math.prod(weight.shape)
        how = f"tiles of {new.block}" if new.kind == TILES else new.kind
        out.layers[name] = how if new.kind == DENSE else f"{how}, {new.share:.0%}"
    out.share = made / whole if whole else 1.0
    return out
