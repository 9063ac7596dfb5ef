"""What a run remembers of its prompts beyond a step: a checkpoint holds as much of it as the steps to come need."""

from __future__ import annotations

import base64
import dataclasses
import io
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from jaxrl.config import Stage, stage_at
from jaxrl.config.stages import taken_before
from jaxrl.errors import InputError
from jaxrl.grpo.groups import too_easy
from jaxrl.types import Groups, JsonObject

Answer = Int32[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What is remembered of prompts, by `Prompt.key`.

    Attributes:
      cursor: prompts taken so far of the present order.
      counts: (right, sampled) answers in the present stage, where the next one drops solved prompts.
      dropped: prompts that are left out as solved.
      answers: the newest right answer, where groups are rescued; the oldest one first.
    """

    cursor: int = 0
    counts: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    answers: Mapping[str, Answer] = dataclasses.field(default_factory=dict)

    def after(self, stages: Sequence[Stage], stage: Stage, groups: Groups) -> Ledger:
        """The ledger after a step of a stage.

        Args:
          stages: of the run.
          stage: the step's.
          groups: all that were sampled, marked; empty where a prompt was refused.
        """
        counts, answers = self.counts, self.answers
        if _counted(stages, stage):
            counts = dict(counts)
            for group in filter(None, groups):
                right, sampled = counts.get(group[0].prompt.key, (0, 0))
                found = sum(rollout.score > 0 for rollout in group)
                counts[group[0].prompt.key] = (right + found, sampled + len(group))
        section = stage.recipe.groups
        if section.rescue:
            answers = dict(answers)
            for group in groups:
                for rollout in [rollout for rollout in group if rollout.score > 0][:1]:
                    answers.pop(rollout.prompt.key, None)  # the newest is the last
                    answers[rollout.prompt.key] = rollout.tokens
            answers = dict(list(answers.items())[-section.rescue_answers :])
        return dataclasses.replace(self, cursor=self.cursor + len(groups), counts=counts, answers=answers)

    def entering(self, before: Stage, stage: Stage) -> Ledger:
        """The ledger with which a stage begins that is not the first, after the one before."""
        dropped = frozenset[str]()
        if (threshold := stage.recipe.data.drop_solved) < 1:
            names = np.array(list(self.counts), object)
            shares = np.array([right / sampled for right, sampled in self.counts.values()])
            dropped = self.dropped | set(too_easy(names, shares, threshold)) if self.counts else self.dropped
        same_marks = stage.recipe.reward == before.recipe.reward
        return Ledger(
            cursor=0 if stage.order == stage.number else self.cursor,
            dropped=dropped,
            answers=self.answers if stage.recipe.groups.rescue and same_marks else {},
        )

    def to_json(self, stages: Sequence[Stage], step: int) -> JsonObject:
        """What a checkpoint after `step` steps has to hold; empty where all of it follows from the recipe."""
        stage = stage_at(stages, step - 1)
        found: JsonObject = {}
        if taken_before(stages, step) is None:
            found["cursor"] = self.cursor
        if _counted(stages, stage):
            found["counts"] = {name: list(pair) for name, pair in self.counts.items()}
        if self.dropped:
            found["dropped"] = sorted(self.dropped)
        if self.answers:
            found["answers"] = {"ids": list(self.answers), "tokens": _packed(list(self.answers.values()))}
        return found


def from_json(values: JsonObject, stages: Sequence[Stage], step: int) -> Ledger:
    """The ledger after `step` steps.

    Args:
      values: of `Ledger.to_json`.
      stages: of the run; later ones may differ from those that it was written with.
      step: steps done.

    Raises:
      InputError: if the stage under way did not count what the next one needs.
    """
    stage, taken = stage_at(stages, step - 1), taken_before(stages, step)
    if _counted(stages, stage) and step and "counts" not in values:
        raise InputError(
            f"{stages[stage.number + 1].title} leaves out prompts that {stage.title} solved, which has done "
            f"{step - stage.first} steps without counting answers; give data.drop_solved to a later stage"
        )
    answers = values.get("answers", {"ids": [], "tokens": None})
    return Ledger(
        cursor=values["cursor"] if taken is None else taken,
        counts={name: (right, sampled) for name, (right, sampled) in values.get("counts", {}).items()},
        dropped=frozenset(values.get("dropped", ())),
        answers=dict(zip(answers["ids"], _unpacked(answers["tokens"]), strict=True)),
    )


def _counted(stages: Sequence[Stage], stage: Stage) -> bool:
    """Whether the next stage leaves out what this one solves."""
    return any(s.recipe.data.drop_solved < 1 for s in stages[stage.number + 1 : stage.number + 2])


def _packed(answers: Sequence[Answer]) -> str:
    """Arrays as text; JSON's numbers would be four times as long."""
    with io.BytesIO() as file:
        np.savez(file, lengths=[len(each) for each in answers], tokens=np.concatenate(answers))
        return base64.b64encode(zlib.compress(file.getvalue(), 1)).decode()


def _unpacked(text: str | None) -> list[Answer]:
    if text is None:
        return []
    with np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), allow_pickle=False) as arrays:
        return np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
