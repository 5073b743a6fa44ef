"""Two results of `python -m benchmarks run`, row by row: what became slower, what faster, what is missing. Markdown.

A row is (op, case, dtype, provider); what is compared are medians. A change counts where the ratio of the medians passes the
threshold and the two runs' ranges from the 20th to the 80th percentile do not touch: a row that is noisy in either run has
to change by as much as its noise. A row timed once has no range, and counts by the threshold alone. Peak memory counts where it passes
the threshold and MEMORY_MIB, which is what its measurement is good to (benchmarks/__init__.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks import tables

Key: TypeAlias = tuple[str, str, str, str]
KEY = ("op", "case", "dtype", "provider")
#: facts that must agree for two times to mean the same, with the words they are shown by
FACTS = {
    "device": "device", "driver": "driver", "cpu": "processor", "cores": "cores", "threads": "threads", "torch": "torch", "cuda": "CUDA",
    "triton": "triton", "python": "Python", "quick": "quick run",
}  # fmt: skip
#: rates measured in the runs: a machine that is slower by more than this is another machine
RATES = {"copy_gbps": "copy, GB/s", "matmul_tflops": "matmul, TFLOP/s", "empty_launch_us": "empty launch, us"}
RATE_BY = 1.1
MEMORY_MIB = 8.0


@dataclass(frozen=True)
class Change:
    """One row in both results. what: "slower", "faster", "wrong", "right", "memory" (more), "less memory", or "" (the same)."""

    key: Key
    old: Mapping[str, Any]
    new: Mapping[str, Any]
    what: str
    ratio: float | None  #: new median over the old one

    @property
    def regression(self) -> bool:
        """Whether it is ours and became worse: a peer that did is shown, and says something of the machine."""
        return self.what in ("slower", "wrong", "memory") and tables.is_ours(self.key[-1])


@dataclass(frozen=True)
class Comparison:
    """changes: rows of both; gone, fresh: rows of one only; differences: facts of the machine that differ, in words."""

    changes: list[Change]
    gone: list[Key]
    fresh: list[Key]
    differences: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]

    @property
    def lost(self) -> list[Key]:
        """Our rows that are gone where the new run has other rows of their case: they failed. A case left out as a whole was not asked for."""
        asked = {key[:3] for key in (*(change.key for change in self.changes), *self.fresh)}
        return [key for key in self.gone if tables.is_ours(key[-1]) and key[:3] in asked]


def _rows(result: Mapping[str, Any], name: str) -> dict[Key, Mapping[str, Any]]:
    try:
        rows = {tuple(row[part] for part in KEY): row for row in result["rows"]}
        _ = [(row["ms_p50"], result["meta"]["device"]) for row in rows.values()]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} is no result of `python -m benchmarks run`: {error} is missing") from None
    if not rows:
        raise ValueError(f"{name} has no rows")
    return rows


def apart(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Whether the 20th percentile of the slower run lies above the 80th of the faster one."""
    return (high.get("ms_p20") or high["ms_p50"]) > (low.get("ms_p80") or low["ms_p50"])


def _judge(key: Key, old: Mapping[str, Any], new: Mapping[str, Any], by: float) -> Change:
    if old["correct"] != new["correct"]:
        return Change(key, old, new, "right" if new["correct"] else "wrong", None)
    if not old["ms_p50"] or not new["ms_p50"]:
        return Change(key, old, new, "", None)
    ratio = new["ms_p50"] / old["ms_p50"]
    if ratio > by and apart(old, new):
        return Change(key, old, new, "slower", ratio)
    before, after = old.get("peak_mib"), new.get("peak_mib")
    counted = before is not None and after is not None and abs(after - before) > MEMORY_MIB
    # Before what became faster: speed that was bought with memory is no improvement.
    if counted and after > before * by:
        return Change(key, old, new, "memory", ratio)
    if ratio < 1 / by and apart(new, old):
        return Change(key, old, new, "faster", ratio)
    if counted and before > after * by:
        return Change(key, old, new, "less memory", ratio)
    return Change(key, old, new, "", ratio)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    out = [
        f"{words}: {old.get(fact) if old.get(fact) not in (None, '') else '-'} -> {new.get(fact) if new.get(fact) not in (None, '') else '-'}"
        for fact, words in FACTS.items()
        if old.get(fact) != new.get(fact)
    ]
    for fact, words in RATES.items():
        before, after = old.get(fact), new.get(fact)
        if before and after and not 1 / RATE_BY <= after / before <= RATE_BY:
            out.append(f"{words}: {before:.4g} -> {after:.4g} ({after / before:.2f}x)")
    for op in sorted(old.get("backends", {}).keys() & new.get("backends", {}).keys()):
        before, after = old["backends"][op], new["backends"][op]
        if before != after:
            out.append(f"backend of {op}: {before} -> {after}")
    for which, meta in (("old", old), ("new", new)):
        if (meta.get("other_load") or 0) > 0.03:
            out.append(f"{which} run: other processes took {meta['other_load']:.0%} of the processors")
    return out


