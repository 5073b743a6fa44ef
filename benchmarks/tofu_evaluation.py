"""How long a TOFU evaluation takes, beside the slow way: batches of 32 in file order, a pass for every answer and every metric, whole
logits, transformers' generate. Both give the same numbers; the largest difference is published too.

    python -m benchmarks quality tofu_evaluation [--rows 32] [--parts forget] [--model smollm2] [--dtype float32]

The environment variable FASTUNLEARN_DATA names a folder with tofu/. The slow way is what open-unlearning does, written anew here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import machine
from fastunlearn.checkpoint import load_checkpoint
from fastunlearn.data.text import pad
from fastunlearn.evaluation import memorisation as memo
from fastunlearn.evaluation import tofu
from fastunlearn.evaluation.journal import Journal
from fastunlearn.evaluation.logs import Logs, summary
from fastunlearn.evaluation.rouge import rouge
from fastunlearn.evaluation.runner import Runner

BATCH = 32
IGNORED = -100


def data_folder() -> Path:
    """TOFU's files.

    Raises:
        ValueError: FASTUNLEARN_DATA is not set, or holds no TOFU.
    """
    folder = Path(os.environ.get("FASTUNLEARN_DATA", "")) / "tofu"
    if "FASTUNLEARN_DATA" not in os.environ or not (folder / "forget10_perturbed.json").is_file():
        raise ValueError("FASTUNLEARN_DATA: set it to a folder that holds tofu/forget10_perturbed.json and its kin")
    return folder


def _rows(part: tofu.Part, answer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, mask, labels) of batches in file order, of one answer of every question."""
    for at in range(0, len(part.questions), BATCH):
        chosen = part.questions[at : at + BATCH]
        rows = [q.prompt + q.answers[answer] for q in chosen]
        labels = [[IGNORED] * len(q.prompt) + q.answers[answer] for q in chosen]
        yield pad(rows, 0), pad([[1] * len(row) for row in rows], 0), pad(labels, IGNORED)


