"""The canvas: a world of twenty objects in twenty-four painting styles (and as photographs), drawn by this code at 64 x 64.

It stands in for UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846), whose protocol it follows: every object occurs in every style,
prompts read "A {object} image in {style} style.", and the plain style (there `Seed_Images`) is the usual surrogate.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fastunlearn.data.canvas.shapes import SHAPES, label_map
from fastunlearn.data.canvas.styles import PAINTERS, SEED_STYLE, Scene

__all__ = ["OBJECTS", "SEED_STYLE", "SIZE", "STYLES", "THEMES", "concept", "draw", "prompt"]

SIZE = 64
OBJECTS: tuple[str, ...] = tuple(SHAPES)
THEMES: tuple[str, ...] = tuple(PAINTERS)
STYLES: tuple[str, ...] = tuple(name for name in THEMES if name != SEED_STYLE)


def prompt(object: str, style: str) -> str:
    """The sentence that names one pair, as in UnlearnCanvas."""
    return f"A {object} image in {style.replace('_', ' ')} style."


def concept(name: str, among: Iterable[str] | None = None) -> str:
    """The canvas' own spelling of a style or an object ("pop_art" -> "Pop Art").

    Args:
        among: the names to choose from; None: every theme and object.

    Raises:
        ValueError: no such name; the message lists what there is.
    """
    names = [*THEMES, *OBJECTS] if among is None else list(among)
    spelt = {n.lower().replace(" ", "_"): n for n in names}
    wanted = name.strip().lower().replace(" ", "_")
    if wanted in spelt:
        return spelt[wanted]
    close = difflib.get_close_matches(wanted, list(spelt), n=1)
    hint = f" Did you mean {spelt[close[0]]!r}?" if close else ""
    raise ValueError(f"concept: {name!r} is not on the canvas.{hint} It knows {', '.join(names)}")


def draw(object: str, style: str, rng: np.random.Generator, size: int = SIZE) -> npt.NDArray[np.uint8]:
    """One picture of an object in a style: position, size, tilt and colours are random.

    Args:
        rng: the source of the randomness; the same state draws the same picture.
        size: 64; the patterns of the styles are made for it.

    Returns:
        RGB uint8 [size, size, 3].

    Raises:
        ValueError: unknown object or style, or a size that is no positive multiple of 32.
    """
    object, style = concept(object, OBJECTS), concept(style, THEMES)
    if size <= 0 or size % 32:
        raise ValueError(f"size: {size}; want a positive multiple of 32")
    scale = float(rng.uniform(0.68, 0.85))
    reach = min(0.97 - scale, 0.14)
    centre = (float(rng.uniform(-reach, reach)), float(rng.uniform(-reach, reach)))
    labels = label_map(object, 2 * size, centre=centre, scale=scale, degrees=float(rng.uniform(-6, 6)))
    fine = np.clip(PAINTERS[style](Scene(labels, rng)), 0, 1)
    small = fine.reshape(size, 2, size, 2, 3).mean((1, 3))
    return np.asarray(np.round(small * 255), dtype=np.uint8)
