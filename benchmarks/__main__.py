"""Command line: python -m benchmarks run | table | plot | compare | cost | tune | quality (see benchmarks/__init__.py)."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT


def write_json(path: Path, result: dict[str, Any]) -> None:
    """One row a line, so that a diff shows which rows changed; written whole or not at all."""
    lines = ["{", f' "meta": {json.dumps(result["meta"], indent=2)},']
    for key in ("rows", "targets", "left_out"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in result.get(key, []))
        lines.append(f' "{key}": [{chr(10) + rows + chr(10) + " " if rows else ""}]{"," if key != "left_out" else ""}')
    lines.append("}")
    write_text(path, "\n".join(lines) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def run(args: argparse.Namespace) -> int:
    import torch

    from benchmarks import harness, machine, ops

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    settings = harness.Settings.of(device, args.quick)
    settings.cases = args.cases or ""
    if args.seconds is not None:
        settings.seconds = args.seconds
    if args.total is not None:
        settings.total_s = args.total
    settings.say = lambda line: print(line, flush=True)
    whole = not (args.ops or args.quick or args.cases)
    if args.update and (not args.ops or args.quick or args.cases):
        raise ValueError(
            "--update: replaces whole ops in the device's results: name them by --ops, without --quick and --cases"
        )
    whole = whole or args.update
    out = Path(args.out) if args.out else RESULTS if whole else ROOT / "out"
    if out.suffix != ".json":
        out = out / f"{machine.slug(device)}.json"

    def terminate(*_: object) -> None:
        raise harness.Terminated

    signal.signal(signal.SIGTERM, terminate)
    result = harness.run(ops.load(args.ops), device, settings)
    write_json(out, merged(json.loads(out.read_text()), result) if args.update else result)
    for t in result["targets"]:
        print(
            f"{'met   ' if t['met'] else 'MISSED'} {t['op']}, {t['case']}: {t['provider']} {t['kind']} "
            f"{t['ratio']:.3g}x of {t['over']} ({t['rule']})"
        )
    for line in result["left_out"]:
        print(line)
    print(f"{len(result['rows'])} rows in {result['meta']['seconds']} s -> {out}")
    wrong = [row for row in result["rows"] if not row["correct"]]
    for row in wrong:
        print(f"wrong: {row['op']}, {row['case']}: {row['provider']}", file=sys.stderr)
    return 1 if any(row["provider"].startswith("fastunlearn") for row in wrong) else 0


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The results of a whole run with some ops measured again; `meta` says which, at which commit and copy bandwidth.

    Raises:
        ValueError: the two are of different devices or versions of torch.
    """
    for key in ("device", "torch", "triton", "threads"):
        if old["meta"][key] != new["meta"][key]:
            raise ValueError(f"--update: {key} was {old['meta'][key]}, is {new['meta'][key]} now; run all ops again")
    again = {row["op"] for row in new["rows"]}
    note = {key: new["meta"][key] for key in ("commit", "date", "copy_gbps")}
    meta = {**old["meta"], "updated": {**old["meta"].get("updated", {}), **dict.fromkeys(sorted(again), note)}}
    parts = {key: [row for row in old[key] if row["op"] not in again] + new[key] for key in ("rows", "targets")}
    parts = {key: sorted(rows, key=lambda row: row["op"]) for key, rows in parts.items()}
    left_out = [line for line in old["left_out"] if line.split(":")[0].split(",")[0] not in again]
    return {"meta": meta, **parts, "left_out": left_out + new["left_out"]}


def table(args: argparse.Namespace) -> int:
    from benchmarks import tables

    stale = tables.update(Path(args.readme), Path(args.results), write=not args.check)
    if args.check and stale:
        print(f"{args.readme} is out of date: run `python -m benchmarks table` ({', '.join(stale)})", file=sys.stderr)
        return 1
    print(f"{args.readme}: {', '.join(stale) + ' written' if stale else 'tables are up to date'}")
    return 0


def plot(args: argparse.Namespace) -> int:
    from benchmarks import plots

    for path in plots.draw(Path(args.results), Path(args.out)):
        print(path)
    return 0


def quality(args: argparse.Namespace) -> int:
    if args.study == "prune":
        from benchmarks import prune

        result = prune.run()
    elif args.study == "canvas_pipeline":
        from benchmarks import canvas_pipeline

        result = canvas_pipeline.run()
    elif args.study == "scapre":
        from benchmarks import scapre

        result = scapre.run(args.concepts or scapre.COUNTS)
    elif args.study == "tofu_evaluation":
        from benchmarks import tofu_evaluation

        result = tofu_evaluation.run(
            args.rows, tuple(args.parts or tofu_evaluation.tofu.FILES), args.model, args.split, args.dtype
        )
    else:
        from benchmarks import demo

        result = demo.run(args.seeds)
    out = Path(args.out) if args.out else RESULTS / "quality" / f"{args.study}.json"
    write_json(out, result)
    return 0


