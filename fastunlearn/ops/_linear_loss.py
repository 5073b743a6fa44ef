"""What `linear_nll` and `linear_divergence` share: losses of logits = hidden @ weight^T that are never all in memory at once.

Only tokens that count are computed. With a frozen head (weight and bias take no gradient) chunks of tokens go through three steps
in one buffer of BUDGET bytes, whatever the vocabulary: logits by a matrix product; the loss, and over the logits their gradient;
by another product the gradient of the hidden states. That gradient is formed in the forward pass, for a factor of 1 of every
token, and the backward pass scales its rows: a loss of a token depends on no other token.

A head that trains wants sum_t u_t g_t h_t^T, whose factors u_t are known in the backward pass only. Where the logits of all tokens
fit into the buffer, it is kept with their gradient in it. Else the forward pass keeps a few numbers a token (the log of the
softmax's sum, ...) and the backward pass makes the logits again, this time in blocks of the vocabulary: the gradient of the head
is then written once, block by block, and only that of the hidden states is accumulated, in fp32.

What happens inside the buffer is the op's own: rows_ and block_ of reference/<op>.py or kernels/<op>.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn import _backend, _native

IGNORED = -100
#: bytes of the logits in memory at once
BUDGET = {"cpu": 256 * 2**20, "cuda": 512 * 2**20}
#: bytes of logits that a thread of a CPU takes through the loss at once
_CACHED = 2**20


@dataclass(frozen=True)
class Spec:
    """Which loss, and what the logits go through: softcap * tanh(scale * x / softcap), or scale * x where softcap is 0."""

    op: str
    kind: str
    strength: float
    scale: float
    softcap: float


class Head(NamedTuple):
    """hidden [n, d], weight [V, d], bias [V]; of the reference the same (None where the loss has none)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None

    def at(self, rows: Tensor | None) -> Head:
        """Of the rows alone; None: of all."""
        if rows is None:
            return self
        return self._replace(
            hidden=self.hidden.index_select(0, rows),
            ref_hidden=None if self.ref_hidden is None else self.ref_hidden.index_select(0, rows),
        )


# ---- the buffer ---------------------------------------------------------------------------------------------------------


def _budget(device: torch.device) -> int:
    return BUDGET.get(device.type, BUDGET["cuda"])


