"""Calibration text for pruning: read, cut into sequences of tokens, and kept apart from what is to be forgotten.

What a pruning method sees decides which weights are left. A calibration text that holds the forget set would therefore leave a
trace of it in the mask itself, whatever is unlearned later; `check_calibration` refuses such text.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
#: how many words from a short answer the names in its question count as the same place: about a sequence of calibration
NEAR = 512
#: content words have more letters
_SHORT = 3
_WORD = re.compile(r"\w+")
#: longer words that questions of any content hold, and that tell nothing of what is asked
_COMMON = frozenset(
    _WORD.findall(
        """
    about according after against also among another answer anyone anything around because been before behind being below best
    between both came come could describe detail details did does doing done down during each either else ever every exactly
    explain find first following found from gave give given gives going have having hello here hers herself him himself however
    into itself just kind kindly know known knows last least less like list lived lives living made make makes many mean means
    might more most much must name named names near never none nothing once only onto other others over part please provide
    question questions really right said same says shall share should since some someone something still such take tell than
    thank thanks that their theirs them themselves then there these they thing things think this those through time times under
    until upon used using very want wanted wants well went were what whatever when where wherever whether which while whom
    whose will with within without work worked works would write wrong your yours yourself
    """
    )
)


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


def _content_words(question: str) -> frozenset[str]:
    """The words that tell what is asked, case aside: the names in it, else its less common words."""
    names, starts, others, short = set[str](), set[str](), set[str](), set[str]()
    end = 0
    for found in _WORD.finditer(question):
        word, gap = found.group(), question[end : found.start()]
        first = end == 0 or any(mark in gap for mark in ".?!:\n")
        end = found.end()
        folded = word.casefold()
        if folded in _COMMON:
            continue
        capital = word[0].isupper()
        if len(word) <= _SHORT:
            if capital and not first and len(word) > 1:
                short.add(folded)
        elif not capital:
            others.add(folded)
        else:
            # Any word is capitalised at the start of a sentence.
            (starts if first else names).add(folded)
    return frozenset(names or (starts | others) or short)


def _runs(words: Sequence[str], size: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    for i in range(len(words) - size + 1):
        yield i, tuple(words[i : i + size])


def check_calibration(texts: Iterable[str], forget: Iterable[Sequence[str | None]]) -> None:
    """Checks that no calibration text holds what is to be forgotten.

    Words are compared, case, punctuation and white space aside. A text is refused where there stands in it, word after word,

    - a question, or thirteen words in a row of a longer one;
    - thirteen words in a row of an answer;
    - a whole answer of three to twelve words, and within 512 words of it all content words of its question: the names (words
      of more than three letters that are capitalised, though not by the start of a sentence), or where it has none its
      words of more than three letters without the commonest, or where it has none of these either shorter names. An
      answer without a question (plain text) is its own question.

    A short answer without these ("I don't know.", "New York City") may be chance: such are counted, in one warning. Strings of fewer
    than three words are not looked for: a bare name or number is no trace by itself. What is said in other words is not
    found.

    Args:
        texts: the calibration texts.
        forget: a row's strings (question, None where there is none; and answer), row by row; further strings are answers too.

    Raises:
        ValueError: naming the first rows that were found, and what of them.

    Warns:
        UserWarning: how often short answers stand in the texts away from what their questions are about.
    """
    runs: dict[int, dict[tuple[str, ...], int]] = {}
    # Many rows may have the same answer.
    answers: dict[int, dict[tuple[str, ...], dict[frozenset[str], int]]] = {}
    for number, (question, *others) in enumerate(forget, 1):
        for string in (question, *others):
            words = _words(string)
            if len(words) < LEAST:
                continue
            if string is question or len(words) >= RUN:
                size = min(len(words), RUN)
                grams = runs.setdefault(size, {})
                for _, gram in _runs(words, size):
                    grams.setdefault(gram, number)
            else:
                asked = _content_words((question if question is not None else string) or "")
                answers.setdefault(len(words), {}).setdefault(tuple(words), {}).setdefault(asked, number)
    found: dict[int, str] = {}
    chance: dict[tuple[str, ...], int] = {}
    for text in texts:
        words = _words(text)
        for size, grams in runs.items():
            for _, gram in _runs(words, size):
                if gram in grams:
                    found.setdefault(grams[gram], " ".join(gram))
        for size, wanted in answers.items():
            for i, gram in _runs(words, size):
                if gram in wanted:
                    row = _row_nearby(words[max(i - NEAR, 0) : i + size + NEAR], wanted[gram])
                    if row is None:
                        chance[gram] = chance.get(gram, 0) + 1
                    else:
                        found.setdefault(row, " ".join(gram))
    if found:
        shown = "; ".join(f"row {number}: {gram!r}" for number, gram in sorted(found.items())[:3])
        more = f"; and {len(found) - 3} more rows" if len(found) > 3 else ""
        raise ValueError(
            f"calibration text: holds what is to be forgotten ({shown}{more}); the choice of weights would remember it. Take "
            "other text"
        )
    if chance:
        most = sorted(chance.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{' '.join(gram)!r} ({count})" for gram, count in most[:3]) + (
            ", ..." if len(most) > 3 else ""
        )
        warnings.warn(
            f"calibration text: {len(chance)} short answers of the forget set stand in it, {sum(chance.values())} times in all, "
            f"without what their questions name nearby: {shown}. Taken for chance; take other text if they are not",
            UserWarning,
            stacklevel=2,
        )


def _row_nearby(nearby: Sequence[str], rows: Mapping[frozenset[str], int]) -> int | None:
    """The first row of which all content words stand there; none for a question without any."""
    there = set(nearby)
    return min((number for asked, number in rows.items() if asked and asked <= there), default=None)
