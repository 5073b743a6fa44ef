"""Launch options of the Triton kernels, tried on this GPU: the table that is shipped as fastunlearn/tuned.json (fastunlearn/_tuned.py).

    python -m benchmarks tune [--ops polar spectral] [--out FILE]

A kernel names its candidates (CANDIDATES in kernels/<op>.py). Each is run beside the kernel's defaults in the op's own benchmark cases: checked
against the definition, then timed, all of them in turns. What a key of a kernel gets is the candidate with the smallest geometric
mean of time over defaults in the cases that asked for that key, if that is below 1 - MARGIN; else nothing, and the defaults hold.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import fastunlearn
from benchmarks import harness, machine
from benchmarks.spec import Case, Inputs, Op, Provider
from fastunlearn._tuned import asked, trying

#: kernel files with candidates
MODULES = ("block_weight_grad", "masked_lora", "nm_linear", "polar", "spectral")
#: gains below this are left to the noise
MARGIN = 0.03
DEFAULT = "defaults"

Options = Mapping[str, int]


def candidates() -> dict[str, tuple[Options, ...]]:
    """Kernel -> options that are tried beside its defaults."""
    out: dict[str, tuple[Options, ...]] = {}
    for name in MODULES:
        out |= importlib.import_module(f"fastunlearn.kernels.{name}").CANDIDATES
    return out


def _trial(base: Provider, kernel: str, options: Options, backend: str) -> Provider:
    def build(inputs: Inputs) -> Callable[[], Any] | None:
        call = base.build(inputs)
        if call is None:
            return None

        def run() -> Any:
            with trying(kernel, options):
                return call()

        return run

    return Provider(json.dumps([kernel, options]), build, backend=backend)


def _heard(op: Op, base: Provider, case: Case, device: torch.device, backend: str) -> set[tuple[str, str]]:
    """The (kernel, key) that a case asks for."""
    inputs = op.make(case, device)
    inputs.case, inputs.device = case, device
    with fastunlearn.backend(backend), asked() as heard:  # type: ignore[arg-type]
        call = base.build(inputs)
        if call is not None:
            call()
    return heard


def trials(
    ops: Iterable[Op], tried: Mapping[str, Sequence[Options]], device: torch.device, settings: harness.Settings, backend: str = "triton"
) -> dict[tuple[str, str], list[dict[str, float]]]:  # fmt: skip
    """(kernel, key) -> for each case that asked for it: options as JSON, "defaults" among them -> ms; wrong and failed ones are missing."""
    bandwidth, flush, others = machine.Bandwidth(device, 2**20), machine.Flusher(device), machine.OtherLoad()
    out: dict[tuple[str, str], list[dict[str, float]]] = {}
    for op in ops:
        base = next(p for p in op.providers if p.name == "fastunlearn")
        for case in op.cases:
            if device.type not in case.devices or settings.cases not in case.name:
                continue
            if machine.free_bytes(device) < case.gib * 2**30:
                settings.say(f"{op.name}, {case.name}: left out for want of memory")
                continue
            try:
                heard = {(kernel, key) for kernel, key in _heard(op, base, case, device, backend) if kernel in tried}
            except Exception as error:  # a kernel that does not serve this case
                settings.say(f"{op.name}, {case.name}: left out: {type(error).__name__}: {error}")
                continue
            kernels = sorted({kernel for kernel, _ in heard})
            if not kernels:
                continue
            settings.say(f"{op.name}, {case.name}, {case.dtype_name}: {', '.join(kernels)}")
            providers = [Provider(DEFAULT, base.build, backend=backend)]
            providers += [_trial(base, kernel, options, backend) for kernel in kernels for options in tried[kernel]]
            runners, _, _ = harness.run_case(
                replace(op, providers=providers), case, device, settings, bandwidth, flush, others
            )
            ms = {r.provider.name: machine.median(r.ms) for r in runners if r.ms}
            if DEFAULT not in ms:
                settings.say("  the defaults did not run")
                continue
            for kernel, key in heard:
                mine = {DEFAULT: ms[DEFAULT]}
                for name, value in ms.items():
                    if name != DEFAULT and json.loads(name)[0] == kernel:
                        mine[json.dumps(json.loads(name)[1])] = value
                out.setdefault((kernel, key), []).append(mine)
    return out


def chosen(cases: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The best candidate that ran in all cases, or None where the defaults are as good."""
    common = set(cases[0]).intersection(*cases[1:]) - {DEFAULT}
    ratio = {
        name: math.exp(sum(math.log(case[name] / case[DEFAULT]) for case in cases) / len(cases)) for name in common
    }
    best = min(sorted(ratio), key=lambda name: ratio[name], default=None)
    if best is None or ratio[best] > 1 - MARGIN:
        return None
    whole = {name: sum(case[name] for case in cases) for name in (best, DEFAULT)}
    return {
        "options": json.loads(best),
        "ms": round(whole[best], 5),
        "default_ms": round(whole[DEFAULT], 5),
        "cases": len(cases),
    }


def merged(
    table: Mapping[str, Any], gpu: str, facts: Mapping[str, str], found: Mapping[tuple[str, str], Any]
) -> dict[str, Any]:
    """The table with what was found on a GPU: kernels that were tried are replaced whole, the GPU's others stay if Triton is the same."""
    old = table.get(gpu, {})
    kernels = {} if old.get("triton") != facts["triton"] else {k: dict(v) for k, v in old.get("kernels", {}).items()}
    for kernel in {kernel for kernel, _ in found}:
        kernels[kernel] = {}
    for (kernel, key), cases in sorted(found.items()):
        entry = chosen(cases)
        if entry is not None:
            kernels[kernel][key] = entry
    mine = {**facts, "kernels": {kernel: keys for kernel, keys in sorted(kernels.items()) if keys}}
    return {**table, gpu: mine}


def run(
    ops: Sequence[Op], device: torch.device, settings: harness.Settings, table: Mapping[str, Any]
) -> dict[str, Any]:
    """The table with this GPU's entries measured anew."""
    found = trials(ops, candidates(), device, settings)
    meta = machine.meta(device)
    facts = {name: meta[name] for name in ("triton", "torch", "driver", "commit", "date")}
    return merged(table, meta["device"], facts, found)
