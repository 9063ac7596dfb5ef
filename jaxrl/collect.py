"""Sampling the groups of a step: which prompts are asked for, what is trained on, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxrl import config, data
from jaxrl.config import Stage
from jaxrl.errors import InputError
from jaxrl.grpo.groups import asked, in_band, rescuable, trained
from jaxrl.ledger import Answer
from jaxrl.marking import finished
from jaxrl.prepare import Method
from jaxrl.rewards.functions import Functions
from jaxrl.sampling.across_processes import Shared
from jaxrl.types import Marker, Prompt, Rollout, SamplingParams

Answers = Mapping[str, Answer]  # right ones of earlier steps, by prompt
Told = Callable[[int, Rollout], None]  # called with a step and a rollout of it, once it is marked
# Called when a step asks for more prompts: the step, how many, and how many groups were out of the band so far.
OnMore = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Work:
    """A stage and what its recipe names, loaded."""

    stage: Stage
    prompts: data.PromptSet  # all there are to draw from
    method: Method
    mark: Marker  # by the steps of the stage
    sampling: SamplingParams
    functions: Functions | None = None  # that the marker calls

    @property
    def recipe(self) -> config.Recipe:
        return self.stage.recipe

    @property
    def most(self) -> int:
        """Prompts that a step asks for at most: of its rounds, or a whole pass, after which more are no use."""
        size, rounds = self.recipe.rollout.prompts, self.recipe.groups.max_rounds
        return size * rounds if rounds else size + len(self.prompts.prompts)

    def asked(self, bad: Bool[np.ndarray, " N"], rounds: int | None = None) -> int:
        """`groups.asked` by the recipe, where `rounds` gives no other limit."""
        section = self.recipe.groups
        limit = section.max_rounds if rounds is None else rounds
        return asked(section.filter, self.recipe.rollout.prompts, bad, limit)

    def stream(self, cursor: int) -> Stream:
        """The prompts that a step may ask for."""
        return Stream(self, cursor)


class Stream(Sequence[Prompt]):
    """The prompts of a step, in the order in which they are asked for: a function of seed, stage and cursor."""

    def __init__(self, work: Work, cursor: int) -> None:
        self._work, self._cursor, self._blocks = work, cursor, dict[int, list[Prompt]]()

    def __len__(self) -> int:
        return self._work.most

    def __getitem__(self, k: int) -> Prompt:  # type: ignore[override]
        block, place = divmod(k, size := self._work.recipe.rollout.prompts)
        if block not in self._blocks:
            r, given, first = self._work.recipe, self._work.prompts, self._cursor + block * size
            order, restart = r.data.order, self._work.stage.order
            self._blocks[block] = data.batch(
                given.prompts, r.run.seed, first, size, order, given.mixture, restart
            )
        return self._blocks[block][place]

    def take(self, first: int, end: int) -> list[Prompt]:
        return [self[k] for k in range(first, end)]


class Collected(NamedTuple):
    """The groups that were sampled for a step, in the order of its stream; empty where a prompt was refused."""

    groups: list[list[Rollout]]
    everyone: bool  # of all processes, or of this one


class Collector:
    """Samples the steps of a stage one after another, in as many rounds as its filter needs.

    The noise of an answer is a function of (seed, step, place in the step's stream, sample): its round is no matter.

    Attributes:
      cursor: prompts taken of the order so far.
      answers: those that may rescue a group, where the recipe rescues; the caller keeps them up to date.
    """

    def __init__(
        self, work: Work, sampler: Shared, cursor: int, answers: Answers, told: Told, on_more: OnMore
    ) -> None:
        """
        Args:
          work: the stage.
          sampler: of all processes.
          cursor: see above.
          answers: see above.
          told: see `Told`.
          on_more: see `OnMore`.
        """
        self._work, self._sampler, self._told, self._on_more = work, sampler, told, on_more
        self.cursor, self.answers = cursor, answers

    def __call__(self, step: int) -> Collected:
        """Samples a step, or this process's share of it; steps are asked for in order. Maybe called in a thread."""
        work, recipe = self._work, self._work.recipe
        stream, asking = work.stream(self.cursor), Asking(work, self.answers)
        seed, samples = (recipe.run.seed, step), recipe.rollout.samples

        def mark(rollout: Rollout) -> Rollout:
            marked = work.mark(rollout, step - work.stage.first)
            self._told(step, marked)
            return marked

        def more(place: int, group: Sequence[Rollout]) -> list[Prompt]:
            before = asking.count
            asking.learn(place, group)
            if asking.count > before:
                self._on_more(step, asking.count - before, asking.bad)
            return stream.take(before, asking.count)

        prompts, alone = stream.take(0, asking.count), self._sampler.alone
        scored = bool(recipe.reward.marked_by)  # as they arrive; else once functions have answered
        if not recipe.groups.rounds or (alone and scored):
            groups = self._sampler.generate(prompts, samples, work.sampling, seed, mark, more)
            self.cursor += asking.count
            return Collected(self._whole(groups), everyone=False)
        # a filter is about everyone's groups, and all of their answers
        groups = []
        while prompts:
            first = len(groups)
            own = self._sampler.generate(prompts, samples, work.sampling, seed, mark, first=first)
            own = self._whole(own)
            groups += (
                own if alone else self._sampler.gather(own, prompts, f"step {step + 1}, from prompt {first}")
            )
            prompts = [prompt for k in range(first, len(groups)) for prompt in more(k, groups[k])]
        self.cursor += asking.count
        return Collected(groups, everyone=not alone)

    def _whole(self, groups: list[list[Rollout]]) -> list[list[Rollout]]:
        """Groups with the values of the recipe's functions, if it has some."""
        return finished(groups) if self._work.recipe.reward.named else groups


class Asking:
    """How many prompts of its stream a step asks for, as its groups become known."""

    def __init__(self, work: Work, answers: Answers) -> None:
        self._work, self._answers = work, answers
        self.count = work.recipe.rollout.prompts
        self._bad = np.zeros(self.count, bool)

    @property
    def bad(self) -> int:
        """Groups that are known to be out of the band."""
        return int(self._bad.sum())

    def learn(self, place: int, group: Sequence[Rollout]) -> None:
        """Takes note of a group, and asks for more prompts if it was the last one needed to know that they are."""
        if self._work.recipe.groups.rounds:
            self._bad[place] = not is_good(self._work.recipe, group, self._answers)
            self.count = max(self.count, min(self._work.asked(self._bad), self._work.most))
            self._bad = np.pad(self._bad, (0, self.count - len(self._bad)))


class TooFew(InputError):
    """Every prompt was sampled, and too few groups are in the band."""


class Chosen(NamedTuple):
    """What is trained on, and what is told of the choice."""

    groups: list[list[Rollout]]
    rescued: int
    rounds: int


def is_good(recipe: config.Recipe, group: Sequence[Rollout], answers: Answers) -> bool:
    """Whether a group's share of right answers is in the band, after a rescue where there may be one."""
    if not group:
        return False
    right = np.array([[rollout.score > 0 for rollout in group]])
    if _stored(recipe, group, answers) and not right.any():
        right[0, 0] = True
    return bool(in_band(right, recipe.groups.keep)[0])


def choose(
    work: Work,
    everyone: Sequence[list[Rollout]],
    step: int,
    answers: Answers,
    score: Callable[[list[Rollout]], list[Rollout]],
) -> Chosen:
    """The groups that a step trains on.

    Args:
      work: the stage.
      everyone: all groups that were sampled for the step, in the order of its stream.
      step: of the run.
      answers: right ones of earlier steps.
      score: gives rollouts the log-probs of the policy; the rescuing ones have no sampler's.

    Raises:
      TooFew: if all prompts were sampled, and too few groups are in the band.
    """
    recipe, section = work.recipe, work.recipe.groups
    groups, rescued = _rescue(work, everyone, step, answers, score)
    if section.filter == "none":
        return Chosen([group for group in groups if group], rescued, rounds=1)
    good = np.array([is_good(recipe, group, {}) for group in groups], bool)
    if len(groups) == work.most < work.asked(~good):
        raise TooFew(
            f"step {step + 1}: all {len(work.prompts.prompts)} prompts of {work.prompts.path} were sampled, and "
            f"{good.sum()} of {len(groups)} groups have a share of right answers between groups.keep = "
            f"{list(section.keep)}; begin a stage here with a wider band, other data or groups.max_rounds"
        )
    places = trained(section.filter, recipe.rollout.prompts, good, (recipe.run.seed, step))
    rounds = next(r for r in itertools.count(1) if work.asked(~good, r) >= len(good))
    return Chosen([groups[k] for k in places], rescued, rounds)


def _stored(recipe: config.Recipe, group: Sequence[Rollout], answers: Answers) -> bool:
    """Whether a right answer to a group's prompt is kept that the stage's streams can hold."""
    if not recipe.groups.rescue or group[0].prompt.key not in answers:
        return False
    return len(answers[group[0].prompt.key]) <= recipe.rollout.max_tokens


def _rescue(
    work: Work,
    everyone: Sequence[list[Rollout]],
    step: int,
    answers: Answers,
    score: Callable[[list[Rollout]], list[Rollout]],
) -> tuple[list[list[Rollout]], int]:
    """The groups, those without a right answer with one of an earlier step at a random place; and how many are so."""
    groups = [list(group) for group in everyone]
    if not work.recipe.groups.rescue:
        return groups, 0
    full = [k for k, group in enumerate(groups) if group]
    right = np.array([[rollout.score > 0 for rollout in groups[k]] for k in full]).reshape(len(full), -1)
    stored = np.array([_stored(work.recipe, groups[k], answers) for k in full], bool)
    chosen = [full[i] for i in np.flatnonzero(rescuable(right, stored))]
    found = [_rollout(work, groups[k][0].prompt, answers, step) for k in chosen]
    for k, rollout in zip(chosen, score(found) if found else [], strict=True):
        place = np.random.default_rng((work.recipe.run.seed, step, k)).integers(len(groups[k]))
        groups[k][place] = work.mark(rollout, step - work.stage.first)
    return groups, len(chosen)


def _rollout(work: Work, prompt: Prompt, answers: Answers, step: int) -> Rollout:
    """A kept answer as a rollout of this step, without log-probs."""
    tokens = answers[prompt.key]
    ended = tokens[-1] in work.sampling.stop_ids
    return Rollout(prompt, tokens, np.zeros(len(tokens), np.float32), "stop" if ended else "length", step)
