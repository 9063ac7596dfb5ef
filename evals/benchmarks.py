"""The benchmarks: where their problems are, how many there must be, and how many responses each one gets."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from jaxrl import config, data
from jaxrl.config.sections import Count, Positive, Section
from jaxrl.errors import InputError
from jaxrl.files import at_home
from jaxrl.rewards.latex_equality import reference
from jaxrl.types import JsonObject

AS_IT_IS = config.Data(suffix="", strip_dapo_wrapper=False)  # puts and takes nothing around a problem
BUILT_IN = Path(__file__).with_name("benchmarks.toml")
# The columns of problem and answer, in the files that JustRL released and on the Hub.
LAYOUTS = (
    ("prompt", "reward_model.ground_truth"),
    ("problem", "answer"),
    ("question", "answer"),
    ("question", "final_answer"),
)


@dataclass(frozen=True)
class Benchmark(Section):
    """A benchmark as benchmarks.toml describes it."""

    path: str
    config: str = ""
    split: str = ""
    files: tuple[str, ...] = ()
    title: str = ""
    folder: str = ""
    problems: Count = 0
    samples: Positive = 32
    problem_column: str = ""
    answer_column: str = ""


@dataclass(frozen=True)
class Problem:
    """A problem as the benchmark has it."""

    question: str  # for people and the judge: of a chat, the last message of the user's
    answer: str  # ground truth, out of its box
    # the whole of it, where the benchmark has messages; file and row, for messages of errors
    chat: Sequence[JsonObject] = field(default=(), compare=False)
    where: str = field(default="", compare=False)


def select(names: str) -> dict[str, Benchmark]:
    """Returns the benchmarks of a list such as "aime24,mine.toml": names, "all", and files that describe others.

    Raises:
      InputError: for a name that is not known, or a file that does not describe benchmarks.
    """
    known = _read(BUILT_IN)
    chosen: dict[str, Benchmark] = {}
    for name in names.split(","):
        if name == "all":
            chosen |= known
        elif name in known:
            chosen[name] = known[name]
        elif name.endswith(".toml"):
            chosen |= _read(at_home(name))
        else:
            raise InputError(
                f"--benchmarks: there is no '{name}'; take some of {', '.join(known)}, or all, or describe your own "
                "in a .toml file"
            )
    return chosen


def load(name: str, benchmark: Benchmark, folder: Path | None = None) -> list[Problem]:
    """Loads its problems, in the order of the file; answers that come in a box are taken out of it.

    Args:
      name: the benchmark's.
      benchmark: its description.
      folder: with local copies, which replace what would come from the Hub.

    Raises:
      InputError: if problems or columns are missing, or there are more or fewer than there should be.
    """
    source = _source(name, benchmark, folder)
    choice = data.Choice(source, section=name, evaluation=True)
    if (
        source == benchmark.path or Path(source).is_dir()
    ):  # config, split and files are of the data set of the Hub
        choice = replace(choice, config=benchmark.config, split=benchmark.split, files=benchmark.files)
    given = (benchmark.problem_column, benchmark.answer_column)
    layouts = (given,) if all(given) else LAYOUTS
    columns = sorted({column for layout in layouts for column in layout})
    rows = list(data.read_rows(data.find_files(choice), (), columns))
    fitting = [layout for layout in layouts if rows and set(layout) <= set(rows[0][1])]
    if not fitting:
        raise InputError(
            f"{source}: has no rows with {', '.join(' and '.join(layout) for layout in layouts)}; name the columns by "
            f"problem_column and answer_column of [{name}] in a .toml file"
        )
    problem, answer = fitting[0]
    problems = [
        _problem(row.get(problem), problem, _answer(row.get(answer), answer, where), where)
        for where, row in rows
    ]
    if benchmark.problems and len(problems) != benchmark.problems:
        raise InputError(
            f"{source}: has {len(problems)} problems where {name} has {benchmark.problems}; get it again, or describe "
            "it in a .toml file as another benchmark"
        )
    return problems


def _read(path: Path) -> dict[str, Benchmark]:
    """The benchmarks that a .toml file describes, by name."""
    try:
        text = json.dumps(tomllib.loads(path.read_text(encoding="utf-8")), default=str)
        found = TypeAdapter(dict[str, Benchmark]).validate_json(text)
    except OSError as error:
        remedy = "give a .toml file of benchmarks"
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise InputError("\n".join(lines)) from None
    except ValueError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    for name, benchmark in found.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"{path}: [{name}] names a file; use letters, digits, _ and -")
        if bool(benchmark.problem_column) != bool(benchmark.answer_column):
            raise InputError(f"{path}: [{name}] has one of problem_column and answer_column; give both")
    return found


def _source(name: str, benchmark: Benchmark, folder: Path | None) -> str:
    """The file, folder or Hub id of its problems."""
    if folder is None or benchmark.path.lower().endswith(data.FORMATS) or Path(benchmark.path).exists():
        return benchmark.path
    local = folder / (benchmark.folder or name)
    files = [file.with_name(file.name + kind) for file in (local / "test", local) for kind in data.FORMATS]
    found = next((file for file in (*files, local) if file.exists()), None)
    if found is None:
        raise InputError(
            f"{name}: --data has neither {local} nor {local}.parquet or another of {' '.join(data.FORMATS)}"
        )
    return str(found)


def _problem(value: object, column: str, answer: str, where: str) -> Problem:
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return Problem(data.chat_of(value, AS_IT_IS, where, column=column).problem, answer, value, where)
    return Problem(_text(value, column, where), answer, where=where)


def _text(value: object, column: str, where: str) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{where}: '{column}' is {value!r:.60}, where text is needed; fill it in")
    return str(value)


def _answer(value: object, column: str, where: str) -> str:
    answer = reference(_text(value, column, where).strip())
    if not answer:
        raise InputError(f"{where}: the box in '{column}' is empty or does not end; write the answer alone")
    return answer
