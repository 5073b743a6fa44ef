"""The course of a run as a picture: losses, learning rate, capacity, gradient norm over the steps.

matplotlib without pyplot: no global state, no display, safe beside a notebook's own figures.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastunlearn.report.files import write_bytes

#: key in the log, what stands beside its axis, colour
PANELS: tuple[tuple[str, str, str], ...] = (
    ("forget_loss", "forget loss\n(nats)", "#b2182b"),
    ("retain_loss", "retain loss\n(nats)", "#2166ac"),
    ("learning_rate", "learning rate", "#4d4d4d"),
    ("capacity", "capacity: share of the\nforget gradient let through", "#1b7837"),
    ("hamu_hardness", "hardness: share of forgetting\nthat costs what must stay", "#b35806"),
    ("hamu_s", "s: share of what the\nball allows that was asked", "#5e4fa2"),
    ("hamu_holds", "certificates that held", "#1b7837"),
    ("grad_norm", "gradient norm\n(L2)", "#762a83"),
)


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a key in a log; entries without it, or whose value is no finite number, are left out."""
    steps, values = [], []
    for entry in history:
        value = entry.get(key)
        if isinstance(value, int | float) and math.isfinite(value) and "step" in entry:
            steps.append(float(entry["step"]))
            values.append(float(value))
    return steps, values


def draw_curves(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws a run's curves into a PNG file, one panel a quantity, those that the log holds.

    Args:
        history: log_history of transformers' trainer state: dicts with step and any of forget_loss, retain_loss (as the objective
            has them, before their factors), learning_rate, capacity (in [0, 1]), hamu_hardness, hamu_s, hamu_holds and grad_norm.
        path: of the picture; a file that is there is replaced.

    Raises:
        ImportError: matplotlib is missing. ValueError: the log holds nothing to draw. OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ImportError("curves need matplotlib: pip install 'fastunlearn[llm]'") from None
    panels = [(key, label, colour) for key, label, colour in PANELS if series(history, key)[0]]
    if not panels:
        raise ValueError("history: no loss, learning rate, capacity or gradient norm in it; there is nothing to draw")
    figure = Figure(figsize=(7.5, 0.9 + 1.75 * len(panels)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (key, label, colour) in zip(axes, panels, strict=True):
        steps, values = series(history, key)
        # A line of few points shows where they are.
        axis.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(steps) <= 40 else None, markersize=3)
        axis.set_ylabel(label, fontsize=8)
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axis.yaxis.get_offset_text().set_fontsize(8)
        if key in ("capacity", "hamu_hardness", "hamu_s", "hamu_holds"):
            axis.set_ylim(0, 1.02)
        elif min(values) >= 0:
            axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("optimiser step", fontsize=9)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if title:
        figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue(), overwrite=True)
