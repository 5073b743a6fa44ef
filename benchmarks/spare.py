"""Studies of SPARE on the canvas: what it forgets against what it keeps, its timestep schemes, pictures before and after.

    python -m benchmarks.spare tradeoff --densities 0.03 0.1 0.3 1 --lambdas 0.3 0.1 1 --seed 0 --work out
    python -m benchmarks.spare timesteps --schemes uniform interval importance --seed 0 --work out
    python -m benchmarks.spare pictures --methods spare salun uce --target "Pop Art" --seed 0 --work out

The first two run SPARE as its recipe says (fastunlearn.methods.recipes) but for what is studied, on the targets and the answer set on
which settings are chosen (`python -m benchmarks.canvas tune`), so that no table's target is looked at. Mask density is the share of the
U-Net's weights that saliency chooses, lambda the factor of the forget term (that of the retain term is the recipe's); of the timestep
schemes all but `uniform` are a reconstruction. They write benchmarks/results/quality/spare_tradeoff.json and spare_timesteps.json after every
trial; the third writes benchmarks/results/canvas_before_after.webp and quality/canvas_before_after.json, what it is of.

Every target is kept in the work folder as soon as it is done, and not done again; rows of other weights, other settings or another
machine are refused there. Two processes take a work folder each and other trials; the written file keeps the rows of both.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks import RESULTS, ROOT, canvas, machine, plots, tables
from benchmarks.__main__ import write_json
from fastunlearn._stored import read_tensors
from fastunlearn.diffusion_trainer import TIMESTEPS
from fastunlearn.evaluation.canvas import ATTACKS, DIVERGED, real_features
from fastunlearn.evaluation.canvas_rows import check_settings, load_rows, weights_of
from fastunlearn.evaluation.metrics import worse_than_surrogate
from fastunlearn.evaluation.worlds import Concepts, Target
from fastunlearn.methods.recipes import METHODS, config_class
from fastunlearn.methods.resolved import resolved_settings
from fastunlearn.report import files
from fastunlearn.report.cost import measured
from fastunlearn.report.grid import grid_sheet
from fastunlearn.sampling import sample

QUALITY = RESULTS / "quality"
PICTURE, PICTURE_FACTS = RESULTS / "canvas_before_after.webp", QUALITY / "canvas_before_after.json"
#: bytes of the picture at most
PICTURE_BYTES = 200_000
DENSITIES, LAMBDAS = (0.03, 0.1, 0.3, 1.0), (0.3, 0.1, 1.0)
#: name in the rows -> settings
SCHEMES: dict[str, dict[str, Any]] = {
    "uniform": {"timesteps": "uniform"},
    "interval, 0 to 0.5": {"timesteps": "interval", "timestep_interval": [0.0, 0.5]},
    "interval, 0.5 to 1": {"timesteps": "interval", "timestep_interval": [0.5, 1.0]},
    "importance": {"timesteps": "importance"},
}
#: beside what makes two canvas studies one
SAME = (*canvas.SAME, "targets", "attacks", "recipe", "machine", "torch")
KINDS = ("style", "object")
#: the untouched model among the methods
UNTOUCHED = "none"


def tradeoff_trials(densities: Iterable[float], lambdas: Iterable[float]) -> dict[str, dict[str, Any]]:
    """Name of a trial -> settings; a line of the curve after the other."""
    return {
        f"density {density:g}, lambda {factor:g}": {
            "variant": "per_weight", "sparsity_inclusiveness": float(density), "forget_alpha": float(factor)
        }
        for factor in lambdas for density in densities
    }  # fmt: skip


def timestep_trials(schemes: Iterable[str]) -> dict[str, dict[str, Any]]:
    wanted = set(schemes)
    return {name: given for name, given in SCHEMES.items() if given["timesteps"] in wanted}


def _whole(rows: Iterable[Mapping[str, Any]], targets: Sequence[Target]) -> tuple[list[Any], list[dict[str, str]]]:
    """Rows of every trial and seed that has all targets, and which have not."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if Target(row["kind"], row["target"]) in targets:
            found.setdefault((row["method"], row["seed"]), []).append(row)
    whole = [row for mine in found.values() if len(mine) == len(targets) for row in mine]
    short = {key: len(mine) for key, mine in found.items() if len(mine) < len(targets)}
    return whole, [
        {"method": name, "why": f"seed {seed}: {n} of {len(targets)} targets"} for (name, seed), n in short.items()
    ]


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of rows in the file: by scheme, or by line and point of the curve."""
    settings, names = row["settings"], list(SCHEMES)
    scheme = names.index(row["method"]) if row["method"] in names else 0
    return scheme, row["seed"], settings.get("forget_alpha", 0), settings.get("sparsity_inclusiveness", 0)


def run(
    study: str, tried: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], *, model: str, work: Path, out: Path, each: int = 2,
    steps: int | None = None, attacks: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Every trial on `each` held-out styles and objects; `out` is written after each.

    Args:
        study: "tradeoff" or "timesteps".
        tried: name of a trial -> settings over SPARE's recipe.
        seeds: of the method.
        steps: of the optimiser, in place of the recipe's.
        attacks: whose accuracy on the erased concept is taken, too.

    Raises:
        ValueError: settings that SPARE refuses (before anything is loaded); a work folder with rows of another study.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps: want at least 1, got {steps}")
    more = {} if steps is None else {"max_steps": steps}
    recipe = {kind: files.plain(resolved_settings("spare", kind, more)) for kind in KINDS}
    for given in tried.values():
        for settings in recipe.values():
            config_class("spare")(**{"output_dir": str(work), "use_cpu": True} | settings | given)
    pipeline = canvas.load_pipeline(model, dtype=torch.float32)
    device = next(pipeline.unet.parameters()).device
    world = canvas.canvas_world(device)
    targets, real = world.held_out_targets(each), real_features(world)
    settings = replace(canvas.TUNING_SETTINGS, attacks=tuple(attacks))
    facts = machine.meta(device)
    about = {"model": model, "recipe": recipe, "machine": facts["device"], "torch": facts["torch"]}
    load = machine.OtherLoad()
    result: dict[str, Any] = {}
    for seed in dict.fromkeys(seeds):
        for name, given in tried.items():
            with load:
                done = canvas.attempt(
                    pipeline, world, targets, "spare", more | given, name=name, seed=seed, settings=settings, real=real,
                    output=work / f"spare-{study}.json", about=about,
                )  # fmt: skip
            whole, left_out = _whole(done["rows"], targets)
            meta: dict[str, Any] = {
                "targets": ", ".join(t.name for t in targets), "attacks": ", ".join(attacks) or "none", "recipe": recipe
            }  # fmt: skip
            rows = canvas.rows_of(whole)
            rows += canvas.committed(out, canvas.facts_of(world, settings, model, done, rows) | meta, rows, SAME)
            rows.sort(key=_order)
            meta = canvas.facts_of(world, settings, model, done, rows) | meta
            meta["methods' seeds"] = ", ".join(map(str, sorted({row["seed"] for row in rows})))
            share = load.share()
            meta |= {"other load, last run": f"{share:.0%}"} if share is not None else {}
            result = {"meta": meta, "rows": rows, "left_out": left_out}
            write_json(out, result)
    return result


def curves(rows: Iterable[Mapping[str, Any]], kind: str) -> dict[float, list[dict[str, Any]]]:
    """lambda -> points by density: density, UA, kept (mean of IRA and CRA), all means over the targets of a kind and the seeds in
    percent, noise: whether a target failed or became noise that the unedited model does not excuse."""
    found: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == kind:
            key = row["settings"]["forget_alpha"], row["settings"]["sparsity_inclusiveness"]
            found.setdefault(key, []).append(tables.counted(dict(row)))
    out: dict[float, list[dict[str, Any]]] = {}
    for (factor, density), mine in sorted(found.items()):
        point = {
            "density": density,
            "UA": sum(row["UA"] for row in mine) / len(mine),
            "kept": sum(row["IRA"] + row["CRA"] for row in mine) / (2 * len(mine)),
            "noise": any("failed" in row or worse_than_surrogate(row) for row in mine),
        }
        out.setdefault(factor, []).append(point)
    return out


def plot(result: Mapping[str, Any], path: Path) -> None:
    """By mask density, a line a lambda: what is forgotten and, below, what is kept; a column a kind of target."""
    meta = result["meta"]
    title = f"SPARE on the canvas by mask density and lambda - weights {meta['weights']}, {meta['machine']}"
    shown = (("UA", "UA: forgotten, %"), ("kept", "mean of IRA and CRA: kept, %"))
    with plots.panels(path, title, len(shown), len(KINDS), figsize=(10, 6)) as axes:
        for column, kind in enumerate(KINDS):
            lines = curves(result["rows"], kind)
            names = {row["target"] for row in result["rows"] if row["kind"] == kind}
            densities = sorted({point["density"] for points in lines.values() for point in points})
            axes[0][column].set_title(
                f"{kind}s: {', '.join(sorted(names))} (hollow: one of them is noise)", fontsize=8, loc="left"
            )
            for axis, (key, label) in zip((axes[0][column], axes[1][column]), shown, strict=True):
                for colour, (factor, points) in zip(_colours(len(lines)), lines.items(), strict=True):
                    x, y = [p["density"] for p in points], [p[key] for p in points]
                    axis.plot(x, y, "-", color=colour, lw=1.2, label=f"lambda {factor:g}")
                    for point in points:
                        face = "white" if point["noise"] else colour
                        axis.plot(point["density"], point[key], "o", color=colour, mfc=face, ms=5)
                axis.set_xscale("log")
                axis.set_xticks(densities, [f"{density:g}" for density in densities])
                axis.minorticks_off()
                axis.set_xlabel("mask density", fontsize=8)
                axis.set_ylabel(label, fontsize=8)
                if key == "UA":
                    axis.set_ylim(-4, 104)
                axis.legend(fontsize=7)


def _colours(count: int) -> list[Any]:
    """Of lines that are in order."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.85 * n / max(count - 1, 1)) for n in range(count)]


