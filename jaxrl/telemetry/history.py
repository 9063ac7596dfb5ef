"""prompts.jsonl: how often each prompt was answered right, a line a step; and what follows from it over a run."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float64

from jaxrl.telemetry.lines import StepLines, read_lines
from jaxrl.types import Groups, Say

FILE = "prompts.jsonl"  # in the run folder
ENOUGH = 16  # answers that make a prompt's share of right ones worth a look
OUTCOMES = ("all right", "some right", "none right")  # of a prompt's answers in a step


class HistoryRow(TypedDict):
    """A line of prompts.jsonl."""

    step: int  # 0 for the first
    prompts: dict[str, tuple[int, int]]  # answers that were right and answers in all, by `Prompt.key`


class Totals(NamedTuple):
    """A prompt's answers over a run."""

    id: str
    shown: int  # answers that were sampled
    right: int
    last_step: int  # at which it was sampled, 0 for the first
    last_right: int  # answers right in that step

    @property
    def lost(self) -> bool:
        """Whether it was answered right once, and not in the last step that had it."""
        return self.right > 0 and not self.last_right


class History:
    """Writes prompts.jsonl. Rows from `start` on are dropped: those steps are about to be run again."""

    def __init__(self, path: Path, start: int, say: Say) -> None:
        self._lines = StepLines(path, start, say, _row_of)

    def log(self, step: int, groups: Groups) -> None:
        """Adds the row of a step, 0 for the first.

        Args:
          step: its number.
          groups: [P][G] marked rollouts, of every group that was sampled; groups of one prompt are added up.

        Raises:
          InputError, RunError: see `files.writing`.
        """
        right, shown = Counter[str](), Counter[str]()
        for rollout in (rollout for group in groups for rollout in group):
            shown[rollout.prompt.key] += 1
            right[rollout.prompt.key] += int(rollout.score > 0)
        row: HistoryRow = {"step": step, "prompts": {name: (right[name], n) for name, n in shown.items()}}
        self._lines.write(row)

    def close(self) -> None:
        self._lines.close()


def read_history(path: Path) -> list[HistoryRow]:
    """Reads the rows of a prompts.jsonl; none where there is no file, as in older runs. Damaged lines are left out."""
    rows, _ = read_lines(path, _row_of)
    return rows


def totals(rows: Iterable[HistoryRow]) -> list[Totals]:
    """The totals of each prompt, in the order in which they were first sampled."""
    found: dict[str, Totals] = {}
    for row in rows:
        for name, (right, shown) in row["prompts"].items():
            before = found.get(name)
            if before:
                found[name] = Totals(name, before.shown + shown, before.right + right, row["step"], right)
            else:
                found[name] = Totals(name, shown, right, row["step"], right)
    return list(found.values())


def hardest(prompts: Sequence[Totals], count: int = 10, least: int = ENOUGH) -> list[Totals]:
    """The prompts with the lowest share of right answers, of those with at least so many answers.

    Of equal shares, those with more answers come first. Where no prompt has that many, the prompts with the most
    answers are looked at.
    """
    least = min(least, max((prompt.shown for prompt in prompts), default=0))
    enough = [prompt for prompt in prompts if prompt.shown >= least]
    return sorted(enough, key=lambda prompt: (prompt.right / prompt.shown, -prompt.shown))[:count]


def last_outcomes(rows: Sequence[HistoryRow]) -> Float64[np.ndarray, "T 3"]:
    """Of the prompts sampled up to each step, the shares with each of OUTCOMES when each was sampled last."""
    outcomes: dict[str, int] = {}
    counts, shares = np.zeros(len(OUTCOMES)), np.zeros((len(rows), len(OUTCOMES)))
    for at, row in enumerate(rows):
        for name, (right, shown) in row["prompts"].items():
            outcome = 0 if right == shown else 1 if right else 2
            if name in outcomes:
                counts[outcomes[name]] -= 1
            counts[outcome] += 1
            outcomes[name] = outcome
        shares[at] = counts / max(len(outcomes), 1)
    return shares


def _row_of(row: object) -> HistoryRow | None:
    """A row from its JSON. Ids are interned: a long run has each many times."""
    if (
        not isinstance(row, dict)
        or type(row.get("step")) is not int
        or not isinstance(row.get("prompts"), dict)
    ):
        return None
    prompts: dict[str, tuple[int, int]] = {}
    for name, counts in row["prompts"].items():
        if not isinstance(counts, list) or [type(n) for n in counts] != [int, int]:
            return None
        right, shown = counts
        if not 0 <= right <= shown or not shown:
            return None
        prompts[sys.intern(name)] = right, shown
    return {"step": row["step"], "prompts": prompts}
