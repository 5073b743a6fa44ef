"""One file an op; `load()` finds them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from benchmarks.spec import Op


def names() -> list[str]:
    """Ops that have a benchmark: the files of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(wanted: Sequence[str] | None = None) -> list[Op]:
    """The ops by name, all of them by default.

    Raises:
        ValueError: no benchmark of that name.
    """
    known = names()
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise ValueError(f"ops: no benchmark named {', '.join(unknown)}; there are: {', '.join(known)}")
    return [importlib.import_module(f"benchmarks.ops.{name}").OP for name in wanted or known]
