"""Python objects in place of what a recipe names by path: rows and reward functions, kept in the run folder.

A run is so still a recipe and files: the command line resumes it, evaluates it and reads its recipe.
"""

from __future__ import annotations

import inspect
import io
import json
import platform
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, cast

from blake3 import blake3

from jaxrl.config import Recipe
from jaxrl.errors import InputError, first_line
from jaxrl.files import replacing

Row = Mapping[str, object]
Function = Callable[..., object]


class Table(Protocol):
    """A `datasets.Dataset`, a `pandas.DataFrame`."""

    def to_parquet(self, file: io.BytesIO, /) -> object: ...


Rows: TypeAlias = Iterable[Row] | Table | str | Path
Rewards: TypeAlias = Function | Sequence[Function] | Mapping[str, Function | tuple[Function, float]]


def paths_of(
    recipe: Recipe, data: Rows | None = None, held_out: Rows | None = None, reward: Rewards | None = None
) -> dict[str, object]:
    """Writes objects into the run folder of a recipe; returns the values of it, by "section.key", that name them.

    Args:
      recipe: has the run folder, and may be a draft.
      data: rows to train on, in place of data.path.
      held_out: rows to evaluate on, in place of eval.path.
      reward: functions in place of reward.function; see `jaxrl.train`.

    Raises:
      InputError: for what is no row, cannot be written, or is named by a stage of the recipe too.
    """
    folder = Path(recipe.run.directory) / "objects"
    values: dict[str, object] = {}
    for section, rows in (("data", data), ("eval", held_out)):
        if rows is not None:
            path = _keep_rows(rows, folder, "held_out" if section == "eval" else section)
            whole = {"path": path, "config": "", "split": "", "files": ()}
            values |= {f"{section}.{key}": value for key, value in whole.items()}
    if data is not None:
        values["data.sources"] = ()
    if reward is not None:
        values["reward.function"] = ""
        values["reward.functions"] = [
            {"path": f"{_keep_function(function, folder, name)}:{name}", "weight": weight, "name": name}
            for name, (function, weight) in _named(reward).items()
        ]
    for entry in recipe.stages:
        for key in values:
            section, _, name = key.partition(".")
            if name in entry.changes.get(section, {}):
                raise InputError(
                    f"the stage until {entry.until} has {key} of its own; leave that out of the recipe"
                )
    return values


def _keep_rows(rows: Rows, folder: Path, name: str) -> str:
    if isinstance(rows, str | Path):
        return str(rows)
    if hasattr(rows, "to_parquet"):
        file = io.BytesIO()
        cast(Table, rows).to_parquet(file)
        return str(_keep(folder, name, file.getvalue(), ".parquet"))
    text = "".join(
        _line(row, f"{name}, row {number}") for number, row in enumerate(cast(Iterable[Row], rows), 1)
    )
    return str(_keep(folder, name, text.encode(), ".jsonl"))


def _line(row: object, where: str) -> str:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a {type(row).__name__}; rows are dicts, with a value for each column")
    try:
        return json.dumps(dict(row), default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {first_line(error)}; values are text, numbers, lists and dicts") from None


def _plain(value: object) -> object:
    if hasattr(value, "tolist"):  # NumPy's
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _named(reward: Rewards) -> dict[str, tuple[Function, float]]:
    """Functions and weights by name."""
    if isinstance(reward, Mapping):
        return {name: each if isinstance(each, tuple) else (each, 1.0) for name, each in reward.items()}
    functions = [reward] if callable(reward) else reward
    found: dict[str, tuple[Function, float]] = {}
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        name = name if name.isidentifier() else "reward"  # a lambda
        if name in found:
            raise InputError(f"reward: two functions are called {name}; give a dict of them by name")
        found[name] = (function, 1.0)
    return found


def _keep_function(function: Function, folder: Path, name: str) -> Path:
    """Writes a function for processes that call it; returns the file, whose name says which function it is.

    What is in `__main__`, a notebook say, is written whole; others are imported there from where they are here.

    Raises:
      InputError: if it cannot be called, or has something that cannot be written.
    """
    import cloudpickle

    if not callable(function) or not name.isidentifier():
        raise InputError(f"reward: {name!r} is no function, or no name of one")
    try:
        pickled = cloudpickle.dumps(function)
        source = blake3(_written(function) or pickled).hexdigest()
    except Exception as error:  # whatever an object raises
        raise InputError(
            f"reward: {name} cannot be given to another process ({first_line(error)}); put it into a file, and set "
            f'reward.function = "FILE.py:{name}"'
        ) from None
    made = {"python": platform.python_version(), "path": [p for p in sys.path if p], "source": source}
    return _keep(folder, name, json.dumps(made).encode() + b"\n" + pickled, ".pkl", source)


def _written(function: Function) -> bytes:
    """A function as it was written, with the values that it is bound to; empty where that is not known.

    What is pickled differs from one session of Python to the next.
    """
    import cloudpickle

    try:
        code = inspect.getsource(function)
    except (OSError, TypeError):
        return b""
    cells = getattr(function, "__closure__", None) or ()
    bound = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    return code.encode() + cloudpickle.dumps((bound, [cell.cell_contents for cell in cells]))


def _keep(folder: Path, name: str, content: bytes, suffix: str, identity: str = "") -> Path:
    """Writes a file under a name of its own, by whichever process comes last: each has the same."""
    path = folder / f"{name}-{(identity or blake3(content).hexdigest())[:12]}{suffix}"
    with replacing(path, f".{uuid.uuid4().hex}") as file:
        file.write(content)
    return path