@torch.no_grad()
def _losses(model: Any, part: tofu.Part, answer: int) -> list[float]:
    out: list[float] = []
    for ids, mask, labels in _rows(part, answer):
        ids, mask, labels = (t.to(model.device) for t in (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        out += (loss.double().sum(1) / (labels != IGNORED).sum(1)).tolist()
    return out


@torch.no_grad()
def _right(model: Any, part: tofu.Part) -> list[list[bool]]:
    out: list[list[bool]] = []
    for ids, mask, labels in _rows(part, 0):
        ids, mask, labels = (t.to(model.device) for t in (ids, mask, labels))
        logp = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)[:, :-1]
        for said, wanted in zip(logp.argmax(-1), labels[:, 1:], strict=True):
            kept = wanted != IGNORED
            out.append((said == wanted)[kept].tolist()[:-1])
    return out


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, part: tofu.Part, most: int) -> list[str]:
    out: list[str] = []
    for at in range(0, len(part.questions), BATCH):
        prompts = [q.prompt for q in part.questions[at : at + BATCH]]
        ids, mask = (
            pad(prompts, 0, "left").to(model.device),
            pad([[1] * len(p) for p in prompts], 0, "left").to(model.device),
        )
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, eos_token_id=part.stops,
            pad_token_id=part.stops[0],
        )  # fmt: skip
        for row in made[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in part.stops), len(row))
            out.append(tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return out


def slow_way(model: Any, tokenizer: Any, encoded: dict[str, tofu.Part], settings: tofu.TofuSettings) -> dict[str, list[float]]:  # fmt: skip
    """Every number of every row."""
    out: dict[str, list[float]] = {}
    for name, part in encoded.items():
        losses = [_losses(model, part, answer) for answer in range(len(part.questions[0].answers))]
        for number, values in enumerate(losses):
            out[f"{name} probability {number}"] = [math.exp(-value) for value in values]
        first = 2 if part.paraphrased else 1
        wrong = [list(row) for row in zip(*losses[first:], strict=True)]
        out[f"{name} truth ratio"] = list(memo.truth_ratio(losses[first - 1], wrong))
        if settings.generate:
            said = _answers(model, tokenizer, part, settings.max_new_tokens)
            out[f"{name} ROUGE-L"] = [
                rouge(s, w.strip()).rougeL_recall for s, w in zip(said, part.answers, strict=True)
            ]
    if "forget" in encoded:
        out["extraction strength"] = [memo.extraction_strength(r) for r in _right(model, encoded["forget"])]
        out["exact memorisation"] = [memo.exact_memorisation(r) or 0.0 for r in _right(model, encoded["forget"])]
    return out


def our_way(model: Any, tokenizer: Any, encoded: dict[str, tofu.Part], settings: tofu.TofuSettings) -> dict[str, list[float]]:  # fmt: skip
    """The same by the engine."""
    stops = sorted({stop for part in encoded.values() for stop in part.stops})
    runner = Runner(model, tokenizer, Journal(None, "", {}), stops=stops, progress=False)
    out: dict[str, list[float]] = {}
    for name, part in encoded.items():
        scores = runner.score(name, part.questions)
        for number in range(len(part.questions[0].answers)):
            out[f"{name} probability {number}"] = [math.exp(-row[number].avg_loss) for row in scores]
        logs: Logs = tofu.probability_logs(name, part, scores, "ratio")
        ratio = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
        out[f"{name} truth ratio"] = [row["score"] for row in logs[ratio]["value_by_index"].values()]
        assert summary(logs)
        if settings.generate:
            known = [(q.answers[0], row[0]) for q, row in zip(part.questions, scores, strict=True)]
            said = runner.answer(f"{name}, answers", [q.prompt for q in part.questions], settings.max_new_tokens, known)
            out[f"{name} ROUGE-L"] = [
                rouge(s, w.strip()).rougeL_recall for s, w in zip(said, part.answers, strict=True)
            ]
        if name == "forget":
            right = [row[0].right(q.answers[0]) for q, row in zip(part.questions, scores, strict=True)]
            out["extraction strength"] = [memo.extraction_strength(r) for r in right]
            out["exact memorisation"] = [memo.exact_memorisation(r) or 0.0 for r in right]
    return out


def differences(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of a row, by kind of number; ratios relative to themselves where they exceed 1."""
    out: dict[str, float] = {}
    for name, values in theirs.items():
        worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours[name], values, strict=True))
        kind = next(k for k in ("probability", "truth ratio", "ROUGE-L", "extraction", "exact") if k in name)
        out[kind] = max(out.get(kind, 0.0), worst)
    return out


def run(
    rows: int = 0, parts: Sequence[str] = tuple(tofu.FILES), model: str = "smollm2", split: str = "forget10", dtype: str = "float32",
    generate: bool = True, max_new_tokens: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Times both ways, once each, and compares every number.

    Args:
        rows: of each set, the first ones; 0: all. parts: which sets. generate: also answers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = tofu.TofuSettings(limit=rows, generate=generate, max_new_tokens=max_new_tokens, attacks=())
    checkpoint = load_checkpoint(model, dtype=getattr(torch, dtype), device=device)
    net, tokenizer = checkpoint.model, checkpoint.tokenizer
    loaded = tofu.load_parts(data_folder(), split)
    encoded = {part: tofu.encode_part(part, loaded[part], tokenizer, settings) for part in parts}
    load = machine.OtherLoad()
    result: list[dict[str, Any]] = []
    found: dict[str, dict[str, list[float]]] = {}
    # Nothing of the first pass (allocator, kernels) is on either clock.
    few = {part: tofu.encode_part(part, loaded[part][:2], tokenizer, settings) for part in parts[:1]}
    for way in (our_way, slow_way):
        way(net, tokenizer, few, settings)
    with load:
        for method, way in (("fastunlearn", our_way), ("batch 32, file order, a pass an answer", slow_way)):
            start = time.perf_counter()
            found[method] = way(net, tokenizer, encoded, settings)
            if device.type == "cuda":
                torch.cuda.synchronize()
            count = sum(len(part.questions) for part in encoded.values())
            result.append(
                {"method": method, "target": f"{split}, {count} rows", "seconds": round(time.perf_counter() - start, 2)}
            )
            print(result[-1], flush=True)
    ours, theirs = found.values()
    worst = differences(ours, theirs)
    result[0]["speed-up"] = round(result[1]["seconds"] / result[0]["seconds"], 2)
    result[0] |= {f"largest difference, {kind}": float(f"{value:.2g}") for kind, value in worst.items()}
    print(result[0], flush=True)
    facts, share = machine.meta(device), load.share()
    meta = {
        "model": f"{model}, {dtype}", "sets": ", ".join(f"{part} {len(encoded[part].questions)}" for part in parts),
        "new tokens": max_new_tokens if generate else 0, "machine": facts["device"], "torch": facts["torch"],
        "commit": facts["commit"], "date": facts["date"],
    }  # fmt: skip
    if share is not None:
        meta["other load"] = f"{share:.0%}"
    return {"meta": meta, "rows": result}
