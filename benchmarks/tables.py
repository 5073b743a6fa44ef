"""The tables of README.md, generated from benchmarks/results/ between markers.

Markers: `<!-- benchmarks:begin NAME -->` ... `<!-- benchmarks:end -->`. NAME is ops-cpu, ops-cuda (each op's newest result on that
kind of device) or ops-<slug> (benchmarks/results/<slug>.json): one line an op, its cases, targets and every row in a fold; or
quality-<study>, for short demo or prune: the rows of benchmarks/results/quality/<study>.json; or scapre: a table for each part of its
study, what is not of 50 or 1,000 concepts in a fold; or canvas: one line a method, means over the targets, every target in a fold; or
spare-timesteps, spare-tradeoff: likewise, one line a scheme or a mask density and a factor of the forget term (all of it in a fold);
or tofu, sau-evidence: one line a method, means over seeds, every run in a fold; or cost: a table for each model and machine; or hamu-images, hamu-language: a table for each answer of the study, every
run in a fold; or pecker-small, pecker-cifar10: one line a method, means over seeds; or canvas-many: a table for each kind of
concept, one line a method; or large, processes, plans: whole models (benchmarks/large_tables.py); or hardening: cases,
kills, memory; or glance: a few of all these.

README.md has the blocks without their folds, each with a link in its place to benchmarks/results/README.md, which has them whole.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import large_tables
from benchmarks.spec import FLOOR

MARKERS = re.compile(r"(<!-- benchmarks:begin ([\w.-]+) -->\n)(.*?)(<!-- benchmarks:end -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"
FOLD = re.compile(r"<details><summary>(.*?)</summary>\n.*?</details>\n", re.DOTALL)
ALL_HEAD = """# Every row

The tables of the project's README with what they leave out: each provider, each target, each run. Written by `python -m benchmarks table`
from the files beside it, which hold the numbers in full.
"""
#: marker -> study
TOFU = {"tofu": "tofu", "sau-evidence": "sau_evidence"}
HAMU = {"hamu-images": "hamu_images", "hamu-language": "hamu_language"}
PECKER = {"pecker-small": "pecker_small", "pecker-cifar10": "pecker_cifar10"}
#: marker -> study, heading of what its lines are
SPARE = {"spare-timesteps": ("spare_timesteps", "timesteps"), "spare-tradeoff": ("spare_tradeoff", "SPARE with")}


def load(results: Path) -> dict[str, dict[str, Any]]:
    """slug -> result, of whole runs (quick ones are not published)."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    return {slug: result for slug, result in found.items() if not result["meta"].get("quick")}


def op_date(result: dict[str, Any], op: str) -> str:
    """When an op of a result was measured."""
    return str(result["meta"].get("updated", {}).get(op, result["meta"])["date"])


def part(result: dict[str, Any], ops: Sequence[str]) -> dict[str, Any]:
    """What a result has of these ops."""
    updated = {op: note for op, note in result["meta"].get("updated", {}).items() if op in ops}
    meta = {**result["meta"], "updated": updated}
    return {"meta": meta, **{key: [row for row in result[key] if row["op"] in ops] for key in ("rows", "targets")}}


