"""jaxrl recipes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxrl import config
from jaxrl.config import named

HELP = "list the recipes that come along, show one, or compare two"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Every command that takes a recipe takes one of these by its name."
    actions = parser.add_subparsers(metavar="ACTION", dest="action")
    show = actions.add_parser(
        "show", help="print one, with the source of every value, to change a copy of it"
    )
    show.add_argument("recipe", help="a name, or the path of a .toml file")
    diff = actions.add_parser("diff", help="the values in which two differ, side by side")
    diff.add_argument("a", help="a name, or the path of a .toml file")
    diff.add_argument("b", help="likewise; a run's recipe.toml, say")


def run(args: argparse.Namespace, _: list[str]) -> None:
    if args.action == "show":
        config.load(args.recipe)  # which says what is wrong with it
        print(named.find(args.recipe).read_text(encoding="utf-8"), end="")
        return
    if args.action == "diff":
        _diff(args.a, args.b)
        return
    for name in (known := named.names()):
        print(f"{name:<{max(map(len, known)) + 2}}{named.summary(named.find(name))}")


def _diff(a: str, b: str) -> None:
    """Prints the values that differ, in the order of a recipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    left, right = (_by_stage(config.load(path)) for path in (a, b))
    table = Table("", a, b, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for key in dict.fromkeys((*left, *right)):
        if left.get(key) != right.get(key):
            table.add_row(key, Text(left.get(key, "")), Text(right.get(key, "")))
    if table.row_count:
        Console().print(table)
    else:
        print(f"{a} and {b} have the same values")


def _by_stage(recipe: config.Recipe) -> dict[str, str]:
    """Values by "section.key": one, or one for each stage if some differ; and how the stages begin and end."""
    stages = config.stages_of(recipe)
    parts = [config.flat(stage.recipe) for stage in stages]
    found = {key: _series([part[key] for part in parts]) for key in parts[0] if key != "run.steps"}
    if recipe.stages:
        found["stages.name"] = _series([stage.name for stage in stages])
        found["stages.restart"] = _series([sorted(stage.restart) for stage in stages])
    return found | {
        "stages.until" if recipe.stages else "run.steps": _series([stage.until for stage in stages])
    }


def _series(values: Sequence[object]) -> str:
    return " | ".join(map(repr, values if any(value != values[0] for value in values) else values[:1]))
