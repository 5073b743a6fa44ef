"""A pruned model that holds its survivors only: weights, gradients and optimiser state of n of every m entries, and a bit each.

Every linear layer with an n:m mask becomes an `NMLinear`, whose parameter `weight` holds the survivors [rows, cols / m * n] under the
name the dense weight had: optimisers, learning-rate factors and inner products (`ops.gram`, `ops.hamu_step_`) see a smaller tensor and
need no mask. A 2:4 layer of bfloat16 with AdamW takes 9/16 + 8/16 + 8/4 of the bytes of its dense weight, where dense with a mask takes
1 + 1 + 2 and the mask. One layer at a time is dense, in a buffer that all share (`ops.nm_linear`).

The same run dense with masks gives the same weights. In float32 products, gathered gradients and AdamW's arithmetic are the same
operations in the same order; only the norm that clips is a sum in another order (float64, so that factors differ in the last place
if at all), and a kernel that reads the compressed weight directly sums in another order too. In bfloat16 stochastic rounding draws its
bits by the place of an entry in memory, which is another here: the two runs differ by rounding, each as far from the exact one.

What is left dense: weights that are shared (tied embeddings), the input and output embeddings (losses read them by themselves), and
what is no nn.Linear. Their masks hold as ever, in the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import ops
from fastunlearn.ops.mask import BitMask
from fastunlearn.ops.nm_tensor import NMTensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (every process must call it); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class NMLinear(nn.Module):
    """nn.Linear with a compressed n:m weight.

    Attributes:
        weight: parameter [out_features, in_features / m * n], the survivors of every row in order.
        bits: parameter that never trains, uint8 [out_features, ceil(in_features / 8)]: the mask. (A parameter, because FSDP shards
            parameters and leaves buffers whole.)
        bias: parameter [out_features] or None.

    `state_dict()` holds weight and bits. `load_state_dict` also takes a dense weight, of which nothing may lie off the mask.
    """

    weight: Tensor
    bits: Tensor
    bias: Tensor | None

    def __init__(self, weight: NMTensor, bias: Tensor | None = None, *, trains: bool = True):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.n, self.m = weight.n, weight.m
        self.weight = nn.Parameter(weight.values, requires_grad=trains)
        self.bits = nn.Parameter(weight.mask.bits, requires_grad=False)
        self.register_parameter("bias", None if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias))
        if isinstance(bias, nn.Parameter):
            self.bias = bias

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        return torch.Size((self.out_features, self.in_features))

    def nm_weight(self) -> NMTensor:
        """The weight as `ops.nm_linear` takes it; a sharded one put together."""
        bits = whole(self.bits.detach())
        return NMTensor._of(whole(self.weight), BitMask._of(bits, self.shape), self.n, self.m)

    @property
    def mask(self) -> BitMask:
        """Which entries survive: a view of `bits`."""
        return self.nm_weight().mask

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The dense weight, new memory outside of autograd."""
        return self.nm_weight().detach().to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return ops.nm_linear(x, self.nm_weight(), self.bias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **options: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is not None and f"{prefix}bits" not in state_dict and tuple(given.shape) == tuple(self.shape):
            own = self.nm_weight().detach()
            mask = own.mask.to(given.device)
            values = ops.nm_compress(given.detach(), mask, self.n, self.m).values
            check_zeros(f"{prefix}weight", given, mask)
            state_dict[f"{prefix}weight"] = values
            state_dict[f"{prefix}bits"] = self.bits
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.n}:{self.m}, bias={self.bias is not None}"


def compressed_layers(model: nn.Module) -> dict[str, NMLinear]:
    """Name of the weight -> layer, of every `NMLinear` of a model."""
    layers = ((_plain(name), module) for name, module in model.named_modules())
    return {f"{name}.weight" if name else "weight": module for name, module in layers if isinstance(module, NMLinear)}


def _plain(name: str) -> str:
    """A module's name without what activation checkpointing puts into it."""
    return name.replace("_checkpoint_wrapped_module.", "")


