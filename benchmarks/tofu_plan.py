"""How long the TOFU study would take here: its parts on a few rows each, and what they add up to.

A part that was measured is kept in a file and not measured again, so that the plan can be made in pieces (`--pieces 1`); each says
how many threads it had and what else ran on the machine. The model is the one that everything starts from: it forgets nothing, but
takes the time that one that does takes. How long a greedy answer is depends on the model, so answers are charged in full.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.tofu_methods import EVIDENCE, METHODS, SETTINGS
from benchmarks.tofu_runs import Rows, Work, finetune
from fastunlearn.checkpoint import Checkpoint, load_checkpoint
from fastunlearn.data.text import encode_rows
from fastunlearn.evaluation import tofu
from fastunlearn.evaluation.journal import Journal
from fastunlearn.evaluation.runner import Runner
from fastunlearn.report.files import write_json

#: rows of a part of an evaluation, steps of unlearning, blocks of the pruned model
ROWS, STEPS, BLOCKS = 4, 2, 2


class Clock:
    """Seconds of what runs inside, and what others took of the machine meanwhile."""

    def __init__(self) -> None:
        self.seconds, self.load = 0.0, machine.OtherLoad()

    @contextmanager
    def __call__(self) -> Any:
        with self.load:
            start = time.perf_counter()
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - start


def _load(work: Work) -> Checkpoint:
    return load_checkpoint(work.base, device=work.device)


def _finetuning(work: Work, clock: Clock) -> dict[str, Any]:
    """Of one step, the second one."""
    checkpoint, size = _load(work), work.size.finetune["batch_size"]
    rows = encode_rows(work.data()["train retain"][:size], checkpoint.tokenizer, what="retain set")
    how = {"epochs": 1, "learning_rate": 0.0, "batch_size": size, "cast": work.cast, "what": "a step"}
    finetune(checkpoint.model, rows, **how)
    with clock():
        finetune(checkpoint.model, rows, **how)
    return {"seconds a step": clock.seconds}


def _unlearning(work: Work, clock: Clock) -> dict[str, Any]:
    """NPO as it is run: what is done once (loading, reference log-probabilities), and a step."""
    method, out = METHODS["NPO"], []
    with clock():
        for steps in (1, 1 + STEPS):
            checkpoint = _load(work)
            options = {**method.options, "learning_rate": 1e-6, "max_steps": steps}
            out.append(work.unlearn(checkpoint, method.config, method.trainer, options, seed=0)["seconds"])
    # The log-probabilities of the first run are kept: the second one's start is without them.
    step = max(0.0, out[1] - out[0]) / STEPS if out[1] > out[0] else out[1] / (1 + STEPS)
    return {"seconds a step": step, "seconds once": max(0.0, out[0] - step)}


def _part(work: Work, part: str, clock: Clock) -> dict[str, Any]:
    """Of one set's first rows: scores, then answers."""
    checkpoint, settings = _load(work), work.settings()
    rows: Rows = work.parts(False)[part][:ROWS]
    encoded = tofu.encode_part(part, rows, checkpoint.tokenizer, settings)
    runner = Runner(
        checkpoint.model, checkpoint.tokenizer, Journal(None, "", {}), stops=encoded.stops, autocast=settings.dtype(), progress=False
    )  # fmt: skip
    runner.score("first", encoded.questions[:1])
    with clock():
        scores = runner.score("scores", encoded.questions)
    out = {"rows": len(rows), "seconds a row": clock.seconds / len(rows)}
    if part != "holdout":
        known = [(q.answers[0], row[0]) for q, row in zip(encoded.questions, scores, strict=True)]
        before = clock.seconds
        with clock():
            runner.answer("answers", [q.prompt for q in encoded.questions], settings.max_new_tokens, known)
        out["seconds a row"] += (clock.seconds - before) / len(rows)
    return out


def _pruning(work: Work, clock: Clock) -> dict[str, Any]:
    """SparseGPT of the first blocks, as if all took as long; without the training that follows."""
    checkpoint = _load(work)
    blocks: Any = checkpoint.model.model.layers
    count = len(blocks)
    checkpoint.model.model.layers = blocks[:BLOCKS]
    checkpoint.model.config.num_hidden_layers = min(BLOCKS, count)
    with clock():
        work.sparsegpt(checkpoint)
    return {"seconds": clock.seconds * count / min(BLOCKS, count)}


