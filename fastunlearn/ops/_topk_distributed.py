"""topk_mask over a process group: rank r holds the r-th run of rows of every tensor.

The key of the k-th largest entry is found digit by digit: every rank counts its entries by the next bits of their keys, one
all-reduce a digit adds the counts of all tensors and densities. Ties at that key are then dealt out in the order of one
process (list order, then row-major, so rank by rank within a tensor) from the ranks' numbers of ties. What travels does not
grow with the scores: see `traffic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn.ops import topk
from fastunlearn.reference import topk as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def digits(scopes: int, bits: int = 32) -> list[tuple[int, int]]:
    """(shift, bins) of each round: large digits for one scope, small ones where every tensor has its own histogram."""
    width = 11 if scopes == 1 else 8
    out, left = [], bits
    while left > 0:
        taken = min(width, left)
        left -= taken
        out.append((left, 1 << taken))
    return out


def traffic(tensors: int, densities: int, world: int, scope: str = "global", bits: int = 32) -> int:
    """Most bytes that one rank hands to collectives or receives as their result in one call."""
    scopes = 1 if scope == "global" else tensors
    histograms = sum(scopes * densities * bins * 8 for _, bins in digits(scopes, bits))
    return 2 * histograms + (world + 1) * (2 + tensors + densities * tensors) * 8


def _gather(values: Tensor, group: ProcessGroup) -> Tensor:
    """int64 [world, ...] of every rank's `values`, in the order of ranks."""
    out = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1) if values.dim() > 1 else out.flatten(), values, group=group)
    return out


class _Shard:
    """This rank's scores behind the two calls that the selection needs, on any backend."""

    def __init__(self, scores: Sequence[Tensor], absolute: bool):
        self.scores, self.absolute = topk.uniform(scores), absolute
        self.shapes = topk.extents(self.scores)
        name = _backend.resolve(topk._OP, scores[0].device, topk.native_limits(self.scores))
        self.native = name == "native"
        if self.native:
            topk.refuse_capture(scores[0].device)

    def _rows(self) -> list[Tensor]:
        return [t.reshape(shape) for t, shape in zip(self.scores, self.shapes)]

    def histogram(self, lo: list[int], shift: int, bins: int) -> Tensor:
        """int64 [tensors, bins]."""
        shifts = [shift] * len(self.scores)
        if not self.native:
            return reference.topk_histogram(self._rows(), self.absolute, lo, shifts, bins)
        if _native.is_cuda(self.scores[0].device):
            counts = self.scores[0].new_empty(len(self.scores), topk.BINS, dtype=torch.int64)
            params = [[[0, low, shift, 0] for low in lo]]
            call = topk.CudaCall(self.scores, self.shapes, [], params, self.absolute)
            _native.library().topk_histogram_cuda(call.arguments, counts.data_ptr())
            return counts[:, :bins].cpu()
        out = torch.empty(len(self.scores), bins, dtype=torch.int64)
        tensors, low, by = topk.table(self.scores, self.shapes), torch.tensor(lo), torch.tensor(shifts)
        dtype = _native.DTYPES[self.scores[0].dtype]
        head = (tensors.data_ptr(), len(self.scores), dtype, self.absolute)
        _native.library().topk_histogram_cpu(*head, low.data_ptr(), by.data_ptr(), bins, out.data_ptr())
        return out

    def write(self, key: list[int], take: list[int]) -> list[Tensor]:
        """Bits of the entries above key[i] and of the first take[i] equal to it."""
        if not self.native:
            return reference.topk_write(self._rows(), self.absolute, key, take)
        bits = topk.empty_bits(self.shapes, self.scores[0].device)
        if _native.is_cuda(self.scores[0].device):
            params = [[[0, threshold, 0, ties] for threshold, ties in zip(key, take)]]
            call = topk.CudaCall(self.scores, self.shapes, [bits], params, self.absolute)
            _native.library().topk_write_cuda(call.arguments)
            return bits
        tensors, keys, ties = topk.table(self.scores, self.shapes), torch.tensor(key), torch.tensor(take)
        out, dtype = topk.addresses([bits]), _native.DTYPES[self.scores[0].dtype]
        head = (tensors.data_ptr(), len(self.scores), dtype, self.absolute)
        _native.library().topk_write_cpu(*head, keys.data_ptr(), ties.data_ptr(), out.data_ptr())
        return bits


