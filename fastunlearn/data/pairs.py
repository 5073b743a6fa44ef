"""Forget rows paired with retain rows: what one step of unlearning sees.

As in open-unlearning an epoch is one pass over the forget set and each forget row comes with retain rows. Those run through the
retain set in random order, every row once before any comes again, across epochs too. Order depends on (seed, epoch) only, so a
resumed run sees what the run without the interruption would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from fastunlearn.data.text import TextSet, collate, name_rows

#: (row of the forget set, rows of the retain set)
Pair = tuple[int, tuple[int, ...]]


def row_limit(max_length: int | None, model: Any) -> int | None:
    """Tokens of a row at most: max_length, or the model's context (max_position_embeddings) where that is less; None: no limit."""
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    known = [limit for limit in (max_length, context) if limit is not None]
    return min(known, default=None)


def check_context(rows: Any, model: Any) -> None:
    """Of rows that were encoded elsewhere.

    Raises:
        ValueError: some are longer than the model's context; it says how many.
    """
    limit = row_limit(None, model)
    lengths = [len(rows[i]["input_ids"]) for i in range(len(rows))]
    long = sum(limit is not None and length > limit for length in lengths)
    if long:
        raise ValueError(
            f"{getattr(rows, 'what', 'rows')}: {long} of {len(lengths)} rows are longer than the model's context of {limit} tokens (up to "
            f"{max(lengths)}); what lies behind it would not count, so encode them with max_length={limit} or less, or split them"
        )


def group_rows(retain: TextSet, args: Any) -> tuple[list[str], list[int]]:
    """Groups of the retain rows, by the column `args.retain_groups` that names them.

    Returns:
        (names in their order, for each row the number of its group).

    Raises:
        ValueError: rows without a name, as many budgets as there are no groups, batches without a row of each.
    """
    column = str(args.retain_groups)
    without = [i for i, row in enumerate(retain.rows) if row.get(column) in (None, "")]
    if without:
        columns = ", ".join(retain.rows[without[0]])
        raise ValueError(
            f"retain_groups: {retain.what}, {name_rows(without)}: nothing in {column!r} (columns: {columns})"
        )
    named = [str(row[column]) for row in retain.rows]
    names = sorted(set(named))
    if args.retain_budgets is not None and len(args.retain_budgets) != len(names):
        raise ValueError(
            f"retain_budgets: want {len(names)}, one for each group ({', '.join(names)}), got {len(args.retain_budgets)}"
        )
    rows = args.per_device_train_batch_size * args.retain_per_forget
    if rows < len(names):
        raise ValueError(
            f"retain_per_forget: a batch has {rows} retain rows and there are {len(names)} groups; want one of each at least"
        )
    if args.world_size > 1 and not args.dataloader_drop_last:
        raise ValueError(
            "retain_groups: on several processes want dataloader_drop_last=true: every batch needs every group"
        )
    return names, [names.index(name) for name in named]


class PairedSet(Dataset[dict[str, Any]]):
    """Items {"forget": row, "retain": [rows], "alternate": row}; retain and alternate only where there are such sets.

    Args:
        forget, retain: sets of token rows (`fastunlearn.data.text.TextSet`); retain None: no retain rows.
        alternates: a set aligned with the forget set, of the answers to be preferred ("I don't know").
    """

    def __init__(self, forget: Dataset[Any], retain: Dataset[Any] | None, alternates: Dataset[Any] | None = None):
        self.forget, self.retain, self.alternates = forget, retain, alternates

    def __len__(self) -> int:
        return len(self.forget)  # type: ignore[arg-type]

    def __getitem__(self, key: Pair | int) -> dict[str, Any]:
        row, others = (key, (key % max(len(self.retain or ()), 1),)) if isinstance(key, int) else key  # type: ignore[arg-type]
        item: dict[str, Any] = {"forget": self.forget[row]}
        if self.retain is not None:
            item["retain"] = [self.retain[i] for i in others]
        if self.alternates is not None:
            item["alternate"] = self.alternates[row]
        return item


class PairedSampler(Sampler[Pair]):
    """Draws the pairs of one epoch.

    Args:
        forget, retain: number of rows; retain 0: pairs have no retain row.
        per_forget: retain rows for each forget row.
        seed: of both orders.
        groups: for each retain row the number of its group, from 0: rows are drawn from one group after the other in turn.
    """

    def __init__(
        self, forget: int, retain: int, per_forget: int = 1, seed: int = 0, groups: Sequence[int] | None = None
    ):
        self.forget, self.retain, self.per_forget, self.seed = forget, retain, per_forget if retain else 0, seed
        self.members: list[list[int]] = [[] for _ in range(1 + max(groups))] if groups else [list(range(retain))]
        for row, group in enumerate(groups or ()):
            self.members[group].append(row)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget

    def _permutation(self, stream: int, turn: int, n: int) -> list[int]:
        # Seeds of neighbouring turns must not share their random numbers: a generator seeded by both makes the seed.
        root = torch.Generator().manual_seed(self.seed * 1_000_003 + stream)
        draws = torch.randint(2**62, (turn + 1,), generator=root)
        return torch.randperm(n, generator=torch.Generator().manual_seed(int(draws[turn]))).tolist()

    def __iter__(self) -> Iterator[Pair]:
        at = self.epoch * self.forget * self.per_forget
        orders: dict[int, tuple[int, list[int]]] = {}
        for row in self._permutation(0, self.epoch, self.forget):
            others = []
            for place in range(at, at + self.per_forget):
                place, group = divmod(place, len(self.members))
                turn, place = divmod(place, len(self.members[group]))
                if orders.get(group, (-1,))[0] != turn:
                    orders[group] = turn, self._permutation(1 + group, turn, len(self.members[group]))
                others.append(self.members[group][orders[group][1][place]])
            at += self.per_forget
            yield row, tuple(others)


class PairedCollator:
    """Items of a `PairedSet` -> {"forget": batch, "retain": batch, "alternate": batch}, each as `collate` gives it."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        parts = {"forget": [item["forget"] for item in items]}
        if "retain" in items[0]:
            parts["retain"] = [row for item in items for row in item["retain"]]
        if "alternate" in items[0]:
            parts["alternate"] = [item["alternate"] for item in items]
        return {name: collate(rows, self.pad_id) for name, rows in parts.items()}
