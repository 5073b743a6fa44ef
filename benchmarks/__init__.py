"""Benchmarks: every op beside its peers and beside what the hardware allows.

    python -m benchmarks run [--ops mask topk] [--device cpu|cuda] [--out FILE] [--quick] [--cases TEXT]
    python -m benchmarks table [--check]      tables of README.md, between its markers, and of results/README.md
    python -m benchmarks plot                 benchmarks/results/plots/<device>-<op>.svg, -roofline.svg, -memory.svg
    python -m benchmarks compare A.json B.json [--by 1.1]     what became slower, as Markdown; 1 where ours did (compare.py)
    python -m benchmarks cost --shapes canvas sd15 sdxl       seconds, memory, storage of every diffusion method (cost.py)
    python -m benchmarks tune                 launch options of the Triton kernels on this GPU -> fastunlearn/tuned.json (tune.py)
    python -m benchmarks quality demo         what the demo forgets and keeps -> benchmarks/results/quality/demo.json
    python -m benchmarks quality prune        perplexity after pruning; needs FASTUNLEARN_DATA (benchmarks/prune.py)
    python -m benchmarks quality tofu_evaluation   a TOFU evaluation beside the slow way (benchmarks/tofu_evaluation.py)
    python -m benchmarks.tofu                 every method on TOFU, and the evidence on SAU's claim (benchmarks/tofu.py)
    python -m benchmarks.canvas               styles and objects erased from the canvas pipeline (benchmarks/canvas.py)
    python -m benchmarks.spare tradeoff       SPARE by mask density and factor of the forget term; also timesteps, pictures (benchmarks/spare.py)

Run from the repository root. A whole run writes benchmarks/results/<device>.json:

    meta      device, driver, torch, triton, commit, date, copy_gbps, matmul_tflops, empty_launch_us, cpu, cores, threads, ...;
              other_load: share of the processors that others took while providers were timed (above a few percent: measure again)
    rows      op, case, dtype, provider, ms_p20, ms_p50, ms_p80, peak_mib, limit_ms, limit_kind ("bytes" | "flops"), correct
    targets   op, case, provider, kind, over, ratio (measured), target, rule, met
    left_out  cases and providers that did not run, and why

How it measures
  * Correctness first: each provider's output on the timed inputs is compared with the op's definition; a wrong one gets a row
    with correct=false and no times.
  * Providers are interleaved: rounds in which each runs once, the first rotating; medians, 20th and 80th percentile. A provider
    has a budget of seconds a case; one whose run takes longer than four seconds is timed once.
  * On a GPU: CUDA events, the L2 cache overwritten before every run. On a CPU: perf_counter, the last-level cache filled with
    something else before every run, and memory as large as the run will allocate touched and freed, because a virtual machine's
    first use of a page costs many times a page fault. Results are freed outside the clock; fresh outputs (and their page faults) are inside.
  * limit_ms: bytes that must be read and written / copy_gbps, or floating-point operations / matmul_tflops (parts in float32 or
    float64: / matmul_tflops_by_dtype). copy_gbps is the median of `copy_` of a large buffer (read and written bytes both count),
    sampled before and after every case of the run. A pure read can beat a limit taken from a copy. Scattered access counts whole
    32-byte sectors (64-byte lines on a CPU) that hold a set bit (`spec.touched_bytes`).
  * peak_mib: peak memory above the inputs and the output, from before a provider builds its states (an optimiser's moments
    count) to the end of its first call, in runs apart from the timed ones, median of three where they are short; on a GPU torch's
    allocator statistics, on a CPU the high-water mark of the resident set, which sees C++ scratch too (machine.py) and is good
    to a few MiB.
  * Shapes are those of real models (shapes.py), values are random.
  * Ratio targets hold where limit_ms >= 0.05; below that the target is to be within 15 microseconds of the best peer.

A new op: write benchmarks/ops/<op>.py with one `OP = Op(...)` (spec.py says what goes in, ops/mask.py is an example).
For quiet CPU timings set KMP_BLOCKTIME=0 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 and run nothing else.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