# Pictures.


def columns_of(world: Concepts, target: Target, own: int, others: int, seed: int) -> list[tuple[str, str]]:
    """(theme, object) of every column: the target with some of the other kind, then with these other concepts of its own kind.

    A style's other themes begin with the surrogate, what it should become, an object's other objects likewise.

    Raises:
        ValueError: more than there are, or none.
    """
    styles, objects = (
        [t.name for t in world.draw_targets(*count, seed)]
        for count in ((len(world.styles), 0), (0, len(world.objects)))
    )
    mates = objects if target.kind == "style" else styles
    first = world.seed_theme if target.kind == "style" else world.surrogate_object(target)
    near = [first, *(n for n in (styles if target.kind == "style" else objects) if n not in (first, target.name))]
    for name, count, known in (("own", own, mates), ("others", others, near)):
        if not 1 <= count <= len(known):
            raise ValueError(f"{name}: want 1 to {len(known)}, got {count}")
    pairs = [(target.name, mate) for mate in mates[:own]]
    pairs += [(name, mates[n % own]) for n, name in enumerate(near[:others])]
    return pairs if target.kind == "style" else [pair[::-1] for pair in pairs]


def webp(sheet: Any, most: int = PICTURE_BYTES) -> bytes:
    """A picture of pillow as WebP, as good as fits.

    Raises:
        ValueError: it does not fit.
    """
    for quality in (90, 80, 70, 60, 45, 30):
        data = io.BytesIO()
        sheet.save(data, format="webp", quality=quality, method=6)
        if len(data.getvalue()) <= most:
            return data.getvalue()
    raise ValueError(
        f"methods: a picture of {sheet.size[0]} x {sheet.size[1]} takes more than {most:,} bytes; fewer rows or columns"
    )


