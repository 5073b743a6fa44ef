"""UA, IRA, CRA: what an unlearned model forgot and kept, as UnlearnCanvas counts it (Zhang et al. 2024, arXiv 2402.11846).

With acc(Y) the share of images of Y which a classifier takes for Y, drawn by the model that unlearned X:

    UA  = 1 - acc(X)
    IRA = mean of acc(Y) over all Y != X of X's own domain (styles for a style, objects for an object)
    CRA = mean of acc(Y) over all Y of the other domain

Images of a style are those of all objects in it and the other way round, so those of X count in CRA too: a model that forgot a style
must still draw the objects.

The surrogate style (UnlearnCanvas' Seed_Images) is a style for some and none for others; `seed_theme="exclude"` leaves its images
out of everything, `"include"` counts it as one more style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: of a classifier, to call an image an image of something
CONFIDENCE = 0.5
#: share of the images of the erased concept that must be images of something
VALID_SHARE = 0.9
#: percent by which they may stay below what the unedited model's images of the surrogate prompts reach
SURROGATE_MARGIN = 5.0

Kind = Literal["style", "object"]


def confident(style_logits: Tensor, object_logits: Tensor) -> Tensor:
    """Which images are images of something: bool [n] of logits [n, themes] and [n, objects]."""
    sure = [logits.detach().float().cpu().softmax(1).amax(1) >= CONFIDENCE for logits in (style_logits, object_logits)]
    return sure[0] & sure[1]


@dataclass
class Counts:
    """What the classifiers said of an answer set, by theme and object that were asked for; all int64 [themes, objects].

    Attributes:
        images: drawn.
        style, object: whose style (object) was recognised.
        valid: taken for some style and for some object, both with a confidence of at least `CONFIDENCE`.
    """

    images: Tensor
    style: Tensor
    object: Tensor
    valid: Tensor

    @classmethod
    def zeros(cls, themes: int, objects: int) -> Counts:
        return cls(*(torch.zeros(themes, objects, dtype=torch.int64) for _ in range(4)))

    def add(self, theme: Tensor, thing: Tensor, style_logits: Tensor, object_logits: Tensor) -> None:
        """Counts one batch.

        Args:
            theme, thing: int64 [n], what was asked for.
            style_logits: [n, themes]. object_logits: [n, objects].

        Raises:
            ValueError: logits for another number of labels.
        """
        for name, logits, labels in (
            ("style", style_logits, self.images.shape[0]),
            ("object", object_logits, self.images.shape[1]),
        ):
            if logits.shape != (len(theme), labels):
                raise ValueError(
                    f"{name}_logits: want {(len(theme), labels)}, got {tuple(logits.shape)}: another classifier's labels"
                )
        where = (theme.cpu(), thing.cpu())
        says = [logits.detach().float().cpu().argmax(1) for logits in (style_logits, object_logits)]
        parts = (
            (self.images, torch.ones_like(where[0])), (self.style, says[0] == where[0]),
            (self.object, says[1] == where[1]), (self.valid, confident(style_logits, object_logits)),
        )  # fmt: skip
        for table, which in parts:
            table.index_put_(where, which.long(), accumulate=True)


def _columns(counts: Counts, domain: Kind) -> Tensor:
    """acc of every label of a domain, fp64; NaN for one without images."""
    right, dim = (counts.style, 1) if domain == "style" else (counts.object, 0)
    return right.sum(dim).double() / counts.images.sum(dim)


def without_theme(counts: Counts, theme: int) -> Counts:
    """The counts without the images of one theme."""
    keep = [i for i in range(len(counts.images)) if i != theme]
    return Counts(*(table[keep] for table in (counts.images, counts.style, counts.object, counts.valid)))


def unlearning_metrics(
    counts: Counts,
    kind: Kind,
    index: int,
    *,
    seed_theme: int | None = None,
    count_seed: bool = True,
) -> dict[str, float | bool]:
    """UA, IRA, CRA in percent, and whether what the erased prompts draw is still an image.

    Args:
        counts: of the answer set.
        kind, index: of the erased concept: which theme or object it is.
        seed_theme: number of the surrogate style among the themes.
        count_seed: False leaves its images out.

    Returns:
        UA, IRA, CRA in [0, 100]; valid: percent of the images of erased prompts that are images of something; noise: whether
        those are fewer than `VALID_SHARE`.

    Raises:
        ValueError: the erased concept is the surrogate style, or the answer set holds no image of some concept.
    """
    rows, columns = counts.images.shape
    if not 0 <= index < (rows if kind == "style" else columns):
        raise ValueError(f"index: there is no {kind} {index}")
    if not count_seed:
        if seed_theme is None:
            raise ValueError("seed_theme: say which theme is the one that does not count")
        if kind == "style" and index == seed_theme:
            raise ValueError("index: the surrogate style cannot be erased")
        counts = without_theme(counts, seed_theme)
        index -= int(kind == "style" and index > seed_theme)
    if not ((counts.images.sum(0) > 0).all() and (counts.images.sum(1) > 0).all()):
        raise ValueError("counts: the answer set lacks images of some theme or object")
    other: Kind = "object" if kind == "style" else "style"
    own = _columns(counts, kind)
    rest = torch.arange(len(own)) != index
    erased = counts.valid.select(0 if kind == "style" else 1, index).sum()
    asked = counts.images.select(0 if kind == "style" else 1, index).sum()
    valid = float(erased) / float(asked)
    return {
        "UA": 100 * (1 - float(own[index])),
        "IRA": 100 * float(own[rest].mean()),
        "CRA": 100 * float(_columns(counts, other).mean()),
        "valid": 100 * valid,
        "noise": valid < VALID_SHARE,
    }


def worse_than_surrogate(row: Mapping[str, Any]) -> bool:
    """Whether a model draws less of something than noise and the unedited model both excuse.

    `noise` asks for `VALID_SHARE` of the erased prompts' images. A perfect eraser draws what the unedited model draws of the
    surrogate prompts, and the classifiers may be unsure of those, too (`valid_surrogate`): what counts against a model is to be
    below the lower of `VALID_SHARE` and `valid_surrogate` - `SURROGATE_MARGIN`.
    """
    surrogate = row.get("valid_surrogate")
    floor = 100 * VALID_SHARE if surrogate is None else min(100 * VALID_SHARE, surrogate - SURROGATE_MARGIN)
    return bool(row["valid"] < floor)


def mean_accuracy(counts: Counts) -> dict[str, float]:
    """Percent of all images whose style, object is recognised, that are images of something: of a model before unlearning."""
    images = counts.images.sum()
    return {
        "style accuracy": 100 * float(counts.style.sum() / images),
        "object accuracy": 100 * float(counts.object.sum() / images),
        "all valid": 100 * float(counts.valid.sum() / images),
    }


def table_mean(rows: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Means over targets, as the benchmark's table has them; a metric that no row has is left out."""
    out = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            out[name] = sum(values) / len(values)
    return out
