"""jaxrl train."""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points

from jaxrl import config
from jaxrl.commands.options import sampler_overrides
from jaxrl.errors import InputError

HELP = "train by a recipe; goes on where a run stopped"
TAKES_OVERRIDES = HELP_OF_ITS_OWN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--samplers", metavar="URL,URL", help="sample by these vLLM servers: --sampler.urls")
    parser.add_argument("--profile", metavar="STEPS", help="trace STEPS steps for XProf: --run.profile")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if not args.recipe:
        if set(overrides) - {"-h", "--help"}:
            raise InputError("train: give a recipe, such as recipes/demo.toml")
        config.from_command_line(config.Recipe(), ["--help"], "jaxrl train RECIPE")  # the defaults
    profile = ["--run.profile", args.profile] if args.profile else []
    recipe = config.load(args.recipe, overrides + profile + sampler_overrides(args.samplers))
    from jaxrl.train import train

    evaluations = entry_points(group="jaxrl.evaluation", name="default")
    if len(evaluations) != 1:
        raise InputError(
            f"{len(evaluations)} packages evaluate during training, not one; install jaxrl again"
        )
    train(recipe, next(iter(evaluations)).load())
