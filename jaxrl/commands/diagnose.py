"""jaxrl diagnose."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxrl.commands.options import positive

HELP = "show where the sampler's log-probs are not the trainer's, and which rounding explains it"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    newest = "1 for the first; default: the newest with answers and a checkpoint before it"
    add("step", nargs="?", type=positive, help=newest)
    add("--answers", type=positive, default=64, metavar="N", help="of the step, evenly spaced (default: 64)")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from jaxrl.diagnose import diagnose
    from jaxrl.report import disagreement

    found = diagnose(args.run, args.step, args.answers, overrides)
    print(disagreement.text(found))
    for path in disagreement.write(found, args.run / "diagnose"):
        print(path)
