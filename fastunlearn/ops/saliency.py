"""Saliency scores: how much a set of batches asks every entry of a model to move, over lists of tensors in one call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.reference import saliency as reference

Kind = Literal["abs", "square", "signed", "weight_grad"]
#: names and numbers of the kinds (csrc/saliency.h: SaliencyKind)
KINDS: dict[str, int] = {name: number for number, name in enumerate(get_args(Kind))}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = frozenset(DTYPES)

_OP = _backend.register("saliency_accumulate_", native=("cpu",), triton=("cuda",))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor (whose own data_ptr() is 0); any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _dispatch(scores: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[Tensor], kind: str) -> None:
    """`weights` is empty but for "weight_grad". All checked, on one device, at least one tensor."""
    backend = _backend.resolve(_OP, scores[0].device)
    if backend == "reference":
        reference.saliency_accumulate_(scores, grads, weights, kind)
        return
    # The kernels see flat memory. Scores of another layout are worked on as a copy and written back.
    flat = [_native.in_memory(s) for s in scores]
    grads = [_native.in_memory(g) for g in grads]
    weights = [_native.in_memory(w) for w in weights]
    if backend == "triton":
        from fastunlearn.kernels import saliency as kernels

        kernels.saliency_accumulate_(flat, grads, weights, KINDS[kind])
    else:
        codes = _native.DTYPES
        ours = [s.data_ptr() for s in flat]
        theirs = [g.data_ptr() for g in grads]
        sizes = [s.numel() for s in flat]
        types = [codes[g.dtype] for g in grads]
        if weights:
            others, kinds = [w.data_ptr() for w in weights], [codes[w.dtype] for w in weights]
        else:
            others = kinds = [0] * len(flat)
        _native.library().saliency_accumulate_cpu(list(zip(ours, theirs, others, sizes, types, kinds)), KINDS[kind])
    # autograd learns of a change that it has not made itself.
    torch.autograd.graph.increment_version([s for s in scores if not s.is_inference()])
    for s, f in zip(scores, flat):
        if f is not s:
            s.copy_(f)


@torch.library.custom_op(
    "fastunlearn::saliency_accumulate_",
    mutates_args=("scores",),
    schema="(Tensor(a!)[] scores, Tensor[] grads, Tensor[] weights, str kind) -> ()",
    tags=_backend.NOT_CAPTURED,
)
def _saliency_op(scores: list[Tensor], grads: list[Tensor], weights: list[Tensor], kind: str) -> None:
    if scores:
        _dispatch(scores, grads, weights, kind)


@_saliency_op.register_fake
def _(scores: list[Tensor], grads: list[Tensor], weights: list[Tensor], kind: str) -> None:
    return None


def _checked(what: str, tensor: object, i: int, score: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what}[{i}]: want a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what}[{i}]: want a dense tensor, got {tensor.layout} ({what}[{i}].to_dense() converts)")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{what}[{i}]: want float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.shape != score.shape:
        raise ValueError(f"{what}[{i}]: shape {tuple(tensor.shape)}, but scores[{i}] is {tuple(score.shape)}")
    if tensor.device != device:
        raise ValueError(f"{what}[{i}]: on {tensor.device}, but scores[{i}] is on {device}; move one of them")
    return tensor


def _shared(scores: Sequence[Tensor]) -> bool:
    """Whether tensors with entries begin at the same place: empty ones may."""
    places = [s.data_ptr() for s in scores if s.numel()]
    return len(set(places)) != len(places)


def saliency_accumulate_(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor] | None = None,
    kind: Kind = "abs",
) -> Sequence[Tensor]:
    """Adds the saliency of one batch's gradients to `scores`, in place, for all tensors of the lists at once.

        kind           scores[i] +=    method
        "abs"          |g|             SPARE (the sum of every batch's |g|)
        "square"       g^2             diagonal of the empirical Fisher information
        "signed"       g               SalUn: select with `topk_mask(scores, ..., key="abs")`, which takes |sum of g|
        "weight_grad"  |w g|           SNIP

    Arithmetic is fp32 whatever the types of g and w; a square is rounded before it is added, or both in one instruction (FMA),
    which shows where it is beyond fp32 and the score is far below 0. A gradient that is None (a parameter that the loss does
    not reach) is skipped, as torch's optimisers do: its scores stay as they are. Of a DTensor this process's part is taken.

    Args:
        scores: float32 tensors, changed in place; distinct memory.
        grads: one for every score: same shape and device; float32, float16 or bfloat16; or None.
        weights: for "weight_grad" only: one for every score, as the gradients.
        kind: see the table.

    Returns:
        `scores`.

    Raises:
        TypeError: a score that is not float32, a gradient or weight of another type, a sparse tensor. ValueError: lists of
        different lengths, shapes or devices that differ, all gradients None, one score twice, unknown kind, weights missing or
        not asked for. RuntimeError: several tensors while a CUDA graph is captured (one tensor a call can be captured).

    Example:
        >>> scores = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
        >>> for batch in forget_set:
        ...     model.zero_grad()
        ...     model(**batch).loss.backward()
        ...     fastunlearn.ops.saliency_accumulate_(scores, [p.grad for p in model.parameters()])
    """
    if kind not in KINDS:
        raise ValueError(f"kind: want one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    for what, given in (("scores", scores), ("grads", grads), ("weights", weights)):
        if isinstance(given, Tensor):
            raise TypeError(f"{what}: want a list of tensors, got one tensor (write [{what}])")
    if (weights is not None) != (kind == "weight_grad"):
        wrong = (
            'needed by kind="weight_grad"'
            if weights is None
            else f'only kind="weight_grad" takes them, got kind={kind!r}'
        )
        raise ValueError(f"weights: {wrong}")
    if len(grads) != len(scores):
        raise ValueError(f"grads: {len(grads)} tensors for {len(scores)} scores; want one (or None) for every score")
    if weights is not None and len(weights) != len(scores):
        raise ValueError(f"weights: {len(weights)} tensors for {len(scores)} scores; want one for every score")
    to_scores: list[Tensor] = []
    to_grads: list[Tensor] = []
    to_weights: list[Tensor] = []
    sharded: Any = ()
    if "torch.distributed.tensor" in sys.modules:
        sharded = sys.modules["torch.distributed.tensor"].DTensor
    device: torch.device | None = None
    for i, (score, grad) in enumerate(zip(scores, grads)):
        if not isinstance(score, Tensor):
            raise TypeError(f"scores[{i}]: want a tensor, got {type(score).__name__}")
        if score.dtype != torch.float32:
            raise TypeError(
                f"scores[{i}]: want torch.float32, got {score.dtype} (torch.zeros_like(p, dtype=torch.float32) makes one)"
            )
        if grad is None:
            continue
        if sharded:
            score, grad = local(score), local(grad)
        where = score.device
        to_scores.append(score)
        if not (
            isinstance(grad, Tensor)
            and grad.dtype in _DTYPES
            and grad.shape == score.shape
            and grad.device == where
            and grad.layout is torch.strided
        ):
            _checked("grads", grad, i, score, where)
        to_grads.append(grad)
        if weights is not None:
            to_weights.append(_checked("weights", local(weights[i]), i, score, where))
        if device is None:
            device = where
        elif where != device:
            raise ValueError(f"scores[{i}]: on {where}, the first on {device}; call once for every device")
    if len(scores) and not to_scores:
        raise ValueError("grads: every gradient is None; call loss.backward() first (and zero_grad() only after this)")
    if _backend.traced(to_scores, to_grads, to_weights):
        _saliency_op(to_scores, to_grads, to_weights, kind)
    elif to_scores:
        places = [s.data_ptr() for s in to_scores]
        if len(set(places)) != len(places) and _shared(to_scores):
            raise ValueError("scores: the same memory twice in the list; a shared parameter has one score")
        _dispatch(to_scores, to_grads, to_weights, kind)
    return scores
