"""Work on rows that several processes share and that an interruption does not lose.

Batches are made before they are shared out, so a row sees the same neighbours however many processes there are: several give the
numbers of one. Each process appends what it has done to a file of its own; a run that starts again skips those rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from fastunlearn.report.files import plain


def world() -> tuple[int, int]:
    """(this process, of how many)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gathered(value: Any) -> list[Any]:
    """What every process has, in their order."""
    count = world()[1]
    if count == 1:
        return [value]
    out: list[Any] = [None] * count
    dist.all_gather_object(out, value)
    return out


def drop_journals(folder: Path | None, name: str) -> None:
    """Removes what interrupted runs left; every process calls this before it reads."""
    if folder is not None and world()[0] == 0:
        for path in folder.glob(f".{name}.*.jsonl"):
            path.unlink(missing_ok=True)
    gathered(None)


class Journal:
    """Results of rows by stage, kept on disk until the whole is done.

    Args:
        folder: where the files lie; None: nothing is kept.
        name: of the files, `.<name>.<process>.jsonl`.
        about: what this is an evaluation of; a journal of another one is refused.

    Raises:
        ValueError: the folder holds a journal of something else; both are named.
    """

    def __init__(self, folder: Path | None, name: str, about: Mapping[str, Any]):
        self.folder, self.name, self.about = folder, name, plain(dict(about))
        self.found: dict[str, dict[int, Any]] = {}
        for path in self.paths():
            self._read(path)
        # Nobody writes before all have read.
        gathered(None)

    def paths(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob(f".{self.name}.*.jsonl"))

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            # Another process has found it worthless.
            return
        for number, line in enumerate(text.split("\n")):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                # The last line of a process that was killed; nothing stands behind it.
                if number == 0:
                    path.unlink(missing_ok=True)
                    return
                continue
            try:
                if number == 0:
                    self._check(entry["about"], path)
                else:
                    rows = self.found.setdefault(entry["stage"], {})
                    rows |= {int(row): value for row, value in entry["rows"].items()}
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number + 1}: not written by an evaluation ({error!r}); remove it"
                ) from None

    def _check(self, other: Mapping[str, Any], path: Path) -> None:
        different = [key for key in {**self.about, **other} if other.get(key) != self.about.get(key)]
        if different:
            key = different[0]
            raise ValueError(
                f"output: {path.parent} holds an interrupted evaluation with {key} = {other.get(key)!r}, this one has "
                f"{self.about.get(key)!r}; choose another folder, or overwrite it"
            )

    def add(self, stage: str, rows: Mapping[int, Any]) -> None:
        """Keeps the results of a batch."""
        self.found.setdefault(stage, {}).update(rows)
        if self.folder is None:
            return
        path = self.folder / f".{self.name}.{world()[0]}.jsonl"
        fresh = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            if fresh:
                file.write(json.dumps({"about": self.about}) + "\n")
            elif file.tell() and not self._whole(path):
                file.write("\n")
            file.write(json.dumps({"stage": stage, "rows": rows}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _whole(path: Path) -> bool:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def run(
        self,
        stage: str,
        rows: int,
        batches: Sequence[Sequence[int]],
        do: Callable[[list[int]], Mapping[int, Any]],
        *,
        progress: bool = True,
    ) -> list[Any]:
        """Does the batches that are not done yet, this process its share of them.

        Args:
            stage: name of this work. rows: how many there are.
            batches: numbers of rows. do: results of some rows, as JSON holds them.

        Returns:
            The results of all rows, in every process.
        """
        rank, count = world()
        found = self.found.setdefault(stage, {})
        left = [[i for i in batch if i not in found] for batch in batches]
        mine = [batch for batch in left[rank::count] if batch]
        off = True if not progress or rank else None
        with tqdm(total=sum(map(len, mine)), desc=f"  {stage}", unit="row", leave=False, disable=off) as bar:
            for batch in mine:
                self.add(stage, do(batch))
                bar.update(len(batch))
        merged: dict[int, Any] = {}
        for part in gathered(found):
            merged |= part
        self.found[stage] = merged
        return [merged[i] for i in range(rows)]

    def clear(self) -> None:
        """Removes the files: all of it stands in the logs."""
        gathered(None)
        if world()[0] == 0:
            for path in self.paths():
                path.unlink(missing_ok=True)
