"""jaxrl check."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxrl.errors import InputError

HELP = "verify that a run's checkpoints are what was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_checkpoint", type=Path, help="run folder, or one of its checkpoints/N")


def run(args: argparse.Namespace, _: list[str]) -> None:
    from jaxrl.checkpoint import Checkpoints
    from jaxrl.export import run_of

    folder, step = run_of(args.run_or_checkpoint)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    bad = list[str]()
    for each in checkpoints.steps() if step is None else [step]:
        try:
            print(checkpoints.verify(each), flush=True)
        except InputError as error:  # the others are verified too
            bad.append(str(error))
    if bad:
        raise InputError("\n".join(bad))
