"""README's table of what unlearning one concept costs, from benchmarks/results/quality/cost.json (cost.py says how it is measured)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: shapes as the table calls them
NAMES = {"canvas": "The canvas pipeline", "sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}


def _seconds(value: float) -> str:
    """Three digits, of long times in hours."""
    return f"{value / 3600:.3g} h" if value >= 7200 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mib(value: float | None) -> str:
    return (
        "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"
    )


def _line(row: dict[str, Any]) -> list[str]:
    load = row.get("other_load")
    measured = "all" if row["whole"] else f"{row['measured']['steps']} of {row['steps']:,} steps"
    if not row["whole"] and row["images"]:
        measured += f", {row['measured']['images']} of {row['images']} images"
    return [
        row["method"],
        f"**{_seconds(row['seconds'])}**",
        "-" if row["whole"] else _mib(1e3 * row["step_seconds"]),
        measured,
        _mib(row["peak_mib"]),
        _mib(row["storage_mib"]),
        "-" if load is None else f"{load:.0%}",
    ]


def block(path: Path) -> str:
    """One table for each model and machine, one line a method."""
    from benchmarks.tables import NOT_MEASURED, markdown

    if not path.is_file():
        return NOT_MEASURED
    result = json.loads(path.read_text())
    lines: list[str] = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["shapes"], row["cut"], row["machine"]), []).append(row)
    for (shapes, cut, machine), rows in groups.items():
        weights = rows[0]["weights"]
        what = f"{NAMES[shapes]}{f' (cut: {cut})' if cut else ''}, U-Net of {rows[0]['network_parameters'] / 1e6:,.4g} M parameters"
        low = [row["method"] for row in rows if row["bf16"]]
        passes = f"fp32 (bf16 passes: {', '.join(low)})" if low else "fp32"
        made = {name: ", ".join(sorted({row[name] for row in rows})) for name in ("torch", "commit")}
        lines += [
            f"{what}, {weights} weights, {passes}; {machine}; torch {made['torch']}, commit {made['commit']}:",
            "",
            *markdown(
                ["method", "seconds", "ms a step", "measured", "peak MiB", "storage MiB", "others' load"], [_line(row) for row in rows]
            ),
            "",
        ]  # fmt: skip
        missing = [
            f"{entry['method']} ({entry['why']})"
            for entry in result.get("left_out", [])
            if (entry["shapes"], entry["cut"], entry["machine"]) == (shapes, cut, machine)
        ]
        lines += [f"Not there: {'; '.join(missing)}.", ""] if missing else []
    lines.append(
        "Seconds of one concept with the method's own settings: a closed form runs whole; of training the counts under `measured` were run "
        "and the parts scaled (`benchmarks/cost.py`). Peak memory: above the pipeline's weights. Storage: what is kept of the result."
    )
    return "\n".join(lines) + "\n"
