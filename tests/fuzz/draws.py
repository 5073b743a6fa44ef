"""Cases for property tests: shapes, strides, types, values and masks of every kind.

    @fuzz("gram", backends=("native", "triton"))
    def test_gram(draw: Draw) -> None: ...

runs the function on cases on each backend by name: 10,000 by `make fuzz`, 300 else (in Triton's interpreter a 50th of them).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastunlearn
from fastunlearn import BitMask


class Tested(NamedTuple):
    ops: tuple[str, ...]
    check: Callable[[Draw], None]
    backends: tuple[str, ...]


#: what `fuzz` has seen
TESTED: list[Tested] = []
#: a case in Triton's interpreter takes as long as so many others
SLOWER = 50
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WIDE = (*FLOATS, torch.float64)
SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 40)
DENSITIES = (0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0)
#: how a tensor lies in memory; "expanded" repeats one row, and cannot be written to
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
VALUES = ("normal", "ties", "zeros", "huge", "tiny", "special")
SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 3e38, 6e-8, 65504.0)


class Draw:
    """One case. What it picks, hypothesis makes smaller where the case fails; numbers come from a seed."""

    def __init__(self, data: Any, seed: int, backend: str):
        self._data, self.backend = data, backend
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, choices: Sequence[Any]) -> Any:
        return self._data.draw(st.sampled_from(choices))

    def integer(self, low: int, high: int) -> int:
        return int(self._data.draw(st.integers(low, high)))

    def number(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def maybe(self) -> bool:
        return bool(self._data.draw(st.booleans()))

    def shape(self, dims: int | None = None) -> tuple[int, ...]:
        """Of up to three dimensions, or of so many."""
        low, high = (0, 3) if dims is None else (dims, dims)
        return tuple(self._data.draw(st.lists(st.sampled_from(SIZES), min_size=low, max_size=high)))

    def shapes(self, most: int = 5) -> list[tuple[int, ...]]:
        return [self.shape() for _ in range(self.integer(1, most))]

    def values(self, shape: Sequence[int], kind: str) -> Tensor:
        """float64 of that kind."""
        shape = tuple(shape)
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if kind in ("ties", "special"):
            pool = torch.tensor(SPECIAL if kind == "special" else (0.0, -0.0, 1.0, -1.0, 2.0, 0.5), dtype=torch.float64)
            some = pool[torch.randint(len(pool), shape, generator=self.generator)]
            few = torch.rand(shape, generator=self.generator) < (0.1 if kind == "special" else 0.9)
            return torch.where(few, some, t)
        return t * {"normal": 1.0, "zeros": 0.0, "huge": 1e30, "tiny": 1e-30}[kind]

    def lay(self, t: Tensor, layout: str | None = None, *, written: bool = False) -> Tensor:
        """The same values in other memory; what lies between them is NaN (True for a mask). Written to: not "expanded"."""
        layout = layout or self.pick(LAYOUTS[:-1] if written else LAYOUTS)
        if layout == "expanded" and t.dim():
            return t[:1].expand(t.shape) if len(t) else t
        if layout == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        fill = True if t.dtype == torch.bool else float("nan") if t.is_floating_point() else 0
        if layout == "strided" and t.dim():
            wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), fill, dtype=t.dtype)
            wide[..., ::2] = t
            return wide[..., ::2]
        if layout == "offset":
            flat = torch.full((t.numel() + 3,), fill, dtype=t.dtype)
            flat[3:] = t.reshape(-1)
            return flat[3:].view(t.shape)
        return t.contiguous()

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype | Sequence[torch.dtype] = FLOATS,
        kind: str | Sequence[str] = "normal",
        *,
        written: bool = False,
    ) -> Tensor:
        """Of one of the types and of one of the kinds of value, in any layout."""
        dtype = dtype if isinstance(dtype, torch.dtype) else self.pick(dtype)
        kind = kind if isinstance(kind, str) else self.pick(kind)
        return self.lay(self.values(shape, kind).to(dtype), written=written)

    def mask(self, shape: Sequence[int], density: float | None = None) -> Tensor:
        """bool."""
        density = self.pick(DENSITIES) if density is None else density
        return self.lay(torch.rand(tuple(shape), generator=self.generator) < density)

    def as_mask(self, may: Tensor) -> BitMask | Tensor:
        """One of the two forms in which ops take it."""
        return packed(may) if self.maybe() else may


def packed(may: Tensor) -> BitMask:
    with fastunlearn.backend("auto"):
        return BitMask.pack(may)


def on(backend: str, call: Callable[[], Any]) -> Any:
    """What the call gives on that backend, or the kind of its error where it refuses: ValueError or TypeError, no other."""
    with warnings.catch_warnings(), fastunlearn.backend(backend):
        warnings.simplefilter("ignore")
        try:
            return call()
        except (ValueError, TypeError) as error:
            refusal = error
    assert len(str(refusal)) > 20, f"an error of few words: {refusal!r}"
    return type(refusal)


def refused(*results: Any) -> bool:
    """Whether the calls refused; if one did, all must."""
    errors = [r for r in results if isinstance(r, type)]
    assert len(errors) in (0, len(results)), f"one refuses, another does not: {results}"
    assert len(set(errors)) < 2, errors
    return bool(errors)


def near(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """Entry by entry: as exact as `bound` (absolute), infinite and NaN where the exact number is in the type of `got`."""
    assert got.shape == want.shape, f"{tuple(got.shape)}, want {tuple(want.shape)}"
    rounded, got, want = want.to(got.dtype).double(), got.double(), want.double()
    same = (got == rounded) | (got.isnan() & rounded.isnan()) | (want.isfinite() & ((got - want).abs() <= bound))
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"{int((~same).sum())} of {same.numel()} entries; {at}: {got[at]}, want {want[at]}")


def run(check: Callable[[Draw], None], backend: str, cases: int) -> int:
    """Runs the function on so many cases; returns how many there were. Raises what it raises, by its smallest case."""
    ran = 0

    def one(data: Any, seed: int) -> None:
        nonlocal ran
        ran += 1
        check(Draw(data, seed, backend))

    one.__name__ = one.__qualname__ = f"{check.__name__}_{backend}"
    settings(max_examples=cases)(given(st.data(), st.integers(0, 2**32 - 1))(one))()
    return ran


def fuzz(*names: str, backends: Sequence[str] = ("native",)) -> Callable[[Callable[[Draw], None]], Any]:
    """See the head of this file. `names`: the ops that the function tests."""

    def decorate(check: Callable[[Draw], None]) -> Any:
        TESTED.append(Tested(names, check, tuple(backends)))

        marks = {"triton": [pytest.mark.thorough]}
        values = [pytest.param(backend, marks=marks.get(backend, [])) for backend in backends]

        @pytest.mark.hypothesis
        @pytest.mark.parametrize("backend", values)
        def test(backend: str) -> None:
            if backend == "triton" and torch.cuda.is_available():
                pytest.skip("runs Triton's interpreter, which a process with a GPU does not use")
            cases = settings().max_examples
            run(check, backend, max(cases // SLOWER, 3) if backend == "triton" else cases)

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate
