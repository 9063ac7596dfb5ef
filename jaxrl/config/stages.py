"""The stages of a run: whole recipes with a first step and an end, and what follows from them for any step.

Everything here is a function of the recipe and the step, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxrl.config.sections import Recipe, StageEntry
from jaxrl.types import Restart

# Sections and keys that a stage cannot change: the model and its optimizer's arrays, what is opened once a run.
FIXED_SECTIONS = ("run", "model", "mesh", "checkpoint")
CHANGING = {  # the keys that it can, of sections that are opened once a run
    "sampler": (
        "correction",
        "correction_level",
        "correction_cap",
        "correction_floor",
        "max_staleness",
        "logprob_diff_limit",
    ),
    "eval": ("every", "samples", "max_tokens", "temperature", "top_p"),
}
FIXED_KEYS = {"rollout": ("engine", "slots")}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps of a run that have one recipe."""

    number: int  # 0 for the first
    name: str
    first: int  # its first step
    until: int  # the step before which it ends
    restart: frozenset[Restart]
    recipe: Recipe  # without stages
    order: int  # number of the stage at which the order of prompts began
    warmed_from: int  # step at which the optimizer began

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"stage '{self.name}'"


def changeable(section: str, key: str) -> bool:
    """Whether a stage may change a key."""
    if section in FIXED_SECTIONS or key in FIXED_KEYS.get(section, ()):
        return False
    return section not in CHANGING or key in CHANGING[section]


def overridden(base: Recipe, entry: StageEntry) -> Recipe:
    """The base with a stage's changes, which are of the fields' types."""
    parts = {
        section: dataclasses.replace(getattr(base, section), **keys)
        for section, keys in entry.changes.items()
    }
    return dataclasses.replace(base, stages=(), **parts)


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a run in order; one of `run.steps` where the recipe has none."""
    if not recipe.stages:
        return (Stage(0, "whole run", 0, recipe.run.steps, frozenset(), recipe, order=0, warmed_from=0),)
    stages: list[Stage] = []
    for number, entry in enumerate(recipe.stages):
        own, before = overridden(recipe, entry), stages[-1] if stages else None
        first, order, warmed_from = (before.until, before.order, before.warmed_from) if before else (0, 0, 0)
        if before and ("data" in entry.restart or _other_order(before.recipe, own)):
            order = number
        if "optimizer" in entry.restart:
            warmed_from = first
        name, restart = entry.name or str(number + 1), frozenset(entry.restart)
        stages.append(Stage(number, name, first, entry.until, restart, own, order, warmed_from))
    return tuple(stages)


def _other_order(before: Recipe, now: Recipe) -> bool:
    """Whether the order of prompts begins anew between two stages; independent draws are numbered by batches."""
    draws = now.data.order == "replacement" and now.rollout.prompts != before.rollout.prompts
    return now.data != before.data or now.data.drop_solved < 1 or draws


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of a step; the first one's before the beginning, the last one's after the end."""
    return next((stage for stage in stages if step < stage.until), stages[-1])


def taken_before(stages: Sequence[Stage], step: int) -> int | None:
    """Prompts that the steps before `step` took of the order that the last of them took from.

    None where it follows from what was sampled.
    """
    now = stage_at(stages, step - 1)
    same = [stage for stage in stages if stage.order == now.order and stage.number <= now.number]
    if any(stage.recipe.groups.rounds for stage in same):
        return None
    return sum((min(stage.until, step) - stage.first) * stage.recipe.rollout.prompts for stage in same)


def reference_at(stages: Sequence[Stage], step: int) -> int:
    """The step whose parameters a KL term of this step is relative to; 0 is the model that training starts from."""
    for stage in reversed([stage for stage in stages if stage.first <= step]):
        every = stage.recipe.kl.reset_every
        last = min(step, stage.until - 1)
        since = (last - stage.first) // every * every if every else 0
        if since or "reference" in stage.restart:
            return stage.first + since
    return 0


def needs_reference(stages: Sequence[Stage], since: int, first: int) -> bool:
    """Whether a step from `first` on takes the policy before step `since` as its reference."""
    return any(
        stage.recipe.kl.coefficient and reference_at(stages, step) == since
        for stage in stages
        for step in range(max(stage.first, first), stage.until)
    )


def longest(recipe: Recipe) -> int:
    """Tokens of the longest prompt and completion of any stage, evaluations included."""
    return max(stage.recipe.max_tokens for stage in stages_of(recipe))
