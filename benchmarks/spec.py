"""The words an op's benchmark is written in: Op, Case, Provider, Limit, Target.

A file benchmarks/ops/<op>.py defines one `OP = Op(...)`; benchmarks/ops/mask.py is the shortest example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.shapes import Shapes, numel

Device = Literal["cpu", "cuda"]
#: Names of providers that do less than the op (one read, one copy): a yardstick, never "the best peer".
FLOOR = "floor: "
COPY = FLOOR + "copy of as many bytes"
BOTH: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """One setting: shapes, element type and whatever else the op's functions read from `options`."""

    name: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = BOTH
    quick: bool = False  #: also part of `--quick`
    gib: float = 0.0  #: memory that inputs and all providers need at once; the case is left out where there is less

    @property
    def numel(self) -> int:
        return numel(self.shapes)

    @property
    def dtype_name(self) -> str:
        return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(
            self.dtype, str(self.dtype).removeprefix("torch.")
        )


@dataclass(frozen=True)
class Limit:
    """What the hardware has to do at the least: bytes read and written, or floating-point operations.

    Operations at the rate of `machine.matmul_tflops` (bf16 on a GPU, fp32 on a CPU), or by the type whose rate counts: {float64: ...}.
    """

    kind: Literal["bytes", "flops"]
    amount: float | Mapping[torch.dtype | None, float]

    def ms(self, copy_gbps: float, tflops: Callable[[torch.dtype | None], float]) -> float:
        """Milliseconds at these rates; `tflops(None)` is the usual one."""
        if isinstance(self.amount, Mapping):
            return sum(count / tflops(dtype) for dtype, count in self.amount.items()) / 1e9
        return self.amount / (copy_gbps * 1e6 if self.kind == "bytes" else tflops(None) * 1e9)


#: Names of inputs are the op's own; `case` and `device` are always there.
Inputs = SimpleNamespace


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    `build(inputs)` does what is done once (states of an optimiser, a compiled function) and gives the function that is timed, or
    None when it does not serve that case. What it returns is handed to the check. Memory is counted from before `build`.
    """

    name: str
    build: Callable[[Inputs], Callable[[], Any] | None]
    devices: tuple[str, ...] = BOTH
    backend: str | None = None  #: fastunlearn backend in force while it is built and run
    check: Callable[[Inputs, Any, Any], str | None] | None = (
        None  #: instead of the op's (a yardstick returns something else)
    )
    compiles: bool = (
        False  #: its first run compiles: memory and times are those of later runs, however long the first took
    )
    max_runs: int | None = None  #: for a peer of many seconds
    budget: float = 1.0  #: share of the time that one provider gets for one case


@dataclass(frozen=True)
class Target:
    """`provider` must reach `ratio` of `over`, on `device`, in the cases whose name contains `case`.

    over: name of a provider, or "limit". kind "time": ms / ms of `over` at most `ratio`; "peak": peak memory / peak memory of
    `over` at most `ratio`; "workspace": peak memory / bytes of the case's tensors in its dtype at most `ratio`.
    """

    over: str
    ratio: float
    device: Device
    case: str = ""
    provider: str = "fastunlearn"
    kind: Literal["time", "peak", "workspace"] = "time"


def _nothing(_: Inputs) -> list[Tensor]:
    return []


@dataclass(frozen=True)
class Op:
    """An op's benchmark.

    Attributes:
        make: (case, device) -> the inputs all providers share, from a fixed seed.
        expected: inputs -> what the definition of the op gives; called once a case, before any provider.
        check: (inputs, output, expected) -> None, or in words why the output is wrong.
        limit: (inputs, bytes of a line of scattered access) -> Limit.
        mutated: inputs that a run changes: put back before `expected` and before each provider's gate.
    """

    name: str
    cases: Sequence[Case]
    make: Callable[[Case, torch.device], Inputs]
    expected: Callable[[Inputs], Any]
    check: Callable[[Inputs, Any, Any], str | None]
    limit: Callable[[Inputs, int], Limit]
    providers: Sequence[Provider]
    mutated: Callable[[Inputs], Sequence[Tensor]] = _nothing
    targets: Sequence[Target] = ()


def ours(op: str, build: Callable[[Inputs], Callable[[], Any] | None], *, reference: bool = False) -> list[Provider]:
    """ "fastunlearn" as a user calls it, and "fastunlearn-<backend>" for every backend that could be asked for by name.

    Args:
        op: the op's name in `fastunlearn.explain`.
        reference: also time the plain PyTorch definition.
    """
    import fastunlearn

    out = [Provider("fastunlearn", build, backend="auto")]
    for backend in ("native", "triton", "reference") if reference else ("native", "triton"):

        def other(inputs: Inputs, backend: str = backend) -> Callable[[], Any] | None:
            # What "auto" takes is timed under the plain name; a kernel in the interpreter is no backend to time.
            if backend == "triton" and inputs.device.type != "cuda":
                return None
            with fastunlearn.backend("auto"):
                same = fastunlearn.explain(op, inputs.device).backend == backend
            absent = fastunlearn.explain(op, inputs.device).backend == "none"
            return None if same or absent else build(inputs)

        out.append(Provider(f"fastunlearn-{backend}", other, backend=backend))
    return out


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a peer, for the very shapes it gets."""
    return torch.compile(function, dynamic=False)


