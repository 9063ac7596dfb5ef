"""jaxrl completion."""

from __future__ import annotations

import argparse
from typing import Literal, get_args, get_origin, get_type_hints

from jaxrl import config
from jaxrl.config import named

HELP = "print a script by which a shell completes commands, options and recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    how = 'eval "$(jaxrl completion bash)" in ~/.bashrc; zsh: jaxrl completion zsh > ~/.zfunc/_jaxrl'
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help=how)


def run(args: argparse.Namespace, _: list[str]) -> None:
    import shtab

    from jaxrl.cli import commands, make_parser

    recipe = shtab.FILE | dict.fromkeys(("bash", "zsh"), "_jaxrl_recipe")
    parser, subparsers = make_parser(known := commands())
    for name, command in known.items():
        for action in subparsers.choices[name]._actions:
            if not action.option_strings and not action.choices:
                complete = recipe if action.dest == "recipe" else shtab.FILE
                action.complete = complete  # type: ignore[attr-defined]
        if getattr(command, "TAKES_OVERRIDES", False):
            _add_values(subparsers.choices[name])
    names = " ".join(named.names())
    files_too = {
        "bash": f'_jaxrl_recipe() {{ compgen -W \'{names}\' -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"_jaxrl_recipe() {{ _alternative 'recipes:recipe:({names})' 'files:file:_files'; }}",
    }
    print(shtab.complete(parser, args.shell, preamble=files_too))  # type: ignore[arg-type]  # a dict by shell, as it says


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every value of a recipe but stages, with its choices."""
    for section, kind in get_type_hints(config.Recipe).items():
        for key, of in get_type_hints(kind).items() if section != "stages" else ():
            choices = (
                get_args(of) if get_origin(of) is Literal else (("true", "false") if of is bool else None)
            )
            parser.add_argument(f"--{section}.{key}", choices=choices)
