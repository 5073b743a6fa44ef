"""The tables of whole models: what was measured (benchmarks/large.py), sharded runs beside their plans, and plans alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
NAMES = ("large", "processes", "plans")
#: (what, arm, over arm, of what, at most)
TARGETS = (
    ("peak of c over a", "c", "a", "peak_bytes", 0.45),
    ("step of c over a", "c", "a", "step_seconds", 0.9),
    ("step of d over c", "d", "c", "step_seconds", 1.05),
)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (head, ruler, *rows)]


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}"


def _plan(measured: float, said: float | None, unit: float) -> str:
    """What the plan said, and how far that is from what was measured."""
    return "-" if said is None else f"{said / unit:,.3g} ({said / measured - 1:+.0%})"


def _world(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "device", "dtype", "batch", "sequence", "checkpointing", "layers"))


def _facts(meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    commits = list(dict.fromkeys(f"{row['commit']}, {row['date']}" for row in rows))
    loads = [row["other_load"] for row in rows if row.get("other_load") is not None]
    said = f"{meta['device']}, {meta['threads']} thread{'s' * (meta['threads'] > 1)}; torch {meta['torch']}; {meta['weights']}"
    kinds = "; seconds of the processor" if all(row.get("clock") == "processor" for row in rows) else ""
    busy = f"; other work took {min(loads):.0%} to {max(loads):.0%} of the machine meanwhile" if loads else ""
    return f"{said}{kinds}{busy}; commit {'; '.join(commits)}."


def measured(result: Mapping[str, Any]) -> list[str]:
    """One line a model and arm, then the targets of those that have what they compare."""
    rows = [row for row in result["rows"] if "seconds" in row]
    parts = list(dict.fromkeys(part for row in rows for part in row["seconds"]))
    head = ["model, rows x tokens", "arm", "tokens/s", "step, s", *(f"{part}, s" for part in parts), "peak MiB", "plan: peak MiB", "plan: step, s"]  # fmt: skip
    lines, targets = [], []
    for row in rows:
        said = row.get("plan", {})
        lines.append([
            f"{row['model']}, {row['dtype']}, {row['batch']} + {row['batch']} x {row['sequence']}", f"({row['arm']}) {row['what']}",
            f"{row['tokens_per_second']:,.0f}", _seconds(row["step_seconds"]),
            *(_seconds(row["seconds"][part]) if part in row["seconds"] else "-" for part in parts),
            f"{row['peak_bytes'] / MIB:,.0f}", _plan(row["peak_bytes"], said.get("peak_bytes"), MIB),
            _plan(row["step_seconds"], said.get("step_seconds"), 1),
        ])  # fmt: skip
    lines += [
        [f"{row['model']}, {row['dtype']}", f"({row['arm']})", row["failed"], *["-"] * (len(head) - 3)]
        for row in result["rows"]
        if "failed" in row
    ]
    for world in dict.fromkeys(map(_world, rows)):
        arms = {row["arm"]: row for row in rows if _world(row) == world}
        for what, one, other, key, limit in TARGETS:
            if one in arms and other in arms:
                ratio = arms[one][key] / arms[other][key]
                verdict = "met" if ratio <= limit else "**missed**"
                targets.append([f"{world[0]}, {world[2]}: {what}", f"{ratio:.3f}", f"<= {limit}", verdict])
    out = _markdown(head, lines)
    out += (
        ["", *_markdown(["target (of 8B on a GPU; here the trend)", "measured", "wanted", ""], targets)]
        if targets
        else []
    )
    return [*out, "", _facts(result["meta"], rows)]


def processes(result: Mapping[str, Any]) -> list[str]:
    """One line an arm and number of processes."""
    rows = result["rows"]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["bytes of all"]))
    head = [
        "arm",
        "processes",
        *(f"{kind} of all, MiB (plan)" for kind in kinds),
        "peak of one, MiB",
        "plan",
        "step, s",
        "plan",
    ]
    lines = [
        [
            f"({row['arm']}) {row['what']}", str(row["processes"]),
            *(f"{row['bytes of all'][k] / MIB:,.1f} ({row['plan']['bytes of all'][k] / MIB:,.1f})" for k in kinds),
            f"{row['peak_bytes'] / MIB:,.0f}", _plan(row["peak_bytes"], row["plan"]["peak_bytes"], MIB), _seconds(row["step_seconds"]),
            _plan(row["step_seconds"], row["plan"]["step_seconds"], 1),
        ] for row in rows
    ]  # fmt: skip
    worlds = dict.fromkeys(f"{r['model']}, {r['dtype']}, {r['batch']} + {r['batch']} rows of {r['sequence']} tokens a process" for r in rows)  # fmt: skip
    return [*_markdown(head, lines), "", f"{'; '.join(worlds)}. {_facts(result['meta'], rows)}"]


def plans(result: Mapping[str, Any]) -> list[str]:
    """One line a model, arm and number of GPUs; what is assumed below."""
    rows = result["rows"]
    parts = [
        k for k in dict.fromkeys(k for row in rows for k in row["bytes"]) if any(row["bytes"].get(k) for row in rows)
    ]
    times = list(dict.fromkeys(k for row in rows for k in row["seconds"]))
    head = ["model", "arm", "GPUs", *(f"{part}, GiB" for part in parts), "peak, GiB", *(f"{time}, s" for time in times), "step, s", "tokens/s"]  # fmt: skip
    lines = []
    for row in rows:
        cells = [f"{row['bytes'].get(part, 0) / GIB:.1f}" for part in parts]
        seconds = [_seconds(row["seconds"][k]) if k in row["seconds"] else "-" for k in times]
        peak = f"{row['peak_bytes'] / GIB:.1f}{'' if row['fits'] else ', does not fit'}"
        lines.append([row["model"], f"({row['arm']}) {row['what']}", str(row["gpus"]), *cells, peak, *seconds, _seconds(row["step_seconds"]), f"{row['tokens_per_second']:,.0f}"])  # fmt: skip
    first = rows[0]
    a = first["arguments"]
    about = (
        f"Arithmetic, nothing was measured; a process's bytes, {a['dtype']}, {a['per_device_train_batch_size']} + "
        f"{a['per_device_train_batch_size'] * a['retain_per_forget']} rows of {a['sequence']} tokens a GPU"
        f"{', activation checkpointing' if a['gradient_checkpointing'] else ''}. Rates: {first['hardware']}. Assumed:"
    )
    return [*_markdown(head, lines), "", about, "", *(f"- {text}" for text in first["assumptions"])]


def block(name: str, folder: Path) -> str | None:
    """Text of a block of that name from benchmarks/results/large; None where nothing was measured.

    Raises:
        KeyError: an unknown name.
    """
    make = {"large": measured, "processes": processes, "plans": plans}[name]
    paths = [folder / f"{name}.json"]
    if name == "large":
        paths = sorted(path for path in folder.glob("*.json") if path.stem not in NAMES)
    texts = ["\n".join(make(json.loads(path.read_text()))) for path in paths if path.is_file()]
    return "\n\n".join(texts) + "\n" if texts else None
