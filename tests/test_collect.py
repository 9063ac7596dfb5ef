"""Which prompts a step asks for and which groups it trains on: by rounds played out, in any order of arrival."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import config, data
from jaxrl.collect import Collector, TooFew, Work, choose
from jaxrl.data.prompts import Counts
from jaxrl.grpo import groups
from jaxrl.marking import Pending
from jaxrl.types import Prompt, Rollout, SamplingParams

SAMPLES = 4
Marks = Callable[[int, int], str]  # the marks of a group, + for a right answer, by step and place


def work_of(prompts: int = 4, available: int = 40, **section: Any) -> Work:
    recipe = config.from_dict(
        {
            "rollout": {"prompts": prompts, "samples": SAMPLES},
            "groups": section,
            "optimizer": {"minibatch_prompts": 1},
        }
    )
    (stage,) = config.stages_of(recipe)
    all_prompts = [Prompt(str(i), np.array([i + 1], np.int32), "") for i in range(available)]
    sampling = SamplingParams(stop_ids=(1,))
    return Work(stage, data.PromptSet(all_prompts, "here", Counts()), None, lambda r, step=0: r, sampling)  # type: ignore[arg-type]


class Sampler:
    """Stands in for `Shared`: groups end in a random order, and some prompts are refused."""

    def __init__(self, marks: Marks, order: random.Random | None = None, alone: bool = True) -> None:
        self.marks, self.order, self.alone = marks, order, alone
        self.asked: list[list[str]] = []  # prompts of each call

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: Any,
        seed: Any,
        on_rollout: Any,
        on_group: Any = None,
        first: int = 0,
    ) -> list[list[Rollout]]:
        given, waiting = list(prompts), list(range(len(prompts)))
        found: dict[int, list[Rollout]] = {}
        self.asked.append([prompt.id for prompt in prompts])
        while waiting:
            place = waiting.pop(self.order.randrange(len(waiting)) if self.order else 0)
            marks = self.marks(seed[1], first + place)
            found[place] = [on_rollout(answer(given[place], mark, k)) for k, mark in enumerate(marks)]
            for prompt in on_group(place, found[place]) if on_group else ():
                waiting.append(len(given))
                given.append(prompt)
        return [found[place] for place in range(len(given))]

    def gather(self, own: list[list[Rollout]], prompts: Any, name: str) -> list[list[Rollout]]:
        return own


def answer(prompt: Prompt, mark: str, k: int) -> Rollout:
    score = 1.0 if mark == "+" else -1.0
    tokens = np.array([7, k, 1], np.int32)
    return Rollout(prompt, tokens, np.full(3, -1.0, np.float32), "stop", 0, score, score)


def collected(work: Work, sampler: Sampler, steps: int = 1, answers: Any = None) -> list[list[list[Rollout]]]:
    collector = Collector(work, sampler, 0, answers or {}, lambda step, rollout: None, lambda *_: None)  # type: ignore[arg-type]
    return [collector(step).groups for step in range(steps)]


def scored(rollouts: list[Rollout]) -> list[Rollout]:
    return rollouts


def places_of(chosen: Sequence[Sequence[Rollout]], everyone: Sequence[Sequence[Rollout]]) -> list[int]:
    """Where each chosen group was in the step's stream."""
    firsts = [group[0] if group else None for group in everyone]
    return [next(k for k, first in enumerate(firsts) if first is group[0]) for group in chosen]


def rounds_of(good: Callable[[int], bool], prompts: int, most: int) -> tuple[list[int], int]:
    """DAPO's loop, rounds of as many prompts as are missing: the places that are taken, and the prompts used."""
    taken, used, rounds = list[int](), 0, 0
    while len(taken) < prompts and (not most or rounds < most):
        asked = range(used, used + prompts - len(taken))
        taken += [k for k in asked if good(k)]
        used, rounds = asked.stop, rounds + 1
    return taken, used


