"""The study behind the README's pruning table: perplexity of SmolLM2-135M-Instruct on WikiText-2 after each method and pattern.

The environment variable FASTUNLEARN_DATA names a folder with wikitext2/valid.txt (calibration) and wikitext2/test.txt.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from fastunlearn.checkpoint import load_checkpoint
from fastunlearn.evaluation.perplexity import chunk_tokens, perplexity
from fastunlearn.localize import prune

LENGTH = 512
CALIBRATION_ROWS = 64
TEST_ROWS = 32
BATCH = 4
PATTERNS = ("2:4", "4:8", "50%")
METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


def texts() -> tuple[str, str]:
    """WikiText-2's validation and test text.

    Raises:
        ValueError: FASTUNLEARN_DATA is not set, or holds no such files.
    """
    folder = Path(os.environ.get("FASTUNLEARN_DATA", "")) / "wikitext2"
    if "FASTUNLEARN_DATA" not in os.environ or not (folder / "test.txt").is_file():
        raise ValueError("FASTUNLEARN_DATA: set it to a folder that holds wikitext2/valid.txt and wikitext2/test.txt")
    return (folder / "valid.txt").read_text(encoding="utf-8"), (folder / "test.txt").read_text(encoding="utf-8")


def cases() -> list[tuple[str, str, str]]:
    """(method, pattern, scope)."""
    listed = [(method, pattern, "row") for pattern in PATTERNS for method in METHODS]
    return [*listed, ("magnitude", "50%", "tensor")]


def run(
    seed: int = 0, methods: tuple[str, ...] = tuple(METHODS), patterns: tuple[str, ...] = PATTERNS
) -> dict[str, Any]:
    """Prunes the dense model anew for every case.

    Args:
        seed: of the choice of calibration rows.
        methods, patterns: a part of the study.
    """
    valid, test = texts()
    checkpoint = load_checkpoint("smollm2")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = chunk_tokens(tokenizer, valid, LENGTH)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_ROWS]
    calibration = rows[chosen.sort().values]
    tokens = chunk_tokens(tokenizer, test, LENGTH, TEST_ROWS)
    value = perplexity(model, tokens, batch_size=BATCH)
    result = [{"method": "dense", "target": "-", "seed": seed, "perplexity": round(value, 2)}]
    print(result[-1], flush=True)
    for method, pattern, scope in cases():
        if method not in methods or pattern not in patterns:
            continue
        model.load_state_dict(dense)
        masks = prune(model, method=method, pattern=pattern, calibration=calibration, scope=scope, batch_size=BATCH)  # type: ignore[arg-type]
        kept = sum(int(mask.count()) for mask in masks.values())
        assert kept * 2 == sum(mask.numel() for mask in masks.values())
        value = perplexity(model, tokens, batch_size=BATCH)
        name = METHODS[method] + (", compared per tensor" if scope == "tensor" else "")
        target = pattern if ":" in pattern else f"{pattern} unstructured"
        row = {
            "method": name,
            "target": target,
            "seed": seed,
            "perplexity": round(value, 2),
        }
        result.append(row)
        print(row, flush=True)
    facts = machine.meta(torch.device("cpu"))
    meta = {
        "model": "SmolLM2-135M-Instruct, linear layers of its blocks",
        "text": f"WikiText-2 test, the first {TEST_ROWS} sequences of {LENGTH} tokens",
        "calibration": f"{CALIBRATION_ROWS} sequences of {LENGTH} tokens of the validation text",
        "dtype": "fp32",
        "machine": facts["device"],
        "torch": facts["torch"],
        "commit": facts["commit"],
        "date": facts["date"],
    }
    return {"meta": meta, "rows": result}