def large(args: argparse.Namespace) -> int:
    import torch

    from benchmarks import large as study
    from benchmarks import machine

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = [
        study.Case(
            model, arm, device, args.dtype, args.batch, args.sequence, args.checkpointing, args.steps, args.layers
        )
        for model in args.model
        for arm in args.arms
    ]
    out = Path(args.out) if args.out else RESULTS / "large" / f"{machine.slug(torch.device(device))}.json"
    result = study.run(cases, out)
    print(f"{len(result['rows'])} rows -> {out}")
    return 0


def processes(args: argparse.Namespace) -> int:
    from benchmarks import large_processes
    from benchmarks.large import Case

    cases = [
        Case(args.model, arm, "cpu", args.dtype, args.batch, args.sequence, False, args.steps, None)
        for arm in args.arms
    ]
    large_processes.run(cases, args.processes, Path(args.out))
    return 0


def plans(args: argparse.Namespace) -> int:
    from benchmarks import large as study

    study.plans(Path(args.out))
    return 0


def compare(args: argparse.Namespace) -> int:
    from benchmarks import compare as comparing

    old, new = (json.loads(Path(path).read_text()) for path in (args.old, args.new))
    found = comparing.compare(old, new, args.by)
    text = comparing.report(found, old, new, args.by)
    if args.out:
        write_text(Path(args.out), text)
    else:
        print(text, end="")
    for change in found.regressions:
        print(f"worse: {', '.join(change.key)}: {change.what}", file=sys.stderr)
    for key in found.lost:
        print(f"gone: {', '.join(key)}: the new run has its case, and not this row", file=sys.stderr)
    return 1 if found.regressions or found.lost else 0


def tune(args: argparse.Namespace) -> int:
    import torch

    from benchmarks import harness, ops
    from benchmarks import tune as tuning
    from fastunlearn import _tuned

    if not torch.cuda.is_available():
        raise ValueError("tune: needs an NVIDIA GPU, torch finds none")
    device = torch.device("cuda")
    settings = harness.Settings(seconds=args.seconds, max_runs=50, cases=args.cases or "")
    settings.say = lambda line: print(line, flush=True)
    out = Path(args.out) if args.out else Path(_tuned.__file__).with_name(_tuned.FILE)
    old = json.loads(out.read_text()) if out.is_file() else _tuned.table()
    result = tuning.run(ops.load(args.ops or tuning.MODULES), device, settings, old)
    write_text(out, json.dumps(result, indent=1) + "\n")
    kernels = result[torch.cuda.get_device_name(device)]["kernels"]
    print(f"{sum(map(len, kernels.values()))} keys of {len(kernels)} kernels better than their defaults -> {out}")
    return 0