@pytest.mark.parametrize("alone", [True, False])
def test_technique_refill_waits_for_functions_that_say_what_is_right(alone: bool) -> None:
    """Scores are known once a round has ended; what is asked for and trained on is what it would be with a verifier."""
    kinds = np.random.default_rng(1).choice(["++--", "----", "++++"], 400)
    work = work_of(5, 400, filter="refill")
    reward = config.Reward(verifier="none", function="mine.py:score")
    recipe = dataclasses.replace(work.recipe, reward=reward)

    def mark(rollout: Rollout, step: int = 0) -> Rollout:
        values = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(Rollout)}
        return Pending(**values | {"score": np.nan}, complete=lambda: rollout)

    stage = dataclasses.replace(work.stage, recipe=recipe)
    later = dataclasses.replace(work, stage=stage, mark=mark)
    sampler, samplers = (
        Sampler(lambda _, k: kinds[k], alone=alone),
        Sampler(lambda _, k: kinds[k], alone=False),
    )
    (everyone,), (expected,) = collected(later, sampler), collected(work, samplers)
    assert sampler.asked == samplers.asked and len(sampler.asked) > 1
    assert [[type(each) for each in group] for group in everyone] == [[Rollout] * SAMPLES] * len(everyone)
    assert [[each.score for each in group] for group in everyone] == [
        [each.score for each in group] for group in expected
    ]
    found = [choose(one, groups, 0, {}, scored) for one, groups in ((later, everyone), (work, expected))]
    places = [places_of(one.groups, groups) for one, groups in zip(found, (everyone, expected), strict=True)]
    assert places[0] == places[1] and len(places[0]) == 5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0, 1, 2, 3]), st.floats(0.3, 1.0))
def test_technique_refill_takes_what_rounds_take_in_any_order_of_arrival(
    seed: int, prompts: int, most: int, rate: float
) -> None:
    kinds = np.random.default_rng(seed).choice(
        ["++--", "----", "++++", ""], 400, p=[rate, *[(1 - rate) / 3] * 3]
    )
    work = work_of(prompts, 400, filter="refill", max_rounds=most)
    expected, used = rounds_of(lambda k: kinds[k] == "++--", prompts, most)
    for sampler in (
        Sampler(lambda _, k: kinds[k]),
        Sampler(lambda _, k: kinds[k], random.Random(seed)),
        Sampler(lambda _, k: kinds[k], alone=False),  # processes that sample together, round by round
    ):
        (everyone,) = collected(work, sampler)
        assert len(everyone) == used
        chosen = choose(work, everyone, 0, {}, scored)
        assert places_of(chosen.groups, everyone) == expected
        if sampler.alone:
            assert len(sampler.asked) == 1  # the next round begins before this one has ended
        else:
            assert chosen.rounds == len(sampler.asked)


def test_technique_the_next_step_goes_on_after_the_last_prompt() -> None:
    work = work_of(4, 40, filter="refill")
    one, two = collected(
        work, Sampler(lambda step, k: "----" if (step, k) in {(0, 1), (0, 4)} else "+---"), 2
    )
    stream = [prompt.id for prompt in work.stream(0).take(0, 10)]
    assert [group[0].prompt.id for group in one + two] == stream


