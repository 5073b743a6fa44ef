"""Runs an op's cases: gate, memory, then times, providers interleaved.

Order of a case: inputs; what the definition gives; for each provider (1) build and run once against the check: a wrong one
is recorded with correct=false and never timed, (2) once more, counting memory; then rounds in which every provider runs
once, the first one rotating, until each has used up its budget of seconds.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

import fastunlearn
from benchmarks import machine
from benchmarks.spec import Case, Inputs, Limit, Op, Provider, Target
from benchmarks.tables import best_peer

#: Below this limit (ms) a ratio says little; then the target is to be within SMALL_SLACK ms of the best peer.
SMALL_LIMIT_MS = 0.05
SMALL_SLACK_MS = 0.015
_TOUCH_FROM = 64 * machine.MIB


class Terminated(BaseException):
    """SIGTERM (a time limit from outside): what was measured is still written."""


@dataclass
class Settings:
    """How much time and which cases.

    Attributes:
        seconds: time of one provider in one case (times its `budget`).
        min_runs, max_runs: runs of one provider, whatever the budget; a provider whose run takes longer than `slow_s` runs once.
        total_s: no new case is started after so many seconds; what was left out is said in the result.
    """

    seconds: float = 2.0
    min_runs: int = 5
    max_runs: int = 100
    slow_s: float = 4.0
    total_s: float = 1500.0
    quick: bool = False
    cases: str = ""
    say: Callable[[str], None] = print

    @staticmethod
    def of(device: torch.device, quick: bool = False) -> Settings:
        if device.type == "cuda":
            return Settings(seconds=0.25 if quick else 0.6, total_s=450, quick=quick)
        return Settings(
            seconds=0.5 if quick else 1.5, min_runs=3 if quick else 5, max_runs=60, total_s=1200, quick=quick
        )


@dataclass
class _Runner:
    provider: Provider
    call: Callable[[], Any] | None = None
    warm_ms: float = 0.0
    peak_mib: float | None = None
    takes: int = 0  #: bytes that a run allocates at once, its states included
    wrong: str | None = None
    ran: str = ""
    ms: list[float] = field(default_factory=list)
    seconds: float = 0.0  #: that timing has taken, what keeps a GPU busy before each call included
    ahead: machine.Ahead = field(default_factory=machine.Ahead)

    def may_run(self, settings: Settings) -> bool:
        runs = len(self.ms)
        if runs >= min(settings.max_runs, self.provider.max_runs or settings.max_runs):
            return False
        if runs and min(self.ms) > settings.slow_s * 1e3:
            return False
        return runs < settings.min_runs or self.seconds < settings.seconds * self.provider.budget


@contextmanager
def _backend(name: str | None) -> Any:
    with ExitStack() as stack:
        if name is not None:
            stack.enter_context(fastunlearn.backend(name))  # type: ignore[arg-type]
        yield


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class _Restore:
    """Puts back the inputs that a run changes."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.tensors = list(tensors)
        self.saved = [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def __call__(self) -> None:
        for tensor, saved in zip(self.tensors, self.saved):
            tensor.copy_(saved)


def _gate(op: Op, runner: _Runner, inputs: Inputs, expected: Any, restore: _Restore, settings: Settings) -> str | None:
    """Builds, checks, measures memory; None, or why the provider takes no part in this case."""
    provider, device = runner.provider, inputs.device

    def build_and_run() -> tuple[Any, Any]:
        call = provider.build(inputs)
        if call is None:
            return None, None
        start = time.perf_counter()
        out = call()
        _sync(device)
        runner.warm_ms = (time.perf_counter() - start) * 1e3
        return call, out

    restore()
    with _backend(provider.backend):
        (call, out), runner.peak_mib, fresh = machine.peak_memory(build_and_run, inputs, device)
        if call is None:
            return ""
        runner.takes = int((runner.peak_mib or 0) * machine.MIB) + fresh
        with torch.no_grad():
            runner.wrong = (provider.check or op.check)(inputs, out, expected)
        del out
        # Again, when everything is loaded and compiled: these count for memory, and warm up.
        again = provider.compiles or runner.warm_ms < settings.slow_s * 1e3
        peaks: list[float] = []
        while runner.wrong is None and again:
            call = None
            restore()
            (call, out), runner.peak_mib, fresh = machine.peak_memory(build_and_run, inputs, device)
            del out
            peaks += [] if runner.peak_mib is None else [runner.peak_mib]
            again = len(peaks) < 3 and runner.peak_mib is not None and runner.warm_ms < 500
        if peaks:
            runner.peak_mib = machine.median(peaks)
            runner.takes = int(runner.peak_mib * machine.MIB) + fresh
    runner.call = call
    return None


def run_case(
    op: Op,
    case: Case,
    device: torch.device,
    settings: Settings,
    bandwidth: machine.Bandwidth,
    flush: Callable[[], None],
    others: machine.OtherLoad,
) -> tuple[list[_Runner], Limit, list[str]]:
    """Runners (gate passed or refused) of one case, its limit, and who was left out and why."""
    inputs = op.make(case, device)
    inputs.case, inputs.device = case, device
    limit = op.limit(inputs, machine.line_bytes(device))
    restore = _Restore(op.mutated(inputs))
    expected = op.expected(inputs)
    runners, left_out = [], []
    for provider in op.providers:
        if device.type not in provider.devices:
            continue
        runner = _Runner(provider)
        try:
            reason = _gate(op, runner, inputs, expected, restore, settings)
        except (fastunlearn.BackendError, torch.OutOfMemoryError, MemoryError, ImportError) as error:
            reason = _line(error)
        except Exception as error:  # a broken provider takes nobody else's time away
            reason, runner.wrong, runner.peak_mib = None, _line(error), None
        if reason is None:
            runners.append(runner)
            if runner.wrong is not None:
                settings.say(f"  WRONG {provider.name}: {runner.wrong}")
                runner.call = None
        elif reason:
            left_out.append(f"{op.name}, {case.name}: {provider.name} left out: {reason}")
            settings.say(f"  {left_out[-1]}")
        gc.collect()
    del expected, restore
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    bandwidth.sample()
    with others:
        interleave([r for r in runners if r.call is not None], device, settings, flush)
    bandwidth.sample()
    return runners, limit, left_out


def interleave(runners: Sequence[_Runner], device: torch.device, settings: Settings, flush: Callable[[], None]) -> None:
    """Rounds: every provider once, each round starting with the next one, until all have spent their budget."""
    gc.disable()
    try:
        for turn in range(settings.max_runs):
            due = [r for r in runners if r.may_run(settings)]
            if not due:
                break
            for i in range(len(due)):
                runner = due[(i + turn) % len(due)]
                assert runner.call is not None
                if device.type == "cpu" and runner.takes > _TOUCH_FROM:
                    machine.touch(runner.takes)
                begin = time.perf_counter()
                with _backend(runner.provider.backend):
                    runner.ms.append(machine.timed(runner.call, device, flush, runner.ahead))
                runner.seconds += time.perf_counter() - begin
    finally:
        gc.enable()


def _row(op: Op, case: Case, runner: _Runner, limit_ms: float, kind: str) -> dict[str, Any]:
    p20, p50, p80 = (round(machine.percentile(runner.ms, q), 5) if runner.ms else None for q in (20, 50, 80))
    return {
        "op": op.name,
        "case": case.name,
        "dtype": case.dtype_name,
        "provider": runner.provider.name,
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "peak_mib": None if runner.peak_mib is None else round(runner.peak_mib, 2),
        "limit_ms": round(limit_ms, 5),
        "limit_kind": kind,
        "correct": runner.wrong is None,
    }


def judge(op: Op, target: Target, case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Measured ratio of one target in one case and whether it is met; None when its rows are not there."""
    by_name = {row["provider"]: row for row in rows}
    mine = by_name.get(target.provider)
    if mine is None or mine["ms_p50"] is None:
        return None
    rule = f"<= {target.ratio:g}"
    small = target.kind == "time" and mine["limit_ms"] < SMALL_LIMIT_MS
    if target.kind == "workspace":
        if mine["peak_mib"] is None:
            return None
        over, name = case.numel * case.dtype.itemsize / machine.MIB, "the inputs' bytes"
        ratio = mine["peak_mib"] / over
    elif target.over == "limit":
        name = "the limit"
        ratio = mine["ms_p50"] / mine["limit_ms"]
    else:
        peer = by_name.get(target.over)
        field_ = "ms_p50" if target.kind == "time" else "peak_mib"
        if peer is None or not peer[field_] or mine[field_] is None:
            return None
        name, ratio = target.over, mine[field_] / peer[field_]
    met = ratio <= target.ratio
    if small:
        best = best_peer(rows)
        floor = best["ms_p50"] if best else mine["limit_ms"]
        met, rule = mine["ms_p50"] <= floor + SMALL_SLACK_MS, f"within {SMALL_SLACK_MS * 1e3:g} us of the best peer"
    return {
        "op": op.name,
        "case": case.name,
        "provider": target.provider,
        "kind": target.kind,
        "over": name,
        "ratio": round(ratio, 5),
        "target": target.ratio,
        "rule": rule,
        "met": met,
    }


def _in_turn(ops: Sequence[Op], device: torch.device, settings: Settings) -> list[tuple[Op, Case]]:
    """The first cases of all ops, then the second ones: a run whose time is over has something of every op."""
    cases = [
        [
            (op, case)
            for case in op.cases
            if device.type in case.devices and (case.quick or not settings.quick) and settings.cases in case.name
        ]
        for op in ops
    ]
    return [pair for row in zip_longest(*cases) for pair in row if pair is not None]


def _run_cases(
    ops: Sequence[Op],
    device: torch.device,
    settings: Settings,
    bandwidth: machine.Bandwidth,
    flush: Callable[[], None],
    others: machine.OtherLoad,
    rates: Callable[[torch.dtype | None], float],
    start: float,
    done: list[tuple[Op, Case, list[_Runner], Limit]],
    left_out: list[str],
) -> None:
    """Appends to `done` and `left_out`, so that an interrupted run keeps what it has."""
    for op, case in _in_turn(ops, device, settings):
        if time.perf_counter() - start > settings.total_s:
            left_out.append(f"{op.name}, {case.name}: left out: the run's {settings.total_s:g} s were over")
            continue
        free = machine.free_bytes(device)
        if free < case.gib * 2**30:
            left_out.append(f"{op.name}, {case.name}: left out: wants {case.gib:.1f} GiB, {free / 2**30:.1f} are free")
            settings.say(left_out[-1])
            continue
        settings.say(f"{op.name}, {case.name}, {case.dtype_name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastunlearn.FallbackWarning)
            try:
                runners, limit, missing = run_case(op, case, device, settings, bandwidth, flush, others)
                limit.ms(1.0, rates)  # measures the rates that it wants, while the device is there
            except Exception as error:  # what other cases have measured is kept
                runners, limit = [], Limit("bytes", 0)
                missing = [f"{op.name}, {case.name}: left out: {_line(error)}"]
                settings.say(missing[0])
        left_out += missing
        done.append((op, case, runners, limit))
        for r in runners:
            if r.ms:
                settings.say(f"  {machine.median(r.ms):10.3f} ms  x{len(r.ms):<4} {r.provider.name}")
            r.call = None
        why = machine.lost(device)
        if why is not None:
            left_out.append(f"the GPU was lost in {op.name}, {case.name} ({why}): the cases after it are missing")
            settings.say(left_out[-1])
            return
        if any(r.provider.compiles for r in runners):
            torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run(ops: Sequence[Op], device: torch.device, settings: Settings) -> dict[str, Any]:
    """All cases of all ops on one device -> {"meta", "rows", "targets", "left_out"}."""
    start, others = time.perf_counter(), machine.OtherLoad()
    facts = machine.meta(device)
    bandwidth, flush = machine.Bandwidth(device), machine.Flusher(device)
    facts["matmul_tflops"] = round(machine.matmul_tflops(device), 4)
    facts["empty_launch_us"] = round(machine.empty_launch_us(device), 3)
    facts["quick"] = settings.quick
    rates: dict[str, float] = {}

    def tflops(dtype: torch.dtype | None) -> float:
        if dtype is None:
            return float(facts["matmul_tflops"])
        name = str(dtype).removeprefix("torch.")
        if name not in rates:
            rates[name] = round(machine.matmul_tflops(device, dtype), 4)
            facts["matmul_tflops_by_dtype"] = rates
        return rates[name]

    done: list[tuple[Op, Case, list[_Runner], Limit]] = []
    left_out: list[str] = []
    try:
        _run_cases(ops, device, settings, bandwidth, flush, others, tflops, start, done, left_out)
    except (KeyboardInterrupt, Terminated):
        left_out.append("the run was interrupted: the cases after the last one here are missing")
        settings.say(left_out[-1])
    order = [(id(op), id(case)) for op in ops for case in op.cases]
    done.sort(key=lambda entry: order.index((id(entry[0]), id(entry[1]))))
    facts["copy_gbps"] = round(bandwidth.gbps(), 3) if bandwidth.samples else None
    share = others.share()
    facts["other_load"] = None if share is None else round(share, 4)
    if share is not None and share > 0.03:
        settings.say(
            f"other processes took {share:.0%} of the processors: these times are not those of a quiet machine"
        )
    facts["seconds"] = round(time.perf_counter() - start, 1)
    if device.type == "cuda":
        # Beside the device's times: what the host spends to queue one call of ours.
        facts["host_ms"] = {
            f"{op.name}: {case.name}, {case.dtype_name}": round(r.ahead.host_ms, 3)
            for op, case, runners, _ in done
            for r in runners
            if r.provider.name == "fastunlearn"
        }
    rows, targets = [], []
    for op, case, runners, limit in done:
        limit_ms = limit.ms(facts["copy_gbps"] or 1, tflops)
        mine = [_row(op, case, r, limit_ms, limit.kind) for r in runners]
        rows += mine
        for target in op.targets:
            if target.device == device.type and target.case in case.name:
                judged = judge(op, target, case, mine)
                targets += [judged] if judged else []
    return {"meta": facts, "rows": rows, "targets": targets, "left_out": left_out}
