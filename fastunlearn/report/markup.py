"""HTML from Python values: what is no markup becomes text, whatever it holds.

    tag("td", "a < b", class_="number")     ->  <td class="number">a &lt; b</td>

Only `Html` passes as markup. Control characters and halves of surrogate pairs, which no HTML file may hold, are replaced; text that
somebody else wrote goes through `said`, so that its direction of writing ends with it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

_VOID = {"meta", "link", "img", "br", "hr"}
#: not allowed in an HTML file, or halves of a pair that utf-8 cannot write
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """Any value as text of a page or of an attribute."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_ILLEGAL.sub("\ufffd", str(value)), quote=True))


def _inside(children: Iterable[Any]) -> str:
    out = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, list | tuple):
            out.append(_inside(child))
        else:
            out.append(escape(child))
    return "".join(out)


def join(*children: Any) -> Html:
    """Children one after the other; lists are taken apart, None is nothing."""
    return Html(_inside(children))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of this code, never of data.
        children: Html, text (escaped), lists of these; None is nothing.
        attributes: `class_` is class, `aria_label` is aria-label; None and False leave one out, True gives it no value.

    Raises:
        ValueError: an element that has no inside was given one.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        # str(): markup in an attribute is text, its quotes would end it.
        words.append(key if value is True else f'{key}="{escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if name in _VOID:
        if children:
            raise ValueError(f"children: <{name}> has no inside")
        return Html(opening)
    return Html(f"{opening}{_inside(children)}</{name}>")


def said(text: Any, most: int = 4000) -> Html:
    """Text of a model or a data set: isolated, and cut where it is very long."""
    text = str(text)
    more = len(text) - most
    return tag("bdi", text[:most], f" ... ({more:,} more characters)" if more > 0 else None)


def table(
    caption: Any, head: Iterable[Any], rows: Iterable[Iterable[Any]], *, numbers: bool = True, hidden_caption: bool = False
) -> Html:  # fmt: skip
    """A table whose first row and first column are headers, in a box that scrolls sideways on a narrow screen.

    Args:
        rows: a header and its cells each; a cell that is no Html is text.
        numbers: cells stand at the right, in figures of one width.
        hidden_caption: for screen readers alone, where a heading says the same.
    """
    lines = []
    for first, *cells in rows:
        lines.append(tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in cells]))
    inner = tag(
        "table",
        tag("caption", caption, class_="quiet" if hidden_caption else None),
        tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])),
        tag("tbody", lines),
        class_="numbers" if numbers else None,
    )
    label = html.unescape(re.sub(r"<[^>]*>", "", escape(caption)))
    return tag("div", inner, class_="scroll", role="region", aria_label=label, tabindex="0")
