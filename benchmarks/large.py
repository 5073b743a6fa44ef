"""Unlearning of whole models, step by step: tokens/s, peak memory and time of every part, beside what `fastunlearn plan` said.

    python -m benchmarks large --model llama-3.1-8b --device cuda        random weights of the published configuration

Arms: (a) open-unlearning's way: dense AdamW over all weights, NPO with a second model as reference asked in every step, logits of all
positions; (b) ours dense: the pruned model with masks, reference log-probs kept from before; (c) ours 2:4 compressed; (d) as (c), the
step taken by HAMU. Weights are random, so only time and memory mean something; every row says so.

An arm runs in a process of its own (its peak is its own) and writes its row when it is done: what a killed run has finished is
kept and not measured again. On a CPU peak memory is the high-water mark of the resident set above what the process held before the
model; on a GPU the allocator's.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from fastunlearn import ops, optim
from fastunlearn.objectives import NPO, answer_logprobs, token_nll
from fastunlearn.ops.mask import BitMask
from fastunlearn.optim.hamu import HamuSGD
from fastunlearn.parametrize import CompressedNM, full_weights
from fastunlearn.report.configurations import configuration, shortened
from fastunlearn.report.cost import clock, process_bytes, reset_high_water, trim_heap
from fastunlearn.report.plan import PlanArguments, measured_hardware, plan
from fastunlearn.updates import make_update

ARMS = {"a": "open-unlearning's way", "b": "ours, dense", "c": "ours, 2:4 compressed", "d": "SAU + HAMU, compressed"}
LABEL = "random weights of the published configuration"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Case:
    """What is measured: a model, an arm, a batch. layers: fewer than the configuration has, None: all."""

    model: str
    arm: str
    device: str
    dtype: str
    batch: int
    sequence: int
    checkpointing: bool
    steps: int
    layers: int | None = None

    @property
    def key(self) -> str:
        return json.dumps({k: v for k, v in vars(self).items() if k != "steps"}, sort_keys=True)


def arguments(case: Case) -> PlanArguments:
    """The same run for `fastunlearn plan`."""
    form = {
        "a": {"method": "open-unlearning"}, "b": {"method": "sau"}, "c": {"method": "sau", "compressed": True},
        "d": {"method": "sau+hamu", "compressed": True},
    }[case.arm]  # fmt: skip
    return PlanArguments(
        case.model, **form, dtype=case.dtype, per_device_train_batch_size=case.batch, sequence=case.sequence,
        gradient_checkpointing=case.checkpointing, hardware="here",
    )  # fmt: skip


class Clock:
    """Seconds by part, waiting for the device at both ends; of the processor where it has one thread (`report.cost.clock`)."""

    def __init__(self, device: torch.device):
        self.device, self.now = device, clock(device)
        self.kind = "processor" if self.now is time.process_time else "wall"
        self.seconds: dict[str, float] = {}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def __call__(self, part: str) -> Any:
        self._wait()
        start = self.now()
        yield
        self._wait()
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start


def build(case: Case, device: torch.device) -> Any:
    """The model on the device, random."""
    import transformers

    config = configuration(case.model)
    if case.layers is not None:
        config = shortened(config, case.layers)
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    model = model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1)
    for name, module in list(model.named_modules()):
        # Rotary frequencies are buffers that nothing above fills: such a module is made again.
        if hasattr(module, "inv_freq"):
            model.set_submodule(name, type(module)(module.config).to(device))
    left = [name for name, _ in model.named_buffers() if not name.endswith("inv_freq")]
    if left:
        raise RuntimeError(f"{case.model}: the buffers {left} have no values; say here how they are made")
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def prune_random(model: nn.Module) -> dict[str, BitMask]:
    """2:4 by magnitude, one layer at a time."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    masks = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                masks[f"{name}.weight"] = mask = ops.nm_mask(module.weight.abs(), 2, 4)
                module.weight.mul_(mask.unpack())
    return masks


