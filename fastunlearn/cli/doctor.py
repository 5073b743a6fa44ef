"""`fastunlearn doctor`: what runs where, why, and what to paste into a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastunlearn
from fastunlearn import _backend, _native

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "peft", "diffusers", "accelerate")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The CPU's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else "nvidia-smi failed"


def collect() -> dict[str, Any]:
    """Everything the doctor knows, as plain data."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "sm": f"{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)})
    native: dict[str, Any] = {"loaded": _native._C is not None, "why_not": _native._why_missing}
    if _native._C is not None:
        native.update(_native._C.build_info())
        native["cuda_devices"], native["cuda_why_none"] = _native._C.cuda_devices()
    proven = _backend.gpu_runs()
    devices = ["cpu", *(["cuda"] if gpus else [])]
    ops = [
        {"op": row.op, "device": device, "backend": row.backend, "reason": row.reason}
        for device in devices
        for row in fastunlearn.explain(device=device)
    ]
    kernels = []
    for op in _backend._ops.values():
        for name, kinds in op.backends.items():
            if "cuda" not in kinds:
                continue
            run = proven.get(f"{op.name}/{name}")
            label = "CUDA" if name == "native" else "Triton"
            kernels.append({"op": op.name, "backend": name, "kernel": label, "gpu_run": run})
    return {
        "fastunlearn": fastunlearn.__version__,
        "packages": {p: _version(p) for p in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "gpus": gpus,
        "driver": _driver(),
        "torch_cuda": torch.version.cuda,
        "native": native,
        "backend_setting": _backend.current_backend(),
        "ops": ops,
        "gpu_kernels": kernels,
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip() for row in rows]


def render(facts: dict[str, Any]) -> str:
    """The facts as text for a terminal: the tables, then the block for bug reports."""
    lines = [f"fastunlearn {facts['fastunlearn']}", "", "What runs:"]
    lines += _table(
        ("op", "tensors on", "backend", "why"),
        [(o["op"], o["device"], o["backend"], o["reason"]) for o in facts["ops"]],
    )
    lines += ["", "GPU kernels:"]
    lines += _table(
        ("op", "kernel", "state"),
        [
            (
                k["op"],
                k["kernel"],
                f"passed its tests on {k['gpu_run']['gpu']} ({k['gpu_run']['date']}, {k['gpu_run']['commit']})"
                if k["gpu_run"]
                else "never run on a GPU",
            )
            for k in facts["gpu_kernels"]
        ],
    )
    native = facts["native"]
    if native["loaded"]:
        cuda = (
            f"CUDA for sm_{native['cuda_archs'].replace(',', ', ')}"
            if native["cuda"]
            else "no CUDA (built without nvcc)"
        )
        built = f"C++ for {native['isa']}, {cuda}, gcc {native['compiler']}"
        if native["cuda"] and not native["cuda_devices"]:
            built += f"; CUDA runtime: {native['cuda_why_none']}"
    else:
        built = f"none: {native['why_not']}"
    gpus = ", ".join(f"{g['name']} (sm_{g['sm']}, {g['memory_gib']} GiB)" for g in facts["gpus"]) or "none"
    cpu = facts["cpu"]
    lines += [
        "",
        "For a bug report, paste this:",
        "",
        "```",
        f"fastunlearn {facts['fastunlearn']}, python {facts['python']}, {facts['system']}",
        ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        f"native: {built}",
        f"cpu: {cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} torch threads",
        f"gpu: {gpus}; driver: {facts['driver']}; torch built for CUDA {facts['torch_cuda'] or 'none'}",
        f"backend setting: {facts['backend_setting']}",
        "ops: " + ", ".join(f"{o['op']}={o['backend']} ({o['device']})" for o in facts["ops"]),
        "```",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastunlearn doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