def newest(results: dict[str, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Of a kind of device, each op's newest run: a part of a result for each machine, that with most ops first."""
    last: dict[str, str] = {}
    for slug, result in results.items():
        for op in dict.fromkeys(row["op"] for row in result["rows"]) if result["meta"]["device_type"] == kind else ():
            if op not in last or op_date(results[last[op]], op) < op_date(result, op):
                last[op] = slug
    chosen = {slug: sorted(op for op in last if last[op] == slug) for slug in set(last.values())}
    return [part(results[slug], ops) for slug, ops in sorted(chosen.items(), key=lambda item: (-len(item[1]), item[0]))]


def ms(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    ruler = ["---" if i == 0 else "--:" for i in range(len(head))]
    return ["| " + " | ".join(line) + " |" for line in (head, ruler, *rows)]


def groups(result: dict[str, Any]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(op, case, dtype) -> rows."""
    out: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        out.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    return out


def is_ours(provider: str) -> bool:
    return provider == "fastunlearn" or provider.startswith(("fastunlearn-", "fastunlearn, "))


def best_peer(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest provider that does the same work and is not ours."""
    peers = [
        r
        for r in rows
        if r["ms_p50"] is not None and not is_ours(r["provider"]) and not r["provider"].startswith(FLOOR)
    ]
    return min(peers, key=lambda r: r["ms_p50"], default=None)


def made(meta: dict[str, Any], ops: Sequence[str] = ()) -> tuple[list[dict[str, Any]], str, str]:
    """The runs of these ops in a result, their commits, from when to when.

    Args:
        ops: where all of them were measured again, only those runs count.
    """
    again = meta.get("updated", {})
    runs = [again[op] for op in ops if op in again]
    runs += [meta] if len(runs) < len(ops) or not ops else []
    runs.sort(key=lambda run: run["date"])
    commits = " and ".join(dict.fromkeys(run["commit"] for run in runs))
    return runs, commits, " to ".join(dict.fromkeys((runs[0]["date"], runs[-1]["date"])))


def heading(meta: dict[str, Any], ops: Sequence[str] = ()) -> str:
    """One line: which machine, which versions, which rates, which commits."""
    runs, commits, dates = made(meta, ops)
    copy = sorted({format(run["copy_gbps"], ".4g") for run in runs}, key=float)
    rates = f"copy {' to '.join(dict.fromkeys((copy[0], copy[-1])))} GB/s, matmul {meta['matmul_tflops']:.3g} TFLOP/s"
    threads = f", {meta['threads']} threads" if meta["device_type"] == "cpu" else f", driver {meta['driver']}"
    versions = f"torch {meta['torch']}" + (f", triton {meta['triton']}" if meta["device_type"] == "cuda" else "")
    which = "run" if len(runs) == 1 else "runs"
    return f"{meta['device']}{threads}; {versions}; {rates}, measured in the same {which}; commit {commits}, {dates}."


def _targets(result: dict[str, Any]) -> list[str]:
    """Measured ratio, target, and met or missed."""
    what = {"time": "time", "peak": "peak memory", "workspace": "workspace"}
    rows = []
    for t in result["targets"]:
        # A ratio far below one reads better as "so many times faster".
        many = t["kind"] == "time" and t["target"] <= 0.15 and t["rule"].startswith("<=")
        measured = f"{1 / t['ratio']:.3g}x faster" if many else f"{t['ratio']:.3g}x"
        rule = f">= {1 / t['target']:.3g}x faster" if many else t["rule"] + ("x" if t["rule"].startswith("<=") else "")
        name = "" if t["provider"] == "fastunlearn" else f" ({t['provider']})"
        rows.append(
            [
                f"{t['op']}: {t['case']}{name}",
                f"{what[t['kind']]} over {t['over']}",
                measured,
                rule,
                "met" if t["met"] else "**missed**",
            ]
        )
    return markdown(["op: case", "ratio", "measured", "target", ""], rows) if rows else []


def _quality_rows(result: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row))

    def cell(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {None: "-", True: "yes", False: "no"}[value]
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [[cell(row.get(name)) for name in names] for row in result["rows"]]
    return markdown([name.replace("_", " ") for name in names], cells)


def _about(result: dict[str, Any]) -> list[str]:
    about = "; ".join(f"{k}: {v}" for k, v in result.get("meta", {}).items() if isinstance(v, (str, int, float)))
    return ["", about + "."] if about else []


def quality_block(path: Path) -> str:
    """Rows of one study: method, target, seed and the metrics by name."""
    if not path.is_file():
        return NOT_MEASURED
    result = json.loads(path.read_text())
    goals = [
        f"{t['kind']} ({t['case']}) {t['ratio']:.2%}, wanted {t['rule']}: {'met' if t['met'] else '**missed**'}"
        for t in result.get("targets", [])
    ]
    said = ["", "Targets: " + "; ".join(goals) + "."] if goals else []
    return "\n".join([*_quality_rows(result), *said, *_about(result)]) + "\n"


def scapre_block(path: Path) -> str:
    """Time at 50 and 1,000 concepts; in a fold every row: a table for each part (`what`), of the columns that it has."""
    if not path.is_file():
        return NOT_MEASURED
    result = json.loads(path.read_text())
    rows = result["rows"]
    short = [row for row in rows if row["what"] != "stress" and row["concepts"] in (50, 1000)]
    fold = [
        "",
        "<details><summary>Every number of concepts, and the residuals</summary>",
        "",
        *_parts(rows),
        "",
        "</details>",
    ]
    return "\n".join([*_parts(short), *_about(result), *fold]) + "\n"


def _parts(all_rows: Sequence[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for what in dict.fromkeys(row["what"] for row in all_rows):
        rows = [{k: v for k, v in row.items() if k != "what"} for row in all_rows if row["what"] == what]
        lines += [f"{what.capitalize()}:", "", *_quality_rows({"rows": rows}), ""]
    return lines[:-1]


def summary_block(path: Path) -> str:
    """What a study answers, a table each, from its `summary`; every row, without its lists and where it was made, in a fold."""
    if not path.is_file():
        return NOT_MEASURED
    result = json.loads(path.read_text())
    hidden = ("machine", "commit", "date", "what")
    rows = [{k: v for k, v in r.items() if k not in hidden and not isinstance(v, list)} for r in result["rows"]]
    fold = ["", "<details><summary>Every run</summary>", "", *_quality_rows({"rows": rows}), "", "</details>"]
    return "\n".join([*_parts(result["summary"]), *_about(result), *fold]) + "\n"


#: columns of the canvas table: heading, kind of target (None: all), metric, digits
_CANVAS = [
    *((f"{kind} {metric}", kind, metric, 1) for kind in ("style", "object") for metric in ("UA", "IRA", "CRA")),
    ("FID, canvas features", None, "fid_canvas_features", 1),
    ("back by embedding", None, "recovered_embedding", 0),
    ("back by relearning", None, "recovered_relearning", 0),
    ("seconds", None, "seconds", 1),
    ("evaluation, s", None, "evaluation_seconds", 0),
    ("peak MiB", None, "peak_mib", 0),
    ("kept MiB", None, "storage_mib", 2),
]


def _canvas_settings(result: dict[str, Any]) -> list[str]:
    """What each method ran with, by the kind of target where that makes a difference."""
    chosen: dict[str, dict[str, list[str]]] = {}
    for row in result["rows"]:
        if row.get("settings"):
            kinds = chosen.setdefault(row["method"], {}).setdefault(json.dumps(row["settings"]), [])
            kinds += [row["kind"]] if row["kind"] not in kinds else []
    out = []
    for method, found in chosen.items():
        for said, kinds in found.items():
            which = f" of {' and '.join(f'{kind}s' for kind in kinds)}" if len(found) > 1 else ""
            out.append(f"- {method}{which}: `{said}`")
    return ["", "Settings:", "", *out] if out else []


def counted(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the canvas as its means take it: a target on which a method failed has accuracies of 0."""
    return {"UA": 0.0, "IRA": 0.0, "CRA": 0.0} | row if "failed" in row else row


def canvas_block(path: Path, first: str = "method", folded: bool = False) -> str:
    """One line a method: means over its targets, the mean of the six accuracies, how many targets became noise or failed.

    A target on which a method failed counts with accuracies of 0; a method on fewer targets than the others says so beside its name.
    A column that no row has a number for is left out.

    Args:
        first: heading of the first column.
        folded: the table in the fold too.
    """
    if not path.is_file():
        return NOT_MEASURED
    result = json.loads(path.read_text())
    columns = [*_CANVAS[:6], *(c for c in _CANVAS[6:] if any(row.get(c[2]) is not None for row in result["rows"]))]

    def runs(rows: list[dict[str, Any]]) -> set[tuple[str, str, int]]:
        return {(row["kind"], row["target"], row["seed"]) for row in rows}

    everywhere = runs(result["rows"])
    what = "targets" if len({seed for _, _, seed in everywhere}) == 1 else "runs"
    lines = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [counted(row) for row in result["rows"] if row["method"] == method]

        def mean(kind: str | None, metric: str, rows: list[dict[str, Any]] = rows) -> float | None:
            values = [r[metric] for r in rows if kind in (None, r["kind"]) and r.get(metric) is not None]
            return sum(values) / len(values) if values else None

        values = [mean(kind, metric) for _, kind, metric, _ in columns]
        cells = ["-" if v is None else f"{v:.{digits}f}" for v, (*_, digits) in zip(values, columns)]
        six = [v for v in values[:6] if v is not None]
        cells.insert(6, f"**{sum(six) / 6:.1f}**" if len(six) == 6 else "-")
        bad = {"noise": sum(row.get("noise", False) for row in rows), "failed": sum("failed" in row for row in rows)}
        said = ", ".join(f"{n} of {len(rows)} {how}" for how, n in bad.items() if n)
        mine = runs(rows)
        name = method if mine == everywhere else f"{method} ({len(mine)} of {len(everywhere)} {what})"
        lines.append([name, *cells, said or "none"])
    head = [first, *(name for name, *_ in columns[:6]), "mean", *(name for name, *_ in columns[6:]), "noise, failed"]
    table = markdown(head, lines)
    out = _about(result)[1:] if folded else [*table, *_about(result)]
    if result.get("left_out"):
        out += [
            "",
            "Left out: " + "; ".join(f"{entry['method']}: {entry['why']}" for entry in result["left_out"]) + ".",
        ]
    hidden = ("settings", "machine", "torch", "commit", "date")
    rows = [{key: value for key, value in row.items() if key not in hidden} for row in result["rows"]]
    out += [
        "",
        f"<details><summary>{'The table, and every target' if folded else 'Every target'}</summary>",
        "",
        *([*table, ""] if folded else []),
        *_quality_rows({"rows": rows}),
        *_canvas_settings(result),
    ]
    out += ["", "</details>"]
    return "\n".join(out) + "\n"


def _range(values: Sequence[float], form: str) -> str:
    low, high = (form.format(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def ops_brief(result: dict[str, Any]) -> list[str]:
    """One line an op: over its cases the share of the limit and the speed-up over each case's fastest peer; how many targets are met."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        shares, gains, peers = [], [], []
        for rows in groups(part(result, [op])).values():
            mine = next((r for r in rows if r["provider"] == "fastunlearn"), None)
            peer = best_peer(rows)
            if mine and mine["ms_p50"] is not None:
                shares.append(mine["limit_ms"] / mine["ms_p50"])
                if peer:
                    gains.append(peer["ms_p50"] / mine["ms_p50"])
                    peers.append(peer["provider"])
        if not shares:
            continue
        goals = [t for t in result["targets"] if t["op"] == op]
        kept = sum(t["met"] for t in goals)
        lines.append(
            [
                op,
                str(len(shares)),
                _range(shares, "{:.0%}"),
                _range(gains, "{:.2g}x") if gains else "-",
                max(dict.fromkeys(peers), key=peers.count) if peers else "-",
                f"{kept} of {len(goals)}" if goals else "-",
            ]
        )
    head = ["op", "cases", "of the limit", "speed-up over the fastest peer", "which, most often", "targets met"]
    return markdown(head, lines)


def ops_cases(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """One line a case: ours, the share of the hardware's limit, the best peer; and one line a provider of it."""
    short, full = [], []
    for (op, case, dtype), rows in groups(result).items():
        mine = next((r for r in rows if r["provider"] == "fastunlearn"), None)
        peer = best_peer(rows)
        if mine and mine["ms_p50"] is not None:
            short.append(
                [
                    f"{op}: {case}, {dtype}",
                    f"**{ms(mine['ms_p50'])}**",
                    f"{mine['limit_ms'] / mine['ms_p50']:.0%}",
                    f"{peer['provider']}: {ms(peer['ms_p50'])}" if peer else "-",
                    f"{peer['ms_p50'] / mine['ms_p50']:.2g}x" if peer else "-",
                    f"{_mib(mine['peak_mib'])} / {_mib(peer['peak_mib']) if peer else '-'}",
                ]
            )
        for r in rows:
            spread = f"{ms(r['ms_p20'])} - {ms(r['ms_p80'])}" if r["correct"] else "wrong result, not timed"
            line = [r["provider"], ms(r["ms_p50"]), spread, _mib(r["peak_mib"]), ms(r["limit_ms"])]
            full.append([f"{op}: {case}, {dtype}", *line])
    head = ["op: case, dtype", "fastunlearn, ms", "of the limit", "best peer, ms", "speed-up", "peak MiB, ours / peer"]
    providers = ["op: case, dtype", "provider", "median ms", "p20 - p80", "peak MiB", "limit, ms"]
    return markdown(head, short), markdown(providers, full)


def _ops_heading(result: dict[str, Any]) -> str:
    return heading(result["meta"], list(dict.fromkeys(row["op"] for row in result["rows"])))


def ops_block(result: dict[str, Any]) -> str:
    """One line a case; then the targets; every provider in a fold."""
    short, full = ops_cases(result)
    targets = _targets(result)
    lines = [_ops_heading(result), "", *short, *(["", *targets] if targets else [])]
    lines += ["", "<details><summary>Every provider</summary>", "", *full, "", "</details>"]
    return "\n".join(lines) + "\n"


def ops_overview(result: dict[str, Any]) -> str:
    """One line an op, then the targets that it misses; every case, target and provider in a fold."""
    short, full = ops_cases(result)
    lines = [_ops_heading(result), "", *ops_brief(result)]
    missed = _targets({"targets": [t for t in result["targets"] if not t["met"]]})
    lines += ["", "Missed:", "", *missed] if missed else []
    lines += ["", "<details><summary>Every case, target and provider</summary>", "", *short]
    targets = _targets(result)
    lines += ["", *targets] if targets else []
    lines += ["", *full, "", "</details>"]
    return "\n".join(lines) + "\n"


def runs_block(path: Path, module: str, left_out: Sequence[str]) -> str:
    """The table that a module makes of a study, one line a method, means over seeds; every run in a fold.

    Args:
        left_out: what is not shown of a run.
    """
    if not path.is_file():
        return NOT_MEASURED
    result = json.loads(path.read_text())
    plain = {**result, "rows": [{k: v for k, v in row.items() if k not in left_out} for row in result["rows"]]}
    size = result["meta"].get("size")
    facts = {**result["meta"], **(size if isinstance(size, Mapping) else {})}
    out = [*importlib.import_module(f"benchmarks.{module}").table(result), *_about({"meta": facts})]
    out += ["", "<details><summary>Every run</summary>", "", *_quality_rows(plain), "", "</details>"]
    return "\n".join(out) + "\n"


def _trials(name: str, folder: Path) -> str:
    """Below TOFU's table, where its settings were tuned: every trial, in a fold."""
    path = folder / "quality" / "tofu_tuning.json"
    if name != "tofu" or not path.is_file():
        return ""
    from benchmarks import tofu_tables

    tuning = json.loads(path.read_text())
    about = (
        "Score, a harmonic mean of 1 - ES and of model utility over that before (in brackets both as they are), on retained authors who stand "
        "for the forget set; in bold what was chosen."
    )
    out = [
        "",
        "<details><summary>Every trial of the tuning</summary>",
        "",
        about,
        "",
        *tofu_tables.trials(tuning),
        *_about(tuning),
    ]
    return "\n".join([*out, "", "</details>"]) + "\n"


#: of the largest number of concepts: heading -> metric, digits
_MOST = {
    "seconds": ("seconds", 2),
    "back by embedding": ("recovered_embedding", 0),
    "back by relearning": ("recovered_relearning", 0),
}


def many_block(path: Path) -> str:
    """A table for each kind of concept: UA / IRA / CRA of every method by the number of concepts, means over seeds; every row in a fold."""
    if not path.is_file():
        return NOT_MEASURED
    result = json.loads(path.read_text())
    out: list[str] = []
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["kind"] == kind]
        counts = sorted({row["concepts"] for row in mine})
        lines = []
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = [method]
            for count in counts:
                rows = [row for row in mine if (row["method"], row["concepts"]) == (method, count)]
                cells.append(_three(rows))
            rows = [row for row in mine if (row["method"], row["concepts"]) == (method, counts[-1])]
            for name, digits in _MOST.values():
                values = [row[name] for row in rows if row.get(name) is not None]
                cells.append(f"{sum(values) / len(values):.{digits}f}" if values else "-")
            lines.append(cells)
        plural = [f"{count} {kind}{'s' if count > 1 else ''}" for count in counts]
        head = ["method", *plural, *(f"{said}, {counts[-1]}" for said in _MOST)]
        # A column that no row has a number for is left out.
        shown = [i for i in range(len(head)) if any(line[i] != "-" for line in lines)]
        out += [
            "UA / IRA / CRA, %:",
            "",
            *markdown([head[i] for i in shown], [[line[i] for i in shown] for line in lines]),
            "",
        ]
    out += [
        *_about(result)[1:],
        "",
        "<details><summary>Every row</summary>",
        "",
        *_quality_rows({"rows": [{k: v for k, v in row.items() if k != "settings"} for row in result["rows"]]}),
        "",
        "</details>",
    ]
    return "\n".join(out) + "\n"


def _three(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "-"
    if any("failed" in row for row in rows):
        return "diverged"
    means = [sum(row[name] for row in rows) / len(rows) for name in ("UA", "IRA", "CRA")]
    noise = " noise" if any(row.get("noise") and row["valid"] < row["valid_surrogate"] for row in rows) else ""
    return " / ".join(f"{value:.1f}" for value in means) + noise


def block(name: str, folder: Path) -> str:
    """Text of one marked block.

    Raises:
        ValueError: no block of that name.
    """
    kind, _, which = name.partition("-")
    if kind == "ops" and which:
        results = load(folder)
        parts = [results[which]] if which in results else newest(results, which)
        return "\n".join(map(ops_overview, parts)) or NOT_MEASURED
    if name == "scapre":
        return scapre_block(folder / "quality" / "scapre.json")
    if name == "canvas":
        return canvas_block(folder / "quality" / "canvas.json")
    if name in SPARE:
        return canvas_block(folder / "quality" / f"{SPARE[name][0]}.json", SPARE[name][1], name == "spare-tradeoff")
    if name == "glance":
        from benchmarks import glance

        return glance.block(folder)
    if name == "cost":
        from benchmarks import cost_tables

        return cost_tables.block(folder / "quality" / "cost.json")
    if name == "hardening":
        from benchmarks import hardening_tables

        return hardening_tables.block(folder / "quality")
    if name in HAMU:
        return summary_block(folder / "quality" / f"{HAMU[name]}.json")
    if name in large_tables.NAMES:
        return large_tables.block(name, folder / "large") or NOT_MEASURED
    if name in PECKER:
        return runs_block(folder / "quality" / f"{PECKER[name]}.json", "pecker_results", ("curve", "settings"))
    if name == "canvas-many":
        return many_block(folder / "quality" / "canvas_many.json")
    if name in TOFU:
        return runs_block(folder / "quality" / f"{TOFU[name]}.json", "tofu_tables", ("options",)) + _trials(
            name, folder
        )
    if name in ("demo", "prune") or (kind == "quality" and which):
        return quality_block(folder / "quality" / f"{which or name}.json")
    raise ValueError(
        f"marker {name!r}: want glance, ops-cpu, ops-cuda, ops-<slug>, quality-<study>, demo, prune, scapre, canvas, spare-timesteps, spare-tradeoff, cost, tofu, "
        "sau-evidence, hamu-images, hamu-language, pecker-small, pecker-cifar10, canvas-many, hardening, large, processes or plans"
    )


def _whole_page(blocks: Mapping[str, str]) -> str:
    """Of benchmarks/results/README.md: every block that has a fold, whole."""
    return ALL_HEAD + "".join(f"\n## {name}\n\n{text}" for name, text in blocks.items() if FOLD.search(text))


def update(readme: Path, results: Path, write: bool = True) -> list[str]:
    """Brings the marked blocks of a file, and the page of every row in `results`, up to date; the names of those that were not."""
    text, stale = readme.read_text(), []
    page = results / "README.md"
    link = Path(os.path.relpath(page, readme.parent)).as_posix()
    blocks = {name: block(name, results) for name in dict.fromkeys(match[2] for match in MARKERS.finditer(text))}

    def replace(match: re.Match[str]) -> str:
        new = FOLD.sub(lambda fold: f"[{fold[1]}]({link}#{match[2]}).\n", blocks[match[2]])
        if new != match[3]:
            stale.append(match[2])
        return match[1] + new + match[4]

    fresh = MARKERS.sub(replace, text)
    if text.count("<!-- benchmarks:begin") != len(MARKERS.findall(text)):
        raise ValueError(f"{readme}: a benchmarks:begin marker without its benchmarks:end")
    if write and stale:
        readme.write_text(fresh)
    whole = _whole_page(blocks)
    if not page.is_file() or page.read_text() != whole:
        stale.append(link)
        if write:
            page.write_text(whole)
    return stale