def compare(old: Mapping[str, Any], new: Mapping[str, Any], by: float = 1.1) -> Comparison:
    """Two results, row by row.

    Args:
        old, new: as `python -m benchmarks run` writes them.
        by: factor of the medians (and of peak memory) from which a change counts, > 1.

    Raises:
        ValueError: not a result; `by` <= 1.
    """
    if by <= 1:
        raise ValueError(f"--by must be > 1 (1.1: a tenth slower fails); got {by:g}")
    before, after = _rows(old, "the old file"), _rows(new, "the new file")
    changes = [_judge(key, row, after[key], by) for key, row in before.items() if key in after]
    return Comparison(
        changes,
        [key for key in before if key not in after],
        [key for key in after if key not in before],
        _differences(old["meta"], new["meta"]),
    )


def _range(row: Mapping[str, Any]) -> str:
    if not row["ms_p50"]:
        return "wrong result" if not row["correct"] else "-"
    low, high = row.get("ms_p20"), row.get("ms_p80")
    spread = "" if low is None or high is None or low == high else f" ({tables.ms(low)} - {tables.ms(high)})"
    return f"{tables.ms(row['ms_p50'])}{spread}"


def _memory(change: Change) -> str:
    old, new = change.old.get("peak_mib"), change.new.get("peak_mib")
    return "-" if old is None or new is None else f"{old:.0f} -> {new:.0f}"


def _name(key: Key) -> str:
    return f"{key[0]}: {key[1]}, {key[2]}"


def _table(title: str, changes: list[Change]) -> list[str]:
    if not changes:
        return []
    rows = [
        [
            _name(c.key),
            c.key[-1],
            c.what or "same",
            "-" if c.ratio is None else f"{c.ratio:.2f}x",
            _range(c.old),
            _range(c.new),
            _memory(c),
        ]
        for c in sorted(changes, key=lambda c: -(c.ratio or float("inf")))
    ]
    head = ["op: case, dtype", "provider", "", "ratio", "old ms (p20 - p80)", "new ms (p20 - p80)", "peak MiB"]
    return ["", f"## {title}", "", *tables.markdown(head, rows)]


def _missing(title: str, keys: list[Key], left_out: list[str]) -> list[str]:
    if not keys:
        return []
    out = ["", f"## {title}", ""]
    for key in keys:
        why = next((line for line in left_out if key[0] in line and key[1] in line), "")
        out.append(f"- {_name(key)}, {key[-1]}" + (f" ({why})" if why else ""))
    return out


def report(found: Comparison, old: Mapping[str, Any], new: Mapping[str, Any], by: float) -> str:
    """Markdown: first whether the two may be compared at all, then what changed, then what is missing, the rest in a fold."""

    def of(result: Mapping[str, Any]) -> str:
        meta = result["meta"]
        return f"{meta['device']}, commit {meta.get('commit', '-')}, {meta.get('date', '-')}"

    ours = {id(c): tables.is_ours(c.key[-1]) for c in found.changes}
    better = [c for c in found.changes if ours[id(c)] and c.what in ("faster", "right", "less memory")]
    peers = [c for c in found.changes if c.what and not ours[id(c)]]
    same = [c for c in found.changes if not c.what]
    lines = ["# Benchmarks compared", "", f"- old: {of(old)}", f"- new: {of(new)}"]
    if found.differences:
        lines += ["", "**The two runs are not of one machine and one set of versions:**", ""]
        lines += [f"- {line}" for line in found.differences]
    lines += [
        "",
        f"{len(found.regressions)} regressions, {len(better)} improvements, {len(same)} rows the same, {len(peers)} peers changed, "
        f"{len(found.gone)} rows only in the old result, {len(found.fresh)} only in the new one. A change: medians apart by more than "
        f"{by:g}x and ranges (p20 - p80) that do not touch.",
    ]
    lines += _table("Regressions", found.regressions)
    lines += _table("Improvements", better)
    lines += _table("Peers that changed", peers)
    lines += _missing("Only in the old result", found.gone, new.get("left_out", []))
    lines += _missing("Only in the new result", found.fresh, old.get("left_out", []))
    if same:
        lines += ["", "<details><summary>The same</summary>", *_table("The same", same)[2:], "", "</details>"]
    return "\n".join(lines) + "\n"
