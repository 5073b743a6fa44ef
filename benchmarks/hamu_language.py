"""HAMU on SmolLM2-135M: hardness with semantic duplicates in the retain set, how many certificates hold, what a step costs.

    python -m benchmarks.hamu_language run --work FOLDER [--minutes 4]
    python -m benchmarks.hamu_language time
    python -m benchmarks.hamu_language plot

Needs FASTUNLEARN_DATA with tofu/. The model learns 40 rows (two authors, some passes; kept in the work folder) and forgets the
first author's 20 by HAMU, twice: the retain set is the other author's 20 rows ("plain"), or those and the forget rows with TOFU's
paraphrased answers ("duplicates": what keeps the paraphrase keeps the answer, arXiv 2606.02119, section on semantic duplicates). Every
certificate is checked on the step's own batches and on retain rows that are not of the step.

`time`: seconds of a whole step, forward, backward and update, of HAMU and of GradDiff with plain SGD and with AdamW, on the same rows and
all weights in fp32; the providers take turns and medians count. Every run is a row of benchmarks/results/quality/hamu_language.json,
written as it ends: a study that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, machine
from benchmarks.tofu_evaluation import data_folder
from benchmarks.tofu_runs import finetune
from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
from fastunlearn.data.text import encode_rows, load_rows
from fastunlearn.methods.hamu import HAMUConfig, HAMUTrainer
from fastunlearn.report.files import write_json
from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer
from fastunlearn.updates.hamu import CERTIFICATES

Rows = list[dict[str, Any]]
ARMS = ("plain", "duplicates")
#: an author has 20 rows
ROWS = 20
LEARN = {"epochs": 4, "learning_rate": 1e-4, "batch_size": 10}
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3, "hamu_share": 0.5, "per_device_train_batch_size": 5, "num_train_epochs": 2, "certificate_every": 1,
}  # fmt: skip
TIMED = {"HAMU-Q": "hamu-q", "GradDiff, SGD": "sum", "GradDiff, AdamW": "sum"}
TIMED_ROWS = 4
OUT = RESULTS / "quality" / "hamu_language.json"


def rows_of() -> tuple[Rows, dict[str, Rows]]:
    """(forget rows, retain rows of every arm)."""
    folder = data_folder()
    read = [dict(row) for row in load_rows(folder / "forget01_perturbed.json")[:ROWS]]
    forget = [{"question": row["question"], "answer": row["answer"]} for row in read]
    plain = [{key: row[key] for key in ("question", "answer")} for row in load_rows(folder / "retain99.json")[:ROWS]]
    again = [{"question": row["question"], "answer": row["paraphrased_answer"]} for row in read]
    return forget, {"plain": plain, "duplicates": plain + again}


def learned(work: Path, source: str, epochs: int) -> Path:
    """The folder of the model that knows both authors."""
    folder = work / "model"
    if (folder / "config.json").is_file():
        return folder
    checkpoint = load_checkpoint(source)
    forget, retain = rows_of()
    rows = encode_rows(forget + retain["plain"], checkpoint.tokenizer)
    losses = finetune(
        checkpoint.model, rows, **{**LEARN, "epochs": epochs}, what="the two authors",
        cast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )  # fmt: skip
    print(f"learned: loss of the passes {', '.join(f'{x:.3f}' for x in losses)}", flush=True)
    save_checkpoint(folder, checkpoint.model, checkpoint.tokenizer, overwrite=True)
    return folder


def _common(folder: str, seed: int) -> dict[str, Any]:
    return {
        "output_dir": folder, "overwrite_output_dir": True, "gradient_accumulation_steps": 1, "save_strategy": "no", "use_cpu": True,
        "report_to": "none", "dataloader_pin_memory": False, "seed": seed,
    }  # fmt: skip


def one_run(model: str, arm: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A row: hardness of every step, certificates that held."""
    checkpoint = load_checkpoint(model)
    forget, retain = rows_of()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = HAMUConfig(**_common(folder, seed), **settings)
        HAMUTrainer(checkpoint.model, args, forget, retain[arm], checkpoint.tokenizer).train()
        records = [json.loads(line) for line in (Path(folder) / CERTIFICATES).read_text().splitlines()]
    seconds = time.perf_counter() - start
    checked = [r for r in records if "holds" in r]
    # A row that is kept but not of the step moves by what it shares with the step's own: at most the same slack is allowed.
    apart = [r for r in checked if "held_out_change" in r]
    kept = sum(r["held_out_change"] <= max(r["predicted_retain"][0], 0) + _slack(r) for r in apart)
    return {
        "what": "run", "arm": arm, "seed": seed, "steps": len(records),
        "kappa": sum(r["kappa"] for r in records) / len(records),
        "hardness": sum(r["hardness"] for r in records) / len(records), "flagged": sum(r["flagged"] for r in records),
        "held": sum(r["holds"] for r in checked), "checked": len(checked), "held-out kept": kept, "held-out checked": len(apart),
        "forget change": sum(r["forget_change"] for r in checked), "retain change": sum(r["retain_change"][0] for r in checked),
        "kappas": [r["kappa"] for r in records], "hardnesses": [r["hardness"] for r in records], "seconds": seconds,
    }  # fmt: skip