class Run:
    """One arm: `step` is an optimiser step on a forget and a retain batch."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device, self.clock = case, device, Clock(device)
        self.model = build(case, device)
        self.reference: Any = None
        masks = None
        if case.arm == "a":
            self.reference = build(replace(case, checkpointing=False), device).requires_grad_(False).eval()
        else:
            masks = prune_random(self.model)
            full_weights(self.model, masks, others=False)
            if case.arm != "b":
                CompressedNM(self.model, masks, 2, 4)
                masks = None
        self.model = self.placed(self.model)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        self.update = make_update("hamu-q" if case.arm == "d" else "sum")
        chosen = None if masks is None else [masks[n] for n, _ in named]
        if case.arm == "d":
            self.optimizer: Any = HamuSGD(self.params, lambda: self._ready, lr=1e-4, share=0.5, max_grad_norm=1.0)
        elif case.arm == "a":
            # fp32 moments, as its paged_adamw_32bit has; nothing is masked.
            self.optimizer = optim.MaskedAdamW(self.params, lr=1e-5, max_grad_norm=1.0, stochastic_rounding=False)
        else:
            self.optimizer = optim.MaskedAdamW(self.params, chosen, lr=1e-5, max_grad_norm=1.0)
        self._ready: Any = None
        self.npo = NPO()
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(0, vocabulary, (2, case.batch, case.sequence), generator=generator).to(device)
        self.batches = [
            {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i, "index": torch.arange(case.batch)}
            for i in ids
        ]
        with torch.no_grad():
            self.kept = None if self.reference is not None else answer_logprobs(self.model, self.batches[0]).total

    def placed(self, model: Any) -> Any:
        """The model where it is trained; here it is there already."""
        return model

    def _whole_logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """log p of every row, fp32, from the logits of all positions."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits, labels = logits[:, :-1].transpose(1, 2).float(), batch["labels"][:, 1:]
        return -nn.functional.cross_entropy(logits, labels, reduction="none").sum(-1)

    def _npo(self, total: Tensor, reference: Tensor) -> Tensor:
        beta = self.npo.beta
        return -2 / beta * nn.functional.logsigmoid(-beta * (total - reference)).mean()

    def _loss(self, name: str) -> Tensor:
        batch = self.batches[name == "retain"]
        if self.case.arm != "a":
            said = answer_logprobs(self.model, batch)
            return self._npo(said.total, self.kept) if name == "forget" else token_nll(said)
        if name == "retain":
            return -self._whole_logits(self.model, batch).sum() / batch["labels"][:, 1:].numel()
        with self.clock("reference"), torch.no_grad():
            reference = self._whole_logits(self.reference, batch)
        return self._npo(self._whole_logits(self.model, batch), reference)

    def step(self) -> None:
        for number, name in enumerate(("forget", "retain")):
            before = self.clock.seconds.get("reference", 0.0)
            with self.clock(name), self.update.term(self.params, number):
                self._loss(name).backward()
            # The reference's pass is a part of its own.
            self.clock.seconds[name] -= self.clock.seconds.get("reference", 0.0) - before
        with self.clock("optimizer"):
            if self.case.arm == "d":
                self._ready = self.update.take()  # type: ignore[attr-defined]
            self.optimizer.step()
            self._ready = None
            self.optimizer.zero_grad()


