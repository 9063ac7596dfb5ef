"""Problems as a reader wants them: their text in place of ids, and their right answers over the whole run."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.report.runs import Run
from jaxrl.telemetry.history import HistoryRow, Totals, hardest
from jaxrl.telemetry.rollouts import read_prompts, rollout_files

T = TypeVar("T")
Stored = Sequence[tuple[str, str, str]]  # (id, prompt, answer) of rollouts in the page


class Listed(NamedTuple):
    """A problem in a list of the page."""

    totals: Totals
    text: str  # its id where no file here has its text
    link: str  # its name in the page's browser; empty where that has no rollout of it


def around(prompts: Sequence[str]) -> tuple[str, str]:
    """What all prompts begin and end with, a chat template and the recipe's own words, cut where a line or tag ends."""
    if len({*prompts}) < 2:
        return "", ""
    head = os.path.commonprefix(prompts)
    tail = os.path.commonprefix([prompt[len(head) :][::-1] for prompt in prompts])[::-1]
    begin = max(head.rfind(end) for end in ">]\n") + 1
    end = re.search(r"[<\[\n]", tail)
    return head[:begin], tail[end.start() :] if end else ""


def lists(run: Run, stored: Stored) -> dict[str, list[Listed]]:
    """The prompts that were never solved, and the hardest of the others, each by its title; without empty lists."""
    never, solved = ([p for p in run.prompts if bool(p.right) == right] for right in (False, True))
    found = {"Never solved": hardest(never), "Hardest that were solved": hardest(solved)}
    texts = _texts(run, stored, {prompt.id for prompts in found.values() for prompt in prompts})
    here = _single(stored)
    return {
        title: [
            Listed(prompt, texts.get(prompt.id, prompt.id), name if (name := _id(prompt.id)) in here else "")
            for prompt in prompts
        ]
        for title, prompts in found.items()
        if prompts
    }


def histories(rows: Sequence[HistoryRow], stored: Stored) -> dict[int, list[tuple[int, int, int]]]:
    """(step from 1, right, answers) of the prompts that several steps had, by their place among the stored ones."""
    places = _single(stored)
    found: dict[str, list[tuple[int, int, int]]] = {}
    for row in rows:
        for key, (right, shown) in row["prompts"].items():
            if _id(key) in places:
                found.setdefault(key, []).append((row["step"] + 1, right, shown))
    keys = Counter(map(_id, found))  # another file of a later stage may have the same id
    return {places[_id(k)]: steps for k, steps in found.items() if len(steps) > 1 and keys[_id(k)] == 1}


def _texts(run: Run, stored: Stored, keys: Collection[str]) -> dict[str, str]:
    """The text of each prompt by key: from rollouts in the page, else from others, else from data on this machine."""
    from jaxrl.data import problem_texts

    head, tail = around([prompt for _, prompt, _ in stored])
    found: dict[str, str] = {}

    def add(prompts: Mapping[str, str]) -> bool:  # whether some are still missing
        for key in {*keys} - found.keys():
            if prompt := prompts.get(_id(key)):
                found[key] = prompt.removeprefix(head).removesuffix(tail)
        return len(found) < len(keys)

    if add({name: stored[place][1] for name, place in _single(stored).items()}):
        others = {pair for file in rollout_files(run.directory) for pair in read_prompts(file)}
        add(_once(others))
    for stage in config.stages_of(run.recipe) if run.recipe else ():
        if missing := {*keys} - found.keys():
            try:
                texts = problem_texts(_moved(stage.recipe, run.directory))
            except InputError:
                continue  # the file is no longer what the run read
            found |= {key: texts[key] for key in missing if key in texts}
    return found


def _moved(recipe: config.Recipe, directory: Path) -> config.Data:
    """A recipe's [data], with a path inside the run folder where that folder is now."""
    path = Path(recipe.data.path)
    if not path.is_relative_to(recipe.run.directory):
        return recipe.data
    return dataclasses.replace(recipe.data, path=str(directory / path.relative_to(recipe.run.directory)))


def _once(pairs: Collection[tuple[str, T]]) -> dict[str, T]:
    """What each name has, without names that have several things."""
    counts = Counter(name for name, _ in pairs)
    return {name: each for name, each in pairs if counts[name] == 1}


def _single(stored: Stored) -> dict[str, int]:
    """The place of each prompt by id, without ids that several have."""
    return _once([(name, place) for place, (name, _, _) in enumerate(stored)])


def _id(key: str) -> str:
    """The id in a `Prompt.key`."""
    return re.sub(r" [0-9a-f]{16}$", "", key)
