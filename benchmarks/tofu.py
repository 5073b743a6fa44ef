"""The study behind the README's TOFU tables: every method of the library for language models on SmolLM2-135M, dense and 2:4.

    python -m benchmarks.tofu plan  --size cpu            measures a step and says how long each part would take here
    python -m benchmarks.tofu tune  --size cpu            each method's grid, equally many trials, on retained authors
    python -m benchmarks.tofu run   --size cpu --seeds 0 1 2
    python -m benchmarks.tofu evidence --size cpu         SAU's claim: unlearn then prune, prune then unlearn, with what

Needs FASTUNLEARN_DATA with tofu/. Size gpu: TOFU full against retain90, forget10. Size cpu: forget01 with the first ten authors as
the retain set. Every finished run is a row of benchmarks/results/quality/tofu.json (tofu_tuning.json, sau_evidence.json), written
after each: a study that stopped goes on, and --hours stops one in time. While settings are chosen, authors of the retain set stand in
for the forget set; the study's own forget set is not asked. Settings are chosen by `chosen` from the committed trials:
the best harmonic mean of what is forgotten (1 - extraction strength) and what is kept (model utility over that before).
`python -m benchmarks table` makes the README's tables of it, `python -m benchmarks plot` the picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT, machine
from benchmarks.__main__ import write_json
from benchmarks.tofu_runs import PATTERN, SIZES, Rows, Work
from fastunlearn.checkpoint import Checkpoint, save_checkpoint
from fastunlearn.localize import nm_violations
from fastunlearn.methods.altpo import sample_alternates
from fastunlearn.methods.hamu import HAMUConfig, HAMUTrainer
from fastunlearn.methods.sau import SAUConfig, SAUTrainer
from fastunlearn.report.files import write_json as write_plain
from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer

SETTINGS = ("dense", PATTERN)
#: metric of TOFU_SUMMARY.json -> column, digits
SHOWN = {
    "forget_quality": "forget quality", "model_utility": "model utility", "forget_truth_ratio": "forget truth ratio",
    "extraction_strength": "ES", "exact_memorization": "EM", "forget_Q_A_Prob": "forget prob", "forget_Q_A_ROUGE": "forget ROUGE",
    "privleak": "PrivLeak", "mia_min_k": "MIA Min-K",
}  # fmt: skip
RATES = (1e-5, 3e-5, 1e-4, 3e-4)


def _rates(**more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"learning_rate": rate, **more} for rate in RATES)


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Attributes:
        trials: settings tried, as many for every method.
        options: of its configuration, in every trial.
        settings: where it runs; SAU has no dense form.
    """

    trials: tuple[dict[str, Any], ...]
    options: dict[str, Any] = field(default_factory=dict)
    config: type = UnlearnConfig
    trainer: type = UnlearnTrainer
    settings: tuple[str, ...] = SETTINGS


def _objective(name: str, trials: tuple[dict[str, Any], ...] | None = None, **options: Any) -> Method:
    return Method(trials or _rates(), {"objective": name, **options})


_SGD = tuple(
    {"learning_rate": rate, "hamu_share": share} for rate, share in ((3e-2, 0.5), (1e-1, 0.5), (3e-1, 0.5), (1e-1, 0.8))
)
METHODS: dict[str, Method] = {
    "GradAscent": _objective("GradAscent"),
    "GradDiff": _objective("GradDiff"),
    "KL": _objective("KL"),
    "NPO": _objective("NPO"),
    "SimNPO": _objective("SimNPO"),
    "IdkDPO": _objective("IdkDPO"),
    "AltPO": _objective("AltPO"),
    "RMU": _objective("RMU"),
    "UNDIAL": _objective("UNDIAL"),
    "WGA": _objective("WGA"),
    "SatImp": _objective("SatImp"),
    "CEU": _objective("CEU"),
    "PDU": _objective("PDU"),
    "PCGrad, NPO": _objective("NPO", update="pcgrad"),
    "GRU, NPO": _objective("NPO", update="gru"),
    "HAMU-Q": Method(_SGD, {"update": "hamu-q", "on_infeasible": "largest"}, HAMUConfig, HAMUTrainer),
    "HAMU-U": Method(_SGD, {"update": "hamu-u", "on_infeasible": "largest"}, HAMUConfig, HAMUTrainer),
    "SAU, NPO": Method(_rates(), {"objective": "NPO"}, SAUConfig, SAUTrainer, (PATTERN,)),
    "SAU x HAMU": Method(
        _SGD, {"objective": "GradDiff", "update": "hamu-q", "on_infeasible": "largest", "weight_decay": 0.0, "warmup_epochs": 0.0,
               "lr_scheduler_type": "constant"}, SAUConfig, SAUTrainer, (PATTERN,),
    ),
}  # fmt: skip
#: the study's stages -> file
FILES = {"run": "tofu.json", "tune": "tofu_tuning.json", "evidence": "sau_evidence.json"}


