"""The plan of a sharded run beside the run: SmolLM2 in one, two and four processes (gloo, FSDP2), what each holds and how long a step takes.

    python -m benchmarks processes --processes 1 2 4 --arms c d

Bytes of weights, gradients and optimiser states are counted tensor by tensor, the peak is the high-water mark of a process above
what it held before the model. Seconds are those that a process has of its processor, as the processes share this machine's cores: the
plan's are of operations run and timed here, and of a link as fast as gloo's copies are by the same clock. Gloo's traffic takes the
processor and hides behind nothing, which the plan supposes of a GPU's.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import ROOT, machine
from benchmarks.large import ARMS, LABEL, Case, Run, arguments, write
from fastunlearn.report.cost import clock, process_bytes, reset_high_water, trim_heap
from fastunlearn.report.plan import Hardware, measured_hardware, plan

#: what `accelerate launch` sets for fsdp_version: 2
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
_LINK_BYTES = 2**24


class ShardedRun(Run):
    """A run whose model is cut over the processes there are."""

    def placed(self, model: Any) -> Any:
        if dist.get_world_size() == 1:
            return model
        from accelerate import Accelerator

        from fastunlearn.sharded import shard_model

        return shard_model(model, Accelerator(cpu=True))

    def held(self) -> dict[str, int]:
        """Bytes of this process, gradients as they are before the step."""

        def size(tensors: Any) -> int:
            return sum(_local(t).nbytes for t in tensors)

        states = [
            t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()
        ]
        lists = 2 if self.case.arm == "d" else 1
        return {
            "weights": size(self.model.parameters()), "gradients": lists * size(self.params), "states": size(states),
        }  # fmt: skip


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _shared_hardware() -> Hardware:
    """What a process can do, and the bytes that it receives from the others in a second of its own; means over processes."""
    dist.barrier()
    made, now = measured_hardware(), clock(torch.device("cpu"))
    world, link = dist.get_world_size(), made.link
    if world > 1:
        part, whole = torch.ones(_LINK_BYTES // 4), torch.empty(world * _LINK_BYTES // 4)
        best = float("inf")
        for _ in range(4):
            dist.barrier()
            start = now()
            dist.all_gather_into_tensor(whole, part)
            best = min(best, now() - start)
        # The plan takes 80 % of a link.
        link = (world - 1) * _LINK_BYTES / best / 0.8
    rates = torch.tensor([made.flops[2], made.flops[4], made.copy, made.launch, link], dtype=torch.float64)
    dist.all_reduce(rates)
    two, four, copy, launch, link = (rates / world).tolist()
    return replace(made, flops={2: two, 4: four}, copy=copy, launch=launch, link=link, network=link)


def measure(case: Case) -> dict[str, Any]:
    """One process's row."""
    hardware = _shared_hardware()
    asked = replace(arguments(case), gpus=dist.get_world_size())
    plan(asked, replace(hardware, timed=None))  # imports what a step needs, and runs nothing
    gc.collect()
    trim_heap()
    before = process_bytes("VmRSS") or 0
    run = ShardedRun(case, torch.device("cpu"))
    run.step()
    gc.collect()
    trim_heap()
    reset_high_water()
    run.clock.seconds.clear()
    load = machine.OtherLoad()
    for _ in range(case.steps):
        dist.barrier()
        with load:
            run.step()
    peak = (process_bytes("VmHWM") or 0) - before
    said = plan(asked, hardware)
    seconds = {part: s / case.steps for part, s in run.clock.seconds.items()}
    return {
        "peak_bytes": peak, "bytes": run.held(), "seconds": seconds, "step_seconds": sum(seconds.values()), "clock": run.clock.kind, "other_load": load.share(),
        "plan": {"peak_bytes": round(said.peak), "bytes": said.to_dict()["bytes"], "seconds": said.seconds, "step_seconds": said.step},
        "link_gbps": 0.8 * hardware.link / 1e9,
    }  # fmt: skip


def child(text: str, folder: Path) -> None:
    """A process under torchrun."""
    dist.init_process_group("gloo")
    row = measure(Case(**json.loads(text)))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of those of all processes: the largest peak, the slowest step, bytes of all of them."""
    worst, slowest = max(rows, key=lambda row: row["peak_bytes"]), max(rows, key=lambda row: row["step_seconds"])
    total = {name: sum(row["bytes"][name] for row in rows) for name in worst["bytes"]}
    out = {
        "peak_bytes": worst["peak_bytes"], "bytes of all": total, "seconds": slowest["seconds"], "step_seconds": slowest["step_seconds"],
        "clock": slowest["clock"], "other_load": slowest["other_load"], "link_gbps": rows[0]["link_gbps"], "plan": slowest["plan"],
    }  # fmt: skip
    out["plan"]["bytes of all"] = {name: len(rows) * out["plan"]["bytes"][name] for name in total}
    return out


def run(cases: Sequence[Case], counts: Sequence[int], out: Path) -> dict[str, Any]:
    """Measures what `out` does not hold yet.

    Raises:
        RuntimeError: a process failed.
    """
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    facts = machine.meta(torch.device("cpu"))
    result["meta"] = facts | {"weights": LABEL}
    done = {(row["key"], row["processes"]) for row in result["rows"]}
    for case in cases:
        for count in counts:
            if (case.key, count) in done:
                print(f"there already: {case.model}, arm {case.arm}, {count} processes", flush=True)
                continue
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc_per_node",
                    str(count),
                    "--standalone",
                ]
                made = subprocess.run(
                    [*command, "-m", "benchmarks.large_processes", json.dumps(vars(case)), folder], cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **(FSDP if count > 1 else {}), "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                if made.returncode:
                    raise RuntimeError(
                        f"{case.model}, arm {case.arm}, {count} processes: exit status {made.returncode}"
                    )
                rows = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
            row = {
                "key": case.key, "commit": facts["commit"], "date": facts["date"], **vars(case), "what": ARMS[case.arm],
                "weights": LABEL, "processes": count, **together(rows),
            }  # fmt: skip
            result["rows"].append(row)
            print(
                f"{case.model}, arm {case.arm}, {count} processes: peak {row['peak_bytes'] / 2**20:,.0f} MiB (plan "
                f"{row['plan']['peak_bytes'] / 2**20:,.0f}), step {row['step_seconds']:.2f} s (plan {row['plan']['step_seconds']:.2f})",
                flush=True,
            )  # fmt: skip
            write(out, result)
    return result


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
