"""Which code runs an op: reference PyTorch, native (C++ on a CPU, CUDA on a GPU) or Triton.

`fastunlearn.backend(name)` chooses, `fastunlearn.explain()` tells. Nothing falls back in silence: with "auto" an op warns
once for every reason why its kernel could not serve; a backend asked for by name raises when it cannot.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastunlearn import _native

#: of ops that wait for the device or upload a table of addresses in every call: torch.compile keeps them out of its CUDA graphs
NOT_CAPTURED = (torch.Tag.cudagraph_unsafe,)

BackendName = Literal["auto", "reference", "native", "triton"]
_NAMES: tuple[str, ...] = get_args(BackendName)
_ENV = "FASTUNLEARN_BACKEND"


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve; the message says how to get it."""


class FallbackWarning(UserWarning):
    """An op runs as reference PyTorch because its kernel cannot serve."""


class Explanation(NamedTuple):
    """One row of `explain()`."""

    op: str
    backend: str  #: what the next call on `device` runs
    reason: str
    device: str
    last: str | None  #: what the last call in this process ran, as "backend:device type"


@dataclass
class _Op:
    name: str
    #: device types each backend serves, in the order "auto" tries them
    backends: Mapping[str, tuple[str, ...]]
    last: str | None = None
    warned: set[str] = field(default_factory=set)


_ops: dict[str, _Op] = {}
# A list for all threads: an entry is removed by itself, as blocks of two threads may end in any order.
_stack: list[list[str]] = []


def traced(*tensors: Any) -> bool:
    """Whether a call goes through its torch.library op: the tensors have no memory to hand to a kernel, or someone watches.

    So it is under torch.compile, export, make_fx and every other dispatch mode, inside torch.func's transforms, and for fake and
    functional tensors. Arguments may be tensors or lists of them; what is neither is left to the checks of the op.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    for value in tensors:
        for t in value if isinstance(value, list | tuple) else (value,):
            if isinstance(t, (FakeTensor, FunctionalTensor)):
                return True
    return False


def register(name: str, **backends: tuple[str, ...]) -> _Op:
    """Declares an op: `register("topk_mask", native=("cpu", "cuda"))`. Order is the order "auto" tries."""
    unknown = set(backends) - {"native", "triton"}
    assert not unknown, unknown
    op = _ops[name] = _Op(name, backends)
    return op


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, _NAMES))}; got {name!r}")
    return name


def current_backend() -> str:
    """The backend in force: the innermost `backend(...)`, else the environment variable FASTUNLEARN_BACKEND, else "auto"."""
    if _stack:
        return _stack[-1][0]
    return _checked(os.environ.get(_ENV) or "auto", f"environment variable {_ENV}")


@contextmanager
def backend(name: BackendName) -> Iterator[None]:
    """Runs the ops called inside with one backend, in all threads of the process.

    Args:
        name: "auto" (the fastest that works), "reference" (plain PyTorch), "native" (C++ / CUDA) or "triton".

    Raises:
        ValueError: unknown name. Ops called inside raise `BackendError` when the backend cannot serve them.

    Example:
        >>> with fastunlearn.backend("reference"):
        ...     masks = fastunlearn.ops.topk_mask(scores, density=0.1)
    """
    entry = [_checked(name, "backend")]
    _stack.append(entry)
    try:
        yield
    finally:
        _stack[:] = [other for other in _stack if other is not entry]


@cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken triton must not break the library
        return f"triton does not import ({type(error).__name__}: {error}): pip install 'triton>=3.6'"
    return None


def _triton_interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _unusable(op: _Op, name: str, device: torch.device) -> str | None:
    """None, or why backend `name` cannot serve `op` on `device`."""
    kinds = op.backends.get(name)
    if kinds is None:
        return f"{op.name} has no {name} kernel (it has: {', '.join(['reference', *op.backends])})"
    if name == "native":
        if device.type not in kinds:
            return f"{op.name} has no native code for {device.type} tensors (only {', '.join(kinds)})"
        return _native.unusable(device)
    missing = _triton_missing()
    if missing:
        return missing
    if device.type == "cuda":
        return None
    if device.type == "cpu" and _triton_interprets():
        return None
    return (
        f"Triton kernels need a CUDA tensor, this one is on {device.type} "
        "(or set TRITON_INTERPRET=1 before Python starts, to run them slowly on a CPU)"
    )


def _choose(op: _Op, device: torch.device, unsupported: Mapping[str, str]) -> tuple[str, str, list[str]]:
    """(backend, reason, reasons why better ones could not serve)."""
    asked = current_backend()
    where = f"fastunlearn.backend({asked!r})" if _stack else f"{_ENV}={asked}"
    if asked == "reference":
        return "reference", f"asked for by {where}", []
    if asked != "auto":
        why = _unusable(op, asked, device) or unsupported.get(asked)
        if why:
            raise BackendError(f"{op.name}: backend {asked!r} was asked for ({where}) and cannot serve: {why}")
        return asked, f"asked for by {where}", []
    reasons: list[str] = []
    for name, kinds in op.backends.items():
        if device.type not in kinds:
            continue
        why = _unusable(op, name, device) or unsupported.get(name)
        if why is None:
            return name, f"auto: first that serves {device.type}", reasons
        reasons.append(f"{name}: {why}")
    by_design = f"auto: {op.name} has no kernel for {device.type} tensors"
    return "reference", "; ".join(reasons) or by_design, reasons


def resolve(op: _Op, device: torch.device, unsupported: Mapping[str, str] | None = None) -> str:
    """The backend that runs this call of `op`; warns once per reason when a kernel cannot serve.

    Args:
        unsupported: backend -> why this very input (its dtype, its layout) is beyond that backend.

    Raises:
        BackendError: inside FakeTensorMode, where no tensor has memory (what can be traced does not come here: `traced`).
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise BackendError(f"{op.name}: fake tensors have no memory to work on; call it outside FakeTensorMode")
    name, _, reasons = _choose(op, device, unsupported or {})
    if name == "reference":
        for reason in reasons:
            if reason not in op.warned:
                op.warned.add(reason)
                warnings.warn(
                    f"fastunlearn.{op.name} runs as plain PyTorch on {device.type}; {reason}",
                    FallbackWarning,
                    stacklevel=4,
                )
    op.last = f"{name}:{device.type}"
    return name


def explain(op: str | None = None, device: torch.device | str | None = None) -> Any:
    """Which backend serves an op, and why.

    Args:
        op: name of an op; None for all of them.
        device: for tensors there; None means the GPU where there is one, else the CPU.

    Returns:
        An `Explanation` (op, backend, reason, device, last), or a list of them when `op` is None. A backend that was asked for
        and cannot serve is shown as "none", with the reason.

    Raises:
        ValueError: no op of that name.
    """
    import fastunlearn.ops
    import fastunlearn.optim  # noqa: F401

    if op is not None and op not in _ops:
        raise ValueError(f"no op named {op!r}; there are: {', '.join(sorted(_ops))}")
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def row(o: _Op) -> Explanation:
        try:
            name, reason, _ = _choose(o, where, {})
        except BackendError as error:
            name, reason = "none", str(error)
        return Explanation(o.name, name, reason, where.type, o.last)

    return row(_ops[op]) if op is not None else [row(o) for o in _ops.values()]


def gpu_runs() -> dict[str, dict[str, str]]:
    """ "op/backend" -> where it passed its tests on a GPU (gpu, date, commit); what is not in it never ran on one."""
    return json.loads(resources.files("fastunlearn").joinpath("gpu_runs.json").read_text())
