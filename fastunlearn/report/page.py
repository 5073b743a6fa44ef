"""One self-contained HTML page about one or more runs: no script, nothing loaded, everything that is data is text.

The page forbids by its own policy (Content-Security-Policy) whatever it does not hold: a mistake in escaping could not load or run
anything either.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fastunlearn._version import __version__
from fastunlearn.report import sections
from fastunlearn.report.files import write_bytes
from fastunlearn.report.markup import Html, join, said, tag
from fastunlearn.report.run_folder import Run, load_run
from fastunlearn.report.style import CSS
from fastunlearn.report.targets import Target

_SECTIONS: tuple[tuple[str, str, Callable[[Sequence[Run], Sequence[Target]], Html | None]], ...] = (
    ("asked", "What was asked", sections.asked),
    ("numbers", "What was forgotten and kept", sections.numbers),
    ("samples", "Before and after, side by side", sections.samples),
    ("curves", "The course of training", sections.curves),
    ("certificates", "Hardness and certificates", sections.certificates),
    ("masks", "Masks by layer", sections.masks),
    ("cost", "Cost", sections.cost),
    ("how", "Command, versions, settings", sections.how),
    ("limits", "What this does not show", sections.limits),
)


def render(runs: Sequence[Run], *, title: str | None = None, targets: Sequence[str] = (), texts: bool = True) -> str:
    """The page as text.

    Args:
        runs: of `load_run`; several are compared side by side.
        title: of the page; default: the method and the model, or the names of the runs.
        targets: "part.metric<=number" (see `Target`), for all runs instead of their own.
        texts: False leaves out what was said and drawn before and after, for a page that will be shown to others.

    Raises:
        ValueError: no runs, a target that cannot be read or that no run has a measurement for.
    """
    if not runs:
        raise ValueError("runs: want at least one folder, got none")
    runs = _named(runs)
    read = [Target.read(text) for text in targets]
    measured = [f"{part}.{metric}" for run in runs for part, metrics in run.after.items() for metric in metrics]
    for target in read:
        if f"{target.part}.{target.metric}" not in measured:
            raise ValueError(
                f"target: no run measured {target.part}.{target.metric}{_near(f'{target.part}.{target.metric}', measured)}"
            )
    shown = []
    for ident, heading, make in _SECTIONS:
        if ident == "samples" and not texts:
            continue
        inside = make(runs, read)
        if inside is not None:
            if ident == "samples":
                warning = (
                    "This part shows what was to be forgotten: keep it to yourself, or leave it out with --no-texts."
                )
                inside = join(tag("p", warning, class_="note"), inside)
            shown.append((ident, heading, inside))
    links = [tag("li", tag("a", heading, href=f"#{ident}")) for ident, heading, _ in shown]
    body = [
        tag("section", tag("h2", heading, id=ident), inside, aria_labelledby=ident) for ident, heading, inside in shown
    ]
    title = title or _title(runs)
    # The page's own style is the only one it takes.
    allowed = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("meta", name_="robots", content="noindex"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    page = tag(
        "html",
        head,
        tag(
            "body",
            tag("a", "Skip to the report", href="#report", class_="skip"),
            tag(
                "header",
                tag("h1", said(title, 200)),
                tag("p", _lead(runs)),
                tag("nav", tag("ul", links), aria_label="Sections"),
            ),
            tag("main", body, id="report"),
            tag(
                "footer",
                tag("p", f"Written by fastunlearn {__version__}: fastunlearn report. The page holds all it shows."),
            ),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _near(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, names, n=1) or sorted(set(names))[:6]
    return f"; there is {', '.join(found)}" if found else "; none of them measured anything"


def _named(runs: Sequence[Run]) -> Sequence[Run]:
    """Runs of one name are told apart by the folder around them, or a number."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.path.resolve().parts[-2:])
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name += f" ({seen[run.name]})"
    return runs


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"Unlearning report: {', '.join(run.name for run in runs)}"
    method, model = (str(runs[0].asked.get(key, "")) for key in ("method", "model"))
    return f"Unlearning report: {method or runs[0].name}{f' on {Path(model).name}' if model else ''}"


def _lead(runs: Sequence[Run]) -> str:
    """What came of it, in a sentence or two."""
    if len(runs) > 1:
        return f"{len(runs)} runs, side by side."
    out = []
    for part, words in (("forget", "what had to be forgotten"), ("retain", "what had to be kept")):
        old, new = (side.get(part, {}).get("exact_recall") for side in (runs[0].before, runs[0].after))
        if all(isinstance(v, int | float) for v in (old, new)):
            out.append(f"of {words} it recalls {new:.1%} ({old:.1%} before)")
    return f"After the run the model was asked again: {'; '.join(out)}." if out else "One run of fastunlearn."


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str] = "report.html",
    *,
    title: str | None = None,
    targets: Sequence[str] = (),
    texts: bool = True,
    overwrite: bool = False,
) -> Path:
    """Reads run folders and writes their report, whole or not at all.

    Args:
        title, targets, texts: as `render`.
        overwrite: replace a file that is there.

    Returns:
        Where it is.

    Raises:
        ValueError: as `load_run` and `render`. FileExistsError: there is a file. OSError: it cannot be read or written.

    Example:
        >>> write_report(["out"], "report.html", targets=["forget.exact_recall<=0.05"])
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder; want the name of a file")
    if path.exists() and not overwrite:
        # Before any reading.
        raise FileExistsError(f"out: {path} exists; --overwrite replaces it")
    page = render([load_run(folder) for folder in folders], title=title, targets=targets, texts=texts)
    write_bytes(path, page.encode("utf-8"), overwrite=overwrite)
    return path