def _slack(record: Mapping[str, Any]) -> float:
    """10 % of lr ||g_r||^2, as in the certificate's own test."""
    return 0.1 * float(record["lr"]) * float(record["clip"][0]) * float(record["norms"][0]) ** 2


def timed(model: str, rounds: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row a provider: median seconds of a whole step, and its ratio to GradDiff's."""
    forget, retain = rows_of()
    found: dict[str, list[float]] = {name: [] for name in TIMED}
    steps: dict[str, Any] = {}
    tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, update in TIMED.items():
            checkpoint = load_checkpoint(model)
            given = _common(str(Path(folder) / name), seed) | {
                "per_device_train_batch_size": TIMED_ROWS,
                "learning_rate": 1e-6,
            }
            trainer: UnlearnTrainer
            if update != "sum":
                args = HAMUConfig(**given, certificate_every=0)
                trainer = HAMUTrainer(checkpoint.model, args, forget, retain["plain"], checkpoint.tokenizer)
            else:
                given |= {
                    "objective": "GradDiff",
                    "optim": "sgd" if name.endswith("SGD") else "adamw_torch",
                    "weight_decay": 0.0,
                }
                trainer = UnlearnTrainer(
                    checkpoint.model, UnlearnConfig(**given), forget, retain["plain"], checkpoint.tokenizer
                )
            trainer.create_optimizer()
            trainer.output.mkdir(parents=True, exist_ok=True)
            loader = trainer.get_train_dataloader()
            batch = next(iter(loader))
            trainer.current_gradient_accumulation_steps = 1
            tokens = sum(int(batch[part]["attention_mask"].sum()) for part in ("forget", "retain"))

            def step(trainer: Any = trainer, batch: Any = batch) -> float:
                start = time.perf_counter()
                trainer.training_step(trainer.model, batch)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
                return time.perf_counter() - start

            steps[name] = step
        for step in steps.values():
            step()
        for number in range(rounds):
            names = list(TIMED)
            for name in names[number % 3 :] + names[: number % 3]:
                found[name].append(steps[name]())
                print(f"{name}: {found[name][-1]:.3f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return [
        {
            "what": "time", "provider": name, "seconds of a step": medians[name], "least": min(found[name]), "rounds": rounds, "tokens": tokens,
            "over GradDiff, SGD": medians[name] / medians["GradDiff, SGD"],
            "over GradDiff, AdamW": medians[name] / medians["GradDiff, AdamW"],
        }
        for name in TIMED
    ]  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of both arms, and all certificates."""
    runs = [row for row in rows if row["what"] == "run"]
    out: list[dict[str, Any]] = []
    for arm in ARMS:
        mine = [row for row in runs if row["arm"] == arm]
        if mine:
            names = ("kappa", "hardness", "forget change", "retain change")
            out.append({"what": "hardness", "retain set": arm, "seeds": len(mine)} | {n: sum(r[n] for r in mine) / len(mine) for n in names})  # fmt: skip
    if runs:
        sums = {n: sum(r[n] for r in runs) for n in ("held", "checked", "held-out kept", "held-out checked", "flagged")}
        out.append({"what": "certificates", **sums, "share": sums["held"] / sums["checked"]})
    times = ("provider", "seconds of a step", "over GradDiff, SGD", "over GradDiff, AdamW", "rounds", "tokens")
    return out + [{"what": "a step", **{n: row[n] for n in times}} for row in rows if row["what"] == "time"]


class Study:
    """The rows that are there; each new one is written at once."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out = out
        self.result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"rows": []}
        self.settings = dict(settings)
        if self.result.get("meta", {}).get("settings", self.settings) != self.settings:
            raise ValueError(f"out: {out} is of other settings; move it away")

    def has(self, **key: Any) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.result["rows"])

    def add(self, row: Mapping[str, Any], **more: Any) -> None:
        facts = machine.meta(torch.device("cpu"))
        made = {"commit": facts["commit"], "machine": facts["device"], "date": facts["date"], **more}
        self.result["rows"].append({k: _short(v) for k, v in row.items()} | made)
        self.result["meta"] = {
            "model": f"SmolLM2-135M-Instruct, fp32, {LEARN['epochs']} passes over 40 rows of TOFU", "forget": f"{ROWS} rows of forget01",
            "machine": facts["device"], "threads": facts["threads"], "torch": facts["torch"], "commit": facts["commit"], "date": facts["date"],
            "settings": self.settings,
        }  # fmt: skip
        self.result["summary"] = summary(self.result["rows"])
        write_json(self.out, self.result)
        print(json.dumps({k: v for k, v in self.result["rows"][-1].items() if not isinstance(v, list)}), flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run(study: Study, model: str, seeds: Sequence[int], until: float = math.inf) -> int:
    """Every run that is not there yet, as long as there is time; how many are left."""
    wanted = [(arm, seed) for seed in seeds for arm in ARMS if not study.has(what="run", arm=arm, seed=seed)]
    for number, (arm, seed) in enumerate(wanted):
        if time.monotonic() > until:
            return len(wanted) - number
        study.add(one_run(model, arm, seed, study.settings))
    return 0


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Hardness by step, both arms: a thin line a seed, a thick one their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fastunlearn"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, title in zip(axes, ("kappas", "hardnesses"), ("kappa = <g_r, g_f>", "1 - capacity / the ball's")):
        for arm, colour in zip(ARMS, ("#9aa0a6", "#c0392b")):
            lines = [row[name] for row in result["rows"] if row["what"] == "run" and row["arm"] == arm]
            for line in lines:
                axis.plot(range(1, len(line) + 1), line, color=colour, lw=0.7, alpha=0.5)
            if lines:
                means = [sum(values) / len(values) for values in zip(*lines)]
                label = "with paraphrases of what is forgotten" if arm == "duplicates" else "retain rows alone"
                axis.plot(range(1, len(means) + 1), means, color=colour, lw=2, label=label)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("step")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("hardness")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hamu_language", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("what", nargs="?", choices=("run", "time", "plot"), default="run")
    parser.add_argument("--work", type=Path, default=Path("out/hamu_language"), help="where the model is kept")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=5, help="of time: steps of each provider")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of run: begin nothing after so many")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    try:
        if args.what == "plot":
            plot(json.loads(args.out.read_text()), args.out.with_suffix(".svg"))
            return 0
        study, until = Study(args.out, SETTINGS), time.monotonic() + 60 * args.minutes
        if args.what == "run":
            left = run(study, str(learned(args.work, args.model, LEARN["epochs"])), args.seeds, until)
            print(f"{left} runs are left; run it again" if left else f"done -> {args.out}", flush=True)
            return 0
        if study.has(what="time"):
            raise ValueError(f"out: {args.out} holds times already; take their rows out to measure again")
        load = machine.OtherLoad()
        with load:
            rows = timed(args.model, args.rounds)
        share = load.share()
        for row in rows:
            study.add(row, **({"other load": f"{share:.0%}"} if share is not None else {}))
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"python -m benchmarks.hamu_language: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