def _robustness(work: Work, clock: Clock) -> dict[str, Any]:
    """Relearning and rounding of the model as it is."""
    checkpoint = _load(work)
    with clock():
        work.robust(checkpoint, 0)
    return {"seconds": clock.seconds}


def _parts(work: Work) -> dict[str, Callable[[Clock], dict[str, Any]]]:
    out: dict[str, Callable[[Clock], dict[str, Any]]] = {
        "fine-tuning": lambda clock: _finetuning(work, clock), "unlearning": lambda clock: _unlearning(work, clock),
    }  # fmt: skip
    for part in work.parts(False):
        out[f"evaluation, {part}"] = lambda clock, part=part: _part(work, part, clock)  # type: ignore[misc]
    out["pruning"] = lambda clock: _pruning(work, clock)
    out["robustness"] = lambda clock: _robustness(work, clock)
    return out


def _hours(work: Work, parts: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], settings: Sequence[str]) -> dict[str, float]:  # fmt: skip
    """What the parts add up to; of an evaluation the seconds."""
    size, data = work.size, work.data()
    forget = len(data["train forget"])
    asked = {part: len(rows) for part, rows in work.parts(False).items()}
    evaluation = sum(parts[f"evaluation, {part}"]["seconds a row"] * count for part, count in asked.items())
    rows = 2 * len(data["train retain"]) + forget
    steps = -(-forget // size.batch_size) * size.epochs
    one = parts["unlearning"]["seconds once"] + steps * parts["unlearning"]["seconds a step"] + evaluation
    robust = parts["robustness"]["seconds"]
    runs = [(name, setting) for name in methods for setting in METHODS[name].settings if setting in settings]
    step, pruning = parts["fine-tuning"]["seconds a step"], parts["pruning"]["seconds"]
    again = size.recover["epochs"] / size.recover["batch_size"] * step  # of a row, after pruning
    pruned = sum(when != "before" for *_, when in EVIDENCE.values())
    hours = {
        "models": rows * size.finetune["epochs"] / size.finetune["batch_size"] * step + (2 * pruning + rows * again) * (len(settings) - 1),
        "tune": sum(len(METHODS[name].trials) for name, _ in runs) * one,
        # Of each setting the models before, and the retain model twice: it is what the others are compared with.
        "run": len(runs) * len(seeds) * (one + robust) + len(settings) * (3 * evaluation + 2 * robust),
        "evidence": len(seeds) * (len(EVIDENCE) * (one + robust) + pruned * (pruning + len(data["train retain"]) * again)),
    }  # fmt: skip
    return {
        "seconds, an evaluation": evaluation, "seconds, a run": one + robust, "steps of a run": steps,
        **{f"hours, {name}": seconds / 3600 for name, seconds in hours.items()}, "hours": sum(hours.values()) / 3600,
    }  # fmt: skip


def plan(
    work: Work, methods: Sequence[str], seeds: Sequence[int], settings: Sequence[str] = SETTINGS, *, out: Path | None = None,
    pieces: int | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Measures what `out` does not hold yet, a line each, and says how long the stages would take.

    Args:
        out: where it is kept (plan.json of the work folder). pieces: measure no more than so many parts.

    Returns:
        What stands in the file; None where parts are left.

    Raises:
        ValueError: the file is of another model, size or precision.
    """
    out = out or work.folder / "plan.json"
    facts = machine.meta(work.device)
    # A number of rows asked, epochs and the like change the sum, not its parts.
    about = {"model": work.base, "forward passes": "bf16" if work.bf16 else "fp32", "new tokens": work.size.new_tokens, "machine": facts["device"]}  # fmt: skip
    made: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"about": about, "parts": {}}
    if made["about"] != about:
        raise ValueError(f"plan: {out} is of {made['about']}, this one of {about}; move it away")
    for name, measure in _parts(work).items():
        if name in made["parts"]:
            continue
        if pieces == 0:
            return None
        pieces = None if pieces is None else pieces - 1
        clock = Clock()
        row = {key: round(value, 3) for key, value in measure(clock).items()}
        made["parts"][name] = row | {
            "threads": facts["threads"], "other load": clock.load.share(), "commit": facts["commit"], "date": facts["date"],
        }  # fmt: skip
        write_json(out, made)
        print(f"{name}: {json.dumps(row)}", flush=True)
    made["size"] = asdict(work.size)
    made["sum"] = _hours(work, made["parts"], methods, seeds, settings) | {"methods": len(methods), "seeds": len(seeds), "settings": list(settings)}  # fmt: skip
    write_json(out, made)
    return made
