"""jaxrl export."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from jaxrl.errors import InputError
from jaxrl.types import Dtype

HELP = "write a run's weights as a Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_checkpoint", type=Path, help="run folder, or one of its checkpoints/N")
    parser.add_argument("out", nargs="?", type=Path, help="default: hf in the run folder")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    hub = "send it to the Hugging Face Hub too, with a card, the recipe and the curves; private if new"
    parser.add_argument("--push", metavar="ORG/NAME", help=hub)
    parser.add_argument("--public", action="store_true", help="--push makes a public repository")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what --push would send, and send nothing"
    )


def run(args: argparse.Namespace, _: list[str]) -> None:
    from jaxrl.exports import export, run_of

    source = args.run_or_checkpoint
    if (args.public or args.dry_run) and not args.push:
        raise InputError("--public and --dry-run are about --push; give it a repository, ORG/NAME")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise InputError(f"--push {args.push}: a repository on the Hub is ORG/NAME")
    run_folder = run_of(source)[0]
    out = args.out or run_folder / "hf"
    steps = export(source, out, args.dtype)
    if args.push:
        from jaxrl import hub

        files = hub.files_of(run_folder, out, steps, args.push)
        if args.dry_run:
            hub.describe(files, args.push, args.public)
        else:
            hub.push(files, args.push, steps, args.public)
