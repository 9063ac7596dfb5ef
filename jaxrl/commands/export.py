"""jaxrl export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from jaxrl.types import Dtype

HELP = "write a run's weights as a Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_checkpoint", type=Path, help="run folder, or one of its checkpoints/N")
    parser.add_argument("out", nargs="?", type=Path, help="default: hf in the run folder")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")


def run(args: argparse.Namespace, _: list[str]) -> None:
    from jaxrl.export import export, run_of

    source = args.run_or_checkpoint
    export(source, args.out or run_of(source)[0] / "hf", args.dtype)