def pictures(
    methods: Sequence[str], name: str, seed: int, *, model: str, work: Path, out: Path = PICTURE, facts: Path = PICTURE_FACTS,
    own: int = 4, others: int = 6,
) -> dict[str, Any]:  # fmt: skip
    """The untouched model and each method after it unlearned a target, a row each, all from the start latent of one seed.

    Args:
        methods: with their recipes.
        name: of the target.
        own: columns of the erased concept. others: of other concepts of its kind.

    Raises:
        ValueError: an unknown target, a work folder with rows of another model, target, seed, settings or machine.
    """
    pipeline = canvas.load_pipeline(model, dtype=torch.float32)
    device = next(pipeline.unet.parameters()).device
    world = canvas.canvas_world(device)
    target = world.target(name)
    asked = columns_of(world, target, own, others, seed)
    labels, about = [f"{theme} {thing}" for theme, thing in asked], machine.meta(device)
    meta = {
        "model": model, "weights": weights_of(pipeline, world)["weights"], "target": str(target), "seed": seed, "columns": labels,
        "DDIM steps": world.steps, "guidance": world.guidance_scale, "machine": about["device"], "torch": about["torch"],
    }  # fmt: skip
    # A target has files of its own, so that one folder may hold several.
    stem = f"spare-pictures-{target.kind}-{target.name.lower().replace(' ', '-')}-{seed}"
    journal, prompts = work / f"{stem}.json", [world.prompt(thing, theme) for theme, thing in asked]
    shown: dict[str, Tensor] = {}
    with files.only_writer(journal):
        _, rows = load_rows(journal, meta)
        for method in dict.fromkeys([UNTOUCHED, *methods]):
            settings = {} if method == UNTOUCHED else resolved_settings(method, target.kind)
            kept = work / stem / f"{method}.safetensors"
            row = next((r for r in rows if r["method"] == method), None)
            if row is None:
                row = {"method": method, "kind": target.kind, "target": target.name, "settings": files.plain(settings)}
                fresh = canvas.load_pipeline(model, dtype=torch.float32)
                try:
                    row["seconds"] = round(_unlearn(method, fresh, world, target, seed), 2)
                    options = {"steps": world.steps, "guidance_scale": world.guidance_scale, "what": "  pictures"}
                    images = sample(fresh, prompts, [seed], **options)[0]
                    files.write_bytes(kept, save({"images": images.contiguous()}), overwrite=True)
                except DIVERGED as error:
                    row["failed"] = " ".join(str(error).split())[:200] or type(error).__name__
                row |= {"commit": about["commit"], "date": about["date"]}
                rows.append(row)
                files.write_json(journal, {"meta": meta, "rows": rows})
                print(f"{method}: {row.get('failed') or str(row['seconds']) + ' s'}", flush=True)
            check_settings(journal, row, settings)
            if "failed" not in row:
                shown[method] = read_tensors(kept)[0]["images"]
    names = ["untouched" if method == UNTOUCHED else method for method in shown]
    files.write_bytes(out, webp(grid_sheet(torch.stack(list(shown.values())), rows=names, columns=labels)), overwrite=True)  # fmt: skip
    said = [row for method in shown for row in rows if row["method"] == method]
    stamp = {key: " and ".join(dict.fromkeys(row[key] for row in said)) for key in ("commit", "date")}
    left_out = [{"method": r["method"], "why": r["failed"]} for r in rows if "failed" in r and r["method"] in methods]
    result = {"meta": meta | {"weights": str(meta["weights"])[:12]} | stamp, "rows": said, "left_out": left_out}
    write_json(facts, result)
    return result


