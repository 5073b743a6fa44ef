"""The study behind the README's first table: `fastunlearn demo` on several seeds, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, machine

#: stage of the demo -> method of the table
METHODS = {"pruned": "pruned to 2:4", "memorised": "memorised", "unlearned": "SAU, NPO"}


def rows_of(seed: int, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a stage."""
    settings = result["settings"]
    target = f"{settings['forget']} of {settings['people']} people"
    seconds = list(result["seconds"].values())
    # Phases alternate: load, prune, ask, memorise, ask, forget, ask.
    spent = dict(zip(METHODS, (seconds[1], seconds[3], seconds[5])))
    return [
        {
            "method": method,
            "target": target,
            "seed": seed,
            "forget recall": f"{result['stages'][stage]['forget']:.0%}",
            "in other words": f"{result['stages'][stage]['paraphrased']:.0%}",
            "retain recall": f"{result['stages'][stage]['retain']:.0%}",
            "perplexity": round(result["stages"][stage]["perplexity"], 1),
            "seconds": round(spent[stage], 1),
        }
        for stage, method in METHODS.items()
    ]


def run(seeds: Sequence[int]) -> dict[str, Any]:
    """Runs the demo once a seed.

    Raises:
        RuntimeError: a run failed or missed its targets.
    """
    rows, violations, seconds = [], 0, []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "demo.json"
            command = [sys.executable, "-m", "fastunlearn", "demo", "--seed", str(seed), "--output", f"{folder}/demo"]
            command += ["--json", str(out)]
            done = subprocess.run(command, cwd=ROOT)
            if done.returncode != 0:
                raise RuntimeError(f"fastunlearn demo --seed {seed} ended with {done.returncode}")
            result = json.loads(out.read_text())
        violations += len(result["violations"])
        seconds.append(round(sum(result["seconds"].values())))
        rows += rows_of(seed, result)
    facts = machine.meta(torch.device("cpu"))
    meta = {
        "model": "SmolLM2-135M-Instruct, 2:4",
        "machine": facts["device"],
        "torch": facts["torch"],
        "weights outside the 2:4 pattern": violations,
        "seconds in all": ", ".join(map(str, seconds)),
        "commit": facts["commit"],
        "date": facts["date"],
    }
    return {"meta": meta, "rows": rows}