def measure(case: Case) -> dict[str, Any]:
    """One row: what the arm took, and what the plan says of it."""
    device = torch.device(case.device)
    # What is imported and opened once is not the model's: the plan by rates imports what a step needs and runs nothing.
    hardware = measured_hardware()
    plan(arguments(case), replace(hardware, timed=None))
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    gc.collect()
    trim_heap()
    reset_high_water()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = process_bytes("VmRSS") or 0
    run = Run(case, device)
    run.step()
    # The first step makes buffers and states; pruning at the start is no part of a step.
    gc.collect()
    trim_heap()
    reset_high_water()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run.clock.seconds.clear()
    steps, load = [], machine.OtherLoad()
    for _ in range(case.steps):
        start = dict(run.clock.seconds)
        with load:
            run.step()
        steps.append({part: s - start.get(part, 0.0) for part, s in run.clock.seconds.items()})
    steps.sort(key=lambda parts: sum(parts.values()))
    middle = steps[len(steps) // 2]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else (process_bytes("VmHWM") or 0) - before
    seconds = sum(middle.values())
    row: dict[str, Any] = {
        **vars(case), "what": ARMS[case.arm], "weights": LABEL, "seconds": middle, "step_seconds": seconds,
        "tokens_per_second": 2 * case.batch * case.sequence / seconds, "peak_bytes": peak,
        "clock": run.clock.kind, "threads": torch.get_num_threads(), "other_load": load.share(),
    }  # fmt: skip
    if case.layers is None:
        # Afterwards: what the plan runs leaves buffers in the process, which would not count as the step's then.
        del run
        said = plan(arguments(case), hardware)
        row["plan"] = {
            "peak_bytes": round(said.peak),
            "bytes": said.to_dict()["bytes"],
            "seconds": said.seconds,
            "step_seconds": said.step,
        }
    return row


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def run(cases: list[Case], out: Path) -> dict[str, Any]:
    """Measures every case that `out` does not hold yet, each in a process of its own; one that failed is tried again, unless it was
    out of memory, which is a result."""
    result: dict[str, Any] = {"rows": []}
    if out.exists():
        result = json.loads(out.read_text())
    facts = machine.meta(torch.device(cases[0].device))
    result["meta"] = facts | {"weights": LABEL}
    done = {row["key"] for row in result["rows"] if row.get("failed", OUT_OF_MEMORY) == OUT_OF_MEMORY}
    for case in cases:
        if case.key in done:
            print(f"there already: {case.model}, arm {case.arm}", flush=True)
            continue
        print(f"{case.model}, arm {case.arm} ({ARMS[case.arm]}) ...", flush=True)
        command = [sys.executable, "-m", "benchmarks.large", json.dumps(vars(case))]
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = [line for line in made.stdout.splitlines() if line.startswith("{")]
        row: dict[str, Any] = {"key": case.key, "commit": facts["commit"], "date": facts["date"]}
        if made.returncode or not lines:
            said = json.loads(lines[-1]) if lines else {}
            row |= {**vars(case), "failed": f"exit status {made.returncode}"} | said
            print(f"  {row['failed']}", flush=True)
        else:
            row |= json.loads(lines[-1])
            shown = ", ".join(f"{part} {1e3 * s:.0f} ms" for part, s in row["seconds"].items())
            print(
                f"  {row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_bytes'] / 2**20:,.0f} MiB; {shown}",
                flush=True,
            )
        result["rows"] = [other for other in result["rows"] if other["key"] != case.key] + [row]
        write(out, result)
    return result


def child(text: str) -> int:
    """The row of a case on standard output; where memory runs out, that (an allocator of torch says it in words)."""
    try:
        print(json.dumps(measure(Case(**json.loads(text)))))
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in words):
            raise
        print(json.dumps({"failed": OUT_OF_MEMORY, "said": str(error).partition("\n")[0]}))
        return 1
    return 0


#: (model, arm, GPUs): what `fastunlearn plan` is asked for the README
PLANS = (
    *(("llama-3.1-8b", arm, 1) for arm in ARMS), *(("llama-3.2-1b", arm, 1) for arm in ARMS), ("llama-3.1-70b", "c", 8),
    ("llama-3.1-70b", "d", 8), ("llama-3.1-70b", "c", 64), ("llama-3.1-70b", "d", 64),
)  # fmt: skip


def plans(out: Path) -> dict[str, Any]:
    """Bytes and seconds by component, by arithmetic alone: H200s that were not there, the assumptions written beside."""
    rows = []
    for model, arm, gpus in PLANS:
        case = Case(model, arm, "cuda", "bfloat16", 8, 512, True, 1)
        said = plan(replace(arguments(case), hardware="h200", gpus=gpus)).to_dict()
        rows.append({"model": model, "arm": arm, "what": ARMS[arm], "gpus": gpus, **said})
        print(
            f"{model}, arm {arm}, {gpus} GPUs: peak {said['peak_bytes'] / 2**30:.1f} GiB, step {said['step_seconds']:.2f} s",
            flush=True,
        )
    result = {
        "meta": {"what": "arithmetic of fastunlearn plan; nothing was measured", "hardware": "h200"},
        "rows": rows,
    }
    write(out, result)
    return result


if __name__ == "__main__":
    raise SystemExit(child(sys.argv[1]))
