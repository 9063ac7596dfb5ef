"""Every system's recipe, shrunk, as a run: it shows its mechanism, and a run in two parts is the same run."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shrunk
import tiny_run
from jaxrl import config, run
from jaxrl.types import Rollout, silent
from shrunk import STEPS, Seen, seen
from staged import manifest
from tiny import lines

pytestmark = pytest.mark.slow

Finished = Callable[[str], Path]


def call(function: str, argument: Path) -> None:
    """Calls a function of tests/shrunk.py in a process on one device."""
    code = f"import sys, shrunk; shrunk.{function}(sys.argv[1])"
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(argument)],
        env=tiny_run.environment(**path), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasoner") / "model"
    call("make_base", folder)
    return folder


@pytest.fixture(scope="module")
def finished(reasoner: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run folder of a system by its name; each is run once."""
    runs: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            call("train", shrunk.write_recipe(name, folder, reasoner))
            runs[name] = folder / "run"
        return runs[name]

    return of


def steps_of(run_folder: Path) -> list[Seen]:
    return [seen(run_folder, step) for step in range(len(tiny_run.metrics(run_folder)))]


def right(rollout: Rollout) -> bool:
    return rollout.score > 0


def share(group: list[Rollout]) -> float:
    return float(np.mean([right(rollout) for rollout in group]))


def text(tokens: Any) -> str:
    return "".join(shrunk.SYMBOLS[token] for token in tokens)


def assert_starts_anew(steps: list[Seen], at: set[int]) -> None:
    """The reference is the policy in the first update of these steps, but for float32's rounding, and in no other's."""
    for step, found in enumerate(steps):
        kl = [update["kl"] for update in found.updates]
        assert (kl[0] < 1e-12) == (step in at), (step, kl)
        assert all(value > 1e-12 for value in kl[1:]), (step, kl)


