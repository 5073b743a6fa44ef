"""Two pictures of one device's results: time against the hardware limit, and peak memory, all ops side by side.

Roofline: a panel an op, a point a case, both axes logarithmic; on the lower line the limit is met, on the upper one it is missed by TARGET.
Peak memory: ours against that of the fastest peer, what lies below the line takes less. Text stays text, so that the files are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables

OURS, PEER, LINE = "#0b7a75", "#9aa0a6", "#c0392b"
#: an op that takes longer than this many times its limit is looked at
TARGET = 1.3
#: memory below this is drawn here: the measurement says no more
LEAST_MIB = 1.0
_COLUMNS = 4


def points(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """op -> its cases: case, limit, ours, peer (ms), ours_mib, peer_mib; None where there is no such number."""
    out: dict[str, list[dict[str, Any]]] = {}
    for (op, case, dtype), rows in tables.groups(result).items():
        mine = next((row for row in rows if row["provider"] == "fastunlearn"), None)
        if mine is None or mine["ms_p50"] is None:
            continue
        peer = tables.best_peer(rows)
        out.setdefault(op, []).append(
            {
                "case": f"{case}, {dtype}",
                "limit": mine["limit_ms"],
                "ours": mine["ms_p50"],
                "peer": peer and peer["ms_p50"],
                "ours_mib": mine["peak_mib"],
                "peer_mib": peer and peer["peak_mib"],
            }
        )
    return out


def _panels(
    result: dict[str, Any], title: str, path: Path, ops: Sequence[str], draw: Callable[[Any, str], None], x: str, y: str
) -> None:
    """One panel an op, axes shared."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    settings = {"svg.hashsalt": "fastunlearn", "svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        rows = math.ceil(len(ops) / _COLUMNS)
        columns = math.ceil(len(ops) / rows)
        figure, axes = plt.subplots(
            rows, columns, figsize=(2.5 * columns + 0.6, 2.3 * rows + 0.9), squeeze=False, sharex=True, sharey=True,
            layout="constrained",
        )  # fmt: skip
        for axis, op in zip(axes.flat, ops):
            draw(axis, op)
            axis.set(xscale="log", yscale="log")
            axis.set_title(op, fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                side.set_minor_locator(NullLocator())
        for number, axis in enumerate(axes.flat):
            axis.set_visible(number < len(ops))
            if number + columns >= len(ops):
                axis.set_xlabel(x)
                axis.tick_params(labelbottom=True)
            if number % columns == 0:
                axis.set_ylabel(y)
        meta = result["meta"]
        _, commits, dates = tables.made(meta, [*points(result)])
        figure.suptitle(f"{title} - {meta['device']}, commit {commits}, {dates}", fontsize=9)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.5, max(values) * 1.5


def roofline(result: dict[str, Any], path: Path) -> None:
    """Time against limit: ours and the fastest peer of every case."""
    by_op = points(result)
    limits = [p["limit"] for cases in by_op.values() for p in cases]
    low, high = _range(limits)

    def draw(axis: Any, op: str) -> None:
        cases = by_op[op]
        axis.plot([low, high], [low, high], color=LINE, lw=1.0, label="the limit")
        axis.plot(
            [low, high], [TARGET * low, TARGET * high], color=LINE, lw=0.8, ls="--", label=f"{TARGET:g}x the limit"
        )
        peers = [p for p in cases if p["peer"]]
        axis.scatter([p["limit"] for p in peers], [p["peer"] for p in peers], s=14, color=PEER, label="fastest peer")
        axis.scatter([p["limit"] for p in cases], [p["ours"] for p in cases], s=18, color=OURS, label="fastunlearn")

    _panels(result, "Time against the hardware's limit", path, list(by_op), draw, "limit, ms", "median, ms")


def memory(result: dict[str, Any], path: Path) -> None:
    """Peak memory above inputs and output: ours against the fastest peer's."""
    by_op = {
        op: [p for p in cases if p["ours_mib"] is not None and p["peer_mib"] is not None]
        for op, cases in points(result).items()
    }
    by_op = {op: cases for op, cases in by_op.items() if cases}
    if not by_op:
        return
    seen = [max(LEAST_MIB, p[which]) for cases in by_op.values() for p in cases for which in ("ours_mib", "peer_mib")]
    low, high = _range(seen)

    def draw(axis: Any, op: str) -> None:
        axis.plot([low, high], [low, high], color=LINE, lw=1.0, label="as much as the peer")
        axis.scatter(
            [max(LEAST_MIB, p["peer_mib"]) for p in by_op[op]],
            [max(LEAST_MIB, p["ours_mib"]) for p in by_op[op]],
            s=18, color=OURS, label=f"a case (below {LEAST_MIB:g} MiB: drawn there)",
        )  # fmt: skip

    _panels(
        result, "Peak memory above inputs and output", path, list(by_op), draw, "fastest peer, MiB", "fastunlearn, MiB"
    )


def draw(results: dict[str, dict[str, Any]], out: Path) -> list[Path]:
    """<slug>-roofline.svg and <slug>-memory.svg of every result (slug -> result); the paths that were written."""
    paths = []
    for slug, result in results.items():
        for name, picture in (("roofline", roofline), ("memory", memory)):
            path = out / f"{slug}-{name}.svg"
            picture(result, path)
            paths += [path] if path.is_file() else []
    return paths
