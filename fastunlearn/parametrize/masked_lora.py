"""MaskedLoraConfig: a PEFT adapter whose product B A reaches only the entries of a mask, W + s (B A) o M (SPARE, arXiv 2602.07058).

Three variants, as SPARE has them: per_weight (a mask for every weight), per_module (an ordinary adapter on modules chosen by name)
and dense (an ordinary adapter on modules chosen by pattern). Importing this file registers the adapter with PEFT under a type of its
own: a checkpoint of it loads only where fastunlearn was imported, so that nobody loses the masks without a word.

The layers compute with `ops.masked_lora_linear` and `masked_lora_conv2d`: the base layer's product and the adapter's are one.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastunlearn import ops
from fastunlearn.objectives.language import closest
from fastunlearn.ops.mask import BitMask, rows_cols

if not hasattr(BaseTuner, "_replace_module"):
    import peft

    raise ImportError(f"MaskedLoraConfig needs peft >= 0.18, this is {peft.__version__}: pip install -U peft")

#: PEFT's name of the adapter: what a KeyError says where fastunlearn was not imported.
PEFT_TYPE = "FASTUNLEARN_MASKED_LORA"
VARIANTS = ("per_weight", "per_module", "dense")
INITS = ("gaussian", "kaiming", "random")


@dataclass
class MaskedLoraConfig(PeftConfig):
    """Configuration of a masked adapter, for `peft.get_peft_model`, diffusers' `add_adapter` and the trainers' `peft_config`.

    Example:
        >>> masks = dict(zip(names, ops.topk_mask(scores, density=0.75)))   # parameter name -> BitMask
        >>> unet = get_peft_model(unet, MaskedLoraConfig(r=4, lora_alpha=4, masks=masks, target_modules=["to_q", "to_k", "to_v"]))
    """

    r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The adapter is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in [0, 1)."})
    target_modules: Any = field(
        default=None,
        metadata={
            "help": "Names, endings of names, a regular expression or 'all-linear'. None: every linear layer and convolution whose "
            "mask has a bit set; for transformers' models without masks, PEFT's own choice."
        },
    )
    exclude_modules: Any = field(default=None, metadata={"help": "Names or a regular expression of what is left out."})
    variant: str | None = field(
        default=None, metadata={"help": "per_weight, per_module or dense; None: per_weight where there are masks."}
    )
    masks: Any = field(
        default=None,
        repr=False,
        metadata={
            "help": "Parameter name -> BitMask of its shape, or bool [tiles of rows, tiles of columns] with `block`. Saved as buffers with "
            "the adapter, not in this file."
        },
    )
    block: int | None = field(
        default=None, metadata={"help": "Masks are of tiles of this side, entries; None: of single entries."}
    )
    init_lora_weights: str = field(
        default="gaussian",
        metadata={
            "help": "gaussian (A ~ N(0, 1/r), B = 0), kaiming (A uniform, B = 0), random (both: not the base at first)."
        },
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Name or pattern -> another rank."})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Name or pattern -> another alpha."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases train: none, all or lora_only."})
    modules_to_save: Any = field(default=None, metadata={"help": "Other modules that train and are saved whole."})
    modules: list[str] | None = field(default=None, metadata={"help": "Full names of the adapted modules; filled in."})
    base: dict[str, Any] | None = field(default=None, metadata={"help": "Which weights it was made for; filled in."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, PEFT_TYPE)
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r: want a rank of at least 1, got {self.r!r}")
        for name, rank in self.rank_pattern.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"rank_pattern: {name!r} wants a rank of at least 1, got {rank!r}")
        if not isinstance(self.lora_alpha, int | float) or not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha: want a finite number, got {self.lora_alpha!r}")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: want a number in [0, 1), got {self.lora_dropout!r}")
        if self.variant is None:
            self.variant = "per_weight" if self.masks is not None else "dense"
        for name, known in (("variant", VARIANTS), ("init_lora_weights", INITS)):
            value = str(getattr(self, name))
            if value not in known:
                raise ValueError(f"{name}: {value!r} is unknown; {closest(value, list(known))}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias: want none, all or lora_only, got {self.bias!r}")
        if self.variant == "per_weight" and self.masks is None and self.base is None:
            raise ValueError("masks: variant per_weight wants parameter name -> BitMask, got None")
        if self.variant != "per_weight" and self.masks is not None:
            raise ValueError(f"masks: variant {self.variant} is an ordinary adapter and takes none")
        if (
            self.variant == "per_module"
            and not isinstance(self.target_modules, list | tuple | set)
            and not self.modules
        ):
            raise ValueError(
                f"target_modules: variant per_module wants the list of chosen modules, got {self.target_modules!r}"
            )
        if self.block is not None and (
            isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1
        ):
            raise ValueError(f"block: want a side of at least 1, or None, got {self.block!r}")
        if self.masks is not None:
            self.masks = _checked_masks(self.masks, self.block)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Without the masks, which are saved as tensors."""
        masks, self.masks = self.masks, None
        try:
            out = super().to_dict()
        finally:
            self.masks = masks
        out.pop("masks")
        out["peft_type"] = PEFT_TYPE
        return out


