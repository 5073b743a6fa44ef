"""BitMask: layout, counts, algebra, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastunlearn
from fastunlearn import BitMask, load_masks, save_masks
from fastunlearn.ops.mask import rows_cols
from tests.proof import OpProof

SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (100,),
    "ragged": (5, 7),
    "bytes": (63, 128),
    "conv": (6, 3, 3, 3),
    "no_rows": (0, 4),
    "no_cols": (4, 0),
    "many_blocks": (257, 1003),
    "wide": (2, 70_001),
}


def _mask(shape: tuple[int, ...], density: float = 0.3, device: str = "cpu") -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density).to(device)


def numpy_bits(mask: torch.Tensor) -> torch.Tensor:
    """The layout in numpy's words: little-endian packbits along the columns."""
    flat = mask.cpu().reshape(rows_cols(mask.shape)).numpy()
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little"))


class TestMask(OpProof):
    op = "bitmask"
    backends = ("native",)
    cuda_bodies = True
    cases = {
        **{name: (lambda device, s=shape: _mask(s, device=device)) for name, shape in SHAPES.items()},
        "none": lambda device: _mask((33, 100), 0.0, device),
        "all": lambda device: _mask((33, 100), 1.1, device),
    }
    few = ("one", "ragged", "bytes", "no_rows", "many_blocks", "all")

    def run(self, args):
        mask = BitMask.pack(args)
        return [mask.bits, mask.unpack(), mask.count(), mask.prefix_counts(3), mask.prefix_counts(64)]

    def oracle(self, args):
        bits = numpy_bits(args)
        per_byte = np.bitwise_count(bits.numpy().ravel()).astype(np.int64)
        before = np.concatenate([[0], per_byte.cumsum()])
        prefix = [
            torch.from_numpy(before[np.minimum(np.arange(-(-per_byte.size // c) + 1) * c, per_byte.size)])
            for c in (3, 64)
        ]
        return [bits, args, args.sum(), *prefix]

    def library_calls(self, args):
        flat = args.reshape(rows_cols(args.shape))
        bits = numpy_bits(args)
        ops = torch.ops.fastunlearn
        yield ops.mask_pack.default, (flat,)
        yield ops.mask_unpack.default, (bits, flat.shape[1])
        yield ops.mask_count.default, (bits,)
        yield ops.mask_prefix.default, (bits, 64)


def test_any_nonzero_byte_is_true():
    """A bool tensor made by a view of bytes may hold other values than 0 and 1."""
    raw = torch.arange(256, dtype=torch.uint8)
    with fastunlearn.backend("native"):
        mask = BitMask.pack(raw.view(torch.bool))
    assert int(mask.count()) == 255


def test_non_contiguous():
    bools = _mask((40, 24)).t()
    assert torch.equal(BitMask.pack(bools).unpack(), bools)


def test_algebra_keeps_padding_zero():
    a, b = _mask((5, 13), 0.5), _mask((5, 13), 0.2).flip(1)
    pa, pb = BitMask.pack(a), BitMask.pack(b)
    assert torch.equal((pa & pb).unpack(), a & b)
    assert torch.equal((pa | pb).unpack(), a | b)
    assert int((~pa).count()) == int((~a).sum())
    assert BitMask.ones((5, 13)).density == 1.0
    assert BitMask.zeros((5, 13)).density == 0.0
    assert BitMask.ones((5, 13)).equal(~BitMask.zeros((5, 13)))


def test_files_round_trip(tmp_path):
    masks = {"layer.weight": BitMask.pack(_mask((6, 3, 3, 3))), "bias": BitMask.pack(_mask((11,)))}
    path = tmp_path / "sub" / "masks.safetensors"
    save_masks(masks, path)
    assert [p.name for p in path.parent.iterdir()] == ["masks.safetensors"]
    back = load_masks(path)
    assert set(back) == set(masks)
    for name, mask in masks.items():
        assert back[name].shape == mask.shape
        assert back[name].equal(mask)


def test_truncated_file(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks({"a": BitMask.pack(_mask((64, 64)))}, path)
    raw = path.read_bytes()
    for keep in (0, 7, 50, len(raw) - 1):
        path.write_bytes(raw[:keep])
        with pytest.raises(ValueError, match="truncated"):
            load_masks(path)


def test_file_of_something_else(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no fastunlearn masks"):
        load_masks(path)
    with pytest.raises(FileNotFoundError, match="no mask file"):
        load_masks(tmp_path / "absent")
    save_file(
        {"a": torch.zeros(1, 1, dtype=torch.uint8)},
        path,
        {"format": "fastunlearn.masks", "version": "1", "shapes": json.dumps({"b": [8]})},
    )
    with pytest.raises(ValueError, match="names b, but there is no tensor of that name"):
        load_masks(path)


DAMAGED = {
    "padding": ({"a": torch.full((2, 1), 255, dtype=torch.uint8)}, {}, "a has bits set behind its 5 columns"),
    "version": ({}, {"version": "2"}, "version '2' are unknown"),
    "no_version": ({}, {"version": None}, "version None are unknown"),
    "no_shapes": ({}, {"shapes": None}, "'shapes' is missing or damaged"),
    "broken_shapes": ({}, {"shapes": "{"}, "'shapes' is missing or damaged"),
    "list": ({}, {"shapes": json.dumps([["a", 2, 5]])}, "'shapes' is a list, want a dict"),
    "shape_of_words": ({}, {"shapes": json.dumps({"a": "2x5"})}, "the shape of a is '2x5', want a list"),
    "negative": ({}, {"shapes": json.dumps({"a": [-2, 5]})}, "the shape of a is .-2, 5., want a list"),
    "dtype": ({"a": torch.zeros(2, 1)}, {}, "a is no mask of shape .*want torch.uint8, got torch.float32"),
    "size": ({"a": torch.zeros(2, 2, dtype=torch.uint8)}, {}, "a is no mask of shape .*bits of shape"),
    "missing": ({}, {"shapes": json.dumps({"a": [2, 5], "b": [3]})}, "names b, but there is no tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file(case, tmp_path):
    tensors, changed, words = DAMAGED[case]
    path = tmp_path / "masks.safetensors"
    metadata = {"format": "fastunlearn.masks", "version": "1", "shapes": json.dumps({"a": [2, 5]}), **changed}
    save_file(
        {"a": torch.full((2, 1), 31, dtype=torch.uint8), **tensors},
        path,
        {key: value for key, value in metadata.items() if value is not None},
    )
    with pytest.raises(ValueError, match=words) as error:
        load_masks(path)
    assert str(path) in str(error.value)
    assert "truncated" not in str(error.value)


def test_files_are_not_overwritten_unasked(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks({"a": BitMask.ones((3,))}, path)
    with pytest.raises(FileExistsError, match=r"overwrite=True\) replaces it"):
        save_masks({"a": BitMask.zeros((3,))}, path)
    assert int(load_masks(path)["a"].count()) == 3
    save_masks({"a": BitMask.zeros((3,))}, path, overwrite=True)
    assert int(load_masks(path)["a"].count()) == 0


def test_load_masks_arguments(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks({"a": BitMask.ones((3,))}, path)
    with pytest.raises(TypeError, match="like: want a module or name -> tensor, got str"):
        load_masks(path, "cpu")
    with pytest.raises(TypeError, match="positional"):
        load_masks(path, None, "cpu")
    assert load_masks(path, {"a": torch.zeros(3)}, device="meta")["a"].device.type == "meta"


@pytest.mark.parametrize("shape", [(5, 13), (4, 16), (9,)])
def test_inverting_compiles_as_one_graph(shape):
    bools = _mask(shape)

    def run(bools):
        mask = BitMask.pack(bools)
        return mask.invert().unpack(), BitMask.ones(mask.shape).bits

    torch._dynamo.reset()
    inverse, ones = torch.compile(run, fullgraph=True, backend="aot_eager")(bools)
    assert torch.equal(inverse, ~bools)
    assert torch.equal(ones, numpy_bits(torch.ones(shape, dtype=torch.bool)))


def test_file_of_another_model(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks({"weight": BitMask.pack(_mask((4, 8)))}, path)
    assert set(load_masks(path, like=torch.nn.Linear(8, 4))) == {"weight"}
    with pytest.raises(ValueError, match=r"another model.*mask of \(4, 8\), parameter of \(4, 9\)"):
        load_masks(path, like=torch.nn.Linear(9, 4))
    with pytest.raises(ValueError, match="no such parameter"):
        load_masks(path, like=torch.nn.Sequential(torch.nn.Linear(8, 4)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: BitMask.pack(torch.ones(3)), TypeError, "torch.bool"),
        (lambda: BitMask.pack([True]), TypeError, "mask: want a torch.bool tensor, got list"),
        (lambda: BitMask(torch.zeros(2, 2, dtype=torch.int32), (2, 16)), TypeError, "torch.uint8"),
        (lambda: BitMask(torch.zeros(2, 2, dtype=torch.uint8), (2, 17)), ValueError, "bits of shape"),
        (lambda: BitMask.zeros((2, 3)) & BitMask.zeros((3, 2)), ValueError, "shapes differ"),
        (lambda: BitMask.zeros((2, 3)) | torch.zeros(2, 3), TypeError, "BitMask on both sides"),
        (lambda: BitMask.zeros((2, 3)).prefix_counts(0), ValueError, "at least 1 byte"),
        (lambda: save_masks({}, "unused"), ValueError, "empty"),
        (lambda: save_masks({"a": torch.zeros(3)}, "unused"), TypeError, "want a BitMask"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
