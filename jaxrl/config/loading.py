"""Recipes from TOML, with overrides, and back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import tomli_w
import tyro
from pydantic import TypeAdapter, ValidationError

from jaxrl.config.hints import meant, misnamed
from jaxrl.config.named import find
from jaxrl.config.rules import impossible
from jaxrl.config.sections import Recipe, RewardFunction, Source, StageEntry
from jaxrl.errors import InputError, first_line
from jaxrl.types import JsonObject


def from_dict(values: Mapping[str, object], source: str = "recipe") -> Recipe:
    """Validates values by section and builds a recipe.

    Raises:
      InputError: with a line per unknown key, wrong type, value out of range or impossible combination.
    """
    recipe = _unchecked(values, source)
    problems = impossible(recipe)
    if problems:
        raise InputError("\n".join(f"{source}: {problem}" for problem in problems))
    return recipe


def from_earlier(values: JsonObject, source: str) -> Recipe:
    """A recipe that a run has written, maybe by an earlier version.

    Raises:
      InputError: see `from_dict`.
    """
    sections = {name: dict(part) if isinstance(part, dict) else part for name, part in values.items()}
    advantage = sections.get("advantage", {})
    if "normalize_std" in advantage:
        advantage["scale"] = "group" if advantage.pop("normalize_std") else "none"
    return from_dict(sections, source)


def load(recipe: str | Path | Recipe, overrides: Sequence[str] | Mapping[str, object] = ()) -> Recipe:
    """Reads a TOML recipe, or one that comes along by its name, and applies overrides.

    Args:
      recipe: its path or name, or one that was loaded before.
      overrides: values by "section.key", or `--section.key value` of a command line.

    Raises:
      InputError: if the file is missing, is not TOML, or does not describe a possible run.
    """
    values, source, folder = _tables(recipe)
    changes = overrides if isinstance(overrides, Mapping) else {}
    if changes or not overrides:
        return _located(from_dict(_changed(values, changes), source), folder)
    return from_dict(to_dict(draft(recipe, overrides)), "command line")


def draft(recipe: str | Path | Recipe, overrides: Sequence[str] | Mapping[str, object] = ()) -> Recipe:
    """As `load`, but the recipe may be impossible as long as more is to be changed.

    Raises:
      InputError: if the file is missing, is not TOML, or has a key or value that no recipe has.
    """
    values, source, folder = _tables(recipe)
    changes = overrides if isinstance(overrides, Mapping) else {}
    if changes or not overrides:
        return _located(_unchecked(_changed(values, changes), source), folder)
    found = from_command_line(_unchecked(values, source), list(overrides), f"jaxrl train {source}")
    return _located(found, folder)


def _tables(recipe: str | Path | Recipe) -> tuple[JsonObject, str, Path]:
    """The values of a recipe by section, what to call it in messages, and the folder that it is in."""
    if isinstance(recipe, Recipe):
        return to_dict(recipe), "recipe", Path()
    path = find(recipe)
    return _read(path), str(path), path.parent


def _read(path: Path) -> JsonObject:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the recipe ({error.strerror}); give the path of a .toml file"
        ) from None
    except ValueError as error:  # of the syntax, the encoding, or an integer of thousands of digits
        raise InputError(f"{path}: not valid TOML: {first_line(error)}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid TOML: nested too deeply") from None


def _changed(values: Mapping[str, object], changes: Mapping[str, object]) -> JsonObject:
    """The tables with other values, by "section.key"; "stages" is the whole list."""
    found: JsonObject = {n: dict(part) if isinstance(part, Mapping) else part for n, part in values.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if key == "stages":
            found[key] = value
            found.get("run", {}).pop("steps", None)  # the last stage says it
        elif section in _names(Recipe) - {"stages"} and name:
            found.setdefault(section, {})[name] = value
        else:
            raise InputError(f"{key}: values are given by section.key; {meant(key, list(flat(Recipe())))}")
    return found


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with whole paths of the files of reward functions, which are in this folder or the current one."""

    def whole(path: str) -> str:
        file, _, function = path.rpartition(":")
        there = [at.absolute() / file for at in (folder, Path()) if (at / file).is_file()]
        return f"{there[0]}:{function}" if file.endswith((".py", ".pkl")) and there else path

    def located(keys: dict[str, object]) -> dict[str, object]:
        found = dict(keys)
        if function := keys.get("function"):
            found["function"] = whole(str(function))
        if functions := cast(tuple[RewardFunction, ...], keys.get("functions", ())):
            found["functions"] = tuple(dataclasses.replace(f, path=whole(f.path)) for f in functions)
        return found

    own = {"function": recipe.reward.function, "functions": recipe.reward.functions}
    reward = dataclasses.replace(recipe.reward, **located(own))  # type: ignore[arg-type]
    stages = tuple(
        dataclasses.replace(each, changes={**each.changes, "reward": located(each.changes["reward"])})
        if "reward" in each.changes
        else each
        for each in recipe.stages
    )
    return dataclasses.replace(recipe, reward=reward, stages=stages)


def from_command_line(default: Recipe, args: list[str], program: str) -> Recipe:
    """Overrides a recipe by `--section.key value`; `--help` prints every field and exits.

    Raises:
      InputError: for an option that is named otherwise.
    """
    problem = misnamed(args, list(flat(default)))
    if problem:
        raise InputError(problem)
    return tyro.cli(
        tyro.conf.configure(tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed)(Recipe),
        default=default,
        args=[{"true": "True", "false": "False"}.get(arg, arg) for arg in args],  # as TOML writes them
        prog=program,
        description="Overrides of the recipe's values, which are shown as defaults. Besides: --samplers URL,URL "
        "samples by these vLLM servers; --profile STEPS traces so many steps for XProf; --quiet shows no progress; "
        "--log-level debug|info|warning|error is of JAX and other libraries.",
    )


