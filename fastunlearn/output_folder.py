"""The output folder of a run: locked while it lasts, refused where it holds something, and what a full disk looks like."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
#: folders that this process owns
_HELD: set[Path] = set()


class OutputFolder:
    """A folder that one run owns: `with claim_output(path) as folder`.

    Attributes:
        path: the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        resume: bool = False,
        keep: bool = False,
        resumable: bool = True,
    ):
        self.path = Path(folder).expanduser()
        self._ways = (
            "or resume (resume_from_checkpoint=true) or overwrite it (overwrite_output_dir=true)"
            if resumable
            else "or overwrite it (--overwrite)"
        )
        self.overwrite = overwrite
        self.resume = resume
        self.keep = keep
        self._lock: int | None = None
        self._made: list[Path] = []
        self._nested = False
        # In a distributed run the first process owns the folder for all of them.
        self._follows = int(os.environ.get("RANK", "0")) > 0

    def check(self) -> None:
        """Raises what `with` would raise, and changes nothing.

        Raises:
            BlockingIOError: another run writes there. FileExistsError: it holds something, and none of overwrite, resume and keep
            is set. NotADirectoryError: it, or what it would stand in, is a file. PermissionError: it may not be written.
        """
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"output: {there} is a file; want a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"output: no permission to write into {there}; choose another folder")
        if self.path.resolve() in _HELD or self._follows:
            return
        lock = self.path / LOCK
        if lock.exists() and fcntl is not None:
            descriptor = os.open(lock, os.O_RDWR)
            try:
                self._flock(descriptor)
            finally:
                os.close(descriptor)
        self._check_empty()

    def _check_empty(self) -> None:
        if not self.path.is_dir() or self.overwrite or self.resume or self.keep:
            return
        there = sorted(p.name for p in self.path.iterdir() if p.name != LOCK and not _leftover(p.name))
        if there:
            shown = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            raise FileExistsError(
                f"output: {self.path} holds something already ({shown}); choose another folder, {self._ways}"
            )

    def _flock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another run"
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"output: another run writes to {self.path} ({holder}); wait for it or choose another folder",
            ) from None

    def __enter__(self) -> Self:
        self.check()
        # A command claims its folder before it loads a model, and the trainer inside it claims it again.
        self._nested = self.path.resolve() in _HELD or self._follows
        if self._nested:
            return self
        self._made = make_folder(self.path)
        try:
            self._claim()
            # A second run may have come between the check and the lock.
            self._check_empty()
        except BaseException:
            self.release()
            raise
        for path in self.path.iterdir():
            if _leftover(path.name):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if self.overwrite and not self.resume:
            self._remove_training_checkpoints()
        return self

    def _claim(self) -> None:
        if fcntl is None:
            warnings.warn("output: this system has no flock; nothing keeps a second run off the folder", stacklevel=3)
            return
        lock = self.path / LOCK
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._flock(descriptor)
                # The run before removes its lock file when it ends: a lock on a removed file locks nothing.
                if lock.exists() and os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._lock = descriptor
        _HELD.add(self.path.resolve())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}, {time.strftime('%F %T')}\n".encode(), 0)

    def _remove_training_checkpoints(self) -> None:
        """Trainer's checkpoint-<step> of the run before: a later resume would take them for this run's."""
        for path in self.path.glob("checkpoint-*"):
            if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "trainer_state.json").is_file():
                shutil.rmtree(path)

    def release(self) -> None:
        """Gives the folder back; one that this run made and left empty is removed."""
        if self._nested:
            return
        _HELD.discard(self.path.resolve())
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        with suppress(OSError):
            for path in reversed(self._made):
                path.rmdir()
        self._made = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _leftover(name: str) -> bool:
    """A temporary name of a save that was killed."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


def claim_output(
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    keep: bool = False,
    resumable: bool = True,
) -> OutputFolder:
    """The output folder of a run, locked while the `with` lasts.

    The lock is the kernel's (flock on folder/.lock): a run that is killed gives it back. A folder that holds something is
    refused; with `overwrite`, `resume` or `keep` it is taken as it is, but for what a killed save left half written and, with
    `overwrite`, the Trainer's `checkpoint-<step>` folders of the run before. No other file is removed. `keep`: for a program that
    writes on in its folder without being asked. `resumable`: whether a message may name that way.

    Raises (on entering):
        BlockingIOError: another run writes there. FileExistsError: it holds something. NotADirectoryError: it is a file.
        OSError: it cannot be made.
    """
    return OutputFolder(folder, overwrite=overwrite, resume=resume, keep=keep, resumable=resumable)


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder with its parents; returns those that were not there."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return absent


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left on the disk."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    # safetensors raises its own exception.
    return "os error 28" in str(error) or "No space left" in str(error)