@pytest.mark.parametrize("name", shrunk.NAMES)
def test_it_trains_and_goes_on_bit_for_bit(name: str, finished: Finished, tmp_path: Path) -> None:
    whole = finished(name)
    rows = tiny_run.metrics(whole)
    recipe = config.load(whole.parent / "recipe.toml")
    stages = config.stages_of(recipe)
    assert len(rows) == stages[-1].until and all(math.isfinite(row["update/grad_norm"]) for row in rows)
    for stage in stages:
        steps = [seen(whole, step) for step in range(stage.first, stage.until)]
        assert {len(group) for step in steps for group in step.groups} == {stage.recipe.rollout.samples}
        assert max(row["response/length_max"] for row in rows[stage.first : stage.until]) <= (
            stage.recipe.rollout.max_tokens
        )
    parts = tmp_path / "run"
    shutil.copytree(whole, parts)
    (tmp_path / "recipe.toml").write_text(
        config.to_toml(dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, directory=str(parts))))
    )
    kept = stages[-1].until // 2 // STEPS * STEPS  # a switch, or a step at which a reference is replaced
    for checkpoint in (parts / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > kept:
            shutil.rmtree(checkpoint)
    said = tiny_run.finish("train", tmp_path / "recipe.toml")
    assert f"going on from step {kept}" in said
    for step in range(kept + 1, stages[-1].until + 1):
        assert manifest(parts, step) == manifest(whole, step), step
    assert tiny_run.metrics(parts) == rows


def test_deepscaler_restarts_with_longer_answers(finished: Finished) -> None:
    folder = finished("deepscaler-1.5b")
    steps = steps_of(folder)
    assert_starts_anew(steps, at={0, 3, 6})
    assert [step.adam_steps for step in steps] == [2, 4, 6] * 3
    longest = [max(len(rollout.tokens) for rollout in step.rollouts) for step in steps]
    assert max(longest[:3]) == 24 < max(longest[3:6]) <= 36 < max(longest[6:]) <= 48
    assert {r.reward for step in steps for r in step.rollouts} == {0.0, 1.0}
    assert all(
        "<think>" in text(r.prompt.tokens) for r in steps[0].rollouts
    )  # what its verifier wants to see
    assert not any("say 5" in text(r.prompt.tokens) for step in steps for r in step.rollouts)  # has no answer


def test_fastcurl_takes_prompts_by_their_length(finished: Finished) -> None:
    folder = finished("fastcurl-1.5b-v3")
    steps = steps_of(folder)
    bare = [
        [text(r.prompt.tokens).split(" Let's")[0].removeprefix("<user>") for r in s.rollouts] for s in steps
    ]
    lengths = [{len(problem) for problem in problems} for problems in bare]
    assert max(set.union(*lengths[:3])) <= 12 < 13 <= min(set.union(*lengths[6:9]))
    assert min(set.union(*lengths[9:])) <= 12 < max(set.union(*lengths[9:]))
    assert [len(step.updates) for step in steps] == [2] * 3 + [1] * 12
    for step, found in enumerate(steps):
        last = step >= 12  # V3: neither a reference nor a bonus
        assert all((call["terms"].kl_weights is None) == last for call in found.packed)
        assert all((call["terms"].entropy_weights is None) == last for call in found.packed)
    rows = lines(folder / "metrics.jsonl")
    assert all(bool(row.get("time/reference")) == (step < 12) for step, row in enumerate(rows))
    assert_starts_anew(steps[:12], at={0, 3, 6, 9})


def test_prorl_v1_trains_on_mixed_groups_and_resets(finished: Finished) -> None:
    folder = finished("prorl-1.5b-v1")
    steps, rows = steps_of(folder), tiny_run.metrics(folder)
    for step, row in zip(steps, rows, strict=True):
        assert len(step.groups) == row["groups/trained"] == 16 <= row["groups/sampled"]
        assert all(0 < share(group) < 1 for group in step.groups)
    assert max(row["groups/sampled"] for row in rows) > 16
    assert_starts_anew(steps, at={0, 3, 9, 12})  # runs 2, 6 and 7
    assert [step.adam_steps for step in steps] == [
        4 * n for n in (1, 2, 3, *range(1, 7), 1, 2, 3, *range(1, 7))
    ]
    cut = [
        (step, right(r), r.reward)
        for step, found in enumerate(steps)
        for r in found.rollouts
        if r.finish_reason == "length"
    ]
    assert any(step < 6 for step, *_ in cut) and any(step >= 6 for step, *_ in cut)
    assert all(reward == right - (step >= 6) for step, right, reward in cut)


def test_e3_has_an_order_of_its_own_in_every_stage(finished: Finished) -> None:
    folder = finished("e3-1.7b")
    steps = steps_of(folder)
    recipe = config.load(folder.parent / "recipe.toml")
    sooner = dataclasses.replace(
        recipe,
        stages=(dataclasses.replace(recipe.stages[0], until=1), recipe.stages[1]),
    )
    work = run.load(sooner, None, silent).works[1]
    assert [p.key for p in work.stream(0).take(0, 8)] == [group[0].prompt.key for group in steps[3].groups]
    rows = {(row["problem"]): name for name in ("easy", "medium") for row in problems(folder, name)}
    for step, found in enumerate(steps):
        asked = {text(r.prompt.tokens).split(" Let's")[0].removeprefix("<user>") for r in found.rollouts}
        assert {rows[one] for one in asked} == {"easy" if step < 3 else "medium"}
        for call in found.packed:  # a bonus for every token, averaged over all
            lengths = np.array([len(r.tokens) for r in call["rollouts"]])
            assert np.sum(call["terms"].entropy_weights * lengths) == pytest.approx(
                2e-3 if step < 3 else 1e-3
            )
    assert [len(found.groups[0]) for found in steps] == [4] * 3 + [8] * 3
    assert_starts_anew(steps, at={0, 3})


def problems(folder: Path, split: str) -> list[dict[str, str]]:
    return lines(folder.parent / "data" / f"{split}-00000-of-00001.jsonl")


def test_polaris_copies_good_groups_and_leaves_out_what_is_solved(finished: Finished) -> None:
    folder = finished("polaris-1.7b")
    steps, rows = steps_of(folder), tiny_run.metrics(folder)
    copies = 0
    for step, row in zip(steps, rows, strict=True):
        assert len(step.groups) == row["groups/trained"] == 4 and len(step.updates) == 1
        assert all(0 < share(group) < 1 for group in step.groups)
        copies += 4 - len({id(group) for group in step.groups})
        for group in step.groups:  # a copy is marked against its own answer
            for r in group:
                _, *answer = text(r.tokens).split("</think>")
                box = answer[0].rpartition("\\boxed{")[2].partition("}")[0] if answer else ""
                assert r.reward == (box == r.prompt.answer)
    assert copies
    shares = defaultdict[str, list[int]](lambda: [0, 0])
    history = [row["prompts"] for row in lines(folder / "prompts.jsonl")]
    for prompts in history[:STEPS]:
        for name, (good, count) in prompts.items():
            shares[name][0] += good
            shares[name][1] += count
    solved = {name for name, (good, count) in shares.items() if good / count > 0.9}
    assert solved and not solved & set().union(*history[STEPS:])
    assert all(row["sampler/logprob_diff_mean"] < 1e-4 for row in rows)  # both have the stage's temperature
    assert np.mean([row["policy/entropy"] for row in rows]) > 0


def test_archer_has_two_ranges_by_entropy(finished: Finished) -> None:
    folder = finished("archer-math-1.5b")
    steps, rows = steps_of(folder), tiny_run.metrics(folder)
    for step, row in zip(steps[1:], rows[1:], strict=True):  # the first is at rate 0
        assert all(0 < share(group) < 1 for group in step.groups)
        assert len(step.groups) == row["groups/trained"] <= 8 == row["groups/sampled"]
        assert len(step.updates) == 3 * len(step.packed)
        for call in step.packed:
            terms = call["terms"]
            arrays = zip(call["rollouts"], terms.ratio_low, terms.ratio_high, terms.kl_weights, strict=True)
            for rollout, low, high, kl in arrays:
                wide = high == 1.5
                n = len(rollout.tokens)
                assert wide.sum() == n - 1 - math.floor(0.8 * (n - 1))  # above the quantile, without ties
                assert np.all(low == np.where(wide, 0.5, 0.8)) and np.all(high[~wide] == 1.2)
                assert np.all((kl == 0) == wide)
        first, *_, last = (update["ratio_max"] for update in step.updates)
        assert last > first and len(step.packed) == -(
            -len(step.groups) // 4
        )  # one denominator for all passes
    assert min(row["groups/trained"] for row in rows) < 8


def assert_normalized(found: Seen) -> None:
    """Over all tokens of a step the advantages have mean 0 and variance 1."""
    lengths = np.array([len(r.tokens) for call in found.packed for r in call["rollouts"]])
    values = np.concatenate([call["advantages"] for call in found.packed])
    mean = np.average(values, weights=lengths)
    assert mean == pytest.approx(0, abs=1e-6)
    assert np.average((values - mean) ** 2, weights=lengths) == pytest.approx(1, abs=1e-4)  # less the epsilon


def test_prorl_v2_follows_with_its_reference_and_pays_for_short_answers(finished: Finished) -> None:
    steps = steps_of(finished("prorl-1.5b-v2"))
    for step, found in enumerate(steps):
        assert_normalized(found)
        for r in found.rollouts:
            bonus = 0.25 * (1 + math.cos(math.pi * len(r.tokens) / 24)) if step % 5 < 2 else 0.0
            assert r.reward == pytest.approx(right(r) + bonus)
        assert all(0 < share(group) < 1 for group in found.groups)
    assert_starts_anew(steps, at={0, 3})
    assert [found.adam_steps for found in steps] == [4, 8, 12, 16, 20, 24]  # the moments stay


def test_questa_shows_the_beginning_of_a_solution(finished: Finished) -> None:
    folder = finished("questa-nemotron-1.5b")
    rows = {row["problem"]: row["generation"] for row in problems(folder, "train")}
    for step, found in enumerate(steps_of(folder)):
        for r in found.rollouts:
            shown = text(r.prompt.tokens).removeprefix("<user>").removesuffix("<assistant><think>")
            problem, hint = shown.split("\n\n## Hint.")
            solution = rows[problem].rpartition("</think>")[2]
            assert hint == solution[: int(len(solution) * (0.5 if step < 3 else 0.25))]
            assert problem != "say 4"  # its solution lacks the answer
        assert_normalized(found)
        values = defaultdict[bool, set[float]](set)
        for call in found.packed:
            for r, advantage in zip(call["rollouts"], call["advantages"], strict=True):
                values[right(r)].add(round(float(advantage), 9))
        assert {key: len(each) for key, each in values.items()} == {
            True: 1,
            False: 1,
        }  # no group has its own mean


def test_brorl_has_many_answers_to_few_prompts(finished: Finished) -> None:
    steps = steps_of(finished("brorl-1.5b"))
    for found in steps:
        assert {len(group) for group in found.groups} == {64} and len(found.groups) == 16
        assert len(found.updates) == 4
        assert_normalized(found)
        assert all(np.max(np.concatenate(c["terms"].corrections)) <= 2 for c in found.packed)
    assert_starts_anew(steps, at={0})


def test_still_pays_for_divergence_token_by_token(finished: Finished, reasoner: Path) -> None:
    """The reference's log-probabilities are those of transformers."""
    folder = finished("still-3-1.5b")
    first, second = seen(folder, 0), seen(folder, 2)
    for call in first.packed[:1]:  # the reference is the policy
        rewards = np.array([r.reward for r in call["rollouts"]]).reshape(4, -1)
        centered = rewards - rewards.mean(axis=1, keepdims=True)
        expected = (centered / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-8)).reshape(-1)
        for advantage, value in zip(call["advantages"], expected, strict=True):
            np.testing.assert_allclose(advantage, value, atol=1e-6)
    fell = 0
    call = second.packed[0]
    for rollout, advantage, old in list(
        zip(call["rollouts"], call["advantages"], call["old_logprobs"], strict=True)
    )[:8]:
        reference = by_transformers(reasoner, rollout)
        cost = 1e-3 * (np.asarray(old) - reference)
        np.testing.assert_allclose(advantage[:-1] - advantage[1:], -cost[:-1], atol=3e-8)
        fell += int(np.sum(cost > 1e-6))
    assert fell
    assert {r.reward for r in second.rollouts} == {-1.0, 1.0}


def by_transformers(folder: Path, rollout: Rollout) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[*map(int, rollout.prompt.tokens), *map(int, rollout.tokens)]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    at = len(rollout.prompt.tokens) - 1 + torch.arange(len(rollout.tokens))
    return logprobs[at, ids[0, at + 1]].double().numpy()