def to_dict(recipe: Recipe) -> JsonObject:
    """Values by section and key, and the stages where there are some, as a file has them."""
    values = dataclasses.asdict(recipe)
    entries = values.pop("stages")
    stages = [{**{k: v for k, v in each.items() if k != "changes"}, **each["changes"]} for each in entries]
    return {**values, "stages": stages} if stages else values


def to_toml(recipe: Recipe) -> str:
    """The recipe as a file that `load` reads."""
    return tomli_w.dumps(to_dict(recipe))


def flat(recipe: Recipe) -> dict[str, object]:
    """Values by "section.key", those of stages by "stages.0.section.key"."""
    values = to_dict(recipe)
    stages = {f"stages.{number}": stage for number, stage in enumerate(values.pop("stages", []))}
    found: dict[str, object] = {}
    for name, part in (values | stages).items():
        for key, value in part.items():
            inner = value.items() if name in stages and isinstance(value, dict) else None
            found |= (
                {f"{name}.{key}.{k}": v for k, v in inner} if inner is not None else {f"{name}.{key}": value}
            )
    return found


def differences(a: Recipe, b: Recipe) -> list[str]:
    """The keys on which two recipes differ, as 'section.key: a -> b'; None where a recipe has no such stage or key."""
    left, right = flat(a), flat(b)
    keys = dict.fromkeys((*left, *right))
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}" for key in keys if left.get(key) != right.get(key)
    ]


def _unchecked(values: Mapping[str, object], source: str) -> Recipe:
    """A recipe of the right types that may be impossible, as a file may be before overrides."""
    entries = values.get("stages")
    if entries is not None:
        values = {**values, "stages": _gathered(entries, source)}
    recipe = _validated(values, source)
    if not recipe.stages:
        return recipe
    run = values.get("run")
    if isinstance(run, Mapping) and run.get("steps", recipe.stages[-1].until) != recipe.stages[-1].until:
        raise InputError(
            f"{source}: run.steps = {recipe.run.steps}, and the last stage ends at until = {recipe.stages[-1].until}; "
            "leave run.steps out"
        )
    stages = tuple(_typed(recipe, number, source) for number in range(len(recipe.stages)))
    run_section = dataclasses.replace(recipe.run, steps=stages[-1].until)
    return dataclasses.replace(recipe, run=run_section, stages=stages)


def _validated(values: Mapping[str, object], source: str) -> Recipe:
    try:  # JSON mode: strict about types, and still takes an integer where a float is meant
        return TypeAdapter(Recipe).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise InputError("\n".join(f"{source}: {line}" for line in _explain(error))) from None


def _gathered(entries: object, source: str) -> list[JsonObject]:
    """Entries of [[stages]] with the tables of sections under `changes`."""
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise InputError(f"{source}: stages is no list of tables; write [[stages]] before each")
    own, sections = _names(StageEntry), _names(Recipe) - {"stages"}
    found: list[JsonObject] = []
    for number, entry in enumerate(entries):
        changes = {key: value for key, value in entry.items() if key not in own or key == "changes"}
        for key, value in changes.items():
            if key not in sections or not isinstance(value, dict):
                raise InputError(
                    f"{source}: unknown key 'stages.{number}.{key}'; a stage has until, name, restart, and keys with "
                    "their sections, such as rollout.max_tokens"
                )
        found.append({key: entry[key] for key in entry if key not in changes} | {"changes": changes})
    return found


def _typed(recipe: Recipe, number: int, source: str) -> StageEntry:
    """A stage whose changes are checked, and of the types of their fields."""
    entry, base = recipe.stages[number], to_dict(recipe)
    base.pop("stages")
    for section, keys in entry.changes.items():
        base[section] = {**base[section], **keys}
    changed = _validated(base, f"{source}: stages.{number}")
    typed = {
        section: {key: getattr(getattr(changed, section), key) for key in keys}
        for section, keys in entry.changes.items()
    }
    return dataclasses.replace(entry, changes=typed)


def _names(kind: type[Recipe | StageEntry]) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def _explain(error: ValidationError) -> Iterator[str]:
    """A line for each problem, with the key and the remedy."""
    for problem in error.errors():
        key, message = ".".join(map(str, problem["loc"])), problem["msg"]
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            yield f"unknown key '{key}'; {_suggestion(problem['loc'])}"
        elif problem["type"] in ("missing", "missing_argument"):
            yield f"'{key}' is missing; give it"
        else:
            yield f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(location: tuple[int | str, ...]) -> str:
    known = [f.name for f in dataclasses.fields(Recipe)]
    of_lists = {"data.sources": Source, "reward.functions": RewardFunction}
    entry = of_lists.get(".".join(map(str, location[:2])))
    if entry and len(location) > 3:
        known = [f.name for f in dataclasses.fields(entry)]
    elif len(location) > 1:
        known = [f.name for f in dataclasses.fields(getattr(Recipe(), str(location[0])))]
    if location == ("advantage", "normalize_std"):
        return 'it is now advantage.scale, "group" for true and "none" for false'
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