def equal(_: Inputs, output: Any, expected: Any) -> str | None:
    """Check: the same bits (masks, lists of them, tensors)."""
    from benchmarks.machine import tensors

    got, want = list(tensors(output)), list(tensors(expected))
    if len(got) != len(want):
        return f"{len(got)} tensors, want {len(want)}"
    wrong = [i for i, (a, b) in enumerate(zip(got, want)) if a.shape != b.shape or not torch.equal(a, b)]
    return f"tensor {wrong[0]} differs ({len(wrong)} of {len(got)})" if wrong else None


def close(rtol: float, atol: float) -> Callable[[Inputs, Any, Any], str | None]:
    """Check: largest |got - want| <= atol + rtol * largest |want|, tensor by tensor."""
    from benchmarks.machine import tensors

    def check(_: Inputs, output: Any, expected: Any) -> str | None:
        got, want = list(tensors(output)), list(tensors(expected))
        if len(got) != len(want):
            return f"{len(got)} tensors, want {len(want)}"
        for i, (a, b) in enumerate(zip(got, want)):
            if a.shape != b.shape:
                return f"tensor {i} has shape {tuple(a.shape)}, want {tuple(b.shape)}"
            if not a.numel():
                continue
            worst = (a.detach().float() - b.detach().float()).abs_().max().item()
            if not worst <= atol + rtol * b.detach().abs().max().item():
                return f"tensor {i} is {worst:.3g} off"
        return None

    return check


def copy_of(nbytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads and writes `nbytes` together: the yardstick COPY."""
    half = nbytes // 2
    step = min(half, 2**29)
    source = torch.ones(step, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def run() -> Tensor:
        for start in range(0, half, step):
            length = min(step, half - start)
            target[:length].copy_(source[:length])
        return target

    return run


def copied(_: Inputs, output: Tensor, expected: Any) -> str | None:
    """Check of `copy_of`."""
    return None if bool((output == 1).all()) else "not copied"


def touched_bytes(bits: Tensor, cols: int, itemsize: int, line: int) -> int:
    """Bytes of the lines of `line` bytes, in a row-major tensor behind a BitMask, that hold a set bit.

    Args:
        bits: uint8 [rows, ceil(cols / 8)] of the mask.
        cols: columns of the tensor.
        itemsize: bytes of one entry.
    """
    per = line // itemsize
    if bits.numel() == 0:
        return 0
    if cols % per == 0 and per % 8 == 0:
        return int((bits.flatten().view(-1, per // 8) != 0).any(-1).sum()) * line
    total = 0
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    rows = max(per, 2**25 // cols // per * per)  # `per` rows end on a line whatever the number of columns
    for start in range(0, bits.shape[0], rows):
        flat = (bits[start : start + rows].unsqueeze(-1) >> places & 1).flatten(1)[:, :cols].flatten()
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per))
        total += int(flat.view(-1, per).any(-1).sum()) * line
    return total


def expected_touched_bytes(entries: int, density: float, itemsize: int, line: int) -> float:
    """The same for a random mask of that density, without a mask."""
    per = line // itemsize
    return entries / per * (1 - (1 - density) ** per) * line
