"""The recipes that come along: JustRL's values, a source for each, and the paper's table of token budgets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jaxrl import config, plan
from jaxrl.rewards import VERIFIERS

RECIPES = Path(__file__).parents[1] / "recipes"
JUSTRL = ("justrl-deepseek-1.5b", "justrl-nemotron-1.5b")
ABLATIONS = ("ablation-overlong", "ablation-overlong-robust", "ablation-robust")
EVALUATION = {
    "eval.benchmarks",
    "eval.every",
    "eval.benchmark_samples",
    "eval.temperature",
    "eval.top_p",
    "eval.max_tokens",
}


def load(name: str) -> config.Recipe:
    return config.load(RECIPES / f"{name}.toml")


def changed(a: config.Recipe, b: config.Recipe) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in config.differences(a, b))


@pytest.mark.parametrize("name", [*JUSTRL, *ABLATIONS])
def test_every_value_says_where_it_comes_from(name: str) -> None:
    lines = (RECIPES / f"{name}.toml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+ = ", line)]
    sources = "paper|script|verl|author|ours|the file"
    assert len(values) >= 8 and all(re.search(rf'["\w] +# ({sources})\b', line) for line in values)


# to a plan, each other recipe is the same as one of these
@pytest.mark.parametrize("name", [JUSTRL[0], ABLATIONS[1]])
def test_they_can_be_planned(name: str) -> None:
    (step,) = plan.plan(load(name), plan.Assumptions(trainers=2, samplers=6))["steps"]
    assert 60 < step["total"] < 600  # seconds on H100s


def test_the_two_bases_differ_in_the_model_alone() -> None:
    found = changed(*map(load, JUSTRL))
    # the last two: where it is kept, and when it was stopped
    assert set(found) == {"model.path", "run.directory", "run.steps"}


def test_justrl_is_the_default_of_every_field_that_matters() -> None:
    found = changed(config.Recipe(), load(JUSTRL[0]))
    assert set(found) == {"run.directory", "data.order"} | EVALUATION


def test_values_of_the_released_script() -> None:
    r = load(JUSTRL[1])
    assert (r.rollout.prompts, r.rollout.samples) == (256, 8)
    assert (r.optimizer.minibatch_prompts, r.updates_per_step) == (64, 4)
    assert (r.data.max_prompt_tokens, r.rollout.max_tokens) == (1024, 15_360)
    assert (r.loss.clip_low, r.loss.clip_high, r.loss.dual_clip) == (0.2, 0.28, 10.0)
    o = r.optimizer
    assert (o.learning_rate, o.warmup_steps, o.weight_decay, o.max_grad_norm) == (1e-6, 10, 0.1, 1.0)
    assert (r.rollout.temperature, r.rollout.top_p, r.rollout.top_k) == (1.0, 1.0, 0)
    assert (r.eval.temperature, r.eval.top_p, r.eval.max_tokens, r.eval.every) == (0.7, 0.9, 31_744, 50)


def test_ablations_change_what_their_names_say() -> None:
    base, long = load(JUSTRL[0]), {"reward.overlong_tokens": "0 -> 4096"}
    robust = {"reward.verifier": "'strict_boxed' -> 'equivalent'", "reward.with_prompt": "False -> True"}
    for name, expected in zip(ABLATIONS, (long, long | robust, robust), strict=True):
        found = changed(base, load(name))
        assert {key: value for key, value in found.items() if not key.startswith("run.")} == expected
        assert load(name).reward.verifier in VERIFIERS


# (stages of steps, samples and context in 1,024 tokens), prompts, share that dynamic sampling keeps, the budget that it
# goes on from; and what the paper prints, in 1,024 tokens: its two tables, to two digits
TABLE = {
    "DeepScaleR": ([(1040, 8, 8), (480, 8, 16), (230, 8, 24)], 128, 1.0, None, 2.2e6),
    "ProRL-V1": ([(1700, 16, 8), (550, 32, 8), (200, 16, 16)], 256, 0.5, None, 2.1e8),
    "ProRL-V2": ([(1000, 16, 8)], 256, 0.5, "ProRL-V1", 2.8e8),
    "BroRL": ([(191, 512, 16)], 128, 0.5, "ProRL-V2", 6.8e8),
    "QuestA": ([(2000, 16, 32)], 128, 0.5, None, 2.6e8),
}
PRINTED = {"justrl-deepseek-1.5b": 1.4e8, "justrl-nemotron-1.5b": 1.1e8}


def others(name: str) -> float:
    """Tokens in units of 1,024 that a run of TABLE may have sampled, those before it included."""
    stages, prompts, kept, before, _ = TABLE[name]
    own = sum(steps * samples * context for steps, samples, context in stages) * prompts / kept
    return own + (others(before) if before else 0)


def two_digits(x: float) -> float:
    return float(f"{x:.1e}")


@pytest.mark.parametrize("name", JUSTRL)
def test_the_papers_budget_is_that_of_the_recipe(name: str) -> None:
    recipe = load(name)
    assert two_digits(recipe.run.steps * recipe.step_tokens / 1024) == PRINTED[name]


def test_the_papers_table_of_budgets_and_its_two_slips() -> None:
    for name, (*_, printed) in TABLE.items():
        slip = 10 if name == "DeepScaleR" else 1  # the paper's is ten times too small
        assert two_digits(others(name)) == pytest.approx(printed * slip, rel=1e-9), name
    ours = {name: load(name).run.steps * load(name).step_tokens / 1024 for name in JUSTRL}
    # "4.9x" is of rounded figures, as is "half of ProRL-V2's"; and no 65 times DeepScaleR's
    assert others("BroRL") / ours[JUSTRL[0]] == pytest.approx(4.71, abs=0.005)
    assert others("ProRL-V2") / ours[JUSTRL[0]] == pytest.approx(1.92, abs=0.005)
    assert others("QuestA") / ours[JUSTRL[1]] == pytest.approx(2.33, abs=0.005)
    assert ours[JUSTRL[0]] / others("DeepScaleR") == pytest.approx(6.5, abs=0.05)


def test_the_papers_averages_and_its_slip() -> None:
    rows = tomllib.loads((RECIPES.parent / "evals" / "paper.toml").read_text())["row"]
    wrong = {
        row["model"]: (round(float(np.mean(list(row["scores"].values()))), 2), row["printed_average"])
        for row in rows
        if "printed_average" in row
    }
    assert wrong == {"DeepScaleR-1.5B-Preview": (44.90, 44.88)}
