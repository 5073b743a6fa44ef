"""How many cases of the property tests (tests/fuzz) each op has passed: benchmarks/results/quality/fuzz.json.

    python -m benchmarks.fuzz [--cases 10000] [--seconds 200]

Runs can be cut short and go on: the cases, failures and seconds of the file that is there are added to. Every test has its turn
of a few hundred cases, those with the fewest first. New cases each time, from no database of failed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from benchmarks import RESULTS, machine
from benchmarks.__main__ import write_json

TURN = 250


def _tests(cases: int) -> dict[tuple[str, str], tuple[Any, int]]:
    """(test, backend) -> (what was tested, cases wanted)."""
    import hypothesis

    import tests.conftest  # noqa: F401 (sets the profiles)
    from tests.fuzz import FILES
    from tests.fuzz.draws import SLOWER, TESTED

    hypothesis.settings.register_profile(
        "counted",
        hypothesis.settings.get_profile("fuzz"),
        derandomize=False,
        database=None,
        print_blob=True,
        phases=[hypothesis.Phase.generate],  # what fails is made smaller by `make fuzz`
    )
    hypothesis.settings.load_profile("counted")
    for name in FILES:
        import_module(f"tests.fuzz.{name}")
    return {
        (f"{tested.check.__module__.rsplit('.', 1)[1]}.{tested.check.__name__}", backend): (
            tested, max(cases // SLOWER, 1) if backend == "triton" else cases,
        )
        for tested in TESTED
        for backend in tested.backends
    }  # fmt: skip


def run(
    cases: int, seconds: float | None, before: dict[str, Any] | None, only: str = ""
) -> Iterator[list[dict[str, Any]]]:
    """All rows, after every turn.

    Args:
        cases: wanted of every test, a 50th of them in Triton's interpreter. seconds: start no new turn after that.
        before: the result to add to. only: part of a test's name.
    """
    tests = _tests(cases)
    from tests.fuzz.draws import run as run_cases

    rows = {(row["test"], row["backend"]): row for row in (before or {"rows": []})["rows"]}
    rows = {key: row for key, row in rows.items() if key in tests}
    for key, (tested, wanted) in tests.items():
        row = {"op": ", ".join(tested.ops), "test": key[0], "backend": key[1], "cases": 0, "wanted": wanted, "failures": 0, "seconds": 0.0}  # fmt: skip
        rows[key] = row | rows.get(key, {}) | {"wanted": wanted}
    start = time.perf_counter()
    while seconds is None or time.perf_counter() - start < seconds:
        waiting = [k for k in rows if only in k[0] and rows[k]["cases"] < rows[k]["wanted"] and not rows[k]["failures"]]
        if not waiting:
            break
        key = min(waiting, key=lambda k: rows[k]["cases"] / rows[k]["wanted"])
        row, (tested, wanted) = rows[key], tests[key]
        turn, begun = min(wanted - row["cases"], TURN if key[1] != "triton" else TURN // 50), time.perf_counter()
        try:
            row["cases"] += run_cases(tested.check, key[1], turn)
        except Exception:
            row["failures"] += 1
            traceback.print_exc()
        row["seconds"] = round(row["seconds"] + time.perf_counter() - begun, 1)
        print(f"{key[0]} {key[1]}: {row['cases']} of {wanted} cases, {row['failures']} failed, {row['seconds']} s", flush=True)  # fmt: skip
        yield [rows[k] for k in sorted(rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "--cases", type=int, default=10_000, help="of every test and backend; Triton's interpreter a 50th"
    )
    parser.add_argument("--seconds", type=float, help="start no new turn after so many; another run goes on")
    parser.add_argument("--only", default="", help="tests whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality" / "fuzz.json")
    args = parser.parse_args(argv)
    before = json.loads(args.out.read_text()) if args.out.is_file() else None
    import torch

    rows = (before or {"rows": []})["rows"]
    meta = {"study": "fuzz", **machine.meta(torch.device("cpu"))}
    for rows in run(args.cases, args.seconds, before, args.only):
        write_json(args.out, {"meta": meta, "rows": rows})
    failures = sum(row["failures"] for row in rows)
    print(f"{sum(row['cases'] for row in rows)} cases, {failures} failures -> {args.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
