"""BitMask: pack, unpack, count, prefix counts. Peers: torch's own boolean operations, numpy's packbits, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.spec import Case, Inputs, Limit, Op, Provider, compiled, equal, ours
from fastunlearn import BitMask
from fastunlearn.reference import mask as reference

MODELS = {"SmolLM2-135M": shapes.smollm2_135m(), "SD 1.4 U-Net": shapes.sd14_unet()}
CASES = [
    Case(f"{work}, {model}", listed, torch.bool, {"work": work}, quick="Smol" in model, gib=4 * shapes.numel(listed) / 2**30)
    for model, listed in MODELS.items()
    for work in ("pack", "unpack", "count")
]  # fmt: skip


def make(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    bools = [torch.rand(s, generator=generator, device=device) < 0.1 for _, s in case.shapes]
    return Inputs(bools=bools, masks=[BitMask.pack(b) for b in bools])


def _flat(bits: Callable[[torch.Tensor], torch.Tensor], bools: list[torch.Tensor]) -> list[torch.Tensor]:
    return [bits(b.reshape(b.shape[0] if b.dim() > 1 else 1, -1)) for b in bools]


def expected(x: Inputs) -> Any:
    if x.case.options["work"] == "pack":
        return _flat(reference.mask_pack, x.bools)
    return x.bools if x.case.options["work"] == "unpack" else [torch.stack([b.sum() for b in x.bools]).sum()]


def mine(x: Inputs) -> Callable[[], Any]:
    return {
        "pack": lambda: [BitMask.pack(b) for b in x.bools],
        "unpack": lambda: [m.unpack() for m in x.masks],
        "count": lambda: [torch.stack([m.count() for m in x.masks]).sum()],
    }[x.case.options["work"]]


def numpy_bits(x: Inputs) -> Callable[[], Any] | None:
    bools = [b.numpy().reshape(b.shape[0] if b.dim() > 1 else 1, -1) for b in x.bools]
    bits = [m.bits.numpy() for m in x.masks]
    return {
        "pack": lambda: [torch.from_numpy(np.packbits(b, axis=1, bitorder="little")) for b in bools],
        "unpack": lambda: [
            torch.from_numpy(np.unpackbits(b, axis=1, count=m.cols, bitorder="little").view(np.bool_)).view(m.shape)
            for b, m in zip(bits, x.masks)
        ],
        "count": lambda: [torch.tensor(sum(int(np.bitwise_count(b).sum()) for b in bits))],
    }[x.case.options["work"]]


def torch_compile(x: Inputs) -> Callable[[], Any] | None:
    if "Smol" not in x.case.name or x.case.options["work"] == "count":
        return None
    if x.case.options["work"] == "pack":
        pack = compiled(reference.mask_pack)
        return lambda: _flat(pack, x.bools)
    unpack = compiled(reference.mask_unpack)
    return lambda: [unpack(m.bits, m.cols).view(m.shape) for m in x.masks]


def torch_bools(x: Inputs) -> Callable[[], Any] | None:
    """What a mask of one byte an entry costs to count."""
    return (
        (lambda: [torch.stack([torch.count_nonzero(b) for b in x.bools]).sum()])
        if x.case.options["work"] == "count"
        else None
    )


def limit(x: Inputs, line: int) -> Limit:
    bits = sum(m.bits.numel() for m in x.masks)
    return Limit("bytes", bits if x.case.options["work"] == "count" else bits + x.case.numel)


OP = Op(
    name="mask",
    cases=CASES,
    make=make,
    expected=expected,
    check=equal,
    limit=limit,
    providers=[
        *ours("bitmask", mine, reference=True),
        Provider("numpy", numpy_bits, devices=("cpu",)),
        Provider("torch.compile", torch_compile, compiles=True),
        Provider("torch, one byte an entry", torch_bools),
    ],
)