def cost(args: argparse.Namespace) -> int:
    import torch

    from benchmarks import cost as study

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    gpu = device == "cuda"
    cases = [
        study.Case(
            shapes, method, device, args.steps, args.images or (32 if gpu else 8), args.sampling_steps,
            True if gpu and not args.fp32 else None, args.blocks, args.pixels,
        )
        for shapes in args.shapes
        for method in args.methods or study.METHODS
    ]  # fmt: skip
    out = Path(args.out) if args.out else study.STUDY
    result = study.run(cases, out, write_json, again=args.again)
    print(f"{len(result['rows'])} rows, {len(result['left_out'])} left out -> {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Every op beside its peers and its limit."
    )
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("run", help="measure; writes one JSON")
    p.add_argument("--ops", nargs="+", help="default: all")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument(
        "--out", help="file, or folder for <device>.json; default benchmarks/results, or out/ for a part of a run"
    )
    p.add_argument("--update", action="store_true", help="replace the ops of --ops in the device's committed results")
    p.add_argument("--quick", action="store_true", help="few cases, little time")
    p.add_argument("--cases", help="only cases whose name contains this")
    p.add_argument("--seconds", type=float, help="time of one provider in one case")
    p.add_argument("--total", type=float, help="start no new case after so many seconds")
    p.set_defaults(do=run)
    p = commands.add_parser(
        "table", help="write the tables into README.md, and every row into benchmarks/results/README.md"
    )
    p.add_argument("--check", action="store_true", help="write nothing; fail when README.md is out of date")
    p.add_argument("--readme", default=str(ROOT / "README.md"))
    p.add_argument("--results", default=str(RESULTS))
    p.set_defaults(do=table)
    p = commands.add_parser("plot", help="time against limit, and memory, one picture an op")
    p.add_argument("--results", default=str(RESULTS))
    p.add_argument("--out", default=str(RESULTS / "plots"))
    p.set_defaults(do=plot)
    p = commands.add_parser(
        "quality", help="a study of what was forgotten and kept; writes results/quality/<study>.json"
    )
    p.add_argument("study", choices=("demo", "prune", "canvas_pipeline", "scapre", "tofu_evaluation"))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the demo")
    p.add_argument("--concepts", nargs="+", type=int, help="of scapre: how many, some numbers")
    p.add_argument("--rows", type=int, default=0, help="tofu_evaluation: rows of each set (default: all)")
    p.add_argument("--parts", nargs="+", choices=("forget", "retain", "ra", "wf"), help="tofu_evaluation: sets")
    p.add_argument("--model", default="smollm2", help="tofu_evaluation: folder or name")
    p.add_argument("--split", default="forget10", help="tofu_evaluation: forget split")
    p.add_argument("--dtype", default="float32", help="tofu_evaluation: of the weights")
    p.add_argument("--out", help="file; default benchmarks/results/quality/<study>.json")
    p.set_defaults(do=quality)
    p = commands.add_parser("large", help="unlearning of whole models: tokens/s, peak memory, time by part; resumable")
    p.add_argument("--model", nargs="+", default=["smollm2-135m"], help="names of published configurations")
    p.add_argument("--arms", nargs="+", choices=("a", "b", "c", "d"), default=["a", "b", "c", "d"])
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--batch", type=int, default=8, help="forget rows; as many retain rows")
    p.add_argument("--sequence", type=int, default=512)
    p.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--layers", type=int, help="fewer layers than the configuration has")
    p.add_argument("--out", help="default: benchmarks/results/large/<device>.json; rows it holds are kept")
    p.set_defaults(do=large)
    p = commands.add_parser("processes", help="a sharded run in some processes on this CPU, beside its plan; resumable")
    p.add_argument("--model", default="smollm2-135m", help="name of a published configuration")
    p.add_argument("--arms", nargs="+", choices=("c", "d"), default=["c", "d"])
    p.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    p.add_argument("--batch", type=int, default=2, help="forget rows of a process; as many retain rows")
    p.add_argument("--sequence", type=int, default=128)
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--out", default=str(RESULTS / "large" / "processes.json"), help="rows it holds are kept")
    p.set_defaults(do=processes)
    p = commands.add_parser("plans", help="memory and time of 1B, 8B and 70B models by arithmetic, 1 to 64 GPUs")
    p.add_argument("--out", default=str(RESULTS / "large" / "plans.json"))
    p.set_defaults(do=plans)
    p = commands.add_parser("tune", help="launch options of the kernels on this GPU -> fastunlearn/tuned.json")
    p.add_argument("--ops", nargs="+", help="default: all whose kernels have candidates")
    p.add_argument("--cases", help="only cases whose name contains this")
    p.add_argument("--seconds", type=float, default=0.2, help="time of one candidate in one case")
    p.add_argument("--out", help="default: the file in the package; what it says of other GPUs is kept")
    p.set_defaults(do=tune)
    p = commands.add_parser("cost", help="seconds, peak memory, storage of every diffusion method; resumable")
    p.add_argument("--shapes", nargs="+", choices=("canvas", "sd15", "sdxl"), default=["canvas"])
    p.add_argument("--methods", nargs="+", help="default: all")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--steps", type=int, default=6, help="optimiser steps that are measured")
    p.add_argument("--images", type=int, help="images that are drawn (default 8, on a GPU 32)")
    p.add_argument("--sampling-steps", type=int, default=5, help="of an image that is drawn")
    p.add_argument("--blocks", type=int, help="of sd15 and sdxl: the first levels of the network only")
    p.add_argument("--pixels", type=int, help="of sd15 and sdxl: smaller images")
    p.add_argument("--fp32", action="store_true", help="on a GPU: no autocast")
    p.add_argument("--again", action="store_true", help="measure what the file has already, too")
    p.add_argument("--out", help="default: benchmarks/results/quality/cost.json; rows it holds are kept")
    p.set_defaults(do=cost)
    p = commands.add_parser("compare", help="two results, row by row: what became slower; 1 where ours did, or is gone")
    p.add_argument("old")
    p.add_argument("new")
    p.add_argument(
        "--by",
        type=float,
        default=1.1,
        help="a change: medians apart by more than this (default 1.1), and ranges apart",
    )
    p.add_argument("--out", help="file of the report, Markdown; default: it is printed")
    p.set_defaults(do=compare)
    args = parser.parse_args(argv)
    try:
        return args.do(args)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"python -m benchmarks: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
