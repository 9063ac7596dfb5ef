"""jaxrl replay."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxrl.errors import InputError

HELP = "execute steps of a run again from the answers that it kept, and compare the weights"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("step", nargs="?", type=int, help="1 for the first")
    parser.add_argument(
        "--all", action="store_true", help="all steps; writes audit.json if all is as it should be"
    )
    within = "by how much parameters may differ, as they do on another mesh; default: the same bits"
    published = "a Hugging Face folder that is said to have the weights after the last of these steps"
    parser.add_argument("--published", type=Path, metavar="FOLDER", help=published)
    parser.add_argument("--within", type=float, default=0.0, metavar="D", help=within)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if (args.step is None) != args.all:
        raise InputError("replay: give a step, or --all")
    from jaxrl.replay import AUDIT, open_replay

    with open_replay(args.run, overrides, args.within, print, args.published) as replay:
        steps = []
        for step in replay.steps(args.step):
            steps.append(step)
            same = f"checkpoint {step.step}: " + (
                "the same bits"
                if not step.difference
                else f"parameters differ by up to {step.difference:.3g}"
            )
            print(
                f"step {step.step}: {step.answers} answers, weights {step.weights[:16]}"
                + (f"; {same}" if step.checkpoint else ""),
                *(f"  ! {finding}" for finding in step.findings),
                sep="\n",
                flush=True,
            )
        bad = [step.step for step in steps if step.findings]
        if bad:
            raise InputError(
                f"{len(bad)} of {len(steps)} steps are not what {args.run} says; the first is step {bad[0]}, see above"
                + replay.excuse()
            )
        if args.published:
            print(f"{args.published} has the weights after step {steps[-1].step}")
        if args.all:
            replay.record(steps)
            print(
                f"all {len(steps)} steps follow from the model, the data and the answers -> {args.run / AUDIT}"
            )
