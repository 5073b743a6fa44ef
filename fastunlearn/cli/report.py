"""`fastunlearn report`: one page about one run, or several side by side, to open in any browser and hand on as a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastunlearn.cli._run import guarded

PROG = "fastunlearn report"
EXAMPLE = """\
example:
  fastunlearn report out
  fastunlearn report runs/npo runs/simnpo --out compared.html --target 'forget.exact_recall<=0.05' 'text.perplexity<=1.05x'

A run is a folder that sau, unlearn, hamu, prune, spare, uce, scapre, pecker, demo ... wrote. The page holds what was asked, what was
forgotten and kept, curves, certificates, masks by layer, cost, the command and versions; no script, nothing is loaded from anywhere.
It shows what was to be forgotten where the run kept it (samples): --no-texts leaves that out."""


def main(argv: Sequence[str]) -> int:
    """Writes the report; 0, or 2 for bad input (one line on standard error)."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Writes one self-contained HTML page about one run, or several compared side by side.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", "--output", default="report.html", metavar="FILE", help="the page (report.html)")
    parser.add_argument("--title", help="of the page (method and model)")
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="TARGET",
        help="part.metric<=number or >=, e.g. forget.exact_recall<=0.05; 1.05x is times what it was before; default: the runs' own",
    )
    parser.add_argument("--no-texts", action="store_true", help="leave out what was said and drawn before and after")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    options = parser.parse_args(argv)

    def run() -> int:
        from fastunlearn.report.page import write_report

        path = write_report(
            options.runs,
            options.out,
            title=options.title,
            targets=options.target,
            texts=not options.no_texts,
            overwrite=options.overwrite,
        )
        print(f"{len(options.runs)} run{'s' if len(options.runs) > 1 else ''} in {path}")
        return 0

    return guarded(PROG, run)
