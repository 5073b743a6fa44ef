"""Calibration text for pruning: read, cut into sequences of tokens, and kept apart from what is to be forgotten.

What a pruning method sees decides which weights are left. A calibration text that holds the forget set would therefore leave a
trace of it in the mask itself, whatever is unlearned later; `check_calibration` refuses such text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunlearn.data.general_text import GENERAL_TEXT
from fastunlearn.data.text import load_rows

#: words in a row that two texts share by copying rather than by chance
RUN = 13
#: shorter strings (a name, a number, "yes") turn up anywhere and say nothing
LEAST = 3
#: times the text needed from which sequences are drawn
_SPARE = 8
_WORD = re.compile(r"\w+")


def calibration_texts(source: Any = None, *, split: str = "train", column: str = "text") -> list[str]:
    """Texts to calibrate on.

    Args:
        source: a .txt file, which is one text; what `load_rows` reads (.jsonl, .json, .csv, .parquet, a name on the Hugging Face
            Hub, rows), of which one column is taken; None: the packaged `GENERAL_TEXT`.
        split: of a hub data set.
        column: of rows.

    Raises:
        FileNotFoundError, OSError: as `load_rows`. ValueError: nothing in it, no such column, or a row whose column is no text.
    """
    if source is None:
        return list(GENERAL_TEXT)
    if isinstance(source, str | os.PathLike) and os.fspath(source).lower().endswith(".txt"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        texts = [path.read_text(encoding="utf-8")]
    else:
        rows = load_rows(source, split=split)
        texts = []
        for number, row in enumerate(rows, 1):
            if column not in row:
                raise ValueError(
                    f"{source}, row {number}: no column {column!r}; its columns are {', '.join(row) or 'none'}"
                )
            if not isinstance(row[column], str):
                raise ValueError(
                    f"{source}, row {number}: column {column!r} is no text but {type(row[column]).__name__}"
                )
            texts.append(row[column])
    if not any(text.strip() for text in texts):
        raise ValueError(f"{source}: no text in it")
    return texts


def calibration_tokens(
    texts: Sequence[str], tokenizer: Any, *, sequences: int = 128, length: int = 512, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Sequences of tokens from texts.

    Texts are taken one after another from a random one on, joined by blank lines, until there are eight times as many tokens as
    needed (or no more); of their consecutive sequences `sequences` are drawn. Where all texts together are too short, every
    sequence there is, of the greatest equal length that leaves almost nothing over.

    Args:
        texts: as `calibration_texts` gives them.
        tokenizer: of transformers; no special tokens are added.
        sequences: how many at most.
        length: tokens of one at most.
        seed: of both draws.

    Returns:
        int64 [at most sequences, at most length]; the texts that were read for them.

    Raises:
        ValueError: sequences below 1, length below 2, or fewer than two tokens in all.
    """
    if sequences < 1 or length < 2:
        raise ValueError(f"sequences, length: want at least 1 and 2, got {sequences} and {length}")
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(max(len(texts), 1), (), generator=generator))
    ids: list[int] = []
    used: list[str] = []
    for text in [*texts[start:], *texts[:start]]:
        used.append(text)
        end = "" if text.endswith("\n") else "\n\n"
        ids += tokenizer(text + end, add_special_tokens=False)["input_ids"]
        if len(ids) >= _SPARE * sequences * length:
            break
    if len(ids) < 2:
        raise ValueError(f"texts: {len(ids)} tokens in all, want at least 2")
    if len(ids) < sequences * length:
        rows = -(-len(ids) // length)
        length = len(ids) // rows
    rows = len(ids) // length
    tokens = torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)
    if rows > sequences:
        tokens = tokens[torch.randperm(rows, generator=generator)[:sequences].sort().values]
    return tokens, used


def _words(text: str | None) -> list[str]:
    return _WORD.findall((text or "").casefold())


def check_calibration(texts: Iterable[str], forget: Iterable[Sequence[str | None]]) -> None:
    """Checks that no calibration text holds what is to be forgotten.

    A question or an answer of at most thirteen words is found where its words stand in a text one after another (case,
    punctuation and white space aside); a longer one where any thirteen of its words in a row do. Strings of fewer than three
    words are not looked for: a bare name or number is no trace by itself. What is said in other words is not found.

    Args:
        texts: the calibration texts.
        forget: a row's strings (question and answer; None where there is none), row by row.

    Raises:
        ValueError: naming the first rows that were found, and what of them.
    """
    runs: dict[int, dict[tuple[str, ...], int]] = {}
    for number, strings in enumerate(forget, 1):
        for string in strings:
            words = _words(string)
            size = min(len(words), RUN)
            if size >= LEAST:
                grams = runs.setdefault(size, {})
                for i in range(len(words) - size + 1):
                    grams.setdefault(tuple(words[i : i + size]), number)
    found: dict[int, str] = {}
    for text in texts:
        words = _words(text)
        for size, grams in runs.items():
            for i in range(len(words) - size + 1):
                gram = tuple(words[i : i + size])
                if gram in grams:
                    found.setdefault(grams[gram], " ".join(gram))
    if found:
        shown = "; ".join(f"row {number}: {gram!r}" for number, gram in sorted(found.items())[:3])
        more = f"; and {len(found) - 3} more rows" if len(found) > 3 else ""
        raise ValueError(
            f"calibration text: holds what is to be forgotten ({shown}{more}); the choice of weights would remember it. Take "
            "other text"
        )
