"""Runs every CUDA kernel once on small ragged inputs: `compute-sanitizer python -m tests.sanitize`.

Every op whose proof (tests/ops) says that it has CUDA bodies is run on its cases; a kernel without proof is not run.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

import fastunlearn
from tests.proof import OpProof


def proofs() -> list[type[OpProof]]:
    for path in sorted((Path(__file__).parent / "ops").glob("test_*.py")):
        importlib.import_module(f"tests.ops.{path.stem}")
    found, todo = [], list(OpProof.__subclasses__())
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.cuda_bodies:
            found.append(cls)
    return sorted(found, key=lambda cls: cls.op)


def main() -> int:
    if not torch.cuda.is_available():
        print("tests.sanitize: torch finds no GPU", file=sys.stderr)
        return 2
    ran = 0
    for cls in proofs():
        for name in cls.few or cls.cases:
            with fastunlearn.backend("native"):
                cls().run(cls.cases[name]("cuda"))
            torch.cuda.synchronize()
            ran += 1
        print(f"{cls.op}: done", flush=True)
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
