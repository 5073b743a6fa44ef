"""The last hidden states of a causal language model, at chosen positions, and losses made of them without the logits.

A hook on the output layer sees its input inside the model's own forward pass (so an adapter, autocast and DDP's wrapper stay in
place), hands the states that are wanted and the layer's weight to a loss (`ops.linear_nll`, `ops.linear_divergence`), and gives the
layer one state only: logits of a batch are never made.

This needs a plain linear output layer and logits that are at most scaled and soft-capped behind it (Llama, Qwen, Gemma, Cohere,
Granite, GPT-2). Whether that holds is not believed but tried, once a model, on a few tokens of its first pass; where it does not, the loss is made
from logits of the chosen positions, and a warning says why.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunlearn._modes import evaluating

T = TypeVar("T")
_PROBE = 8  # tokens
#: tokens of a row up to which plain attention beats torch's flash attention in bf16 on a CPU, forward and backward together
_SHORT = 128


class States(NamedTuple):
    """What enters the output layer at n positions, and the layer."""

    hidden: Tensor  #: [n, width]
    weight: Tensor  #: [vocabulary, width]
    bias: Tensor | None  #: [vocabulary]
    scale: float  #: the logits are multiplied by it
    softcap: float | None  #: then capped: softcap * tanh(logits / softcap)


_transforms: WeakKeyDictionary[nn.Module, tuple[float, float | None] | str] = WeakKeyDictionary()
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def unwrapped(model: Any) -> Any:
    """The model of transformers (or PEFT) inside DDP's wrapper."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    return model


def head_of(model: Any) -> nn.Module:
    """The output layer.

    Raises:
        ValueError: the model has none.
    """
    head = unwrapped(model).get_output_embeddings()
    if head is None:
        raise ValueError("model: has no output layer (get_output_embeddings() is None); want a causal language model")
    return head


