"""Measures up to how many tokens masked_lora_linear should not write W_eff, for fastunlearn.kernels.masked_lora.SWITCH.

    python -m benchmarks.masked_lora_switch     prints one line of the table, for the GPU it runs on

For every bucket of ranks and growing numbers of tokens it times a training step both ways, on layers of several sizes, and takes the
largest number up to which the kernels that write no W_eff win on all of them.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.machine import Flusher, median, timed
from benchmarks.ops import masked_lora as bench
from benchmarks.spec import Inputs

RANKS = {16: 16, 64: 64, 128: 128}
TOKENS = (4, 8, 16, 32, 64, 96, 128, 192, 256)
LAYERS = ("SD 1.5 attention", "SD 1.5 feed-forward", "Llama-3.1-8B attention", "Llama-3.1-8B gate")


def step_ms(inputs: Inputs, limit: int, name: str, flush: Flusher) -> float:
    """A step with the switch at `limit` tokens."""
    from fastunlearn.kernels import masked_lora as kernels

    kernels.SWITCH[name] = [(kernels.MAX_RANK, limit)]
    run = bench.mine(inputs)
    for _ in range(3):
        run()
    return median([timed(run, inputs.device, flush) for _ in range(15)])


def measure(device: torch.device) -> dict[str, list[tuple[int, int]]]:
    """GPU -> [(ranks up to, tokens up to)]."""
    name, flush = torch.cuda.get_device_name(device), Flusher(device)
    line = []
    for bucket, rank in RANKS.items():
        best = 0
        for tokens in TOKENS:
            wins = []
            for layer in LAYERS:
                case = bench._case(layer, tokens, rank)
                inputs = bench.make(case, device)
                inputs.case, inputs.device = case, device
                wins.append(step_ms(inputs, tokens, name, flush) <= step_ms(inputs, 0, name, flush))
            print(f"r {rank}, T {tokens}: {sum(wins)} of {len(wins)} layers without W_eff", file=sys.stderr, flush=True)
            if not all(wins):
                break
            best = tokens
        line.append((bucket, best))
    return {name: line}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benchmarks.masked_lora_switch: needs an NVIDIA GPU; torch finds none")
    print(json.dumps(measure(torch.device("cuda"))))