def _near(name: str, known: Sequence[str]) -> str:
    """The closest names, or a few of very many."""
    said = closest(name, list(known))
    return said if said.startswith("did") or len(known) <= 8 else "its modules look like " + ", ".join(list(known)[-3:])


def _plain(name: str) -> str:
    """A module's name in the base model, from a parameter's or module's name that PEFT may have wrapped."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".weight")


def _checked_masks(masks: Any, block: int | None) -> dict[str, Any]:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: want parameter name -> BitMask, got {type(masks).__name__}")
    for name, mask in masks.items():
        if block is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 2):
            raise TypeError(
                f"masks[{name!r}]: with block={block} want bool [tiles of rows, tiles of columns], got {type(mask).__name__}"
            )
        if block is None and not isinstance(mask, BitMask):
            raise TypeError(f"masks[{name!r}]: want a BitMask, got {type(mask).__name__} (BitMask.pack(tensor))")
    return dict(masks)


# ---- the base it was made for ---------------------------------------------------------------------------------------------


def _probe(weights: Mapping[str, Tensor]) -> list[float]:
    """An entry of every weight, by which bases of two types can be compared."""
    out = []
    for i, name in enumerate(sorted(weights)):
        flat = weights[name].detach().reshape(-1)
        if flat.numel():
            out.append(float(flat[(i * 2654435761) % flat.numel()]))
    return out


def base_identity(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an adapter says of the weights it was made for: a hash of all their bytes, their type, an entry of each."""
    digest = hashlib.sha256()
    for name in tqdm(sorted(weights), desc="hashing the base", disable=None, delay=3, leave=False):
        weight = weights[name].detach()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        flat = weight.contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.cpu().numpy().data)
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})
    return {"sha256": digest.hexdigest(), "dtypes": dtypes, "probe": _probe(weights)}


def check_base(weights: Mapping[str, Tensor], made_for: Mapping[str, Any]) -> None:
    """Whether these are the weights that `made_for` describes: bit for bit, or as another element type rounds them.

    Raises:
        ValueError: other weights.
    """
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})
    if dtypes == made_for["dtypes"]:
        if base_identity(weights)["sha256"] == made_for["sha256"]:
            return
        why = "their hash differs"
    else:
        epsilon = max(torch.finfo(getattr(torch, d)).eps for d in (*dtypes, *made_for["dtypes"]))
        mine, theirs = _probe(weights), made_for["probe"]
        wrong = [p for p in zip(mine, theirs) if not abs(p[0] - p[1]) <= 2 * epsilon * abs(p[1]) + 1e-7]
        if not wrong and len(mine) == len(theirs):
            return
        why = f"{len(wrong)} of {len(theirs)} sampled entries differ by more than a rounding to {dtypes[0]}"
        if len(mine) != len(theirs):
            why = f"an entry of each of {len(theirs)} weights is known, these are {len(mine)}"
    raise ValueError(
        f"base: the adapter was made for other weights than this model's ({why}); load the model it was trained on"
    )


# ---- layers ---------------------------------------------------------------------------------------------------------------