class Study:
    """Rows of one stage, kept after each.

    Args:
        work: data and models. out: the file. hours: start nothing after so many.
    """

    def __init__(self, work: Work, size: str, out: Path, hours: float | None):
        self.work, self.size, self.out = work, size, out
        self.until = None if hours is None else time.monotonic() + 3600 * hours
        self.rows: list[dict[str, Any]] = []
        self.about = {
            "size": size, "model": f"{work.base} fine-tuned {work.size.finetune['epochs']} epochs",
            "forward passes": "bf16" if work.bf16 else "fp32",
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
        made = {"commit": facts["commit"], "machine": facts["device"]}
        self.rows.append(
            {name: round(v, 4) if isinstance(v, float) and abs(v) > 1e-3 else v for name, v in (row | made).items()}
        )
        size = self.work.size
        meta = self.about | {
            "split": size.split, "retain rows": len(self.work.data()["train retain"]), "epochs": size.epochs,
            "batch": size.batch_size, "machine": facts["device"], "torch": facts["torch"], "commit": facts["commit"],
            "date": facts["date"],
        }  # fmt: skip
        write_json(self.out, {"meta": meta, "rows": self.rows})
        print(json.dumps(self.rows[-1]), flush=True)

    def late(self) -> bool:
        return self.until is not None and time.monotonic() > self.until


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


def one_run(
    work: Work, name: str, setting: str, options: Mapping[str, Any], seed: int, *, tuning: bool, robust: bool
) -> dict[str, Any]:
    """Loads, unlearns, evaluates; a run that diverges is a row too."""
    method = METHODS[name]
    checkpoint = work.load(_model("full", setting))
    wanted = (lambda: alternates_of(work, tuning)) if name == "AltPO" else None
    try:
        cost = work.unlearn(
            checkpoint, method.config, method.trainer, {**method.options, **options}, seed=seed, tuning=tuning, alternates=wanted
        )  # fmt: skip
    except ArithmeticError as error:
        return _diverged(error)
    key = "current"
    work.forget_evals(key)
    numbers = work.evaluate(checkpoint, key, tuning=tuning, retain=None if tuning else _model("retain", setting))
    row = _shown(numbers) | cost
    if robust:
        row |= work.robust(checkpoint, seed)
    work.forget_evals(key)
    return row


def tune(study: Study, methods: Sequence[str], seed: int = 1000) -> None:
    """Every trial of every method, with a seed of its own; authors of the retain set stand in for the forget set."""
    work = study.work
    for setting in SETTINGS:
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


def score(row: Mapping[str, Any], utility: float) -> float:
    """Of a trial: harmonic mean of 1 - extraction strength and model utility over that before, at most 1; 0 where it diverged."""
    if "ES" not in row or "model utility" not in row:
        return 0.0
    forgot, kept = 1 - row["ES"], min(1.0, row["model utility"] / utility) if utility else 0.0
    return 2 * forgot * kept / (forgot + kept) if forgot + kept > 0 else 0.0


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


def run(study: Study, methods: Sequence[str], seeds: Sequence[int], tuning: Mapping[str, Any]) -> None:
    """The table: every method with its chosen settings, every seed, beside the models before and the retain model."""
    work = study.work
    for setting in SETTINGS:
        for kind, name in (("full", "before"), ("retain", "retain model")):
            if study.has(method=name, setting=setting):
                continue
            if study.late():
                return
            checkpoint = work.load(_model(kind, setting))
            numbers = work.evaluate(checkpoint, f"{_model(kind, setting)}-again", retain=_model("retain", setting))
            study.add({"method": name, "setting": setting, "seed": 0, **_shown(numbers), **work.robust(checkpoint, 0)})
        for seed in seeds:
            for name in methods:
                if setting not in METHODS[name].settings or study.has(method=name, setting=setting, seed=seed):
                    continue
                if study.late():
                    return
                options = chosen(tuning, name, setting)
                row = one_run(work, name, setting, options, seed, tuning=False, robust=True)
                study.add({"method": name, "setting": setting, "seed": seed, **row, "options": options})


#: of SAU's claim: name -> (method whose tuned settings are used, options, whether the masks hold, when it is pruned)
EVIDENCE: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "unlearn, then prune": ("NPO", {}, False, "after"),
    "prune, then unlearn, no mask": ("NPO", {}, False, "before"),
    "prune, then unlearn, no mask, prune again": ("NPO", {}, False, "both"),
    "prune, then unlearn, mask": ("SAU, NPO", {}, True, "before"),
    "mask, redistribution update": ("SAU, NPO", {"redistribution": "update"}, True, "before"),
    "mask, redistribution obs": ("SAU, NPO", {"redistribution": "obs"}, True, "before"),
    "mask, redistribution retain": ("SAU, NPO", {"redistribution": "retain"}, True, "before"),
    "mask, HAMU": ("SAU x HAMU", {}, True, "before"),
}


def _evidence_run(work: Work, name: str, seed: int, tuning: Mapping[str, Any]) -> tuple[dict[str, Any], Checkpoint]:
    """One line's model and what it cost; makes the dense unlearned model where it is wanted and not there.

    Raises:
        ArithmeticError: it diverged, or the model it needs did.
    """
    tuned, more, masked, when = EVIDENCE[name]
    setting = "dense" if when == "after" else PATTERN
    options: dict[str, Any] = {**METHODS[tuned].options, **chosen(tuning, tuned, setting), **more}
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
        work.prune(checkpoint)
        assert checkpoint.masks is not None
        cost["layers off the pattern"] = len(nm_violations(checkpoint.model, checkpoint.masks))
    return cost, checkpoint