def _unlearn(method: str, pipeline: Any, world: Any, target: Target, seed: int) -> float:
    """Seconds that it took."""
    if method == UNTOUCHED:
        return 0.0
    _, cost = measured(lambda: METHODS[method](pipeline, world, target, seed), next(pipeline.unet.parameters()).device)
    return cost.seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spare", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("tradeoff", "timesteps", "pictures"):
        p = commands.add_parser(what)
        p.add_argument("--model", default="canvas")
        p.add_argument("--work", type=Path, default=ROOT / "out", help="where an interrupted run is kept")
        p.add_argument("--out", type=Path, help="default: below benchmarks/results/")
        if what == "pictures":
            p.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
            p.add_argument("--target", default="Pop Art", help="style or object that is erased")
            p.add_argument("--seed", type=int, default=0, help="of the methods, the columns and the start latent")
            p.add_argument("--own", type=int, default=4, help="columns of the erased concept")
            p.add_argument("--others", type=int, default=6, help="columns of other concepts of its kind")
            continue
        if what == "tradeoff":
            p.add_argument("--densities", nargs="+", type=float, default=DENSITIES, help="mask densities, in (0, 1]")
            p.add_argument("--lambdas", nargs="+", type=float, default=LAMBDAS, help="factors of the forget term")
        else:
            p.add_argument("--schemes", nargs="+", choices=TIMESTEPS, default=list(TIMESTEPS))
        p.add_argument("--seed", nargs="+", type=int, default=[0], help="of the method; one run of every trial each")
        p.add_argument("--each", type=int, choices=(1, 2), default=2, help="held-out styles, and as many objects")
        p.add_argument("--steps", type=int, help="of the optimiser; default: the recipe's")
        p.add_argument("--attacks", nargs="*", choices=ATTACKS, default=[], help="accuracy they bring back")
    args = parser.parse_args(argv)
    try:
        if args.what == "pictures":
            out = args.out or PICTURE
            pictures(
                args.methods, args.target, args.seed, model=args.model, work=args.work, out=out,
                facts=out.with_suffix(".json") if args.out else PICTURE_FACTS, own=args.own, others=args.others,
            )  # fmt: skip
        else:
            curve = args.what == "tradeoff"
            tried = tradeoff_trials(args.densities, args.lambdas) if curve else timestep_trials(args.schemes)
            run(
                args.what, tried, args.seed, model=args.model, work=args.work, out=args.out or QUALITY / f"spare_{args.what}.json",
                each=args.each, steps=args.steps, attacks=args.attacks,
            )  # fmt: skip
    except (ValueError, FileNotFoundError, BlockingIOError) as error:
        parser.exit(2, f"python -m benchmarks.spare: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
