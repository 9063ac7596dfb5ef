"""A matrix of runs: variants of one recipe, each over the same seeds, from a TOML file.

baseline = "demo"                  # path or name of a recipe
directory = "runs/compare"
seeds = [1, 2, 3, 4, 5]
budget.steps = 100                 # or budget.tokens, or budget.seconds of a device: the same for all
data.path = "runs/data-{seed}"     # values of a recipe, for all; {seed} is the seed
[[variants]]
name = "clip-higher off"
loss.clip_high = 0.2               # values of its own; or recipe = another one
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from evals.held_out import SAMPLED, as_marked
from jaxrl import config
from jaxrl.checkpoint import FREE, is_fixed
from jaxrl.config import named
from jaxrl.config.sections import Location, Positive, Seed
from jaxrl.errors import InputError, first_line
from jaxrl.types import ByThoughts, JsonObject

BASELINE = "baseline"
FOLDER = named.FOLDER / "matrices"
# Keys that say where and how fast, so that runs which differ in these alone are of one recipe
PLACES = (*FREE, "model.path", "data.path", "data.sources", "data.files")
MEASURE = ("benchmarks", "problems", "verifier", *SAMPLED)  # of [eval]: how accuracy is measured


@dataclass(frozen=True)
class Budget:
    """How long each run trains: one of these."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    steps: Positive | None = None
    tokens: Positive | None = None  # sampled
    # of the trainer's devices, in steps
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def given(self) -> tuple[str, float]:
        """The unit and the amount."""
        unit, most = next((name, value) for name, value in vars(self).items() if value is not None)
        return unit, float(most)


@dataclass(frozen=True)
class Variant:
    """A column of the matrix."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(pattern=r"^[^/\x00-\x1f]{1,60}$")]
    recipe: str = ""  # path or name; the baseline's where empty
    values: dict[str, object] = field(default_factory=dict)  # by "section.key"

    @property
    def slug(self) -> str:
        """Its folder's name."""
        return re.sub(r"[^\w.]+", "-", self.name).strip("-.") or "variant"


@dataclass(frozen=True)
class Matrix:
    """See the module's text."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    baseline: str
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    budget: Budget
    variants: tuple[Variant, ...] = ()
    directory: Location = "runs/compare"
    accuracies: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()  # the time to each is compared
    values: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A run of the matrix."""

    variant: str
    seed: int
    folder: Path
    recipe: config.Recipe

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.variant}, seed {self.seed}"


def load(source: str | Path) -> Matrix:
    """Reads a matrix.

    Args:
      source: path, or the name of one that comes along.

    Raises:
      InputError: if it cannot be read, or a key or value is none.
    """
    path = named.find(source, FOLDER, "matrix")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({first_line(error)})") from None
    variants = values.get("variants", [])
    if isinstance(variants, list):
        values["variants"] = [
            _with_values(each, Variant, f"{path}: variants.{n}") if isinstance(each, dict) else each
            for n, each in enumerate(variants)
        ]
    values = _with_values(values, Matrix, str(path))
    try:
        matrix = TypeAdapter(Matrix).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "it"
        raise InputError(f"{path}: {key}: {problem['msg']}") from None
    if sum(value is not None for value in vars(matrix.budget).values()) != 1:
        raise InputError(f"{path}: give one of budget.steps, budget.tokens and budget.seconds")
    slugs = [BASELINE, *(variant.slug.lower() for variant in matrix.variants)]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise InputError(f"{path}: two variants are called {twice[0]}; give each a name of its own")
    if len(set(matrix.seeds)) < len(matrix.seeds):
        raise InputError(f"{path}: seeds = {list(matrix.seeds)} has one twice")
    return matrix


