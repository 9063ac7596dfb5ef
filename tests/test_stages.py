"""Stages as functions of the recipe and the step, against a run that is played step by step; and what may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import checkpoint, config
from jaxrl.config.stages import needs_reference, reference_at, taken_before
from jaxrl.errors import InputError
from jaxrl.ledger import Ledger, from_json
from jaxrl.types import Prompt, Rollout

RESTARTS = ["optimizer", "reference", "data"]


def recipe_of(*stages: dict[str, Any], **sections: dict[str, Any]) -> config.Recipe:
    return config.from_dict({**sections, "stages": list(stages)} if stages else dict(sections))


@st.composite
def staged(draw: st.DrawFn) -> config.Recipe:
    ends = np.cumsum(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    stages = []
    for end in ends.tolist():
        every = draw(st.integers(0, 3))
        stages.append(
            {
                "until": end,
                "restart": [name for name in RESTARTS if stages and draw(st.booleans())],
                "rollout": {"prompts": draw(st.sampled_from([64, 128]))},
                "data": {"max_characters": draw(st.sampled_from([0, 0, 100]))},
                "kl": {"coefficient": 0.1 if every or draw(st.booleans()) else 0.0, "reset_every": every},
            }
        )
    return recipe_of(*stages)


@settings(max_examples=30)
@given(staged())
def test_what_follows_from_a_step_is_what_a_run_would_have(recipe: config.Recipe) -> None:
    """Everything that `stages` computes for any step, kept by hand from the first step on."""
    stages, cursor, reference, warmed, data = config.stages_of(recipe), 0, 0, 0, None
    read: set[int] = set()
    for number, entry in enumerate(recipe.stages):
        own, first = stages[number].recipe, recipe.stages[number - 1].until if number else 0
        for step in range(first, entry.until):
            if step == first and number:
                cursor = 0 if "data" in entry.restart or own.data != data else cursor
                reference = step if "reference" in entry.restart else reference
                warmed = step if "optimizer" in entry.restart else warmed
            elif own.kl.reset_every and step > first and (step - first) % own.kl.reset_every == 0:
                reference = step
            stage = config.stage_at(stages, step)
            assert (stage.number, stage.first, stage.warmed_from) == (number, first, warmed)
            assert reference_at(stages, step) == reference
            if own.kl.coefficient:
                read.add(reference)
            cursor += own.rollout.prompts
            assert taken_before(stages, step + 1) == cursor
        data = own.data
    total = recipe.stages[-1].until
    assert {step for step in range(total) if needs_reference(stages, step, step)} == read
    assert config.stage_at(stages, total) == stages[-1] and recipe.run.steps == total


def test_a_recipe_without_stages_is_one() -> None:
    recipe = config.Recipe()
    (stage,) = config.stages_of(recipe)
    assert (stage.first, stage.until, stage.recipe) == (0, recipe.run.steps, recipe)
    assert "stages" not in config.to_dict(recipe)


def test_overrides_are_of_the_base() -> None:
    first, second = config.stages_of(
        recipe_of(
            {"until": 10, "rollout": {"max_tokens": 1000}},
            {"until": 20, "rollout": {"temperature": 1}},  # an integer where a float is meant
            rollout={"max_tokens": 2000},
        )
    )
    assert (first.recipe.rollout.max_tokens, second.recipe.rollout.max_tokens) == (1000, 2000)
    assert second.recipe.rollout.temperature == 1.0 and isinstance(second.recipe.rollout.temperature, float)


def test_stages_come_back_from_a_file(tmp_path: Path) -> None:
    stages = (
        {"name": "easy", "until": 10, "data": {"sources": [{"path": "a", "weight": 2.0}]}},
        {"name": "hard", "until": 20, "restart": ["data"], "loss": {"dual_clip": float("inf")}},
    )
    recipe = recipe_of(*stages)
    (tmp_path / "recipe.toml").write_text(config.to_toml(recipe))
    assert config.load(tmp_path / "recipe.toml") == recipe
    changed = config.load(tmp_path / "recipe.toml", ["--optimizer.learning-rate", "1e-5"])
    assert config.differences(recipe, changed) == ["optimizer.learning_rate: 1e-06 -> 1e-05"]
    longer = recipe_of(*stages, {"name": "hot", "until": 30})
    assert config.differences(recipe, longer)[1:] == [
        "stages.2.until: None -> 30",
        "stages.2.name: None -> 'hot'",
        "stages.2.restart: None -> ()",
    ]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [{"until": 9, "rollout": {"max_token": 3}}],
            "stages.0: unknown key 'rollout.max_token'; did you mean",
        ),
        ([{"until": 9, "name": "a\nb"}], "stages.0.name = 'a\\nb': value error, not a name of at most 60"),
        ([{"until": 9, "stages": {"until": 2}}], "unknown key 'stages.0.stages'"),
        ([{"until": 9, "temperature": 1.0}], "unknown key 'stages.0.temperature'; a stage has until, name,"),
        ([{"name": "x"}], "'stages.0.until' is missing"),
        ([{"until": 9, "restart": ["all"]}], "stages.0.restart.0 = 'all': input should be 'optimizer'"),
        ({"until": 9}, "write [[stages]] before each"),
        (
            [{"name": "16k", "until": 9, "rollout": {"max_tokens": 40_000}}],
            "stage '16k': packing.stream_tokens",
        ),
        (
            [{"name": "greedy", "until": 9, "rollout": {"temperature": 0}}],
            "stage 'greedy': rollout.temperature",
        ),
    ],
)
def test_a_bad_stage_is_named_before_anything_is_loaded(stages: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        config.from_dict({"stages": stages})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_run_steps_is_the_last_end() -> None:
    assert recipe_of({"until": 7}, run={"steps": 7}).run.steps == 7
    with pytest.raises(InputError, match=r"run.steps = 8, and the last stage ends at until = 7; leave"):
        recipe_of({"until": 7}, run={"steps": 8})


A, B = {"until": 10}, {"until": 20, "optimizer": {"learning_rate": 2e-6}}


@pytest.mark.parametrize(
    ("before", "now", "step", "fixed"),
    [
        ([], [{"until": 10}, {"until": 20, "loss": {"clip_high": 0.4}}], 10, []),  # a stage after a whole run
        ([A], [A, B], 10, []),
        ([A, B], [A, B | {"optimizer": {"learning_rate": 3e-6}}], 10, []),  # it has not begun
        ([A, B], [A, B | {"optimizer": {"learning_rate": 3e-6}}], 11, ["stage '2': optimizer.learning_rate"]),
        ([A, B], [A, B | {"until": 15}, {"until": 30}], 15, []),  # the present end, moved
        ([A, B], [A, B | {"until": 14}, {"until": 30}], 15, ["stages: "]),
        ([A, B], [A, B | {"until": 14}], 15, ["stage '2': until: 20 -> 14, and 15 steps are done"]),
        ([A, B], [{"until": 11}, B], 15, ["stages: "]),
        ([A, B], [A, B | {"restart": ["data"]}], 15, ["stages: "]),
        ([A, B], [A, B | {"restart": ["data"]}], 10, []),
        ([A, B], [A, B | {"data": {"path": "copy"}}], 15, ["stages: "]),  # a new order, whatever is in it
        ([A, B], [A | {"name": "first"}, B], 15, []),  # names are for people
        (
            [A],
            [A | {"loss": {"clip_high": 0.4}}],
            0,
            ["loss.clip_high"],
        ),  # its first checkpoint is of step 1 or later
        ([A, B], [A, B | {"eval": {"samples": 5}}], 15, []),
    ],
)
def test_the_past_is_fixed_and_what_is_ahead_is_free(
    before: Any, now: Any, step: int, fixed: list[str]
) -> None:
    stages = [config.stages_of(recipe_of(*each)) for each in (before, now)]
    found = checkpoint._past_differences(*stages, step, [])
    assert len(found) == len(fixed)
    assert all(line.startswith(words) for line, words in zip(found, fixed, strict=True)), found


def test_what_is_ahead_does_not_change_what_a_run_is() -> None:
    one, two = recipe_of(A), recipe_of(A, B)
    assert checkpoint.identity(one, {}, 10) == checkpoint.identity(two, {}, 10)
    assert checkpoint.identity(one, {}, 11) != checkpoint.identity(two, {}, 11)


def groups_of(*marks: str) -> list[list[Rollout]]:
    """Groups of answers, + for a right one; the prompt's id is the number of the group, modulo 3."""
    found = []
    for number, text in enumerate(marks):
        prompt = Prompt(str(number % 3), np.arange(1, 3, dtype=np.int32), "")
        group = []
        for k, mark in enumerate(text):
            tokens = np.array([number, k, 1], np.int32)
            score = 1.0 if mark == "+" else -1.0
            group.append(Rollout(prompt, tokens, np.zeros(3, np.float32), "stop", 0, score, score))
        found.append(group)
    return found


