"""BitMask: which entries of a tensor may move, one bit an entry, and its file format.

Layout (fixed: files and kernels rely on it): uint8 [rows, ceil(cols / 8)], little-endian in a byte, every row starts on a
byte, padding bits are 0. A tensor of one dimension is one row; one of more dimensions has `shape[0]` rows (a convolution's
rows are its output channels).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunlearn import _backend, _native
from fastunlearn._stored import parse_json, read_tensors
from fastunlearn.reference import mask as reference

_OP = _backend.register("bitmask", native=("cpu", "cuda"))
_FORMAT = "fastunlearn.masks"
_VERSION = "1"


def rows_cols(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, cols) of a tensor of `shape` as a mask sees it: one row for at most one dimension, else shape[0] rows."""
    if len(shape) <= 1:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _pack(bools: Tensor) -> Tensor:
    """bool [rows, cols] -> bits."""
    if _backend.resolve(_OP, bools.device) == "reference":
        return reference.mask_pack(bools)
    bools = _native.in_memory(bools)
    rows, cols = bools.shape
    bits = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8, device=bools.device)
    call = getattr(_native.library(), f"mask_pack_{_native.suffix(bools.device)}")
    where = _native.stream(bools.device) if _native.is_cuda(bools.device) else ()
    call(bools.data_ptr(), rows, cols, bits.data_ptr(), *where)
    return bits


def _unpack(bits: Tensor, cols: int) -> Tensor:
    if _backend.resolve(_OP, bits.device) == "reference":
        return reference.mask_unpack(bits, cols)
    bits = bits.contiguous()
    out = torch.empty(bits.shape[0], cols, dtype=torch.bool, device=bits.device)
    call = getattr(_native.library(), f"mask_unpack_{_native.suffix(bits.device)}")
    where = _native.stream(bits.device) if _native.is_cuda(bits.device) else ()
    call(bits.data_ptr(), bits.shape[0], cols, out.data_ptr(), *where)
    return out


def _count(bits: Tensor) -> Tensor:
    if _backend.resolve(_OP, bits.device) == "reference":
        return reference.mask_count(bits)
    bits = bits.contiguous()
    if not _native.is_cuda(bits.device):
        return torch.tensor(_native.library().mask_count_cpu(bits.data_ptr(), bits.numel()), dtype=torch.int64)
    out = torch.empty((), dtype=torch.int64, device=bits.device)
    _native.library().mask_count_cuda(bits.data_ptr(), bits.numel(), out.data_ptr(), *_native.stream(bits.device))
    return out


