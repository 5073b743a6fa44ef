"""One picture an op and device: times of all providers against the limit, and peak memory, drawn from the result files; all
ops together (overview.py); and those of the studies, among them ScaPre's time and memory by the number of concepts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import overview, pecker_results, scapre, tables, tofu_tables
from benchmarks.spec import FLOOR

OURS, PEER, FLOORS, LIMIT = "#0b7a75", "#9aa0a6", "#d9c27a", "#c0392b"


def _colour(provider: str) -> str:
    if tables.is_ours(provider):
        return OURS
    return FLOORS if provider.startswith(FLOOR) else PEER


@contextmanager
def panels(path: Path, title: str, rows: int, columns: int, **options: Any) -> Iterator[Any]:
    """Axes [rows, columns] of a figure that is written to `path` at the end; the same results give the same file.

    Args:
        title: of the whole.
        options: of matplotlib's `subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text stays text, so that the files are small.
    with matplotlib.rc_context({"svg.hashsalt": "fastunlearn", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
        try:
            yield axes
            for axis in axes.flat:
                axis.tick_params(labelsize=7)
                axis.spines[["top", "right"]].set_visible(False)
            figure.suptitle(title, fontsize=9)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None})
        finally:
            plt.close(figure)


def _draw(meta: dict[str, Any], op: str, cases: dict[tuple[str, str, str], list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    matplotlib.rcParams["svg.hashsalt"] = "fastunlearn"  # the same rows give the same file
    heights = [len(rows) + 1.2 for rows in cases.values()]
    figure, axes = plt.subplots(
        len(cases),
        2,
        figsize=(11, 0.28 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (left, right), ((_, case, dtype), rows) in zip(axes, cases.items()):
        rows = [r for r in rows if r["ms_p50"] is not None][::-1]
        names, colours = [r["provider"] for r in rows], [_colour(r["provider"]) for r in rows]
        values = [r["ms_p50"] for r in rows]
        spread = [[r["ms_p50"] - r["ms_p20"] for r in rows], [r["ms_p80"] - r["ms_p50"] for r in rows]]
        left.barh(names, values, color=colours, xerr=spread, error_kw={"lw": 0.8})
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.xaxis.set_minor_formatter(NullFormatter())
        if rows:
            left.axvline(rows[0]["limit_ms"], color=LIMIT, lw=1.2)
            left.set_xlim(left=0.5 * min(rows[0]["limit_ms"], *values))
        left.set_title(f"{case}, {dtype}: ms (line: limit)", fontsize=8, loc="left")
        right.barh(names, [r["peak_mib"] or 0 for r in rows], color=colours)
        right.set_title("peak MiB above inputs and output", fontsize=8, loc="left")
        right.set_yticks([])
        for axis in (left, right):
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{op} - {meta['device']}, commit {meta['commit']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw(results: Path, out: Path) -> list[Path]:
    """Writes <device>-<op>.svg, <device>-roofline.svg and <device>-memory.svg for every result file, and those of the studies that were
    run; the paths."""
    paths = []
    for slug, result in tables.load(results).items():
        cases = tables.groups(result)
        for op in dict.fromkeys(row["op"] for row in result["rows"]):
            path = out / f"{slug}-{op}.svg"
            _draw(result["meta"], op, {key: rows for key, rows in cases.items() if key[0] == op}, path)
            paths.append(path)
    paths += overview.draw(tables.load(results), out)
    study = results / "quality" / "scapre.json"
    if study.is_file():
        paths.append(out / "scapre-concepts.svg")
        scapre.plot(json.loads(study.read_text()), paths[-1])
    for name, module in (
        ("hamu_images", "cifar_hamu_results"), ("hamu_language", "hamu_language"), ("spare_tradeoff", "spare"),
        *((f"pecker_{size}", "pecker_results") for size in pecker_results.SIZES),
    ):  # fmt: skip
        study = results / "quality" / f"{name}.json"
        if study.is_file():
            paths.append(out / f"{name.replace('_', '-')}.svg")
            # Their models take seconds to import.
            importlib.import_module(f"benchmarks.{module}").plot(json.loads(study.read_text()), paths[-1])
    tofu = tofu_tables.draw(results / "quality" / "tofu.json", out)
    return [*paths, tofu] if tofu is not None else paths
