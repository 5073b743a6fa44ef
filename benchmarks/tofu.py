"""The study behind the README's TOFU tables: every method of the library for language models on SmolLM2-135M, dense and 2:4.

    python -m benchmarks.tofu plan  --size cpu            measures part by part and says how long the stages would take here
    python -m benchmarks.tofu tune  --size cpu            each method's grid, equally many trials, on retained authors
    python -m benchmarks.tofu run   --size cpu --seeds 0 1 2
    python -m benchmarks.tofu run   --size cpu --seeds 0 --settings dense --trial 2 --pieces 1    without tuning, a piece at a time
    python -m benchmarks.tofu evidence --size cpu         SAU's claim: unlearn then prune, prune then unlearn, with what

Needs FASTUNLEARN_DATA with tofu/. Size gpu: TOFU full against retain90, forget10. Size cpu: one author of forget01, the first three authors as
the retain set. Every finished run is a row of benchmarks/results/quality/tofu.json (tofu_tuning.json, sau_evidence.json), written
after each: a study that stopped goes on; --hours stops one in time, --pieces after so many models, evaluations or rows. While settings are chosen, authors of the retain set stand in
for the forget set; the study's own forget set is not asked. Settings are chosen by `chosen` from the committed trials:
the best harmonic mean of what is forgotten (1 - extraction strength) and what is kept (model utility over that before); or, by
--trial, the same place of every method's grid, which the file then says.
`python -m benchmarks table` makes the README's tables of it, `python -m benchmarks plot` the picture.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT, machine
from benchmarks.__main__ import write_json
from benchmarks.tofu_methods import EVIDENCE, METHODS, RATES, SETTINGS
from benchmarks.tofu_plan import plan
from benchmarks.tofu_runs import PATTERN, SIZES, Rows, Work
from benchmarks.tofu_tables import score
from fastunlearn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fastunlearn.localize import nm_violations
from fastunlearn.methods.altpo import sample_alternates
from fastunlearn.report.files import write_json as write_plain

#: metric of TOFU_SUMMARY.json -> column, digits
SHOWN = {
    "forget_quality": "forget quality", "model_utility": "model utility", "forget_truth_ratio": "forget truth ratio",
    "extraction_strength": "ES", "exact_memorization": "EM", "forget_Q_A_Prob": "forget prob", "forget_Q_A_ROUGE": "forget ROUGE",
    "retain_Q_A_Prob": "retain prob", "retain_Q_A_ROUGE": "retain ROUGE",
    "privleak": "PrivLeak", "mia_min_k": "MIA Min-K",
}  # fmt: skip
#: the study's stages -> file
FILES = {"run": "tofu.json", "tune": "tofu_tuning.json", "evidence": "sau_evidence.json"}
#: where a method's settings come from: its trials, or (not tuned) the number of one that every method takes
Tuning = Mapping[str, Any] | int


class Study:
    """Rows of one stage, kept after each.

    Args:
        work: data and models. out: the file. hours: start nothing after so many. pieces: start no more than so many.
        trial: of every method's grid, where nothing was tuned.
    """

    def __init__(
        self, work: Work, size: str, out: Path, hours: float | None, pieces: int | None = None, trial: int | None = None
    ):
        self.work, self.size, self.out, self.pieces = work, size, out, pieces
        self.until = None if hours is None else time.monotonic() + 3600 * hours
        self.rows: list[dict[str, Any]] = []
        epochs = f"fine-tuned {work.size.finetune['epochs']} epochs, once pruned {work.size.recover['epochs']} more"
        self.about = {
            "size": size, "model": f"{work.base} {epochs}",
            "forward passes": "bf16" if work.bf16 else "fp32",
            "settings": "by tuning" if trial is None else f"not tuned: number {trial} of every method's grid, counted from 0",
        }  # fmt: skip
        if out.exists():
            found = json.loads(out.read_text())
            for name, value in self.about.items():
                if found["meta"].get(name) != value:
                    raise ValueError(
                        f"out: {out} holds a study of {name} {found['meta'].get(name)}, this one is {value}; move it away"
                    )
            self.rows = found["rows"]

    def has(self, **key: Any) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        facts = machine.meta(self.work.device)
        # A study goes on elsewhere and later: each row says where it was measured.
        made = {"commit": facts["commit"], "machine": facts["device"], "threads": facts["threads"]}
        self.rows.append(
            {name: round(v, 4) if isinstance(v, float) and abs(v) > 1e-3 else v for name, v in (row | made).items()}
        )
        size = self.work.size
        meta = self.about | {
            "split": size.split, "retain rows": len(self.work.data()["train retain"]),
            "rows asked": ", ".join(f"{part} {len(rows)}" for part, rows in self.work.parts(False).items()),
            "epochs": size.epochs, "batch": size.batch_size, "machine": facts["device"], "torch": facts["torch"], "commit": facts["commit"],
            "date": facts["date"],
        }  # fmt: skip
        write_json(self.out, {"meta": meta, "rows": self.rows})
        print(json.dumps(self.rows[-1]), flush=True)

    def late(self) -> bool:
        """Whether no piece is to be begun any more; every piece asks once."""
        if self.until is not None and time.monotonic() > self.until:
            return True
        if self.pieces is not None:
            self.pieces -= 1
        return self.pieces is not None and self.pieces < 0


def _model(kind: str, setting: str) -> str:
    return kind if setting == "dense" else f"{kind}-2to4"


def _shown(numbers: Mapping[str, float]) -> dict[str, float]:
    return {column: numbers[name] for name, column in SHOWN.items() if name in numbers}


def _diverged(error: ArithmeticError) -> dict[str, str]:
    return {"diverged": str(error).split(";")[0][:120]}


def alternates_of(work: Work, tuning: bool) -> Rows:
    """The forget rows with other answers, drawn once from the dense model before unlearning, for the pruned one too."""
    path = work.folder / f"alternates{'-tuning' if tuning else ''}.json"
    if not path.exists():
        checkpoint = work.load("full")
        rows = sample_alternates(
            checkpoint.model, checkpoint.tokenizer, work.target(tuning)[0], count=2, max_new_tokens=work.size.new_tokens,
        )  # fmt: skip
        write_plain(path, rows)
    return list(json.loads(path.read_text()))


def _unlearned(work: Work, key: str, name: str, setting: str, options: Mapping[str, Any], seed: int, tuning: bool) -> tuple[Checkpoint, dict[str, Any]]:  # fmt: skip
    """The unlearned model and what it cost; from its folder where an earlier run that was cut off left it.

    Raises:
        ArithmeticError: it diverged.
    """
    folder, method, load = work.folder / "unlearned" / key, METHODS[name], machine.OtherLoad()
    about = {"method": name, "setting": setting, "options": dict(options), "seed": seed, "tuning": tuning}
    if (folder / "cost.json").is_file():
        kept = json.loads((folder / "cost.json").read_text())
        if kept["about"] == about:
            return load_checkpoint(folder, device=work.device), kept["cost"]
    checkpoint = work.load(_model("full", setting))
    wanted = (lambda: alternates_of(work, tuning)) if name == "AltPO" else None
    start = time.process_time()
    with load:
        cost = work.unlearn(
            checkpoint, method.config, method.trainer, {**method.options, **options}, seed=seed, tuning=tuning, alternates=wanted
        )  # fmt: skip
    cost |= {"other load": load.share(), "processor seconds": round(time.process_time() - start, 1)}
    files = {"cost.json": json.dumps({"about": about, "cost": cost})}
    save_checkpoint(
        folder, checkpoint.model, checkpoint.tokenizer, masks=checkpoint.masks, pruning=checkpoint.pruning, files=files, overwrite=True
    )  # fmt: skip
    return checkpoint, cost


def one_run(
    work: Work, name: str, setting: str, options: Mapping[str, Any], seed: int, *, tuning: bool, robust: bool
) -> dict[str, Any]:
    """Loads, unlearns, evaluates; a run that diverges is a row too. One that was cut off goes on: the model is kept, the evaluation by
    row."""
    key = re.sub(r"[^A-Za-z0-9]+", "-", f"{name}-{setting}-{seed}{'-tuning' if tuning else ''}")
    try:
        checkpoint, cost = _unlearned(work, key, name, setting, options, seed, tuning)
        # Finite weights, too, can be so large that the model says NaN.
        numbers = work.evaluate(checkpoint, key, tuning=tuning, retain=None if tuning else _model("retain", setting))
        row = _shown(numbers) | cost
        if robust:
            row |= work.robust(checkpoint, seed)
    except ArithmeticError as error:
        row = _diverged(error)
    work.forget_evals(key)
    shutil.rmtree(work.folder / "unlearned" / key, ignore_errors=True)
    return row


def tune(study: Study, methods: Sequence[str], seed: int = 1000, settings: Sequence[str] = SETTINGS) -> None:
    """Every trial of every method, with a seed of its own; authors of the retain set stand in for the forget set."""
    work = study.work
    for setting in settings:
        before = f"full, {setting}"
        if not study.has(method=before, setting=setting):
            if study.late():
                return
            checkpoint = work.load(_model("full", setting))
            work.forget_evals("current")
            study.add({"method": before, "setting": setting, "trial": 0, **_shown(work.evaluate(checkpoint, "current", tuning=True))})  # fmt: skip
            work.forget_evals("current")
        for name in methods:
            if setting not in METHODS[name].settings:
                continue
            for number, trial in enumerate(METHODS[name].trials):
                if study.has(method=name, setting=setting, trial=number):
                    continue
                if study.late():
                    return
                row = one_run(work, name, setting, trial, seed, tuning=True, robust=False)
                study.add({"method": name, "setting": setting, "trial": number, "options": trial, **row})


def chosen(tuning: Mapping[str, Any], name: str, setting: str) -> dict[str, Any]:
    """The best of a method's trials.

    Raises:
        ValueError: there is none.
    """
    rows = [row for row in tuning["rows"] if row["setting"] == setting]
    before = next((row for row in rows if row["method"] == f"full, {setting}"), None)
    trials = [row for row in rows if row["method"] == name]
    if before is None or len(trials) < len(METHODS[name].trials):
        raise ValueError(
            f"tuning: {len(trials)} of {len(METHODS[name].trials)} trials of {name}, {setting}; run `tune` first"
        )
    return dict(max(trials, key=lambda row: score(row, before["model utility"]))["options"])


def settings_of(tuning: Tuning, name: str, setting: str) -> dict[str, Any]:
    """A method's settings.

    Raises:
        ValueError: it was not tuned.
    """
    return dict(METHODS[name].trials[tuning]) if isinstance(tuning, int) else chosen(tuning, name, setting)


def pieces(study: Study, methods: Sequence[str], seeds: Sequence[int], tuning: Tuning, settings: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:  # fmt: skip
    """What of the table is not there: models, the retain model's evaluation, rows; each looked for when the one before is done."""
    work = study.work
    for setting in settings:
        retain = _model("retain", setting)
        for kind in ("full", "retain"):
            model = _model(kind, setting)
            for made in (kind, model):
                if not work.made(made):
                    yield f"model {made}", lambda made=made: work.load(made)
        if not work.evaluated(retain):
            yield f"evaluation of {retain}", lambda retain=retain: work.evaluate(work.load(retain), retain)
        for kind, name in (("full", "before"), ("retain", "retain model")):
            if not study.has(method=name, setting=setting):
                yield f"{name}, {setting}", lambda kind=kind, name=name, setting=setting: _reference(study, kind, name, setting)  # fmt: skip
        for seed in seeds:
            for name in methods:
                if setting in METHODS[name].settings and not study.has(method=name, setting=setting, seed=seed):
                    yield f"{name}, {setting}, seed {seed}", lambda row=(name, setting, seed): _row(study, *row, tuning)  # type: ignore[misc]