def _prefix(bits: Tensor, chunk: int) -> Tensor:
    if _backend.resolve(_OP, bits.device) == "reference":
        return reference.mask_prefix(bits, chunk)
    bits = bits.contiguous()
    chunks = -(-bits.numel() // chunk)
    out = torch.empty(chunks + 1, dtype=torch.int64, device=bits.device)
    if _native.is_cuda(bits.device):
        partial = torch.empty(-(-chunks // 1024), dtype=torch.int64, device=bits.device)
        where = _native.stream(bits.device)
        _native.library().mask_prefix_cuda(
            bits.data_ptr(), bits.numel(), chunk, out.data_ptr(), partial.data_ptr(), *where
        )
    else:
        _native.library().mask_prefix_cpu(bits.data_ptr(), bits.numel(), chunk, out.data_ptr())
    return out


# As torch.library ops: what torch.compile sees instead of the addresses above.
@torch.library.custom_op("fastunlearn::mask_pack", mutates_args=())
def mask_pack(bools: Tensor) -> Tensor:
    return _pack(bools)


@mask_pack.register_fake
def _(bools: Tensor) -> Tensor:
    return bools.new_empty(bools.shape[0], (bools.shape[1] + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("fastunlearn::mask_unpack", mutates_args=())
def mask_unpack(bits: Tensor, cols: int) -> Tensor:
    return _unpack(bits, cols)


@mask_unpack.register_fake
def _(bits: Tensor, cols: int) -> Tensor:
    return bits.new_empty(bits.shape[0], cols, dtype=torch.bool)


@torch.library.custom_op("fastunlearn::mask_count", mutates_args=())
def mask_count(bits: Tensor) -> Tensor:
    return _count(bits)


@mask_count.register_fake
def _(bits: Tensor) -> Tensor:
    return bits.new_empty((), dtype=torch.int64)


@torch.library.custom_op("fastunlearn::mask_prefix", mutates_args=())
def mask_prefix(bits: Tensor, chunk: int) -> Tensor:
    return _prefix(bits, chunk)


@mask_prefix.register_fake
def _(bits: Tensor, chunk: int) -> Tensor:
    return bits.new_empty((bits.numel() + chunk - 1) // chunk + 1, dtype=torch.int64)


class BitMask:
    """A boolean mask of one bit an entry.

    Attributes:
        bits: uint8 [rows, ceil(cols / 8)]; layout in the module's docstring.
        shape: shape of the tensor the mask is for.
    """

    __slots__ = ("bits", "shape")

    bits: Tensor
    shape: torch.Size

    def __init__(self, bits: Tensor, shape: Sequence[int]):
        """Wraps existing bits (no copy). Padding bits must be 0.

        Raises:
            TypeError: bits are not uint8. ValueError: bits do not fit the shape.
        """
        if bits.dtype != torch.uint8:
            raise TypeError(f"bits: want torch.uint8, got {bits.dtype} (BitMask.pack takes a bool mask)")
        rows, cols = rows_cols(shape)
        if tuple(bits.shape) != (rows, (cols + 7) // 8):
            raise ValueError(
                f"bits: a mask of shape {tuple(shape)} has bits of shape {(rows, (cols + 7) // 8)}, got {tuple(bits.shape)}"
            )
        self.bits = bits
        self.shape = torch.Size(shape)

    @classmethod
    def _of(cls, bits: Tensor, shape: torch.Size) -> BitMask:
        """Wraps bits that are known to fit, without a check."""
        mask = cls.__new__(cls)
        mask.bits, mask.shape = bits, shape
        return mask

    @staticmethod
    def pack(mask: Tensor) -> BitMask:
        """Packs a bool tensor of any shape.

        Raises:
            TypeError: no tensor, or not of torch.bool.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: want a torch.bool tensor, got {type(mask).__name__} (torch.tensor(...) makes one)")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: want a torch.bool tensor, got {mask.dtype} (write mask != 0 for a 0/1 mask)")
        flat = mask.reshape(rows_cols(mask.shape))
        return BitMask(mask_pack(flat) if _backend.traced(flat) else _pack(flat), mask.shape)

    @staticmethod
    def zeros(shape: Sequence[int], device: torch.device | str | None = None) -> BitMask:
        """A mask with no bit set."""
        rows, cols = rows_cols(shape)
        return BitMask(torch.zeros(rows, (cols + 7) // 8, dtype=torch.uint8, device=device), shape)

    @staticmethod
    def ones(shape: Sequence[int], device: torch.device | str | None = None) -> BitMask:
        """A mask with every bit set."""
        return BitMask.zeros(shape, device).invert()

    def unpack(self) -> Tensor:
        """The mask as a bool tensor of `shape`."""
        cols = rows_cols(self.shape)[1]
        flat = mask_unpack(self.bits, cols) if _backend.traced(self.bits) else _unpack(self.bits, cols)
        return flat.reshape(self.shape)

    def count(self) -> Tensor:
        """Number of set bits: int64 scalar on the mask's device (no host synchronisation)."""
        return mask_count(self.bits) if _backend.traced(self.bits) else _count(self.bits)

    def prefix_counts(self, chunk: int = 64) -> Tensor:
        """int64 [ceil(bytes / chunk) + 1]: set bits before byte i * chunk, row-major: where an entry stands among the set ones.

        Raises:
            ValueError: chunk < 1.
        """
        if chunk < 1:
            raise ValueError(f"chunk: want at least 1 byte, got {chunk}")
        return mask_prefix(self.bits, chunk) if _backend.traced(self.bits) else _prefix(self.bits, chunk)

    @property
    def density(self) -> float:
        """Share of set bits in [0, 1]; 0 for a mask without entries. Synchronises with the device."""
        return int(self.count()) / max(self.numel(), 1)

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def rows(self) -> int:
        return rows_cols(self.shape)[0]

    @property
    def cols(self) -> int:
        return rows_cols(self.shape)[1]

    def numel(self) -> int:
        """Number of entries, set or not."""
        return self.shape.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BitMask:
        """The mask on another device."""
        return BitMask(self.bits.to(device, non_blocking=non_blocking), self.shape)

    def clone(self) -> BitMask:
        return BitMask(self.bits.clone(), self.shape)

    def _same(self, other: BitMask, what: str) -> None:
        if not isinstance(other, BitMask):
            raise TypeError(f"{what}: want a BitMask on both sides, got {type(other).__name__} (BitMask.pack(tensor))")
        if self.shape != other.shape:
            raise ValueError(f"{what}: shapes differ: {tuple(self.shape)} and {tuple(other.shape)}")

    def __and__(self, other: BitMask) -> BitMask:
        self._same(other, "&")
        return BitMask(self.bits & other.bits, self.shape)

    def __or__(self, other: BitMask) -> BitMask:
        self._same(other, "|")
        return BitMask(self.bits | other.bits, self.shape)

    def invert(self) -> BitMask:
        """The mask of the other entries: `~mask`, in the words that torch.compile(fullgraph=True) can trace."""
        bits = ~self.bits
        if self.cols % 8:
            bits[:, -1] &= (1 << self.cols % 8) - 1
        return BitMask(bits, self.shape)

    def __invert__(self) -> BitMask:
        return self.invert()

    def equal(self, other: BitMask) -> bool:
        """Same shape and the same bits."""
        self._same(other, "equal")
        return torch.equal(self.bits, other.bits)

    def __repr__(self) -> str:
        if self.bits.device.type == "meta":
            return f"BitMask(shape={tuple(self.shape)}, device=meta)"
        return f"BitMask(shape={tuple(self.shape)}, density={self.density:.4g}, device={self.device})"


def save_masks(masks: Mapping[str, BitMask], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes masks by name into one safetensors file (bits as uint8 tensors, shapes in the metadata).

    The file is written under a temporary name and renamed: an interrupted save leaves no half file behind.

    Args:
        overwrite: replace a file that is there already.

    Raises:
        TypeError: a value is not a BitMask. ValueError: no masks. FileExistsError: there is a file and `overwrite` is False.
    """
    from safetensors.torch import save_file

    if not masks:
        raise ValueError("masks: empty; there is nothing to save")
    for name, mask in masks.items():
        if not isinstance(mask, BitMask):
            raise TypeError(f"masks[{name!r}]: want a BitMask, got {type(mask).__name__} (BitMask.pack(tensor))")
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
    }
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; save_masks(..., overwrite=True) replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: mask.bits.cpu().contiguous().clone() for name, mask in masks.items()}, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _padding_is_zero(mask: BitMask) -> bool:
    return mask.bits.numel() == 0 or mask.cols % 8 == 0 or not bool((mask.bits[:, -1] >> mask.cols % 8).any())


def _read_mask(tensors: Mapping[str, Tensor], path: Path, name: str, shape: Any) -> BitMask:
    """One mask of the tensors of a file."""
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(
            f"{path}: the shape of {name} is {shape!r}, want a list of sizes; write it again with save_masks"
        )
    if name not in tensors:
        raise ValueError(f"{path}: its metadata names {name}, but there is no tensor of that name")
    try:
        mask = BitMask(tensors[name], shape)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: {name} is no mask of shape {tuple(shape)}: {error}") from error
    if not _padding_is_zero(mask):
        raise ValueError(f"{path}: {name} has bits set behind its {mask.cols} columns; was it written by save_masks?")
    return mask


def _read_shapes(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Name -> shape, of a file's metadata."""
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is a safetensors file but holds no fastunlearn masks (its format: {metadata.get('format')!r})"
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path}: mask files of version {metadata.get('version')!r} are unknown here (known: {_VERSION!r}); "
            "a newer fastunlearn may read it"
        )
    try:
        shapes = parse_json(metadata.get("shapes", ""), "it")
    except ValueError as error:
        raise ValueError(f"{path}: its metadata 'shapes' is missing or damaged ({error})") from error
    if not isinstance(shapes, dict):
        raise ValueError(f"{path}: its metadata 'shapes' is a {type(shapes).__name__}, want a dict of name -> shape")
    return shapes


def load_masks(
    path: str | os.PathLike[str],
    like: torch.nn.Module | Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, BitMask]:
    """Reads masks that `save_masks` wrote.

    Args:
        like: the model (or name -> tensor) the masks are for; then every mask must have a parameter of its name and shape.
        device: where the masks go.

    Raises:
        FileNotFoundError: no such file. TypeError: `like` is neither a module nor a mapping. ValueError: truncated, not a
        mask file, of an unknown version, damaged (the message names what), or of another model.
    """
    if like is not None and not isinstance(like, torch.nn.Module | Mapping):
        raise TypeError(f"like: want a module or name -> tensor, got {type(like).__name__} (the device is device=...)")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no mask file at {path}")
    tensors, metadata = read_tensors(path)
    masks = {
        name: _read_mask(tensors, path, name, shape).to(device) for name, shape in _read_shapes(metadata, path).items()
    }
    if like is not None:
        tensors = dict(like.named_parameters()) if isinstance(like, torch.nn.Module) else dict(like)
        wrong = [f"{name}: the model has no such parameter" for name in masks if name not in tensors]
        wrong += [
            f"{name}: mask of {tuple(mask.shape)}, parameter of {tuple(tensors[name].shape)}"
            for name, mask in masks.items()
            if name in tensors and tuple(mask.shape) != tuple(tensors[name].shape)
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"{path} holds masks of another model: {'; '.join(wrong[:3])}{more}")
    return masks
