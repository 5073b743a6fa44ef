"""Files that are there whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> None:
    """Writes a file whole.

    Args:
        overwrite: replace a file that is there already.

    Raises:
        FileExistsError: there is a file and `overwrite` is False. OSError: it cannot be written; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; overwrite=True replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: scalars of torch and numpy as Python's, paths as text, NaN and infinity as null.

    Raises:
        TypeError: it is none of mapping, list, text, number, truth value, None.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"data: JSON holds no {type(value).__name__}")


def dump_json(data: Any) -> str:
    """Text of a JSON file: two spaces, utf-8 letters as they are, a newline at the end."""
    return json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike[str], data: Any, *, overwrite: bool = True) -> None:
    """Writes data as JSON, whole or not at all.

    Args:
        data: mappings, lists, numbers, text; `plain` says what becomes of the rest.
        overwrite: replace a file that is there already.

    Raises:
        TypeError: the data hold what JSON cannot. FileExistsError, OSError: as `write_bytes`.
    """
    write_bytes(path, dump_json(data).encode(), overwrite=overwrite)
