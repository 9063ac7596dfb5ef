"""Checks and budget of a run, against rows whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl import config
from jaxrl.report.runs import CHECKS, budget, check, number, read_run


def run(folder: Path, recipe: config.Recipe | None = None, **columns: list[float | None]):  # type: ignore[no-untyped-def]
    count = len(next(iter(columns.values())))
    rows = [{"step": i} | {k.replace("__", "/"): v[i] for k, v in columns.items()} for i in range(count)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if recipe:
        (folder / "recipe.toml").write_text(config.to_toml(recipe))
    return read_run(folder)


QUIET = {
    "policy__entropy": (1.0, 0.51),
    "response__truncated_fraction": (0.10, 0.149),
    "sampler__logprob_diff_mean": (0.1, 0.019),
    "groups__all_correct_fraction": (0.9, 0.4),
    "groups__all_wrong_fraction": (0.1, 0.39),
    "update__skipped": (3.0, 0.0),
}
LOUD = {
    "entropy collapse": {"policy__entropy": (1.0, 0.49)},
    "truncation rising": {"response__truncated_fraction": (0.10, 0.151)},
    "sampler mismatch": {"sampler__logprob_diff_mean": (0.0, 0.021)},
    "dead groups": {"groups__all_wrong_fraction": (0.0, 0.41)},
    "skipped updates": {"update__skipped": (0.0, 1.0)},
}


def columns(means: dict[str, tuple[float, float]]) -> dict[str, list[float | None]]:
    """Twenty steps whose first and last two have these means, between which anything may be."""
    return {key: [a - 0.01, a + 0.01, *[9.0] * 16, b, b] for key, (a, b) in means.items()}


@pytest.mark.parametrize("title", [None, *LOUD])
def test_a_check_warns_just_beyond_its_rule(title: str | None, tmp_path: Path) -> None:
    made = run(tmp_path, **columns(QUIET | LOUD.get(title or "", {})))
    assert [rule.title for rule in CHECKS if check(made, rule)[2]] == ([title] if title else [])


def test_every_check_is_tested_and_silent_without_its_metrics(tmp_path: Path) -> None:
    assert {rule.title for rule in CHECKS} == set(LOUD)
    made = run(tmp_path, other=[1.0, None])
    assert not any(check(made, rule)[2] for rule in CHECKS)


def test_budget_counts_what_was_sampled_and_what_was_trained_on(tmp_path: Path) -> None:
    recipe = config.from_dict(
        {"rollout": {"prompts": 4, "samples": 2, "max_tokens": 100}, "data": {"max_prompt_tokens": 28}}
        | {"optimizer": {"minibatch_prompts": 2}}
    )
    (tmp_path / "eval").mkdir()
    for step, accuracy in ((0, 0.25), (3, 0.75)):
        result = {"name": "step", "step": step, "accuracy": accuracy, "ci95": [0, 1]}
        (tmp_path / "eval" / f"{step}.json").write_text(json.dumps(result))
    made = run(
        tmp_path, recipe, response__length_mean=[50.0, 60.0, 70.0], sampler__refused=[0.0, 1.0, 0.0],
        update__tokens=[300.0, None, 500.0], time__sample=[10.0, 20.0, 30.0], time__step=[600.0] * 3,
    )  # fmt: skip
    used = budget(made)
    assert used["tokens at most"] == 3 * 4 * 2 * 128
    assert used["tokens sampled"] == 50 * 8 + 60 * 6 + 70 * 8
    assert used["tokens trained on"] == 800
    assert (used["seconds sample"], used["seconds in all"]) == (60, 1800)
    np.testing.assert_allclose(used["hours a point of accuracy"], 0.5 / 50)


def test_budget_counts_devices_servers_and_benchmarks(tmp_path: Path) -> None:
    recipe = config.from_dict({"rollout": {"engine": "vllm"}, "sampler": {"servers": 6}})
    (tmp_path / "eval" / "benchmarks").mkdir(parents=True)
    for step, score in ((0, 0.3), (2, 0.35)):
        result = {"step": step, "seconds": 50.0, "benchmarks": {}, "average": {"pass@1": score}}
        (tmp_path / "eval" / "benchmarks" / f"{step}.json").write_text(json.dumps(result))
    used = budget(
        run(tmp_path, recipe, perf__devices=[2.0, 2.0], time__update=[10.0, 20.0], time__step=[100.0, 200.0])
    )
    assert used["devices"] == 8
    assert (used["seconds update"], used["device seconds update"]) == (30, 240)
    assert (used["seconds benchmarks"], used["seconds in all"]) == (100, 400)
    np.testing.assert_allclose(used["device hours in all"], 8 * 400 / 3600)
    np.testing.assert_allclose(used["device hours a point of accuracy"], 8 * 400 / 3600 / 5)


def test_a_run_of_another_version_keeps_its_curves(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[rollout]\nno_such_key = 1\n")
    made = run(tmp_path, update__tokens=[1.0])
    assert made.recipe is None and "tokens sampled" not in budget(made)


def test_numbers_are_short() -> None:
    assert [number(x) for x in (1234567.8, 0.123456, 12.0, float("nan"))] == [
        "1,234,568",
        "0.1235",
        "12",
        "-",
    ]
