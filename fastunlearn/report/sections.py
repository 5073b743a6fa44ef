"""The sections of a report, one function each: runs -> markup, or None where no run has anything to say."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

from fastunlearn.report.card import LABELS, LIMITS
from fastunlearn.report.curves import PANELS, series
from fastunlearn.report.layers import arranged
from fastunlearn.report.markup import Html, join, said, table, tag
from fastunlearn.report.run_folder import Run, Sample, is_number
from fastunlearn.report.svg import Line, heat_map, line_chart, number, swatch
from fastunlearn.report.targets import Target

_PARTS = {
    "forget": "To be forgotten",
    "paraphrased": "To be forgotten, asked in other words",
    "retain": "To be kept",
    "text": "Other text",
}
_SHARES = ("exact_recall",)
#: steps shown in the table below a curve; rows of the list of certificates
_STEPS, _FLAGGED = 12, 20


def _value(value: Any, metric: str = "", none: str = "not measured") -> Html:
    """Whatever stands in a file; `none` is said where nothing does."""
    if value is None:
        return tag("span", none, class_="soft")
    if isinstance(value, bool):
        return join("yes" if value else "no")
    if is_number(value):
        return join(f"{value:.1%}" if metric in _SHARES else number(value))
    if isinstance(value, dict):
        return join(", ".join(f"{key} {number(v) if is_number(v) else v}" for key, v in value.items())[:500])
    return said(value, 500)


def _heads(runs: Sequence[Run], first: str) -> list[Any]:
    return [first, *(said(run.name, 80) for run in runs)]


def _rows(runs: Sequence[Run], of: Callable[[Run], dict[str, Any]]) -> list[list[Any]]:
    names = dict.fromkeys(str(name) for run in runs for name in of(run))
    return [
        [
            said(name, 120),
            *(
                _value(of(run)[name], none="none") if name in of(run) else tag("span", "-", class_="soft")
                for run in runs
            ),
        ]
        for name in names
    ]


def asked(runs: Sequence[Run], _: Sequence[Target]) -> Html:
    return table(
        "What each run was asked",
        _heads(runs, "what"),
        _rows(runs, lambda r: r.asked),
        numbers=False,
        hidden_caption=True,
    )


# ---- did it forget, did it keep ------------------------------------------------------------------------------------------------


def _measured(run: Run, part: str, metric: str, targets: Sequence[Target]) -> list[Html]:
    """Cells: before, after, what was wanted."""
    cells = [_value(side.get(part, {}).get(metric), metric) for side in (run.before, run.after)]
    wanted = []
    for t in targets:
        if (t.part, t.metric) == (part, metric):
            words = t.words(f"{100 * t.value:g} %") if metric in _SHARES and not t.times else str(t)
            wanted.append(tag("div", words, ": ", _verdict(t, run)))
    return [*cells, join(wanted) if wanted else tag("span", "-", class_="soft")]


def _verdict(target: Target, run: Run) -> Html:
    met = target.met(run.before, run.after)
    if met is None:
        return tag("span", "cannot be said", class_="soft")
    return tag("span", "met" if met else "missed", class_="good" if met else "bad")


def targets_of(run: Run, given: Sequence[Target]) -> list[Target]:
    """Those given for all runs, else the run's own.

    Raises:
        ValueError: the run's own cannot be read.
    """
    if given:
        return list(given)
    try:
        return [Target.read(text) for text in run.targets]
    except ValueError as error:
        raise ValueError(f"{run.path}: {error}") from None


def numbers(runs: Sequence[Run], given: Sequence[Target]) -> Html | None:
    parts = dict.fromkeys(part for run in runs for side in (run.before, run.after) for part in side)
    if not parts:
        return None
    own = {id(run): targets_of(run, given) for run in runs}
    out = []
    for part in parts:
        metrics = dict.fromkeys(str(m) for run in runs for side in (run.before, run.after) for m in side.get(part, {}))
        metrics.pop("rows", None)
        counts = {str(run.after.get(part, {}).get("rows", run.before.get(part, {}).get("rows"))) for run in runs} - {
            "None"
        }
        rows = f" ({', '.join(sorted(counts))} rows asked)" if counts else None
        heading = said(_PARTS.get(part, part), 120)
        out.append(tag("h3", heading))
        lines: list[list[Any]] = []
        for metric in metrics:
            name = said(LABELS.get(metric, metric), 120)
            some = [run for run in runs if any(metric in side.get(part, {}) for side in (run.before, run.after))]
            lines += [
                [said(run.name, 80) if len(runs) > 1 else name, *_measured(run, part, metric, own[id(run)])]
                for run in some
            ]
            if len(runs) > 1:
                # A table a measurement: runs stand below each other.
                out.append(table(join(name, rows), ["run", "before", "after", "target"], lines))
                lines = []
        if lines:
            out.append(
                table(join("Before and after: ", heading, rows), ["measured", "before", "after", "target"], lines)
            )
    missing = [(run, t) for run in runs for t in own[id(run)] if t.metric not in run.after.get(t.part, {})]
    for run, t in missing:
        out.append(
            tag(
                "p",
                "Target ",
                tag("b", said(f"{t.part}.{t.metric}")),
                f" {t}: not measured in ",
                said(run.name, 80),
                ".",
                class_="note",
            )
        )
    return join(out)


def _picture(image: tuple[str, bytes], who: str, prompt: str) -> Html:
    kind, data = image
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return tag(
        "figure",
        tag("img", src=source, alt=f"{who}: {prompt}"[:300], loading="lazy"),
        tag("figcaption", said(who, 100)),
    )


def _answer(text: str, who: str, wanted: str | None) -> Html:
    same = None if wanted is None else text == wanted
    badge = None if same is None else " (as in the data)" if same else " (differs from the data)"
    shown = said(text) if text else tag("span", "(nothing)", class_="soft")
    return tag(
        "div", tag("p", said(who, 100), badge, class_="who"), tag("blockquote", shown, dir="auto"), class_="side"
    )


def samples(runs: Sequence[Run], _: Sequence[Target]) -> Html | None:
    groups: dict[tuple[str, str, str | None], list[tuple[Run, Sample]]] = {}
    for run in runs:
        for s in run.samples:
            groups.setdefault((s.part, s.prompt, s.seed), []).append((run, s))
    if not groups:
        return None
    out, part = [], None
    for (this, prompt, seed), found in sorted(groups.items(), key=lambda item: _order(item[0][0], groups)):
        if this != part:
            part = this
            out.append(tag("h3", said(_PARTS.get(this, this), 120)))
        sides, seen = [], set()
        pictures = any(s.before_image or s.after_image for _, s in found)
        for run, s in found:
            several = f", {run.name}" if len(runs) > 1 else ""
            for state, text, image in (("before", s.before, s.before_image), ("after", s.after, s.after_image)):
                shown = image or text
                if shown is None or (state == "before" and shown in seen):
                    continue
                if state == "before":
                    # One model before several runs is shown once.
                    seen.add(shown)
                who = (
                    state
                    if state == "before" and len({x.before_image or x.before for _, x in found}) == 1
                    else f"{state}{several}"
                )
                sides.append(_picture(image, who, prompt) if image else _answer(str(text), who, s.wanted))
        heading = [
            said(prompt or "(the first half of a text)", 600),
            tag("span", f" (seed {seed})", class_="soft") if seed else None,
        ]
        wanted = next((s.wanted for _, s in found if s.wanted is not None), None)
        data = tag("p", "In the data: ", tag("q", said(wanted, 600)), class_="soft") if wanted else None
        out.append(
            tag(
                "article",
                tag("h4", heading),
                data,
                tag("div", sides, class_="pictures" if pictures else "sides"),
                class_="sample",
            )
        )
    return join(out)


def _order(part: str, groups: Any) -> int:
    known = list(_PARTS)
    return known.index(part) if part in known else len(known) + [p for p, _, _ in groups].index(part)


# ---- the course ----------------------------------------------------------------------------------------------------------------


def _few(count: int, most: int) -> list[int]:
    """Indices of at most `most` entries, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _curve(runs: Sequence[Run], key: str, label: str, ident: str, found: dict[int, tuple[list[float], list[float]]], marks: dict[int, list[int]]) -> Html:  # fmt: skip
    lines = [Line(runs[i].name, x, y, marks.get(i, ()), i) for i, (x, y) in found.items()]
    ends = "; ".join(
        f"{line.name}: {number(line.y[0])} at step {number(line.x[0])}, {number(line.y[-1])} at step {number(line.x[-1])}"
        for line in lines
    )
    share = key.split("_", 1)[-1] in ("capacity", "hardness", "s", "holds", "unharmed") and all(
        0 <= v <= 1 for line in lines for v in line.y
    )
    picture = line_chart(
        lines, ident=ident, title=label, description=f"{label} over the optimiser's steps. {ends}", x_label="optimiser step",
        bounds=(0.0, 1.0) if share else None,
    )  # fmt: skip
    by_step: dict[float, dict[int, float]] = {}
    for i, (x, y) in found.items():
        for a, b in zip(x, y, strict=True):
            by_step.setdefault(a, {})[i] = b
    steps = sorted(by_step)
    kept = [steps[k] for k in _few(len(steps), _STEPS)]
    caption = f"{label}: {len(kept)} of {len(steps)} logged steps" if len(kept) < len(steps) else label
    rows = [[number(step), *(number(by_step[step][i]) if i in by_step[step] else "-" for i in found)] for step in kept]
    heads = ["step", *(said(runs[i].name, 80) for i in found)] if len(runs) > 1 else ["step", label]
    return tag(
        "figure",
        tag("figcaption", label),
        picture,
        tag("details", tag("summary", "as a table"), table(caption, heads, rows)),
    )


