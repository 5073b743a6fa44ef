"""Files that are there whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process off
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """While entered, no other process may enter it for the same file; a process that is killed leaves no claim behind.

    Raises:
        BlockingIOError: another process writes the file.
    """
    path = Path(path)
    if fcntl is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process before removes the file as it goes: a lock on a removed file locks nothing.
            if lock.exists() and os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                break
        except BlockingIOError:
            holder = os.pread(descriptor, 40, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise BlockingIOError(f"output: {holder} writes {path}; wait for it or choose another file") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


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
