"""`nanoflow report RESULT.json ... -o report.html`: results of `nanoflow bench` as one page with figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow.cli.files import make_folder_of

HELP = "make one HTML page with figures from results of nanoflow bench"
LOG_LEVEL = "WARNING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("results", metavar="RESULT", type=Path, nargs="+", help="JSON files that nanoflow bench wrote")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--title", metavar="TEXT", help="the page's title (default: models and machines)")


def run(args: argparse.Namespace) -> int:
    """Read the results, write the page, say which figures are missing and why."""
    from nanoflow.bench.report.figure import Missing
    from nanoflow.bench.report.page import write_report
    from nanoflow.bench.result import load_result

    results = [load_result(path) for path in args.results]
    make_folder_of(args.output)
    sections = write_report(results, args.output, args.title)
    missing = [section for section in sections if isinstance(section, Missing)]
    print(f"{args.output}: {len(sections) - len(missing)} of {len(sections)} figures")
    for section in missing:
        print(f"  {section.title}: {section.why.replace('`', '')}")
    return 0
