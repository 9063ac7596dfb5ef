"""Checks and budget of a run, against rows whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.report.figures import report
from jaxrl.report.runs import CHECKS, Run, budget, number, read_run
from jaxrl.telemetry.timer import PHASES


def run(folder: Path, recipe: config.Recipe | None = None, **columns: list[float | None]) -> Run:
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
    assert [rule.title for rule in CHECKS if rule.apply(made).warns] == ([title] if title else [])


def test_every_check_is_tested_and_silent_without_its_metrics(tmp_path: Path) -> None:
    assert {rule.title for rule in CHECKS} == set(LOUD)
    made = run(tmp_path, other=[1.0, None])
    assert not any(rule.apply(made).warns for rule in CHECKS)


def test_budget_counts_what_was_sampled_and_what_was_trained_on(tmp_path: Path) -> None:
    recipe = config.from_dict(
        {"rollout": {"prompts": 4, "samples": 2, "max_tokens": 100}, "data": {"max_prompt_tokens": 28}}
        | {"optimizer": {"minibatch_prompts": 2}}
    )
    (tmp_path / "eval").mkdir()
    for step, accuracy in ((0, 0.25), (3, 0.75)):
        result = {"name": "step", "step": step, "accuracy": accuracy, "ci95": [0, 1]}
        (tmp_path / "eval" / f"{step}.json").write_text(json.dumps(result))
    tokens = {"response__length_mean": [50.0, 60.0, 70.0], "update__tokens": [300.0, None, 500.0]}
    seconds = {"time__sample": [10.0, 20.0, 30.0], "time__step": [600.0] * 3}
    used = budget(run(tmp_path, recipe, sampler__refused=[0.0, 1.0, 0.0], **tokens, **seconds))
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
    seconds = {"time__update": [10.0, 20.0], "time__step": [100.0, 200.0]}
    used = budget(run(tmp_path, recipe, perf__devices=[2.0, 2.0], **seconds))
    assert used["devices"] == 8
    assert (used["seconds update"], used["device seconds update"]) == (30, 240)
    assert (used["seconds benchmarks"], used["seconds in all"]) == (100, 400)
    np.testing.assert_allclose(used["device hours in all"], 8 * 400 / 3600)
    np.testing.assert_allclose(used["device hours a point of accuracy"], 8 * 400 / 3600 / 5)


def test_summary_and_budget_hold_every_phase_that_is_timed(tmp_path: Path) -> None:
    spent = {phase: 2.0**n for n, phase in enumerate(PHASES)}
    columns = {f"time__{phase}": [seconds, None, seconds] for phase, seconds in spent.items()}
    made = run(tmp_path, **columns, time__step=[100.0] * 3)
    phases = {name: used for name, used in budget(made).items() if name.startswith("seconds ")}
    assert phases.pop("seconds in all") == 300
    assert phases == {f"seconds {name.replace('_', ' ')}": 2 * seconds for name, seconds in spent.items()}
    assert "exchange" in PHASES
    summary = report([tmp_path])[-2].read_text()
    table = summary.split("| phase | seconds | share |\n|---|---|---|\n")[1].split("\n\n")[0]
    shares = {name: 2 * seconds / 300 for name, seconds in spent.items()}
    expected = [f"| {name} | {300 * share:.1f} | {share:.1%} |" for name, share in shares.items()]
    assert table.splitlines() == expected


def test_a_run_from_before_a_phase_was_timed_spent_none_in_it(tmp_path: Path) -> None:
    made = run(tmp_path, time__sample=[1.0, 2.0], time__step=[4.0, 4.0])
    used = budget(made)
    assert (used["seconds sample"], used["seconds exchange"], used["seconds in all"]) == (3, 0, 8)
    assert "| exchange | 0.0 | 0.0% |" in report([tmp_path])[-2].read_text()


def test_a_run_of_another_version_keeps_its_curves(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[rollout]\nno_such_key = 1\n")
    made = run(tmp_path, update__tokens=[1.0])
    assert made.recipe is None and "tokens sampled" not in budget(made)


def test_numbers_are_short() -> None:
    numbers = {1234567.8: "1,234,568", 0.123456: "0.1235", 12.0: "12", float("nan"): "-"}
    assert [number(x) for x in numbers] == list(numbers.values())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "a", "step": 1}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    run(tmp_path, policy__entropy=[1.0])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"eval/a\.json: not .*; delete it and evaluate again"):
        read_run(tmp_path)