@contextmanager
def hooked(layer: nn.Module, kept: Tensor, use: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The layer is called with use(its input at the positions [rows, length] where `kept` is True) [1, any, width]."""

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if hidden.dim() != 3 or hidden.shape[:2] != kept.shape:
            raise ValueError(
                f"model: its output layer is called with hidden states {tuple(hidden.shape)}, "
                f"want ({kept.shape[0]}, {kept.shape[1]}, hidden)"
            )
        # Of a model on several devices the output layer may be on another one than the tokens.
        return (use(hidden[kept.to(hidden.device)]).unsqueeze(0), *args[1:])

    handle = layer.register_forward_pre_hook(_uncompiled(select))
    try:
        yield
    finally:
        handle.remove()


def _uncompiled(hook: T) -> T:
    """A hook that torch.compile leaves alone, with the layer that it is on.

    It selects as many positions as a batch has answer tokens, which breaks a graph, and its parts would be compiled for every term: nine
    graphs of a run, not four. The rest of the model is compiled as it would be.
    """
    # Where the compiler was never imported nothing is compiled, and importing it takes a second.
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def _attention(model: Any, batch: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """The kernel of scaled_dot_product_attention: plain products where torch would take a slower one, else torch's choice.

    On a CPU the backward pass of flash attention in bf16 takes up to three times as long as that of plain attention for rows
    as short as a question and its answer; fp32 is the other way round.
    """
    ids = batch["input_ids"]
    if ids.device.type != "cpu" or not torch.is_grad_enabled() or ids.shape[-1] > _SHORT:
        return nullcontext()
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return nullcontext()  # the second forward pass would not know of this one's choice
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else next(model.parameters()).dtype
    return sdpa_kernel(SDPBackend.MATH) if dtype == torch.bfloat16 else nullcontext()


def forward(model: Any, batch: Mapping[str, Tensor]) -> Any:
    """A pass without a cache; position_ids only where the batch has some."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with _attention(model, batch):
        return model(**given, use_cache=False)


def _unusable(head: nn.Module) -> str | None:
    """None, or why the layer's weight does not say what the layer does."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"its output layer is a {type(head).__name__}, not a plain linear one"
    if not head.weight.is_floating_point() or head.weight.dim() != 2:
        return "the weight of its output layer is quantised"
    if hasattr(head.weight, "to_local") and head.weight.requires_grad:
        # Frozen it is whole inside the forward pass, and the backward pass of the losses does not ask for it.
        return "the weight of its output layer is sharded, and trains"
    strange = [hook for hook in head._forward_hooks.values() if not (_of_fsdp(hook) and _stays_whole(head))]
    return "its output layer has forward hooks" if strange else None


def _of_fsdp(hook: Any) -> bool:
    """Whether a hook is `fully_shard`'s own: it lets the output pass."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _stays_whole(head: nn.Module) -> bool:
    """Whether `fully_shard` leaves the weight whole from the forward pass to the backward pass, as accelerate's last unit does."""
    state: Any = getattr(head, "_get_fsdp_state", lambda: None)()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return all(getattr(group, "post_forward_mesh_info", head) is None for group in groups)


def _expected(config: Any) -> tuple[float, float | None]:
    """What a configuration says of the logits: (scale, soft cap)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return float(scale) / float(divisor), None if not cap else float(cap)


@torch.no_grad()
def _judge(model: Any, raw: list[Tensor], logits: Tensor) -> tuple[float, float | None] | str:
    """(scale, soft cap) if they make the model's logits of what its output layer says, for a few tokens; else a reason."""
    if len(raw) != 1 or raw[0].shape != logits.shape:
        return "its output layer is not called once, with all positions"
    said, logits = raw[0].float(), logits.float()
    for scale, cap in (_expected(unwrapped(model).config), (1.0, None)):
        z = said * scale
        z = z if cap is None else cap * torch.tanh(z / cap)
        if float((z - logits).abs().max()) <= 2e-2 * float(logits.abs().max()) + 1e-6:
            return scale, cap
    return "its logits are not those of its output layer, scaled and capped as its configuration says"


@contextmanager
def _output_of(head: nn.Module, into: list[Tensor]) -> Iterator[None]:
    handle = head.register_forward_hook(_uncompiled(lambda _, args, out: into.append(out.detach().clone())))
    try:
        yield
    finally:
        handle.remove()


def why_logits(model: Any, batch: Mapping[str, Tensor]) -> str | None:
    """None where losses are made of hidden states; else why logits are needed.

    Args:
        batch: input_ids, attention_mask, of which a few tokens are tried.
    """
    head = head_of(model)
    reason = _unusable(head)
    if reason is not None:
        return reason
    if head not in _transforms:
        few = {name: batch[name][:1, :_PROBE] for name in ("input_ids", "attention_mask")}
        raw: list[Tensor] = []
        inner = unwrapped(model)
        with torch.no_grad(), evaluating(inner), _output_of(head, raw):
            _transforms[head] = _judge(model, raw, forward(inner, few).logits)
    return known_reason(model)


def known_reason(model: Any) -> str | None:
    """`why_logits` without trying; None also where nothing was tried yet."""
    head = head_of(model)
    reason, found = _unusable(head), _transforms.get(head)
    return reason or (found if isinstance(found, str) else None)


def _say(head: nn.Module, model: Any, reason: str) -> None:
    said = _warned.setdefault(head, set())
    if reason not in said:
        said.add(reason)
        name = type(unwrapped(model)).__name__
        warnings.warn(f"{name}: losses are made from logits, as {reason}; this takes more memory", stacklevel=4)


def at_head(
    model: Any,
    batch: Mapping[str, Tensor],
    kept: Tensor,
    from_states: Callable[[States], T],
    from_logits: Callable[[Tensor], T],
    whole: bool = False,
) -> T:
    """A loss of the positions where `kept` [rows, length] is True, row-major; differentiable.

    Args:
        model: a causal language model of transformers, maybe wrapped (PEFT, DDP).
        batch: input_ids, attention_mask: int64 [rows, length].
        from_states: called inside the forward pass. from_logits: called with [n, vocabulary] where `why_logits` says why, or where
            `whole` asks for it.
    """
    head = head_of(model)
    reason = known_reason(model)
    if reason is not None or whole:
        if reason is not None:
            _say(head, model, reason)
        return from_logits(logits_at(model, batch, kept))
    out: list[T] = []
    raw: list[Tensor] = []
    found: Any = _transforms.get(head)
    transform = _expected(unwrapped(model).config) if found is None else found

    def use(hidden: Tensor) -> Tensor:
        weight: Any = head.weight
        bias: Any = head.bias
        out.append(from_states(States(hidden, weight, bias, *transform)))
        return hidden[: 1 if found else _PROBE]

    # The first pass tries what it assumes on a few of its own logits: a pass of its own would be seen by other hooks.
    with nullcontext() if found else _output_of(head, raw), hooked(head, kept, use):
        logits = forward(model, batch).logits
    if found is None:
        _transforms[head] = _judge(model, raw, logits.detach())
        if _transforms[head] != transform:
            return at_head(model, batch, kept, from_states, from_logits)
    return out[0]


def logits_at(model: Any, batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """Logits [n, vocabulary] of the positions where `kept` is True, in the model's dtype."""
    with hooked(head_of(model), kept, lambda hidden: hidden):
        return forward(model, batch).logits[0]


@torch.no_grad()
def last_states(model: Any, batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """What enters the output layer where `kept` is True, [n, width]; no gradient, dropout off."""
    out: list[Tensor] = []

    def use(hidden: Tensor) -> Tensor:
        out.append(hidden)
        return hidden[:1]

    with evaluating(model), hooked(head_of(model), kept, use):
        forward(model, batch)
    return out[0]
