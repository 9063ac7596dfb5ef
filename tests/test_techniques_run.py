"""Recipes full of techniques, as runs: each mechanism shows in the metrics, and a run in two parts is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_run
from parallel.test_processes import assert_same_weights, complete
from tiny import rollout_rows

RECIPES: dict[str, dict[str, Any]] = {
    # a reference, Archer's gate, a bonus, IcePop, REINFORCE++-baseline, two epochs, terms of the length
    "loss": {
        "advantage.scale": "batch",
        "kl.coefficient": 0.01,
        "kl.estimator": "k2",
        "entropy.bonus": 0.001,
        "entropy.quantile": 0.5,
        "optimizer.epochs": 2,
        "sampler.correction": "masked",
        "sampler.correction_floor": 0.5,
        "sampler.correction_cap": 5.0,
        "reward.wrong": 0.0,
        "length.cosine": 0.5,
        "length.cosine_on": 1,
        "length.cosine_off": 1,
        "length.truncated_penalty": 0.25,
        "loss.dual_clip": float("inf"),
    },
    # KL in the reward, one ratio a sequence, truncated answers out of the loss
    "reward": {
        "kl.coefficient": 0.1,
        "kl.place": "reward",
        "kl.estimator": "k1",
        "loss.ratio": "sequence",
        "loss.normalization": "sequence_mean",
        "loss.log_ratio_bound": 20.0,
        "length.on_truncated": "drop",
    },
}


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["loss", pytest.param("reward", marks=pytest.mark.slow)])
def test_technique_runs_resume_bit_for_bit(name: str, base: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    tiny_run.finish("train", tiny_run.write_recipe(whole, base, **RECIPES[name] | {"run.steps": 4}))
    recipe = tiny_run.write_recipe(parts, base, **RECIPES[name] | {"run.steps": 4})
    tiny_run.finish("train", recipe, "--run.steps", 2)
    tiny_run.finish("train", recipe)
    assert tiny_run.metrics(whole / "run") == tiny_run.metrics(parts / "run")
    assert_same_weights(whole / "run", parts / "run", tmp_path)
    rows = rows_of(whole / "run")
    assert [row["perf/compilations"] for row in rows[1:]] == [0] * 3
    assert rows[-1]["update/grad_norm"] > 0 == rows[0]["update/skipped"]
    kl = [row.get("policy/kl_reference", np.nan) for row in rows]
    if name == "loss":
        assert kl[0] == 0 < kl[1] < kl[-1]  # the first step's rate is 0
        assert rows[0]["update/sequences"] == 2 * 64  # all of them, twice
        assert_rewards(whole / "run")
    else:
        assert np.isnan(kl).all()


def assert_rewards(run: Path) -> None:
    """By hand, from the rollouts: the cosine in steps 0 and 2, a quarter less where an answer was cut off."""
    for step in range(4):
        for row in rollout_rows(run, step):
            reward = max(row["score"], 0.0)
            if step % 2 == 0:
                reward += 0.25 * (1 + np.cos(np.pi * row["tokens"] / 8))
            reward -= 0.25 * (row["finish_reason"] == "length")
            assert row["reward"] == pytest.approx(reward, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_technique_runs_of_two_processes_are_those_of_one(name: str, base: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    process = tiny_run.jaxrl(
        "train",
        tiny_run.write_recipe(one, base, **RECIPES[name] | {"run.steps": 3}),
        JAX_NUM_CPU_DEVICES="4",
    )
    assert process.wait(300) == 0, process.stdout and process.stdout.read()
    complete(tiny_run.write_recipe(two, base, **RECIPES[name] | {"run.steps": 3}))
    expected, found = rows_of(one / "run"), rows_of(two / "run")
    for key in ("reward/mean", "update/grad_norm", "update/loss", "update/approx_kl", "policy/entropy"):
        for a, b in zip(expected, found, strict=True):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key
    assert [row["perf/compilations"] for row in found[1:]] == [0] * 2
