"""Any scores: masks of bits, of the largest, of n in m; what is stored of them; each bit for bit against plain Python."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from fastunlearn import BitMask, load_masks, ops, save_masks
from tests.fuzz.draws import DENSITIES, VALUES, WIDE, Draw, fuzz, on, packed, refused
from tests.ops.test_mask import numpy_bits
from tests.ops.test_nm import plain as nm_bits
from tests.ops.test_nm_tensor import make_mask, survivors
from tests.ops.test_topk import plain as largest
from tests.proof import assert_equal


@fuzz("BitMask", backends=("native", "reference"))
def test_bitmask(draw: Draw) -> None:
    shape = draw.shape()
    bools, other = draw.mask(shape), draw.mask(shape)

    def run():
        mask, second = BitMask.pack(bools), BitMask.pack(other)
        assert_equal((~mask).unpack(), ~bools)
        assert_equal((mask & second).unpack(), bools & other)
        assert_equal((mask | second).unpack(), bools | other)
        return mask, mask.unpack(), mask.count(), mask.prefix_counts(chunk)

    chunk = draw.integer(1, 70)
    mask, again, count, prefix = on(draw.backend, run)
    assert_equal(mask.bits, numpy_bits(bools))
    assert_equal(again, bools.contiguous())
    assert int(count) == int(bools.sum())
    flat = mask.bits.flatten().numpy()
    starts = [int(np.bitwise_count(flat[: i * chunk]).sum()) for i in range(len(prefix))]
    assert prefix.tolist() == starts


@fuzz("save_masks", "load_masks")
def test_files(draw: Draw) -> None:
    masks = {f"layer.{i}": packed(draw.mask(draw.shape())) for i in range(draw.integer(1, 4))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.safetensors"
        on(draw.backend, lambda: save_masks(masks, path))
        again = on(draw.backend, lambda: load_masks(path))
    assert list(again) == sorted(again) or list(again) == list(masks)
    assert set(again) == set(masks)
    for name, mask in masks.items():
        assert again[name].shape == mask.shape
        assert_equal(again[name].bits, mask.bits)


@fuzz("topk_mask", backends=("native", "reference"))
def test_topk(draw: Draw) -> None:
    shapes = [s[:2] for s in draw.shapes(4)]
    scores = [draw.tensor(s, FLOATS_OF[draw.integer(0, 3)], VALUES) for s in shapes]
    densities = [draw.pick((*DENSITIES, 0.29, 0.75)) for _ in range(draw.integer(1, 3))]
    scope, key = draw.pick(("global", "tensor", "row")), draw.pick(("value", "abs"))
    widest = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1, torch.float64: 2}
    compared = max((s.dtype for s in scores), key=widest.__getitem__)
    if draw.backend == "native" and compared == torch.float64:
        scores = [s.float() for s in scores]
    wanted: list[float] | float = densities if draw.maybe() else densities[0]
    got = on(draw.backend, lambda: ops.topk_mask(scores, wanted, scope=scope, key=key))
    want = [[packed(m) for m in masks] for masks in largest(scores, wanted, None, scope, key)]
    assert_equal(got, want if isinstance(wanted, list) else want[0])


FLOATS_OF = (*WIDE[:3], WIDE[3])


def _pattern(draw: Draw) -> tuple[int, int]:
    m = draw.pick((1, 2, 4, 4, 5, 8, 16, 24, 33, 64))
    return draw.pick((0, 1, m // 2, m // 2, m - 1, m)), m


@fuzz("nm_mask", backends=("native", "reference"))
def test_nm_mask(draw: Draw) -> None:
    n, m = _pattern(draw)
    dtype = draw.pick(WIDE if draw.backend == "reference" else WIDE[:3])
    one = [(draw.integer(0, 6), draw.integer(0, 6) * m) for _ in range(draw.integer(1, 3))]
    scores = [draw.tensor(s, dtype, VALUES) for s in one]
    if draw.maybe() and one[0][1] == m:
        scores[0] = scores[0].reshape(one[0][0], m, 1)
    several = draw.maybe()
    got = on(draw.backend, lambda: ops.nm_mask(scores if several else scores[0], n, m))
    for mask, s in zip(got if several else [got], scores):
        assert_equal(mask.bits, nm_bits(s, n, m))
        assert mask.shape == s.shape


@fuzz("nm_compress", backends=("native", "reference"))
def test_nm_compress(draw: Draw) -> None:
    n, m = _pattern(draw)
    shape = (draw.integer(0, 6), draw.integer(0, 6) * m)
    weight = draw.tensor(shape, draw.pick(WIDE), VALUES)
    mask = make_mask(shape, n, m, draw.integer(0, 999))
    if draw.pick((False, False, False, True)) and mask.bits.numel():
        # One bit of another pattern.
        mask = BitMask(mask.bits.clone(), shape)
        mask.bits[0, 0] ^= 1

    def run():
        tensor = ops.nm_compress(weight, mask, n, m)
        dense = tensor.to_dense()
        assert_equal(ops.nm_compress(dense, mask, n, m).values, tensor.values)
        assert_equal(tensor.gather(dense), tensor.values)
        return tensor.values, dense

    got = on(draw.backend, run)
    kept = mask.unpack()
    fits = bool((kept.view(shape[0], shape[1] // m, m).sum(-1) == n).all()) if m else True
    assert isinstance(got, type) != fits
    if fits:
        assert_equal(got[0], survivors(weight, kept, n, m))
        assert_equal(got[1], torch.where(kept, weight, torch.zeros((), dtype=weight.dtype)))
        assert not refused(got)