class MaskedLoraLayer(nn.Module, BaseTunerLayer):
    """A linear layer or convolution with masked adapters."""

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("lora_mask_bits", "r", "scaling", "lora_dropout", "block")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, rank: int, alpha: float, config: MaskedLoraConfig, mask: Any
    ):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ParameterDict({}), nn.ParameterDict({})
        self.lora_mask_bits = BufferDict({}, persistent=True)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.block: dict[str, int | None] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rank, alpha, config, mask)

    def update_layer(
        self, adapter_name: str, rank: int, alpha: float, config: MaskedLoraConfig, mask: BitMask | Tensor | None
    ) -> None:
        """Adds an adapter; a per_weight one without a mask gets its bits when its file is read."""
        weight = self._base.weight
        rows, cols = rows_cols(weight.shape)
        like = {"device": weight.device, "dtype": weight.dtype}
        self.r[adapter_name], self.scaling[adapter_name] = rank, float(alpha) / rank
        self.lora_dropout[adapter_name] = float(config.lora_dropout)
        self.block[adapter_name] = config.block
        A, B = torch.empty(rank, cols, **like), torch.zeros(rows, rank, **like)
        if config.init_lora_weights == "kaiming":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        else:
            nn.init.normal_(A, std=1 / rank)
        if config.init_lora_weights == "random":
            nn.init.normal_(B, std=1 / rank)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = nn.Parameter(A), nn.Parameter(B)
        if config.variant == "per_weight":
            if config.block is not None:
                shape, dtype = _tiles(rows, cols, config.block), torch.bool
            else:
                shape, dtype = (rows, (cols + 7) // 8), torch.uint8
            bits = mask.bits if isinstance(mask, BitMask) else torch.zeros(shape, dtype=dtype) if mask is None else mask
            self.lora_mask_bits[adapter_name] = bits.clone().to(weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    def mask(self, adapter_name: str) -> BitMask | None:
        """The adapter's mask, entry by entry; None for one without."""
        if adapter_name not in self.lora_mask_bits:
            return None
        block = self.block[adapter_name]
        if block is not None:
            rows, cols = rows_cols(self._base.weight.shape)
            tiles = self.lora_mask_bits[adapter_name].repeat_interleave(block, 0).repeat_interleave(block, 1)
            return BitMask.pack(tiles[:rows, :cols].reshape(self._base.weight.shape))
        return BitMask._of(self.lora_mask_bits[adapter_name], self._base.weight.shape)

    def _factors(self, adapter_name: str, mask: bool = True) -> tuple[Tensor, Tensor, BitMask | None, float]:
        if adapter_name not in self.lora_A:
            raise ValueError(f"adapter {adapter_name!r}: not on this layer, which has {sorted(self.lora_A)}")
        bits = self.mask(adapter_name) if mask else None
        return self.lora_A[adapter_name], self.lora_B[adapter_name], bits, self.scaling[adapter_name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s (B A) o M, of the base weight's shape and the factors' type."""
        A, B, mask, scaling = self._factors(adapter)
        nothing = A.new_zeros(()).expand(self._base.weight.shape)
        return ops.masked_lora_weight(nothing, A, B, mask, scaling)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the adapters into the base weight; entries outside of their masks keep their bits.

        Raises:
            ValueError: with `safe_merge`, a merged weight that is not finite.
        """
        base = self._base
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            merged = ops.masked_lora_weight(base.weight.detach(), *self._factors(name))
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"adapter {name!r}: the merged weight holds NaN or infinity")
            if self._unmerged is None:
                # Subtracting again would not give the same bits.
                self._unmerged = base.weight.data
            base.weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """The base weight as it was, bit for bit."""
        if self._unmerged is not None:
            self._base.weight.data = self._unmerged
        self._unmerged = None
        self.merged_adapters.clear()

    def _apply_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        dropout = self.lora_dropout[name] if self.training else 0.0
        base, (A, B, _, scaling), block = self._base, self._factors(name, mask=False), self.block[name]
        mask = self.mask(name) if block is None else self.lora_mask_bits[name]
        factors, tile = (A, B, mask, scaling), block or 128
        if isinstance(base, nn.Conv2d):
            padding: Any = base.padding
            if base.padding_mode != "zeros":
                x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
            return ops.masked_lora_conv2d(
                x, weight, *factors, bias, base.stride, padding, base.dilation, base.groups, dropout=dropout, block=tile
            )
        return ops.masked_lora_linear(x, weight, *factors, bias, dropout=dropout, block=tile)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: a batch of several adapters is not possible with masked adapters")
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.lora_A]
        if not names:
            return cast(Any, self.base_layer)(x, **kwargs)
        base = self._base
        y = self._apply_layer(x, base.weight, base.bias, names[0])
        for name in names[1:]:
            y = y + self._apply_layer(x, base.weight.new_zeros(()).expand(base.weight.shape), None, name)
        return y

    def __repr__(self) -> str:
        return "masked_lora." + super().__repr__()


class MaskedLoraModel(BaseTuner):
    """PEFT's tuner of `MaskedLoraConfig`."""

    prefix = "lora_"
    tuner_layer_cls = MaskedLoraLayer
    target_module_mapping = cast(Any, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        layers = {
            _plain(name): module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for name, module in self.model.named_modules()
            if name
        }
        if peft_config.modules is None:
            masks = None if peft_config.masks is None else _by_module(peft_config.masks, self.model)
            if peft_config.target_modules is None and masks is None:
                peft_config = super()._prepare_adapter_config(peft_config, model_config)
            peft_config = _maybe_include_all_linear_layers(peft_config, self.model)
            peft_config.modules = _chosen(peft_config, layers, masks)
        absent = [name for name in peft_config.modules if name not in layers]
        if absent:
            raise ValueError(
                f"modules: the adapter has {len(absent)} modules that this model has not, the first is {absent[0]!r}; "
                f"{_near(absent[0], list(layers))}"
            )
        _check_layers({name: layers[name] for name in peft_config.modules})
        if peft_config.target_modules is None or peft_config.variant == "per_module":
            peft_config.target_modules = set(peft_config.modules)
        weights = {name: cast(Any, layers[name]).weight for name in peft_config.modules}
        if not any(w.is_meta for w in weights.values()):
            if peft_config.base is None:
                peft_config.base = base_identity(weights)
            else:
                check_base(weights, peft_config.base)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return _plain(key) in peft_config.modules

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, **_: Any
    ) -> None:
        name = _plain(current_key)
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        mask = None if config.masks is None else _by_module(config.masks, None)[name]
        if isinstance(target, MaskedLoraLayer):
            target.update_layer(adapter_name, rank, alpha, config, mask)
            return
        layer = MaskedLoraLayer(target, adapter_name, rank, alpha, config, mask)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _tiles(rows: int, cols: int, block: int) -> tuple[int, int]:
    return -(-rows // block), -(-cols // block)


def _by_module(masks: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """Masks by their module's name; with a model, only names of its parameters.

    Raises:
        ValueError: names that are no parameters of the model.
    """
    if model is not None:
        known = {_plain(name) for name, _ in model.named_parameters()}
        unknown = [name for name in masks if _plain(name) not in known]
        if unknown:
            raise ValueError(
                f"masks: {len(unknown)} belong to no parameter of the model, the first is {unknown[0]!r}; "
                f"{_near(_plain(unknown[0]), sorted(known))}"
            )
    return {_plain(name): mask for name, mask in masks.items()}


def _chosen(config: Any, layers: Mapping[str, nn.Module], masks: Mapping[str, Any] | None) -> list[str]:
    """Full names of the modules that get an adapter.

    Raises:
        ValueError: nothing is chosen, a module without a mask, a mask of another shape, masks without a set bit.
    """
    if config.variant == "per_module":
        names = [_plain(name) for name in config.target_modules]
        unknown = [name for name in names if name not in layers]
        if unknown:
            raise ValueError(
                f"target_modules: the model has no module {unknown[0]!r}; {_near(unknown[0], list(layers))}"
            )
        return sorted(names)
    if config.target_modules is None:
        assert masks is not None
        names = [n for n, layer in layers.items() if n in masks and isinstance(layer, nn.Linear | nn.Conv2d)]
    else:
        names = [name for name in layers if check_target_module_exists(config, name)]
        _some = sorted(config.target_modules)[0] if isinstance(config.target_modules, set) else config.target_modules
        if not names:
            ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ValueError(f"target_modules: the model has no module {_some!r}; {_near(str(_some), ends)}")
    if masks is None:
        return names
    for name in names:
        if name not in masks:
            raise ValueError(f"masks: target module {name!r} has no mask; give one for {name + '.weight'!r}")
        weight = getattr(layers[name], "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if shape is None:
            continue
        want = shape if config.block is None else _tiles(*rows_cols(shape), config.block)
        if tuple(masks[name].shape) != want:
            tiles = "" if config.block is None else f", {list(want)} tiles of {config.block}"
            raise ValueError(f"masks: the mask of {name!r} is {tuple(masks[name].shape)}, its weight {shape}{tiles}")
    kept = [name for name in names if bool(getattr(masks[name], "bits", masks[name]).any())]
    if not kept:
        raise ValueError("masks: no bit is set in any target module, so nothing could move (an empty saliency?)")
    return kept


def _check_layers(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(
                f"target_modules: {name!r} is a {type(layer).__name__}; masked adapters go on Linear and Conv2d"
            )
        if not layer.weight.is_floating_point():
            raise TypeError(
                f"target_modules: {name!r} is quantised ({layer.weight.dtype}); load the model without quantisation"
            )


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLoraLayer]]:
    """(name in the base model, layer) of all adapted layers of a model.

    Raises:
        ValueError: there are none.
    """
    found = [(_plain(name), m) for name, m in model.named_modules() if isinstance(m, MaskedLoraLayer)]
    if not found:
        raise ValueError("model: carries no masked adapter (get_peft_model(model, MaskedLoraConfig(...)) adds one)")
    return iter(found)


# ---- pruned models --------------------------------------------------------------------------------------------------------


def within_survivors(config: Any, survivors: Mapping[str, BitMask]) -> MaskedLoraConfig:
    """A configuration whose adapter reaches no entry that pruning removed, so that the merged model is as sparse as the base.

    Args:
        config: without masks it takes the survivors as they are; its own masks lose what pruning removed.
        survivors: parameter name -> mask of what pruning left.

    Raises:
        ValueError: an adapter of another kind, which would fill the zeros; tiles; modules that were not pruned.
    """
    if not isinstance(config, MaskedLoraConfig):
        raise ValueError(
            f"peft_config: a {type(config).__name__} would fill a pruned model's zeros when it is merged; want a MaskedLoraConfig, which "
            "keeps them, or train the full weights (no peft_config)"
        )
    if config.block is not None:
        raise ValueError(
            "peft_config: tiles hold entries that pruning removed; want masks of single entries (block=None)"
        )
    masks = dict(survivors)
    if config.masks is not None:
        own = {f"{_plain(name)}.weight": mask for name, mask in config.masks.items()}
        absent = [name for name in own if name not in survivors]
        if absent:
            raise ValueError(
                f"peft_config: {absent[0]!r} has a mask and was not pruned; an adapter there is no part of the pattern"
            )
        masks = {
            name: BitMask.pack(mask.unpack() & survivors[name].unpack().to(mask.device)) for name, mask in own.items()
        }
    out = copy.copy(config)
    out.masks, out.variant = masks, "per_weight"
    return out


@torch.no_grad()
def check_merged(model: nn.Module, survivors: Mapping[str, BitMask]) -> None:
    """Whether merging every adapter of the model leaves what pruning removed at zero.

    Raises:
        ValueError: some entries would be filled; the layer is named.
    """
    for name, layer in masked_layers(model):
        kept = survivors.get(f"{name}.weight")
        for adapter in () if kept is None else layer.lora_A:
            assert kept is not None
            filled = int((layer.get_delta_weight(adapter)[~kept.unpack().to(layer._base.weight.device)] != 0).sum())
            if filled:
                raise ValueError(
                    f"adapter {adapter!r}: merged, it fills {filled:,} entries of {name} that pruning removed"
                )


def _register() -> None:
    """PEFT asks its enumeration of types for ours in several places, and has no way to add one."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
        setattr(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
    kind: Any = PeftType(PEFT_TYPE)
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = MaskedLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = MaskedLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = MaskedLoraModel.prefix


_register()

__all__: Sequence[str] = ["PEFT_TYPE", "MaskedLoraConfig", "MaskedLoraLayer", "MaskedLoraModel", "masked_layers"]
