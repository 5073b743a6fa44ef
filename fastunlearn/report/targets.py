"""Targets that a run was to meet: "forget.exact_recall<=0.05", "text.perplexity<=1.05x" (times what it was before)."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(
    r"\s*(?P<part>[^.<>=]+)\.(?P<metric>[^<>=]+?)\s*(?P<sign><=|>=|<|>)\s*(?P<value>[^x\s]+?)(?P<times>x?)\s*"
)
Numbers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """A bound of a measurement after unlearning.

    Attributes:
        times: value is a factor of the measurement before.
    """

    part: str
    metric: str
    sign: str
    value: float
    times: bool = False

    @classmethod
    def read(cls, text: str) -> Target:
        """
        Raises:
            ValueError: it is no target; how one looks is said.
        """
        match = _FORM.fullmatch(text)
        try:
            value = float(match["value"]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or not math.isfinite(value):
            raise ValueError(
                f"target: want part.metric<=number (or >=; 1.05x is times what it was before), got {text!r}"
            )
        return cls(match["part"].strip(), match["metric"], match["sign"], value, bool(match["times"]))

    def bound(self, before: Numbers) -> float | None:
        """The number to compare with; None: it was not measured before."""
        if not self.times:
            return self.value
        old = before.get(self.part, {}).get(self.metric)
        return self.value * old if isinstance(old, int | float) and math.isfinite(old) else None

    def met(self, before: Numbers, after: Numbers) -> bool | None:
        """None: it cannot be said, for it was not measured."""
        new, bound = after.get(self.part, {}).get(self.metric), self.bound(before)
        if bound is None or not isinstance(new, int | float) or isinstance(new, bool) or not math.isfinite(new):
            return None
        return _SIGNS[self.sign](new, bound)

    def words(self, value: str) -> str:
        """The bound in words, around its number."""
        return f"{ {'<=': 'at most', '>=': 'at least', '<': 'below', '>': 'above'}[self.sign] } {value}"

    def __str__(self) -> str:
        return self.words(f"{self.value:g}{' x before' if self.times else ''}")
