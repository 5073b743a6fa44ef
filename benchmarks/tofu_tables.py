"""The README's TOFU tables and the picture of forget quality against model utility, from the study's committed rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: columns of the tables, in their order; those that nothing has are left out
COLUMNS = (
    "forget quality", "model utility", "forget truth ratio", "ES", "EM", "forget ROUGE", "retain ROUGE", "PrivLeak", "ES relearned", "ES 4-bit",
    "seconds", "processor seconds", "peak_mib",
)  # fmt: skip
_LEAST = 1e-30


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """Over seeds; of forget quality the geometric mean: p-values of ten orders of magnitude."""
    values = [row[column] for row in rows if row.get(column) is not None]
    if not values:
        return None
    if column == "forget quality":
        return math.exp(sum(math.log(max(value, _LEAST)) for value in values) / len(values))
    return sum(values) / len(values)


def means(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a method and setting: means over seeds, how many, how many of them diverged."""
    keys = list(dict.fromkeys((row.get("setting", ""), row["method"]) for row in result["rows"]))
    out = []
    for setting, method in keys:
        rows = [row for row in result["rows"] if (row.get("setting", ""), row["method"]) == (setting, method)]
        mean = {column: _mean(rows, column) for column in COLUMNS}
        out.append(
            {
                "setting": setting,
                "method": method,
                "seeds": len(rows),
                "diverged": sum("diverged" in row for row in rows),
            }
            | mean
        )
    return out


def score(row: Mapping[str, Any], utility: float) -> float:
    """Of a trial: harmonic mean of 1 - extraction strength and model utility over that before, at most 1; 0 where it diverged."""
    if "ES" not in row or "model utility" not in row:
        return 0.0
    forgot, kept = 1 - row["ES"], min(1.0, row["model utility"] / utility) if utility else 0.0
    return 2 * forgot * kept / (forgot + kept) if forgot + kept > 0 else 0.0


def _setting(options: Mapping[str, Any]) -> str:
    """Of a trial, or of a row that took one: its learning rate, and what else differs within a grid."""
    share = options.get("hamu_share", 0.5)
    return f"{options['learning_rate']:g}" + ("" if share == 0.5 else f", share {share:g}")


def trials(tuning: Mapping[str, Any]) -> list[str]:
    """Markdown: every trial of every method, as score (extraction strength, model utility); in bold what was chosen."""
    before = {row["setting"]: row for row in tuning["rows"] if row["method"] == f"full, {row['setting']}"}
    own = [row for row in tuning["rows"] if row["method"] != f"full, {row['setting']}"]
    most = max((row["trial"] for row in own), default=-1) + 1
    lines = [["setting", "method", *(f"trial {i}" for i in range(most))]]
    for setting, method in dict.fromkeys((row["setting"], row["method"]) for row in own):
        utility = before[setting]["model utility"]
        mine = {row["trial"]: row for row in own if (row["setting"], row["method"]) == (setting, method)}
        scores = {i: score(row, utility) for i, row in mine.items()}
        best = max(sorted(scores), key=lambda i: scores[i])
        cells = []
        for i in range(most):
            row = mine.get(i)
            if row is None:
                cells.append("-")
                continue
            found = (
                "diverged"
                if row.get("ES") is None
                else f"{scores[i]:.3f} ({row['ES']:.3f}, {row['model utility']:.3f})"
            )
            cells.append(f"{_setting(row['options'])}: " + (f"**{found}**" if i == best else found))
        lines.append([setting, method, *cells])
    lines.insert(1, ["---"] * (2 + most))
    return ["| " + " | ".join(line) + " |" for line in lines]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other beats in one coordinate without losing in the other, both to be large."""
    return [
        i for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]  # fmt: skip


def unlearned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of methods, with both coordinates; one that diverged with a seed is no point of a front."""
    kept = [row for row in rows if row["method"] not in ("before", "retain model") and not row.get("diverged")]
    return [row for row in kept if row["forget quality"] is not None and row["model utility"] is not None]


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "forget quality":
        return f"{value:.2g}"
    return f"{value:.0f}" if column in ("seconds", "processor seconds", "peak_mib", "PrivLeak") else f"{value:.3f}"


def table(result: Mapping[str, Any]) -> list[str]:
    """Markdown: one line a method and setting; in bold what is on the Pareto front of its setting."""
    rows = means(result)
    columns = [column for column in COLUMNS if any(row[column] is not None for row in rows)]
    if any("layers off the pattern" in row for row in result["rows"]) and not any(row["setting"] for row in rows):
        columns.append("layers off the pattern")
    best: set[tuple[str, str]] = set()
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = unlearned([row for row in rows if row["setting"] == setting])
        points = [(max(row["forget quality"], _LEAST), row["model utility"]) for row in mine]
        best |= {(setting, mine[i]["method"]) for i in front(points)}
    several = any(row["seeds"] > 1 for row in rows)
    # Without tuning every method takes the same place of its grid, which the line below the table says.
    tuned = {
        (row.get("setting", ""), row["method"]): _setting(row["options"]) for row in result["rows"] if "learning_rate" in row.get("options", {})
    }  # fmt: skip
    if result.get("meta", {}).get("settings") != "by tuning":
        tuned = {}
    head = [
        *(["setting"] if any(row["setting"] for row in rows) else []),
        "method",
        *(["seeds"] if several else []),
        *(["rate"] if tuned else []),
        *(c.replace("_", " ") for c in columns),
    ]
    lines = []
    for row in rows:
        name = f"**{row['method']}**" if (row["setting"], row["method"]) in best else row["method"]
        name += f" ({row['diverged']} of {row['seeds']} diverged)" if row["diverged"] else ""
        off = [r.get("layers off the pattern") for r in result["rows"] if r["method"] == row["method"]]
        cells = [
            _cell(c, row[c]) if c in row else str(max((o for o in off if o is not None), default="-")) for c in columns
        ]
        of = [str(row["seeds"])] if several else []
        rate = [tuned.get((row["setting"], row["method"]), "-")] if tuned else []
        lines.append([*([row["setting"]] if "setting" in head else []), name, *of, *rate, *cells])
    ruler = ["---" if name in ("setting", "method") else "--:" for name in head]
    return ["| " + " | ".join(line) + " |" for line in (head, ruler, *lines)]


def draw(path: Path, out: Path) -> Path | None:
    """Forget quality against model utility, a panel a setting, with the front; None where nothing was measured."""
    if not path.is_file():
        return None
    rows = means(json.loads(path.read_text()))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fastunlearn"
    figure, axes = plt.subplots(
        1, len(settings), figsize=(5.5 * len(settings), 4.2), squeeze=False, layout="constrained"
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        mine = [row for row in rows if row["setting"] == setting]
        points = unlearned(mine)
        xy = [(row["model utility"], max(row["forget quality"], _LEAST)) for row in points]
        axis.set_yscale("log")
        for row, (x, y) in zip(points, xy, strict=True):
            ours = any(name in row["method"] for name in ("HAMU", "SAU"))
            axis.plot(x, y, "o", color="#0b7a75" if ours else "#9aa0a6", ms=5)
            axis.annotate(row["method"], (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        best = sorted(xy[i] for i in front(xy))
        axis.plot([x for x, _ in best], [y for _, y in best], color="#c0392b", lw=1, label="Pareto front")
        for row in mine:
            if row["method"] in ("before", "retain model") and row["model utility"] is not None:
                axis.plot(row["model utility"], max(row["forget quality"] or 1.0, _LEAST), "s", color="#d9c27a", ms=6)
                axis.annotate(
                    row["method"], (row["model utility"], max(row["forget quality"] or 1.0, _LEAST)), fontsize=6
                )
        axis.set_xlabel("model utility")
        axis.set_ylabel("forget quality (p-value)")
        axis.set_title(setting, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
        axis.spines[["top", "right"]].set_visible(False)
    out.mkdir(parents=True, exist_ok=True)
    target = out / "tofu.svg"
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return target
