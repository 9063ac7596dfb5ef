"""jaxrl train."""

from __future__ import annotations

import argparse
import logging
from importlib.metadata import entry_points
from pathlib import Path

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
    from jaxrl.train import train

    evaluations = entry_points(group="jaxrl.evaluation", name="default")
    if len(evaluations) != 1:
        raise InputError(
            f"{len(evaluations)} packages evaluate during training, not one; install jaxrl again"
        )
    if args.log_level:
        logging.basicConfig(
            level=args.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s"
        )
    train(recipe, next(iter(evaluations)).load(), quiet=args.quiet)
    if recipe.run.trackers:
        send_report(recipe)


def send_report(recipe: config.Recipe) -> None:
    """Gives the finished run's report to its trackers; a line says if that fails."""
    from jaxrl.parallel import processes
    from jaxrl.report.figures import report
    from jaxrl.telemetry.expendable import Expendable
    from jaxrl.telemetry.services import open_services

    def send() -> None:
        page = next(path for path in report([Path(recipe.run.directory)]) if path.suffix == ".html")
        with open_services(recipe, True, print) as services:
            for service in services:
                service.file(page)

    if processes.chief():
        Expendable("report.html", print, "no tracker got it")(send)