def test_a_ledger_counts_for_the_next_stage_and_keeps_the_newest_right_answers() -> None:
    groups = {"rescue": True, "rescue_answers": 2, "filter": "refill"}
    recipe = recipe_of({"until": 4, "groups": groups}, {"until": 9, "data": {"drop_solved": 0.5}})
    stages = config.stages_of(recipe)
    ledger = Ledger().after(stages, stages[0], groups_of("+-++", "----", "-+--", "++++", "", "----"))
    assert ledger.cursor == 6 and ledger.counts == {"0": (7, 8), "1": (0, 4), "2": (1, 8)}
    assert {name: tokens.tolist() for name, tokens in ledger.answers.items()} == {
        "2": [2, 1, 1],
        "0": [3, 0, 1],
    }
    assert list(ledger.answers) == ["2", "0"]  # the oldest first, which is the next to go
    ledger = ledger.after(stages, stages[0], groups_of("----", "+---"))
    assert list(ledger.answers) == ["0", "1"]
    again = from_json(ledger.to_json(stages, 2), stages, 2)
    assert (again.cursor, again.counts) == (8, ledger.counts)
    assert {name: tokens.tolist() for name, tokens in again.answers.items()} == {
        "0": [3, 0, 1],
        "1": [1, 0, 1],
    }
    entered = ledger.entering(*stages)
    assert (entered.cursor, entered.counts, entered.dropped, entered.answers) == (0, {}, {"0"}, {})


def test_a_plain_run_has_nothing_to_remember() -> None:
    stages = config.stages_of(recipe_of())
    ledger = Ledger().after(stages, stages[0], groups_of("+-++", "----"))
    assert ledger.to_json(stages, 1) == {}
    assert from_json({}, stages, 3).cursor == 3 * 256


def test_a_stage_that_drops_what_nobody_counted_is_refused() -> None:
    stages = config.stages_of(recipe_of({"until": 4}, {"until": 9, "data": {"drop_solved": 0.5}}))
    with pytest.raises(
        InputError, match="stage '2' leaves out prompts that stage '1' solved, which has done 4 steps"
    ):
        from_json({}, stages, 4)
