"""jaxrl report."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "an HTML page and figures of one run or several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the figures; default: report in the first run")
    megabytes = "of rollout files to take into the page (default: 30)"
    parser.add_argument("--rollouts", type=int, default=30, metavar="MB", help=megabytes)


def run(args: argparse.Namespace, _: list[str]) -> None:
    from jaxrl.report import runs
    from jaxrl.report.figures import report

    written = report(args.runs, args.out, args.rollouts)
    for directory in args.runs:
        used = runs.budget(runs.read_run(directory))
        print(f"{directory}: " + ", ".join(f"{runs.number(value)} {name}" for name, value in used.items()))
    for path in written:
        print(path)