@pytest.mark.parametrize(("most", "rounds"), [(0, 3), (2, 2)])
def test_technique_substitute_draws_again_where_too_few_are_good(most: int, rounds: int) -> None:
    """Of 9 groups more than 3 have to be good; those that are not are then copies of these."""
    good = [{1, 4, 5}, {0, 3, 8}, {0, 2, 3, 6}]
    work = work_of(9, 90, filter="substitute", max_rounds=most)
    sampler = Sampler(lambda _, k: "+---" if k % 9 in good[k // 9] else "----", random.Random(3))
    (everyone,) = collected(work, sampler)
    chosen, last = choose(work, everyone, 0, {}, scored), good[rounds - 1]
    assert (len(everyone), chosen.rounds) == (9 * rounds, rounds)
    places = [k - 9 * (rounds - 1) for k in places_of(chosen.groups, everyone)]
    if most:  # goes on with what there is
        assert places == sorted(last)
    else:
        assert len(places) == 9 and set(places) == last and all(places[k] == k for k in last)


def test_technique_drop_trains_on_what_is_left() -> None:
    work = work_of(4, 40, filter="drop", keep=[0.25, 1.0])
    (everyone,) = collected(work, Sampler(lambda _, k: ["+---", "++--", "++++", ""][k]))
    assert places_of(choose(work, everyone, 0, {}, scored).groups, everyone) == [1]


def test_technique_without_a_filter_nothing_is_chosen() -> None:
    work = work_of(4)
    (everyone,) = collected(work, Sampler(lambda _, k: "++++" if k else ""))
    chosen = choose(work, everyone, 0, {"1": np.array([1])}, scored)
    assert chosen.groups == everyone[1:] and (chosen.rescued, chosen.rounds) == (0, 1)


def test_technique_a_band_in_which_nothing_is_left_ends_with_what_to_do() -> None:
    work = work_of(4, 10, filter="refill")
    (everyone,) = collected(work, Sampler(lambda _, k: "+---" if k in (2, 7) else "----"))
    assert len(everyone) == 14  # a whole pass beyond the first round
    with pytest.raises(
        TooFew, match=r"step 6: all 10 prompts of here were sampled, and 2 of 14 groups"
    ) as caught:
        choose(work, everyone, 5, {}, scored)
    assert "groups.keep = [0.0, 1.0]" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["none", "drop", "refill"])
def test_technique_a_rescued_group_has_one_right_answer_of_an_earlier_step(rule: str) -> None:
    work, kept = work_of(4, 40, filter=rule, rescue=True), np.array([7, 8, 9, 1], np.int32)
    ids = [prompt.id for prompt in work.stream(0).take(0, 8)]
    answers = {
        ids[0]: kept,
        ids[2]: kept,
        ids[3]: np.ones(20_000, np.int32),
    }  # the last is too long for this stage
    sampler = Sampler(lambda _, k: ["----", "----", "++--", "----"][k] if k < 4 else "+---")
    (everyone,) = collected(work, sampler, answers=answers)
    asked: list[Rollout] = []

    def score(rollouts: list[Rollout]) -> list[Rollout]:
        asked.extend(rollouts)
        logprobs = np.arange(4, dtype=np.float32)
        return [Rollout(r.prompt, r.tokens, logprobs, r.finish_reason, r.version, 1.0, 1.0) for r in rollouts]

    chosen = choose(work, everyone, 3, answers, score)
    assert chosen.rescued == 1 and [r.prompt.id for r in asked] == [ids[0]]
    (rescuer,) = [r for r in chosen.groups[0] if r.tokens is kept]
    assert rescuer.logprobs.tolist() == [0, 1, 2, 3] and (rescuer.version, rescuer.finish_reason) == (
        3,
        "stop",
    )
    assert [r.score for r in chosen.groups[0]].count(1.0) == 1 and len(chosen.groups[0]) == SAMPLES
    assert everyone[0][0].score == -1  # what was sampled is counted as it was
    assert len(everyone) == {"none": 4, "drop": 4, "refill": 6}[rule]  # none is asked for a rescued group
    assert len(chosen.groups) == {"none": 4, "drop": 2, "refill": 4}[rule]


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_technique_more_is_asked_only_as_more_is_known(known: list[bool], prompts: int, most: int) -> None:
    """Whatever is not known yet counts as good, so that no prompt is asked for that would not be in the end."""
    bad = np.array(known, bool)
    for rule in ("refill", "substitute"):
        end = groups.asked(rule, prompts, bad, most)
        for hidden in range(len(known) + 1):
            assert groups.asked(rule, prompts, bad[:hidden], most) <= end
    assert groups.asked("drop", prompts, bad, most) == groups.asked("none", prompts, bad, most) == prompts
