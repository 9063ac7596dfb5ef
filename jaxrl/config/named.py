"""The recipes that come along, by name."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path

from jaxrl.errors import InputError

FOLDER = Path(__file__).parents[2] / "recipes"  # beside the package, in a checkout and where it is installed


def names(folder: Path = FOLDER) -> list[str]:
    """Names of the recipes, or of what else a folder has, in order."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def find(recipe: str | Path, folder: Path = FOLDER, kind: str = "recipe") -> Path:
    """The file of a recipe: the path, or a recipe that comes along if it is the name of one and no file here.

    Args:
      recipe: its path or name.
      folder: of what comes along.
      kind: what it is, for messages.

    Raises:
      InputError: if it is neither, and no path.
    """
    path, name = Path(recipe), str(recipe)
    if path.is_file() or not re.fullmatch(r"[\w.-]+", name) or name.endswith(".toml"):
        return path
    if name in (known := names(folder)):
        return folder / f"{name}.toml"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise InputError(
        f"{name}: no file here, and no {kind} of that name; "
        + (f"did you mean '{close[0]}'? " if close else "")
        + ("`jaxrl recipes` lists them" if folder == FOLDER else f"there are {', '.join(known)}")
    )


def summary(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with, which says what it is."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()
    )
    return " ".join(line.strip("# ") for line in lines).partition(". ")[0].strip().removesuffix(".")