def evidence(study: Study, seeds: Sequence[int], tuning: Mapping[str, Any]) -> None:
    """One table, three seeds: what masking, redistribution and HAMU are each worth, by the pruned retain model."""
    work = study.work
    for seed in seeds:
        for name in EVIDENCE:
            if study.has(method=name, seed=seed):
                continue
            if study.late():
                return
            try:
                cost, checkpoint = _evidence_run(work, name, seed, tuning)
            except ArithmeticError as error:
                study.add({"method": name, "seed": seed, **_diverged(error)})
                continue
            work.forget_evals("current")
            numbers = work.evaluate(checkpoint, "current", retain=_model("retain", PATTERN))
            work.forget_evals("current")
            study.add({"method": name, "seed": seed, **_shown(numbers), **cost, **work.robust(checkpoint, seed)})


def plan(work: Work, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Measures one step of fine-tuning, of unlearning (NPO) and one part of an evaluation, on the model as it is, and says how long
    the stages would take."""
    from benchmarks.tofu_runs import finetune
    from fastunlearn.checkpoint import load_checkpoint
    from fastunlearn.data.text import encode_rows
    from fastunlearn.evaluation import tofu

    size = work.size
    checkpoint = load_checkpoint(work.base, device=work.device)
    data = work.data()
    load = machine.OtherLoad()
    with load:
        batch = encode_rows(
            data["train retain"][: size.finetune["batch_size"]], checkpoint.tokenizer, what="retain set"
        )
        start = time.perf_counter()
        finetune(
            checkpoint.model, batch, epochs=1, learning_rate=0.0, batch_size=len(batch), cast=work.cast, what="a step"
        )
        step = time.perf_counter() - start
        # An unlearning step: as many forget rows, as many retain rows.
        pair = step * 2 * size.batch_size / size.finetune["batch_size"]
        few = {part: rows[:8] for part, rows in work.parts(False).items()}
        settings = tofu.TofuSettings(
            max_new_tokens=size.new_tokens,
            attacks=("min_k",) if data["holdout"] else (),
            autocast="bfloat16" if work.bf16 else None,
        )
        start = time.perf_counter()
        tofu.evaluate_tofu(checkpoint.model, checkpoint.tokenizer, few, settings=settings, progress=False)
        asked = time.perf_counter() - start
    parts = {part: len(rows) for part, rows in work.parts(False).items()}
    evaluation = asked * sum(parts.values()) / sum(map(len, few.values()))
    rows = len(data["train retain"]) * 2 + len(data["train forget"])
    forget = len(data["train forget"])
    steps = -(-forget // size.batch_size) * size.epochs
    one = steps * pair + evaluation
    # Relearning and rounding ask the forget set twice more; ten rows are trained on five times.
    robust = evaluation * 2 * forget / sum(parts.values()) + 5 * step * 10 / size.finetune["batch_size"]
    pairs = [(name, setting) for name in methods for setting in METHODS[name].settings]
    out = {
        "seconds of a fine-tuning step": step, "seconds of an unlearning step": pair, "seconds of an evaluation": evaluation,
        "steps of a run": steps,
        "hours, models": rows * size.finetune["epochs"] / size.finetune["batch_size"] * step / 3600,
        "hours, tune": sum(len(METHODS[name].trials) for name, _ in pairs) * one / 3600,
        "hours, run": (len(pairs) * len(seeds) + 4) * (one + robust) / 3600,
        "hours, evidence": len(EVIDENCE) * len(seeds) * (one + robust) / 3600,
        "other load": load.share(),
    }  # fmt: skip
    out["hours"] = sum(value for name, value in out.items() if name.startswith("hours,"))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tofu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("plan", "tune", "run", "evidence"))
    parser.add_argument("--size", choices=tuple(SIZES), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bf16", action="store_true", help="forward passes under bf16 autocast")
    parser.add_argument("--hours", type=float, help="start no run after so many")
    parser.add_argument("--work", type=Path, help="models and evaluations (out/tofu-<size>)")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality")
    args = parser.parse_args(argv)
    try:
        work = Work(args.work or ROOT / "out" / f"tofu-{args.size}", SIZES[args.size], args.model, bf16=args.bf16)
        if args.what == "plan":
            print(json.dumps({"size": asdict(work.size), "plan": plan(work, args.methods, args.seeds)}, indent=2))
            return 0
        study = Study(work, args.size, args.results / FILES[args.what], args.hours)
        if args.what == "tune":
            tune(study, args.methods)
            return 0
        path = args.results / FILES["tune"]
        if not path.exists():
            raise ValueError(f"tuning: there is no {path}; run `python -m benchmarks.tofu tune` first")
        tuning = json.loads(path.read_text())
        if args.what == "run":
            run(study, args.methods, args.seeds, tuning)
        else:
            evidence(study, args.seeds, tuning)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"python -m benchmarks.tofu: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