def dense_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """What `state_dict()` of the dense model would be, on the CPU, with zeros where pruned.

    Args:
        keep: of a sharded model every process must call; where `keep` is False what it helps to put together is not kept.
    """
    layers = compressed_layers(model)
    bits = {name.removesuffix("weight") + "bits" for name in layers}
    owners = {_plain(name): id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    made: dict[int | str, Tensor] = {}
    out = {}
    for name, tensor in model.state_dict().items():
        name = _plain(name)
        if name in bits:
            continue
        # What is tied stays tied.
        key = owners.get(name, name)
        if key not in made:
            dense = layers[name].to_dense() if name in layers else whole(tensor.detach())
            made[key] = dense.cpu() if keep else dense.new_empty(0)
        out[name] = made[key]
    return out


class CompressedNM:
    """Compresses a pruned model's linear layers in place.

    Args:
        model: its parameters' names are the masks' names. May be on meta: then only shapes are made.
        masks: parameter name -> BitMask of what pruning left. n, m: the pattern.

    Attributes:
        layers: parameter name -> NMLinear. dense: name -> why that weight stays dense, with its mask.

    Whether a weight trains stays as it was (`requires_grad`): `parametrize.full_weights(model, masks, others=False)` freezes
    embeddings, norms and head.

    Raises:
        ValueError: a mask is of no parameter, m does not divide the columns, a mask is not n:m, a weight is not zero off its mask,
        nothing can be compressed. All before anything is changed.

    Example:
        >>> pruned = load_checkpoint("llama-2to4", dtype=torch.bfloat16)
        >>> parametrize.full_weights(pruned.model, pruned.masks, others=False)
        >>> compressed = parametrize.CompressedNM(pruned.model, pruned.masks, 2, 4)
        >>> optimizer = optim.MaskedAdamW([p for p in pruned.model.parameters() if p.requires_grad], lr=1e-5)
        >>> ...
        >>> save_checkpoint("out", pruned.model, pruned.tokenizer, masks=pruned.masks, pruning=pruned.pruning)
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, BitMask], n: int, m: int):
        self.model, self.n, self.m = model, n, m
        self.layers: dict[str, NMLinear] = {}
        chosen, self.dense = self.check(model, masks, n, m)
        for name, layer, mask in chosen:
            self._replace(name, layer, mask)

    @classmethod
    def check(
        cls, model: nn.Module, masks: Mapping[str, BitMask], n: int, m: int
    ) -> tuple[list[tuple[str, nn.Linear, BitMask]], dict[str, str]]:
        """What would be compressed, and name -> why not of the others; raises as the constructor does and changes nothing."""
        dense: dict[str, str] = {}
        chosen = list(cls._choose(model, masks, dense))
        for name, layer, mask in chosen:
            _check_layer(name, layer, mask, n, m)
        if not chosen:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
            raise ValueError(f"masks: none is of a layer that can be compressed ({why or 'there are no masks'})")
        return chosen, dense

    @staticmethod
    def _choose(
        model: nn.Module, masks: Mapping[str, BitMask], dense: dict[str, str]
    ) -> Iterator[tuple[str, nn.Linear, BitMask]]:
        """The layers to compress; notes why the others are not."""
        owners: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
        modules = dict(model.named_modules())
        known = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            if name not in known:
                raise ValueError(f"masks: {name!r} is no parameter of the model; names look like {next(iter(known))!r}")
            module = modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                dense[name] = f"of a {type(module).__name__}, not of an nn.Linear"
            elif owners[id(module.weight)] > 1:
                dense[name] = "tied to another weight"
            elif any(module is end for end in ends):
                dense[name] = "the losses read this embedding by itself"
            else:
                yield name, module, mask

    @torch.no_grad()
    def _replace(self, name: str, layer: nn.Linear, mask: BitMask) -> None:
        weight = layer.weight
        if weight.is_meta:
            shape = (mask.rows, mask.cols // self.m * self.n)
            bits = BitMask._of(torch.empty_like(mask.bits, device="meta"), mask.shape)
            packed = NMTensor._of(torch.empty(shape, dtype=weight.dtype, device="meta"), bits, self.n, self.m)
        else:
            own = mask.to(weight.device)
            # The bits are the layer's own: a mask that is changed later must not change it.
            packed = ops.nm_compress(weight, own.clone() if own.bits is mask.bits else own, self.n, self.m)
        made = NMLinear(packed, layer.bias, trains=weight.requires_grad).train(layer.training)
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(self.model.get_submodule(parent), child, made)
        self.layers[name] = made

    @torch.no_grad()
    def restore(self) -> nn.Module:
        """The layers as nn.Linear again, one at a time; returns the model."""
        for name, layer in self.layers.items():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.to_dense(), requires_grad=layer.weight.requires_grad)
            plain.bias = layer.bias  # type: ignore[assignment]
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            setattr(self.model.get_submodule(parent), child, plain.train(layer.training))
        self.layers = {}
        return self.model

    def compact_mask(self, name: str, mask: BitMask) -> BitMask | None:
        """A mask of the dense shape as one of the survivors [rows, cols / m * n]; None where every survivor is set.

        Args:
            name: of the weight; of one that stays dense the mask itself is returned.

        Raises:
            ValueError: of another shape, or with bits that pruning did not leave.
        """
        layer = self.layers.get(name)
        if layer is None:
            return mask
        kept = layer.mask
        mask = mask.to(kept.device)
        if mask.shape != kept.shape:
            raise ValueError(f"mask: of shape {tuple(mask.shape)}, but {name} is of shape {tuple(kept.shape)}")
        if not bool((kept & mask).equal(mask)):
            raise ValueError(f"mask: has bits that the mask of pruning of {name} has not")
        if kept.equal(mask):
            return None
        values = (layer.out_features, layer.in_features // self.m * self.n)
        return BitMask.pack(mask.unpack()[kept.unpack()].view(values))

    def expand_mask(self, name: str, mask: BitMask) -> BitMask:
        """The opposite of `compact_mask`: a mask of the survivors as one of the dense shape."""
        layer = self.layers.get(name)
        if layer is None:
            return mask
        kept = layer.mask.unpack()
        chosen = mask.unpack().to(kept.device).flatten()
        return BitMask.pack(torch.zeros_like(kept).masked_scatter_(kept, chosen))

    def compact(self, name: str, values: Tensor) -> Tensor:
        """Numbers of the dense shape, or one for each survivor, in the shape of the survivors (`lr_scale`)."""
        layer = self.layers.get(name)
        if layer is None:
            return values
        kept = layer.mask
        if values.shape == kept.shape:
            values = values[kept.unpack().to(values.device)]
        return values.reshape(layer.out_features, layer.in_features // self.m * self.n)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed layers: values and bits."""
        return sum(layer.weight.nbytes + layer.bits.nbytes for layer in self.layers.values())


def _check_layer(name: str, layer: nn.Linear, mask: BitMask, n: int, m: int) -> None:
    if not isinstance(mask, BitMask):
        raise TypeError(f"masks: want a BitMask for {name}, got {type(mask).__name__} (BitMask.pack(tensor))")
    if tuple(mask.shape) != tuple(layer.weight.shape):
        raise ValueError(
            f"masks: {name} has a mask of shape {tuple(mask.shape)}, its weight {tuple(layer.weight.shape)}"
        )
    if mask.cols % m:
        raise ValueError(
            f"pattern: {m} does not divide the {mask.cols} columns of {name}, so it cannot be stored {n}:{m}; leave it out of the "
            "masks, or train dense with masks (compressed=false)"
        )
    if mask.bits.is_meta:
        return
    try:
        ops.nm_tensor.check_mask(mask.bits, mask.cols, n, m, "mask")
    except ValueError as error:
        raise ValueError(f"masks: {name}: {error}") from None
    if not layer.weight.is_meta:
        check_zeros(name, layer.weight.detach(), mask.to(layer.weight.device))


def check_zeros(name: str, weight: Tensor, mask: BitMask) -> None:
    stray = int(((weight != 0) & ~mask.unpack()).sum())
    if stray:
        raise ValueError(
            f"{name}: {stray:,} of {weight.numel():,} weights lie off the mask and are not zero; are these the masks of this model?"
        )