def _legend(runs: Sequence[Run], drawn: set[int]) -> Html | None:
    """Of several runs, those that have a line."""
    if len(runs) < 2:
        return None
    return tag("ul", [tag("li", swatch(i), said(runs[i].name, 80)) for i in sorted(drawn)], class_="legend")


def curves(runs: Sequence[Run], _: Sequence[Target]) -> Html | None:
    labels = {
        key: label.replace("-\n", "").replace("\n", " ") for key, label, _ in PANELS if not key.startswith("hamu_")
    }
    others = dict.fromkeys(
        key for run in runs for entry in run.history for key in entry if isinstance(key, str) and key.endswith("_loss")
    )
    labels |= {key: key.replace("_", " ") for key in others if key not in labels and key != "train_loss"}
    figures: list[Html] = []
    drawn: set[int] = set()
    for n, (key, label) in enumerate(labels.items()):
        found = {i: xy for i, run in enumerate(runs) if (xy := series(run.history, key))[0]}
        if found:
            drawn |= found.keys()
            figures.append(_curve(runs, key, label, f"curve{n}", found, {}))
    return join(_legend(runs, drawn), tag("div", figures, class_="charts")) if figures else None


# ---- HAMU ----------------------------------------------------------------------------------------------------------------------

_SUMMARY = {
    "steps": "steps with a certificate", "flagged": "flagged: damage could not be avoided", "first_flagged": "first flagged step",
    "checked": "certificates checked", "held": "of them held", "unharmed": "of them without more retain damage than promised", "largest_hardness": "largest hardness", "largest_s": "largest s",
}  # fmt: skip