def _even(total: int, most: int, multiple: int) -> int:
    """Length of equal pieces of `total`, at most `most`, a multiple where that is possible."""
    if total <= most:
        return max(total, 1)
    most = max(most // multiple * multiple, min(most, multiple), 1)
    length = -(-total // -(-total // most))
    return min(most, -(-length // multiple) * multiple)


def _buffer(rows: int, cols: int, like: Tensor) -> Tensor:
    """[rows, cols] whose rows begin on multiples of 128 bytes: products with any vocabulary are those of a round one."""
    step = 128 // like.element_size()
    return _native.fresh((rows, -(-cols // step) * step), like.dtype, like.device)[:, :cols]


def _product(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _chunk(head: Head, code: ModuleType, spec: Spec) -> int:
    """Tokens whose logits are in memory at once."""
    bytes_ = head.weight.shape[0] * head.weight.element_size() * code.buffers(spec, head.weight)
    return _even(len(head.hidden), max(_budget(head.hidden.device) // bytes_, 1), 64)


def _few_rows(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk that are taken through the loss at once: on a CPU few enough for all that is made of them to stay in its cache.

    Whole chunks would go through memory with every step, and most of that memory would be touched for the first time.
    """
    n, columns = logits.shape
    row = max(columns, 1) * logits.element_size()
    step = n if logits.is_cuda else _CACHED * torch.get_num_threads() // row
    step = max(step, 1)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; `total` may be fp32 where the factors have 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


# ---- forward and backward of the tokens that count ----------------------------------------------------------------------


class Result(NamedTuple):
    """Of n tokens: value [n], stats [n, k] for a later backward pass, and where they were made:"""

    value: Tensor
    stats: Tensor
    grad_hidden: Tensor | None  #: [n, d], for a factor of 1
    grad_logits: Tensor | None  #: [n, V], for a factor of 1


def forward(
    code: ModuleType, spec: Spec, head: Head, labels: Tensor, hidden_trains: bool, head_trains: bool, keep: bool
) -> Result:
    """
    Args:
        code: reference or kernels of the op.
        labels: int64 [n], none of them ignored.
        keep: whether the gradient of the logits may be handed out where it fits the buffer.
    """
    (n, width), vocabulary = head.hidden.shape, head.weight.shape[0]
    chunk = _chunk(head, code, spec)
    kept = head_trains and keep and n <= chunk
    fused = hidden_trains and not head_trains
    wide = torch.promote_types(head.hidden.dtype, torch.float32)
    value = head.hidden.new_empty(n, dtype=wide)
    stats = head.hidden.new_empty(n, code.STATS, dtype=wide)
    grad_hidden = head.hidden.new_empty(n, width) if fused else None
    buffer = _buffer(min(chunk, n), vocabulary, head.hidden)
    other = None if head.ref_hidden is None else _buffer(min(chunk, n), vocabulary, head.ref_hidden)
    for start in range(0, n, chunk):
        here = slice(start, min(start + chunk, n))
        logits = _product(buffer[: here.stop - start], head.hidden[here], head.weight, head.bias)
        reference = None
        if other is not None:
            assert head.ref_hidden is not None
            assert head.ref_weight is not None
            reference = _product(other[: here.stop - start], head.ref_hidden[here], head.ref_weight, head.ref_bias)
        for rows in _few_rows(logits):
            at = slice(start + rows.start, start + rows.stop)
            other_rows = None if reference is None else reference[rows]
            code.rows_(logits[rows], other_rows, labels[at], value[at], stats[at], spec, fused or kept)
        if grad_hidden is not None:
            torch.mm(logits, head.weight, out=grad_hidden[here])
    return Result(value, stats, grad_hidden, buffer if kept else None)


def _by_factor(factor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """(rows of `hidden` by their factors, what is left to multiply by): with fp16 a loss scale would overflow here."""
    if hidden.dtype != torch.float16 or not len(factor):
        return (hidden * factor[:, None]).to(hidden.dtype), None
    most = factor.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return (hidden * (factor / most)[:, None]).to(hidden.dtype), most


def backward(
    code: ModuleType,
    spec: Spec,
    head: Head,
    labels: Tensor,
    stats: Tensor,
    grad_logits: Tensor | None,
    factor: Tensor,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [n, d], weight and bias where wanted, of a head that trains.

    Args:
        labels, stats: as `forward` had and made them. grad_logits: of `forward`, None: the logits are made again.
        factor: [n], the gradient that arrives at the values.
    """
    (n, width), vocabulary = head.hidden.shape, head.weight.shape[0]
    wide = torch.promote_types(head.hidden.dtype, torch.float32)
    grad_hidden = head.hidden.new_zeros(n, width, dtype=wide) if wants[0] else None
    grad_weight = (
        torch.empty(vocabulary, width, dtype=head.weight.dtype, device=head.weight.device) if wants[1] else None
    )
    grad_bias = head.weight.new_empty(vocabulary) if wants[2] else None
    scaled, left = _by_factor(factor, head.hidden) if wants[1] else (head.hidden, None)
    block, buffer, other = vocabulary, None, None
    if grad_logits is None:
        bytes_ = max(n, 1) * head.weight.element_size() * code.buffers(spec, head.weight)
        block = _even(vocabulary, max(_budget(head.hidden.device) // bytes_, 1), 128)
        buffer = _buffer(n, block, head.hidden)
        other = None if head.ref_hidden is None else _buffer(n, block, head.ref_hidden)
    for start in range(0, vocabulary, block):
        here = slice(start, min(start + block, vocabulary))
        if buffer is None:
            assert grad_logits is not None
            g = grad_logits
        else:
            g = _product(
                buffer[:, : here.stop - start],
                head.hidden,
                head.weight[here],
                None if head.bias is None else head.bias[here],
            )
            reference = None
            if other is not None:
                assert head.ref_hidden is not None
                assert head.ref_weight is not None
                bias = None if head.ref_bias is None else head.ref_bias[here]
                reference = _product(
                    other[:, : here.stop - start], head.ref_hidden, head.ref_weight[here], bias
                )  # fmt: skip
            for rows in _few_rows(g):
                other_rows = None if reference is None else reference[rows]
                code.block_(g[rows], other_rows, labels[rows], stats[rows], start, vocabulary, spec)
        if grad_hidden is not None:
            _accumulate(grad_hidden, g, head.weight[here])
        if grad_weight is not None:
            torch.mm(g.t(), scaled, out=grad_weight[here])
        if grad_bias is not None:
            grad_bias[here] = (g * factor[:, None]).sum(0) if n else 0
    if grad_hidden is not None:
        grad_hidden = grad_hidden.mul_(factor[:, None]).to(head.hidden.dtype)
    if grad_weight is not None and left is not None:
        grad_weight.mul_(left)
    return grad_hidden, grad_weight, grad_bias


def _counted(labels: Tensor, vocabulary: int) -> Tensor | None:
    """Rows whose label counts; None: all of them. The one place where the host waits for a GPU."""
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "labels: called while a CUDA graph is captured; how many tokens count is known on the host only. Call it outside"
        )
    kept = labels != IGNORED
    count, wrong = torch.stack([kept.sum(), (kept & ((labels < 0) | (labels >= vocabulary))).sum()]).tolist()
    if wrong:
        bad = labels[kept & ((labels < 0) | (labels >= vocabulary))][0].item()
        raise ValueError(f"labels: want {IGNORED} (ignored) or a row of weight, 0 to {vocabulary - 1}; got {bad}")
    return None if count == len(labels) else kept.nonzero()[:, 0]


def _pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _spread(tensor: Tensor, rows: Tensor | None, n: int) -> Tensor:
    """The opposite: zeros where nothing was picked."""
    if rows is None:
        return tensor
    return tensor.new_zeros(n, *tensor.shape[1:]).index_copy_(0, rows, tensor)


def _code(spec: Spec, device: torch.device, dtype: torch.dtype) -> ModuleType:
    from importlib import import_module

    unsupported = {"triton": "float64 runs as plain PyTorch"} if dtype == torch.float64 else {}
    backend = _backend.resolve(_backend._ops[spec.op], device, unsupported)
    where = "kernels" if backend == "triton" else "reference"
    return import_module(f"fastunlearn.{where}.{spec.op}")


class _LinearLoss(torch.autograd.Function):
    """Eager calls."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, labels: Tensor, *tensors: Tensor | None) -> Tensor:
        head = Head(*tensors)  # type: ignore[arg-type]
        needs = ctx.needs_input_grad[2:5]
        with torch.autocast(head.hidden.device.type, enabled=False):
            code = _code(spec, head.hidden.device, head.hidden.dtype)
            rows = _counted(labels, len(head.weight))
            result = forward(code, spec, head.at(rows), _pick(labels, rows), needs[0], needs[1] or needs[2], keep=True)
        ctx.spec, ctx.code, ctx.n = spec, code, len(labels)
        head_trains = needs[1] or needs[2]
        ctx.save_for_backward(
            labels if head_trains else None,
            rows,
            result.stats if head_trains and result.grad_logits is None else None,
            result.grad_hidden,
            result.grad_logits,
            *(head if head_trains else [None] * len(head)),
        )
        return _spread(result.value, rows, len(labels))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        labels, rows, stats, grad_hidden, grad_logits, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:5]
        factor = _pick(factor, rows)
        nothing: list[Any] = [None] * 3
        with torch.autocast(factor.device.type, enabled=False):
            if grad_hidden is not None:
                scaled = (grad_hidden * factor[:, None]).to(grad_hidden.dtype)
                return None, None, _spread(scaled, rows, ctx.n), None, None, *nothing
            if labels is None:
                return (None,) * 8
            head = Head(*tensors).at(rows)
            grads = backward(ctx.code, ctx.spec, head, _pick(labels, rows), stats, grad_logits, factor, needs)
            first = None if grads[0] is None else _spread(grads[0], rows, ctx.n)
            return None, None, first, *grads[1:], *nothing


# ---- what torch.compile sees: results of every token, as nobody knows before the call how many count -----------------------


@torch.library.custom_op("fastunlearn::linear_loss", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _linear_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    op: str,
    kind: str,
    strength: float,
    scale: float,
    softcap: float,
    hidden_trains: bool,
    head_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(value [n], stats [n, k], grad_hidden [n, d], or [0, d] where the head trains or nothing does)"""
    spec = Spec(op, kind, strength, scale, softcap)
    head = Head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    code, n = _code(spec, hidden.device, hidden.dtype), len(labels)
    rows = _counted(labels, len(weight))
    result = forward(code, spec, head.at(rows), _pick(labels, rows), hidden_trains, head_trains, keep=False)
    grad = hidden.new_empty(0, hidden.shape[1]) if result.grad_hidden is None else _spread(result.grad_hidden, rows, n)
    return _spread(result.value, rows, n), _spread(result.stats, rows, n), grad


@_linear_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    op: str,
    kind: str,
    strength: float,
    scale: float,
    softcap: float,
    hidden_trains: bool,
    head_trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    n = labels.shape[0]
    stats = 2 if op == "linear_nll" else 4
    fused = hidden_trains and not head_trains
    return (
        hidden.new_empty(n, dtype=wide),
        hidden.new_empty(n, stats, dtype=wide),
        hidden.new_empty(n if fused else 0, hidden.shape[1]),
    )


@torch.library.custom_op("fastunlearn::linear_loss_backward", mutates_args=(), tags=_backend.NOT_CAPTURED)
def _linear_loss_backward_op(
    factor: Tensor,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    op: str,
    kind: str,
    strength: float,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias ([0] where there is no bias)."""
    spec = Spec(op, kind, strength, scale, softcap)
    head = Head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    code, n = _code(spec, hidden.device, hidden.dtype), len(labels)
    rows = _counted(labels, len(weight))
    wants = (True, True, bias is not None)
    grad, grad_weight, grad_bias = backward(
        code, spec, head.at(rows), _pick(labels, rows), _pick(stats, rows), None, _pick(factor, rows), wants
    )
    assert grad is not None
    assert grad_weight is not None
    return _spread(grad, rows, n), grad_weight, weight.new_empty(0) if grad_bias is None else grad_bias


@_linear_loss_backward_op.register_fake
def _(
    factor: Tensor,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    op: str,
    kind: str,
    strength: float,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (hidden.shape[0], hidden.shape[1])
    return (
        hidden.new_empty(shape),
        weight.new_empty(weight.shape[0], weight.shape[1]),
        weight.new_empty(0 if bias is None else weight.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, op, kind, strength, scale, softcap, _, ctx.head_trains = inputs
    _, stats, grad_hidden = output
    ctx.words = (op, kind, strength, scale, softcap)
    ctx.mark_non_differentiable(stats, grad_hidden)
    ctx.save_for_backward(*([stats, *tensors] if ctx.head_trains else [grad_hidden]))


def _backward_op(ctx: Any, factor: Tensor, *_: Any) -> tuple[Any, ...]:
    rest: tuple[Any, ...] = (None,) * 11
    if not ctx.head_trains:
        (grad_hidden,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, *rest
        return (grad_hidden * factor[:, None]).to(grad_hidden.dtype), None, None, *rest
    stats, *tensors = ctx.saved_tensors
    grad, grad_weight, grad_bias = _linear_loss_backward_op(factor, stats, *tensors, *ctx.words)
    return grad, grad_weight, None if tensors[2] is None else grad_bias, *rest


_linear_loss_op.register_autograd(_backward_op, setup_context=_setup_context)


# ---- what both public ops do ---------------------------------------------------------------------------------------------


def reduced(spec: Spec, head: Head, labels: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(values, counts) of checked arguments, by token or summed over the last dimension of `labels`."""
    flat = labels.reshape(-1).long().contiguous()
    flattened = head._replace(
        hidden=head.hidden.reshape(-1, head.hidden.shape[-1]),
        ref_hidden=None if head.ref_hidden is None else head.ref_hidden.reshape(-1, head.ref_hidden.shape[-1]),
    )
    if _backend.traced(*flattened, labels):
        grad = torch.is_grad_enabled()
        hidden_trains = grad and head.hidden.requires_grad
        head_trains = grad and (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
        value = _linear_loss_op(
            *flattened, flat, spec.op, spec.kind, spec.strength, spec.scale, spec.softcap, hidden_trains, head_trains
        )[0]
    else:
        if not torch.is_grad_enabled():
            # needs_input_grad knows nothing of it: the gradient of the logits would be made for nobody.
            flattened = Head._make(None if t is None else t.detach() for t in flattened)
        value = _LinearLoss.apply(spec, flat, *flattened)
    value, counts = value.reshape(labels.shape), (labels != IGNORED).long()
    return (value, counts) if reduction == "token" else (value.sum(-1), counts.sum(-1))