def _common_dtype(scores: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Every rank compares keys of one width: float64 on any rank makes it float64 on all."""
    wide = torch.tensor([int(any(t.dtype == torch.float64 for t in scores)), len(scores)], device=scores[0].device)
    everyone = _gather(wide, group).tolist()
    if any(n != len(scores) for _, n in everyone):
        raise ValueError(f"scores: ranks hold lists of different lengths: {[n for _, n in everyone]}")
    return [t.double() for t in scores] if any(w for w, _ in everyone) else list(scores)


def select(
    scores: Sequence[Tensor],
    densities: Sequence[float] | None,
    k: int | None,
    scope: topk.Scope,
    key: topk.Key,
    group: ProcessGroup,
) -> list[list[Tensor]]:
    """Bits of this rank's rows for every density and tensor; `scope` is "global" or "tensor"."""
    rank, device = dist.get_rank(group), scores[0].device
    scores = _common_dtype(scores, group)
    shard = _Shard(scores, key == "abs")
    tensors, bits = len(scores), 64 if scores[0].dtype == torch.float64 else 32
    sizes = _gather(torch.tensor([t.numel() for t in scores], device=device), group).sum(0).tolist()
    counts = [
        topk.counts_of(d, k, scope, [(1, n) for n in sizes]) for d in (densities if densities is not None else [None])
    ]
    # Which scope a tensor belongs to: histograms are added over the tensors of a scope before they travel.
    owner = [0] * tensors if scope == "global" else list(range(tensors))
    scopes = max(owner) + 1
    start = -(1 << 63) if bits == 64 else 0
    lo = [[start] * scopes for _ in counts]
    left: list[list[int]] = [list(row) for row in counts]
    ties = torch.zeros(len(counts), tensors, dtype=torch.int64)
    valid: list[int] = []
    for shift, bins in digits(scopes, bits):
        same = all(row == lo[0] for row in lo)  # the first digit is the same for all densities
        local = [shard.histogram([row[o] for o in owner], shift, bins) for row in (lo[:1] if same else lo)]
        summed = torch.stack([h if scopes > 1 else h.sum(0, keepdim=True) for h in local]).to(device)
        dist.all_reduce(summed, group=group)
        found = summed.expand(len(counts), scopes, bins).cpu()
        if not valid:
            valid = found[0].sum(-1).tolist()
            left = [[min(c, v) for c, v in zip(row, valid)] for row in counts]
        place, after = _digit(found, left)
        for d in range(len(counts)):
            histogram = local[0 if same else d]
            for i, o in enumerate(owner):
                ties[d, i] = histogram[i, place[d][o]]
            lo[d] = [first + (p << shift) for first, p in zip(lo[d], place[d])]
        left = after
    # After the last digit `lo` is the key itself and `ties` counts this rank's entries that have it.
    everyone = _gather(ties.to(device), group).cpu()
    out = [
        shard.write([row[o] for o in owner], _share(everyone[:, d], left[d], owner, rank)) for d, row in enumerate(lo)
    ]
    entries = sum(sizes)
    topk.warn_nan(entries - sum(valid), entries, max(sum(row) for row in counts))
    return out


def _digit(found: Tensor, left: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """(bin that holds the k-th largest, how many of that bin are still to take) by density and scope.

    found: int64 [densities, scopes, bins]. Where nothing is to be taken: the last bin, 0 of it.
    """
    want = torch.tensor(left).unsqueeze(-1)
    above = found.flip(-1).cumsum(-1).flip(-1)  # entries in this bin and higher ones
    place = ((above >= want).sum(-1) - 1).clamp(min=0)
    higher = above.gather(-1, place.unsqueeze(-1)) - found.gather(-1, place.unsqueeze(-1))
    return place.tolist(), (want - higher).squeeze(-1).tolist()


def _share(ties: Tensor, take: list[int], owner: list[int], rank: int) -> list[int]:
    """How many ties this rank takes in each tensor; ties: int64 [world, tensors], take: by scope."""
    left, out = list(take), []
    for i, o in enumerate(owner):
        for r, n in enumerate(ties[:, i].tolist()):
            taken = min(n, left[o])
            left[o] -= taken
            if r == rank:
                out.append(taken)
    return out