def _reference(study: Study, kind: str, name: str, setting: str) -> None:
    work, model = study.work, _model(kind, setting)
    checkpoint = work.load(model)
    numbers = work.evaluate(checkpoint, f"{model}-again", retain=_model("retain", setting))
    study.add({"method": name, "setting": setting, "seed": 0, **_shown(numbers), **work.robust(checkpoint, 0)})


def _row(study: Study, name: str, setting: str, seed: int, tuning: Tuning) -> None:
    options = settings_of(tuning, name, setting)
    row = one_run(study.work, name, setting, options, seed, tuning=False, robust=True)
    study.add({"method": name, "setting": setting, "seed": seed, **row, "options": options})


def run(
    study: Study, methods: Sequence[str], seeds: Sequence[int], tuning: Tuning, settings: Sequence[str] = SETTINGS
) -> None:
    """The table: every method with its chosen settings, every seed, beside the models before and the retain model."""
    for name, do in pieces(study, methods, seeds, tuning, settings):
        if study.late():
            return
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        do()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def _evidence_run(work: Work, name: str, seed: int, tuning: Tuning) -> tuple[dict[str, Any], Checkpoint]:
    """One line's model and what it cost; makes the dense unlearned model where it is wanted and not there.

    Raises:
        ArithmeticError: it diverged, or the model it needs did.
    """
    tuned, more, masked, when = EVIDENCE[name]
    setting = "dense" if when == "after" else PATTERN
    options: dict[str, Any] = {**METHODS[tuned].options, **settings_of(tuning, tuned, setting), **more}
    twin = work.folder / "models" / f"full-unlearned-{seed}"
    if "redistribution" in more:
        options["dense_model"] = str(work.folder / "models" / "full")
    if more.get("redistribution") == "obs":
        if not (twin / "config.json").is_file():
            _evidence_run(work, "unlearn, then prune", seed, tuning)
        options["dense_unlearned_model"] = str(twin)
    checkpoint = work.load(_model("full", setting))
    method = METHODS[tuned]
    cost = work.unlearn(checkpoint, method.config, method.trainer, options, seed=seed, masked=masked)
    if when == "after":
        save_checkpoint(twin, checkpoint.model, checkpoint.tokenizer, overwrite=True)
    if when != "before":
        work.prune(checkpoint, "retain")
        assert checkpoint.masks is not None
        cost["layers off the pattern"] = len(nm_violations(checkpoint.model, checkpoint.masks))
    return cost, checkpoint


