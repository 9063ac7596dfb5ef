"""jaxrl train."""

from __future__ import annotations

import argparse
import logging

from jaxrl import config
from jaxrl.commands.options import sampler_overrides
from jaxrl.errors import InputError

HELP = "train by a recipe; goes on where a run stopped"
TAKES_OVERRIDES = HELP_OF_ITS_OWN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--samplers", metavar="URL,URL", help="sample by these vLLM servers: --sampler.urls")
    parser.add_argument("--profile", metavar="STEPS", help="trace STEPS steps for XProf: --run.profile")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, help="of JAX and other libraries, on stderr")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if not args.recipe:
        if set(overrides) - {"-h", "--help"}:
            raise InputError("train: give a recipe, such as recipes/demo.toml")
        config.from_command_line(config.Recipe(), ["--help"], "jaxrl train RECIPE")  # the defaults
    profile = ["--run.profile", args.profile] if args.profile else []
    recipe = config.load(args.recipe, overrides + profile + sampler_overrides(args.samplers))
    if args.log_level:
        form = "%(asctime)s %(name)s %(levelname)s %(message)s"
        logging.basicConfig(level=args.log_level.upper(), format=form, force=True)  # absl's handler is there
    from jaxrl import api

    api.train_loaded(recipe, quiet=args.quiet)
