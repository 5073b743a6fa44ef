"""`fastunlearn bench`: every op beside its peers and its limit; `python -m benchmarks` of the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fastunlearn

ROOT = Path(fastunlearn.__file__).resolve().parent.parent


def main(argv: Sequence[str]) -> int:
    """Passes everything on; 2 where the package was installed without its source tree."""
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        print(
            "fastunlearn bench: the benchmarks are in the source tree, and this is an installed package. From a checkout of the "
            "repository: pip install -e '.[dev,llm]', then fastunlearn bench run",
            file=sys.stderr,
        )
        return 2
    # A process of its own: the benchmarks choose threads and handle signals for themselves.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *(argv or ["--help"])]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