def evidence(study: Study, seeds: Sequence[int], tuning: Tuning) -> None:
    """One table, three seeds: what masking, redistribution and HAMU are each worth, by the pruned retain model."""
    work = study.work
    for seed in seeds:
        for name in EVIDENCE:
            if study.has(method=name, seed=seed):
                continue
            if study.late():
                return
            work.forget_evals("current")
            try:
                cost, checkpoint = _evidence_run(work, name, seed, tuning)
                numbers = work.evaluate(checkpoint, "current", retain=_model("retain", PATTERN))
                row = _shown(numbers) | cost | work.robust(checkpoint, seed)
            except ArithmeticError as error:
                row = _diverged(error)
            work.forget_evals("current")
            study.add({"method": name, "seed": seed, **row})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tofu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("plan", "tune", "run", "evidence"))
    parser.add_argument("--size", choices=tuple(SIZES), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bf16", action="store_true", help="forward passes under bf16 autocast")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of plan, tune and run")
    parser.add_argument(
        "--trial", type=int, help="run, evidence: without tuning, this place of every method's grid, from 0"
    )
    parser.add_argument("--hours", type=float, help="start no run after so many")
    parser.add_argument(
        "--pieces", type=int, help="start no more than so many pieces: models, evaluations, rows; parts of the plan"
    )
    parser.add_argument("--work", type=Path, help="models and evaluations (out/tofu-<size>)")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality")
    args = parser.parse_args(argv)
    try:
        work = Work(args.work or ROOT / "out" / f"tofu-{args.size}", SIZES[args.size], args.model, bf16=args.bf16)
        if args.what == "plan":
            made = plan(work, args.methods, args.seeds, args.settings, pieces=args.pieces)
            print("parts are left; ask again" if made is None else json.dumps(made["sum"], indent=2))
            return 0
        if args.trial is not None and not 0 <= args.trial < len(RATES):
            raise ValueError(f"trial: want 0 to {len(RATES) - 1}, got {args.trial}")
        trial = None if args.what == "tune" else args.trial
        study = Study(work, args.size, args.results / FILES[args.what], args.hours, args.pieces, trial)
        if args.what == "tune":
            tune(study, args.methods, settings=args.settings)
            return 0
        path = args.results / FILES["tune"]
        if trial is None and not path.exists():
            raise ValueError(f"tuning: there is no {path}; run `python -m benchmarks.tofu tune` first, or give --trial")
        tuning: Tuning = json.loads(path.read_text()) if trial is None else trial
        if args.what == "run":
            run(study, args.methods, args.seeds, tuning, args.settings)
        else:
            evidence(study, args.seeds, tuning)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"python -m benchmarks.tofu: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
