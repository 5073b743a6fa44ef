"""Lines and heat maps as inline SVG, without a drawing library: colours come from the page's style, so that they follow its light.

Every picture has a title and a description for those who do not see it; the numbers stand in a table that the page puts below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastunlearn.report.markup import Html, tag

#: of a line, after its colour: who cannot tell the colours can tell these
_DASHES = (None, "6 3", "2 2", "8 2 2 2", "3 5", "12 3")
COLOURS = len(_DASHES)
#: as wide as a phone: text keeps its size there
WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 12, 36


@dataclass(frozen=True)
class Line:
    """Attributes: name; x, y: finite numbers, as many of each; marks: indices of points that stand out; number: of its colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: Sequence[int] = ()
    number: int = 0


def number(value: float) -> str:
    """A number as a person writes it: four digits."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers within [low, high]."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.75), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)][: 4 * count]


def thin(x: Sequence[float], y: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """At most about `most` points: lowest and highest of every stretch, so that no peak is lost."""
    if len(x) <= most:
        return list(x), list(y)
    size = -(-2 * len(x) // most)
    kept: list[int] = []
    for at in range(0, len(x), size):
        stretch = range(at, min(at + size, len(x)))
        kept += sorted({min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)})
    return [x[i] for i in kept], [y[i] for i in kept]


def swatch(index: int) -> Html:
    """A piece of a line, for a legend; said by the text beside it."""
    line = tag(
        "line", x1=0, y1=6, x2=28, y2=6, class_=f"line s{index % COLOURS}", stroke_dasharray=_DASHES[index % COLOURS]
    )
    return tag("svg", line, viewBox="0 0 28 12", width=28, height=12, aria_hidden="true", class_="swatch")


def _apart(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis; around a single value there is some room, however large it is."""
    room = max(0.5, 1e-3 * abs(high))
    return (low, high) if high > low else (low - room, high + room)


def line_chart(
    lines: Sequence[Line], *, ident: str, title: str, description: str, x_label: str, bounds: tuple[float, float] | None = None
) -> Html:  # fmt: skip
    """Lines over one axis.

    Args:
        ident: of the page's ids, letters and digits.
        bounds: of the vertical axis; None: those of the values, with zero where none is below it.

    Raises:
        ValueError: nothing to draw.
    """
    every_x = [v for line in lines for v in line.x]
    every_y = [v for line in lines for v in line.y]
    if not every_x:
        raise ValueError("lines: nothing to draw")
    left, right = min(every_x), max(every_x)
    low, high = bounds or (min(every_y) if min(every_y) < 0 else 0.0, max(every_y))
    low, high = _apart(low, high)
    left, right = _apart(left, right)
    # A little air above the highest point.
    high += 0.03 * (high - low)

    def at_x(v: float) -> float:
        return round(_LEFT + (v - left) / (right - left) * (WIDTH - _LEFT - _RIGHT), 2)

    def at_y(v: float) -> float:
        return round(HEIGHT - _BOTTOM - (v - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 2)

    parts: list[Html] = []
    for v in ticks(low, high):
        parts.append(tag("line", x1=_LEFT, y1=at_y(v), x2=WIDTH - _RIGHT, y2=at_y(v), class_="grid"))
        parts.append(tag("text", number(v), x=_LEFT - 5, y=at_y(v) + 3.5, text_anchor="end"))
    whole = all(float(v).is_integer() for v in every_x)
    below = {"y": HEIGHT - _BOTTOM + 14, "text_anchor": "middle"}
    steps = [v for v in ticks(left, right) if not whole or float(v).is_integer()]
    parts += [tag("text", number(v), x=at_x(v), **below) for v in steps]
    parts.append(tag("line", x1=_LEFT, y1=at_y(low), x2=WIDTH - _RIGHT, y2=at_y(low), class_="axis"))
    parts.append(tag("text", x_label, x=(_LEFT + WIDTH - _RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    for line in lines:
        x, y = thin(line.x, line.y)
        style = f"s{line.number % COLOURS}"
        points = " ".join(f"{at_x(a)},{at_y(b)}" for a, b in zip(x, y, strict=True))
        if len(x) > 1:
            parts.append(
                tag("polyline", points=points, class_=f"line {style}", stroke_dasharray=_DASHES[line.number % COLOURS])
            )
        if len(x) <= 40:
            parts += [tag("circle", cx=at_x(a), cy=at_y(b), r=2.2, class_=f"dot {style}") for a, b in zip(x, y)]
        for i in line.marks:
            cx, cy = at_x(line.x[i]), at_y(line.y[i])
            parts.append(tag("path", d=f"M{cx - 5},{cy - 9}h10l-5,8z", class_="mark"))
    return _framed(parts, WIDTH, HEIGHT, ident, title, description, "chart")


def _framed(
    parts: Sequence[Html], width: float, height: float, ident: str, title: str, description: str, style: str
) -> Html:
    return tag(
        "svg",
        tag("title", title, id=f"{ident}-t"),
        tag("desc", description, id=f"{ident}-d"),
        list(parts),
        viewBox=f"0 0 {width:g} {height:g}", role="img", aria_labelledby=f"{ident}-t", aria_describedby=f"{ident}-d", class_=style,
        width=f"{width:g}", height=f"{height:g}",
    )  # fmt: skip


def heat_map(
    values: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    ident: str,
    title: str,
    description: str,
    top: float,
) -> Html:
    """Shares as squares, the darker (in the dark: the lighter) the larger.

    Args:
        values: (row, column) -> share in [0, top]; where there is none, the place is empty.
        top: what the strongest colour stands for; its scale is drawn below.
    """
    letter, cell_w, cell_h, gap = 6.2, 34, 15, 2
    left = max(40.0, letter * max(map(len, rows)) + 8)
    # Names of columns are turned by 45 degrees: 0.71 of their length is height, and as much width at the right.
    slant = 0.71 * letter * max(map(len, columns))
    above = slant + 14
    width = max(left + len(columns) * cell_w + slant, left + 150)
    height = above + len(rows) * cell_h + 34
    parts = []
    for j, name in enumerate(columns):
        x, y = left + (j + 0.5) * cell_w, above - 5
        parts.append(tag("text", name, x=f"{x:g}", y=f"{y:g}", transform=f"rotate(-45 {x:g} {y:g})"))
    for i, row in enumerate(rows):
        y = above + i * cell_h
        parts.append(tag("text", row, x=f"{left - 6:g}", y=f"{y + 11:g}", text_anchor="end"))
        for j, column in enumerate(columns):
            value = values.get((row, column))
            if value is None:
                continue
            x = left + j * cell_w
            place = {"x": f"{x:g}", "y": f"{y:g}", "width": cell_w - gap, "height": cell_h - gap}
            strength = 0.0 if top <= 0 else min(1.0, max(0.0, value / top))
            parts.append(
                tag(
                    "rect",
                    tag("title", f"{row}, {column}: {value:.4%}"),
                    **place,
                    class_="cell",
                    fill_opacity=round(strength, 3),
                )
            )
    y = above + len(rows) * cell_h + 10
    parts.append(tag("text", "0 %", x=f"{left - 6:g}", y=f"{y + 10:g}", text_anchor="end"))
    for k in range(9):
        place = {"x": f"{left + k * 11:g}", "y": f"{y:g}", "width": 11, "height": 12}
        parts.append(tag("rect", **place, class_="cell", fill_opacity=k / 8))
    parts.append(tag("text", f"{100 * top:.3g} %", x=f"{left + 105:g}", y=f"{y + 10:g}"))
    return _framed(parts, width, height, ident, title, description, "heat")
