"""jaxrl check."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxrl.errors import InputError, RunError

HELP = "verify that a run's checkpoints are what was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_checkpoint", type=Path, help="run folder, or one of its checkpoints/N")


def run(args: argparse.Namespace, _: list[str]) -> None:
    from jaxrl.checkpoint import Checkpoints
    from jaxrl.exports import run_of

    folder, step = run_of(args.run_or_checkpoint)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    bad = list[InputError | RunError]()
    for each in checkpoints.steps() if step is None else [step]:
        try:
            print(checkpoints.verify(each), flush=True)
        except (InputError, RunError) as error:  # the others are verified too
            bad.append(error)
    if bad:
        kind = InputError if any(isinstance(error, InputError) for error in bad) else RunError
        raise kind("\n".join(map(str, bad)))