def _with_values(table: JsonObject, kind: type, where: str) -> JsonObject:
    """A table whose sections of a recipe are gathered as `values`, by "section.key"."""
    own = {each.name for each in dataclasses.fields(kind)} - {"values"}
    sections = {each.name for each in dataclasses.fields(config.Recipe)}
    found = {key: value for key, value in table.items() if key in own}
    changes: dict[str, object] = {}
    for key, value in table.items():
        if key in own:
            continue
        if key == "stages":
            changes[key] = value
        elif key in sections and isinstance(value, Mapping):
            changes |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            raise InputError(
                f"{where}: unknown key '{key}'; known are {', '.join(sorted(own))} and section.key"
            )
    return found | {"values": changes}


def cells(matrix: Matrix, steps: int) -> list[Cell]:
    """The runs, seed by seed, so that all variants have as many at any time: of the baseline first.

    Args:
      matrix: see `load`.
      steps: run.steps of each, at first; a budget of tokens or seconds may need more.

    Raises:
      InputError: for a recipe that cannot be, or whose held-out accuracy is another measure than the baseline's; names
        the variant.
    """
    found: list[Cell] = []
    for seed in matrix.seeds:
        for variant in (Variant(BASELINE), *matrix.variants):
            folder = Path(matrix.directory) / variant.slug / f"seed-{seed}"
            values = _seeded({**matrix.values, **variant.values}, seed)
            own = {"run.directory": str(folder), "run.seed": seed, "run.steps": steps}
            try:
                recipe = config.load(variant.recipe or matrix.baseline, {**values, **own})
                if not recipe.eval.every:
                    raise InputError("nothing is measured; set eval.every, and eval.path or eval.benchmarks")
                cell = Cell(variant.name, seed, folder, recipe)
                if found and (other := _measure(cell) - _measure(found[0])):
                    keys = ", ".join(sorted(key for key, _ in other))
                    raise InputError(
                        f"{keys}: held-out answers would not be sampled or marked "
                        "as the baseline's; set eval.verifier and eval.max_tokens for all, and eval.* for none alone"
                    )
            except InputError as error:
                raise InputError(f"variant '{variant.name}': {error}") from None
            found.append(cell)
    return found


def _measure(cell: Cell) -> set[tuple[str, str]]:
    """What a cell's held-out accuracy depends on beside its weights, by key."""
    found: set[tuple[str, str]] = set()
    for stage in config.stages_of(cell.recipe):
        marked = as_marked(stage.recipe)
        values = {f"eval.{key}": getattr(marked.eval, key) for key in MEASURE if key != "verifier"}
        values["eval.max_tokens"] = marked.eval.max_tokens or marked.rollout.max_tokens
        if marked.eval.path:  # benchmarks have a grader of their own
            keys = ["verifier", "with_prompt"]
            keys += ["thoughts"] * (marked.reward.verifier in get_args(ByThoughts))
            keys += ["function", "functions", "threshold"] * (marked.reward.verifier == "none")
            values |= {f"reward.{key}": getattr(marked.reward, key) for key in keys}
        found |= {(key, repr(value)) for key, value in values.items()}
    return found


def _seeded(values: Mapping[str, object], seed: int) -> dict[str, object]:
    return {k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in values.items()}


def departures(cell: Cell, recipe: config.Recipe) -> list[str]:
    """The keys in which a run that is there is not what its cell wants."""
    found = config.differences(_anywhere(cell.recipe), _anywhere(recipe))
    measures = tuple(f"eval.{key}:" for key in (*MEASURE, "every"))
    return [line for line in found if line.startswith(measures) or is_fixed(line, PLACES)]


def _anywhere(recipe: config.Recipe) -> config.Recipe:
    """A recipe whose functions are named without their folders."""

    def bare(path: str) -> str:
        return path.rpartition("/")[2]

    functions = tuple(dataclasses.replace(f, path=bare(f.path)) for f in recipe.reward.functions)
    reward = dataclasses.replace(recipe.reward, function=bare(recipe.reward.function), functions=functions)
    return dataclasses.replace(recipe, reward=reward)