def certificates(runs: Sequence[Run], _: Sequence[Target]) -> Html | None:
    having = [run for run in runs if run.certificates or run.summary]
    if not having:
        return None
    rows = [
        [words, *(_value(r.summary[key]) if r.summary.get(key) is not None else "-" for r in having)]
        for key, words in _SUMMARY.items()
    ]
    out: list[Html | None] = [
        tag(
            "p",
            "Before every step HAMU computes how much it can forget and what that must cost. Hardness is the share of what a step could "
            "forget that cannot be had without damage to what must stay: at 0 forgetting is free, at 1 nothing is; s is the share of "
            "what the trust ball allows that was asked for. A step is flagged where damage cannot be avoided; a certificate holds where "
            "the losses, measured before and after the step, moved as it said.",
        ),
        table("Certificates", _heads(having, "certificates"), rows, hidden_caption=True),
    ]
    figures: list[Html] = []
    drawn: set[int] = set()
    for n, (key, label) in enumerate((("hardness", "hardness: share of forgetting that costs what must stay"), ("s", "s: share of what the trust ball allows that was asked"))):  # fmt: skip
        found, marks = {}, {}
        for i, run in enumerate(runs):
            x, y = series(run.certificates, key) if run.certificates else series(run.history, f"hamu_{key}")
            if x:
                found[i] = (x, y)
                flagged = {float(r["step"]) for r in run.certificates if r.get("flagged") is True}
                marks[i] = [k for k, step in enumerate(x) if step in flagged]
        if found:
            drawn |= found.keys()
            figures.append(_curve(runs, key, label, f"cert{n}", found, marks))
    if figures:
        out += [_legend(runs, drawn), tag("div", figures, class_="charts")]
        out.append(tag("p", "A red triangle stands on a flagged step.", class_="soft"))
    out += [_worst(run) for run in runs]
    return join(out)


def _worst(run: Run) -> Html | None:
    """Steps that were flagged or did not hold."""
    bad = [r for r in run.certificates if r.get("flagged") is True or r.get("holds") is False]
    if not run.certificates:
        return None
    if not bad:
        return tag("p", said(run.name, 80), ": no step was flagged, every certificate that was checked held.")
    rows = []
    for r in bad[:_FLAGGED]:
        change = r.get("retain_change")
        what = [
            word
            for word, is_so in (("flagged", r.get("flagged") is True), ("did not hold", r.get("holds") is False))
            if is_so
        ]
        worst = max((v for v in change if is_number(v)), default=None) if isinstance(change, list) else None
        rows.append(
            [
                _value(r["step"]),
                ", ".join(what),
                _value(r.get("hardness")),
                _value(r.get("forget_change")),
                _value(worst),
            ]
        )
    more = f", the first {_FLAGGED} of {len(bad)}" if len(bad) > _FLAGGED else ""
    caption = join(said(run.name, 80), f": steps that were flagged or did not hold{more}")
    inner = table(caption, ["step", "what", "hardness", "forgotten", "worst retain change"], rows)
    return tag(
        "details",
        tag(
            "summary", f"{len(bad)} {'step' if len(bad) == 1 else 'steps'} flagged or not held in ", said(run.name, 80)
        ),
        inner,
    )


