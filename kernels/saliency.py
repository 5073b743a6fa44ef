"""Accumulates saliency scores of a whole list of tensors in one launch.

The list is one flat run of blocks: program i takes block i, finds its tensor by bisection of the first block of every
tensor, and reads the addresses from a table. Whole blocks are read without a mask, so that loads stay 16 bytes wide.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8
MIXED = -1  # the tensors of the list differ in their element type: it stands in the table
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@triton.jit
def _load(address, places, mask, code, CODE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr):
    """Entries of one tensor as fp32; `code` is its element type when the list mixes them (CODE = -1)."""
    if CODE == 0:
        x = _load_as(address, places, mask, tl.float32, ALIGNED, WHOLE)
    elif CODE == 1:
        x = _load_as(address, places, mask, tl.float16, ALIGNED, WHOLE)
    elif CODE == 2:
        x = _load_as(address, places, mask, tl.bfloat16, ALIGNED, WHOLE)
    else:
        if code == 0:
            x = _load_as(address, places, mask, tl.float32, ALIGNED, WHOLE)
        elif code == 1:
            x = _load_as(address, places, mask, tl.float16, ALIGNED, WHOLE)
        else:
            x = _load_as(address, places, mask, tl.bfloat16, ALIGNED, WHOLE)
    return x


@triton.jit
def _load_as(address, places, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if WHOLE:
        x = tl.load(pointer + places)
    else:
        x = tl.load(pointer + places, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _block(
    table, tensor, count, places, mask, KIND: tl.constexpr, GRAD: tl.constexpr, WEIGHT: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One block: KIND 0 abs, 1 square, 2 signed, 3 weight_grad (fastunlearn/ops/saliency.py: KINDS)."""
    codes = tl.load(table + 4 * count + tensor)
    term = _load(tl.load(table + count + tensor), places, mask, codes % 4, GRAD, ALIGNED, WHOLE)
    if KIND == 0:
        term = tl.abs(term)
    elif KIND == 1:
        term = term * term
    elif KIND == 3:
        term = tl.abs(
            _load(tl.load(table + 2 * count + tensor), places, mask, codes // 4, WEIGHT, ALIGNED, WHOLE) * term
        )
    scores = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        scores = tl.multiple_of(scores, 16)
    if WHOLE:
        tl.store(scores + places, tl.load(scores + places) + term)
    else:
        tl.store(scores + places, tl.load(scores + places, mask=mask, other=0.0) + term, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _kernel(
    table, count, STEPS: tl.constexpr, KIND: tl.constexpr, GRAD: tl.constexpr, WEIGHT: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`table` int64 [6, count]: addresses of scores, gradients, weights; entries; element types (gradient + 4 * weight);
    first block of the tensor. STEPS bisections find the last tensor that starts at or before this program's block.
    """
    block = tl.program_id(0).to(tl.int64)
    tensor = block * 0
    high = tensor + count
    for _ in tl.static_range(STEPS):
        middle = (tensor + high) // 2
        here = tl.load(table + 5 * count + middle) <= block
        tensor = tl.where(here, middle, tensor)
        high = tl.where(here, high, middle)
    start = (block - tl.load(table + 5 * count + tensor)) * BLOCK
    numel = tl.load(table + 3 * count + tensor)
    places = start + tl.arange(0, BLOCK)
    mask = places < numel
    if start + BLOCK <= numel:
        _block(table, tensor, count, places, mask, KIND, GRAD, WEIGHT, ALIGNED, True)
    else:
        _block(table, tensor, count, places, mask, KIND, GRAD, WEIGHT, ALIGNED, False)


@triton.jit
def _term(grads, weights, places, mask, KIND: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        term = tl.load(grads + places).to(tl.float32)
    else:
        term = tl.load(grads + places, mask=mask, other=0.0).to(tl.float32)
    if KIND == 0:
        term = tl.abs(term)
    elif KIND == 1:
        term = term * term
    elif KIND == 3:
        if WHOLE:
            weight = tl.load(weights + places).to(tl.float32)
        else:
            weight = tl.load(weights + places, mask=mask, other=0.0).to(tl.float32)
        term = tl.abs(weight * term)
    return term


@triton.jit
def _kernel_one(scores, grads, weights, numel, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """One tensor: its addresses are arguments, there is no table to upload."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    places = start + tl.arange(0, BLOCK)
    mask = places < numel
    if start + BLOCK <= numel:
        term = _term(grads, weights, places, mask, KIND, True)
        tl.store(scores + places, tl.load(scores + places) + term)
    else:
        term = _term(grads, weights, places, mask, KIND, False)
        tl.store(scores + places, tl.load(scores + places, mask=mask, other=0.0) + term, mask=mask)


def _one_code(tensors: Sequence[Tensor]) -> int:
    codes = {_CODES[t.dtype] for t in tensors}
    return codes.pop() if len(codes) == 1 else MIXED


def saliency_accumulate_(
    scores: Sequence[Tensor], grads: Sequence[Tensor], weights: Sequence[Tensor], kind: int, block: int = BLOCK
) -> None:
    """All tensors contiguous and on one device; `weights` is empty but for kind 3."""
    sizes = [s.numel() for s in scores]
    if not all(sizes):
        keep = [i for i, n in enumerate(sizes) if n]
        if not keep:
            return
        scores, grads, sizes = [scores[i] for i in keep], [grads[i] for i in keep], [sizes[i] for i in keep]
        weights = [weights[i] for i in keep] if weights else []
    if len(scores) == 1:
        with torch.cuda.device_of(scores[0]):
            _kernel_one[(-(-sizes[0] // block),)](
                scores[0], grads[0].detach(), weights[0].detach() if weights else scores[0], sizes[0], kind, block,
                num_warps=WARPS,
            )  # fmt: skip
        return
    device = scores[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "saliency_accumulate_: called with several tensors while a CUDA graph is captured; their table is uploaded anew "
            "by every call and would be stale when the graph is replayed. Call it outside the graph, or with one tensor at a time"
        )
    blocks = 0
    first = []
    for n in sizes:
        first.append(blocks)
        blocks += -(-n // block)
    addresses = [s.data_ptr() for s in scores] + [g.data_ptr() for g in grads]
    addresses += [w.data_ptr() for w in weights] or [0] * len(scores)
    codes = [_CODES[g.dtype] for g in grads]
    if weights:
        codes = [c + 4 * _CODES[w.dtype] for c, w in zip(codes, weights)]
    table = torch.frombuffer(array("q", addresses + sizes + codes + first), dtype=torch.int64)
    if device.type == "cuda":
        # From pinned memory the copy is queued and the host does not wait for the device.
        table = table.pin_memory().to(device, non_blocking=True)
    aligned = all(a % 16 == 0 for a in addresses)
    with torch.cuda.device_of(scores[0]):
        _kernel[(blocks,)](
            table, len(scores), (len(scores) - 1).bit_length(), kind,
            _one_code(grads), _one_code(weights) if weights else 0, aligned, block, num_warps=WARPS,
        )  # fmt: skip
