"""README's table of cases, kills and memory, from benchmarks/results/quality/{fuzz,kills,memory}.json (fuzz.py, kills.py, steady.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: what a killed run's output folder held -> in words
STATES = {
    "none": "no model yet", "old": "the earlier one", "new": "the new one", "marked": "a half-replaced one, refused by an error that says so",
    "torn": "a torn one",
}  # fmt: skip


def _made(result: dict[str, Any]) -> str:
    meta = result["meta"]
    return f"{meta['device']}, {meta['commit'][:12]}, {meta['date']}"


def fuzz(result: dict[str, Any]) -> tuple[str, str, str]:
    rows = result["rows"]
    short = [row for row in rows if row["cases"] < row["wanted"]]
    ops = {op for row in rows for op in row["op"].split(", ")}
    cases = sum(row["cases"] for row in rows)
    failures = sum(row["failures"] for row in rows)
    said = f"{cases:,} cases of {len(ops)} ops in {len(rows)} tests (each on one backend), {failures} failed"
    if short:
        said += f"; {len(short)} of the tests ({', '.join(sorted({row['backend'] for row in short}))}) had fewer than were wanted"
    return "property tests: any shape, stride, type, density; ties, NaN, nothing at all", said, _made(result)


def kills(result: dict[str, Any]) -> tuple[str, str, str]:
    rows = result["rows"]
    found = {words: sum(row["state"] == state for row in rows) for state, words in STATES.items()}
    held = ", ".join(f"{count} {words}" for words, count in found.items() if count)
    same = sum(row["same"] for row in rows)
    said = f"{len(rows)} kills; the folder then held {held}; {same} runs that were started again ended bit for bit as one that was not killed"
    return "SIGKILL at a random time of a training run", said, _made(result)


def memory(result: dict[str, Any]) -> tuple[str, str, str]:
    first, last = result["rows"][0], result["rows"][-1]
    said = (
        f"from step {first['step']:,} to {last['step']:,}: {last['rss_mib'] - first['rss_mib']:+.2f} MiB of {last['rss_mib']:,.0f}, "
        f"{last['objects'] - first['objects']:+,} Python objects"
    )
    return "memory of a training run", said, _made(result)


def block(folder: Path) -> str:
    """One line a study; none where a study has not been run."""
    from benchmarks.tables import NOT_MEASURED, markdown

    lines = [
        (what, said, f"`python -m benchmarks.{command}`: {made}")
        for name, command, of in (("fuzz", "fuzz", fuzz), ("kills", "kills", kills), ("memory", "steady", memory))
        if (folder / f"{name}.json").is_file()
        for what, said, made in [of(json.loads((folder / f"{name}.json").read_text()))]
    ]
    if not lines:
        return NOT_MEASURED
    table = markdown(("what", "found", "made by"), [list(line) for line in lines])
    return "\n".join([table[0], "| --- | --- | --- |", *table[2:]]) + "\n"