# ---- masks, cost, how ----------------------------------------------------------------------------------------------------------


def masks(runs: Sequence[Run], _: Sequence[Target]) -> Html | None:
    kinds = dict.fromkeys(kind for run in runs for kind, shares in run.densities.items() if shares)
    figures = []
    for kind in kinds:
        having = [(i, run) for i, run in enumerate(runs) if run.densities.get(kind)]
        top = max(share for _, run in having for share in run.densities[kind].values())
        for i, run in having:
            values, rows, columns = arranged({name[:200]: share for name, share in run.densities[kind].items()})
            label = f"{kind}: {run.name}" if len(runs) > 1 else kind
            low, high = min(values.values()), max(values.values())
            mean = sum(values.values()) / len(values)
            picture = heat_map(
                values, rows, columns, ident=f"mask{i}k{list(kinds).index(kind)}", title=f"Share of weights by layer, {label}", top=top,
                description=f"{len(values)} layers in {len(rows)} blocks, from {low:.2%} to {high:.2%}, {mean:.2%} in the mean of layers.",
            )  # fmt: skip
            lines = [
                [said(row, 120), *(f"{values[row, c]:.2%}" if (row, c) in values else "-" for c in columns)]
                for row in rows
            ]
            below = table(
                join("Share of weights, ", said(label, 200)), ["block", *(said(c, 120) for c in columns)], lines
            )
            box = tag("div", picture, class_="scroll", role="region", aria_label=f"heat map, {label}", tabindex="0")
            text = f": {low:.2%} to {high:.2%} of a layer's weights, {mean:.2%} in the mean of layers"
            figures.append(
                tag(
                    "figure",
                    tag("figcaption", tag("b", said(label, 200)), text),
                    box,
                    tag("details", tag("summary", "as a table"), below),
                )
            )
    if not figures:
        return None
    return join(
        tag(
            "p",
            "A row a block, a column a layer of it; the stronger a square, the larger the share of its weights. One scale for all runs.",
        ),
        tag("div", figures, class_="maps"),
    )


def cost(runs: Sequence[Run], _: Sequence[Target]) -> Html | None:
    rows = _rows(runs, lambda r: r.cost)
    return (
        table("Seconds, peak memory above what was there before, and what is stored", _heads(runs, "cost"), rows)
        if rows
        else None
    )


def how(runs: Sequence[Run], _: Sequence[Target]) -> Html:
    out = []
    for run in runs:
        shown = (
            tag("pre", tag("code", said(run.command)))
            if run.command
            else tag("p", "The run did not write its command down.", class_="soft")
        )
        out += [tag("h3", "Command", [": ", said(run.name, 80)] if len(runs) > 1 else None), shown]
    versions = _rows(runs, lambda r: r.versions)
    if versions:
        out += [
            tag("h3", "Versions"),
            table("Versions of packages", _heads(runs, "package"), versions, numbers=False, hidden_caption=True),
        ]
    settings = _rows(runs, lambda r: r.settings)
    if settings:
        if len(runs) > 1:
            settings.sort(key=lambda row: len(set(row[1:])) == 1)
        words = "Settings; those that differ stand first" if len(runs) > 1 else "Settings"
        out += [
            tag("h3", "Settings"),
            table(words, _heads(runs, "setting"), settings, numbers=False, hidden_caption=len(runs) == 1),
        ]
    return join(out)


_LIMITS_OF_IMAGES = (
    "Images are those of the prompts and seeds shown. What a model no longer draws when asked this way may still come out for other "
    "words, another language, an image or an embedding as a prompt, or after some steps of training.",
    "That it does not draw something shows not that no trace is left in the weights. It is no proof in the sense of a law, and no "
    "substitute for training without the data where that is required.",
    "What was kept is shown by a few images; other abilities may have changed.",
)


def limits(runs: Sequence[Run], _: Sequence[Target]) -> Html:
    points: list[str] = []
    if any("exact_recall" in metrics for run in runs for metrics in run.after.values()):
        other = " and on the text whose perplexity stands above" if any("text" in run.after for run in runs) else ""
        points += [" ".join(point.split()) for point in LIMITS.format(other=other).split("* ") if point.strip()]
    if not points or any(s.before_image or s.after_image for run in runs for s in run.samples):
        points += _LIMITS_OF_IMAGES
    notes = [tag("li", said(run.name, 80), ": ", said(note, 500)) for run in runs for note in run.notes]
    return tag("ul", [tag("li", point) for point in points], notes)
