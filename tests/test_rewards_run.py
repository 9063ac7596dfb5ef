"""Whole runs with reward functions of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import tiny_run
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.loop import train
from jaxrl.run import load
from jaxrl.telemetry.rollouts import rollout_files
from jaxrl.types import silent
from parallel import test_processes

SOURCE = """
def short(tokens, finish_reason):
    return {"stopped": finish_reason == "stop", "tokens": -tokens}

async def bonus(response, answer, prompt, extra):
    assert prompt == answer
    return extra["bonus"] if answer in response else 0
"""


def write_recipe(folder: Path, base: Path, source: str = SOURCE, **overrides: Any) -> Path:
    """`tiny_run.write_recipe` with functions that lie beside it, and rows with a column for one of them."""
    functions = [
        {"path": "mine.py:short", "weight": 0.125},
        {"path": "mine.py:bonus", "weight": 2.0, "name": "extra"},
    ]
    (folder / "mine.py").write_text(source)
    chosen = {} if "reward.function" in overrides else {"reward.functions": functions}
    recipe = tiny_run.write_recipe(folder, base, **{"reward.workers": 1} | chosen | overrides)
    rows = [{"problem": d, "answer": d, "extra": {"bonus": int(d) / 4}} for d in "012"]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 4 steps."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_run.finish("train", write_recipe(folder, base, **{"run.steps": 4}))
    return folder / "run"


def rollouts(run: Path) -> list[list[dict[str, Any]]]:
    return [pq.read_table(path).to_pylist() for path in rollout_files(run)]


def test_rewards_of_a_run_are_those_of_the_functions(whole: Path) -> None:
    for metrics, rows in zip(tiny_run.metrics(whole), rollouts(whole), strict=True):
        expected = []
        for row in rows:
            asked, stopped = row["answer"], row["finish_reason"] == "stop"
            extra = int(asked) / 4 if asked in row["completion"] else 0.0
            parts = {"short/stopped": float(stopped), "short/tokens": -row["tokens"], "extra": extra}
            assert row["rewards"] == parts | {"short": stopped - row["tokens"]}
            assert row["reward"] == row["score"] + 0.125 * row["rewards"]["short"] + 2 * extra
            expected.append(row["rewards"])
        for name in ("short", "short/stopped", "short/tokens", "extra"):
            assert metrics[f"reward/{name}/mean"] == pytest.approx(np.mean([each[name] for each in expected]))
        assert metrics["reward/failed_fraction"] == 0
        assert metrics["reward/accuracy"] == np.mean([row["score"] > 0 for row in rows])


def test_a_run_without_functions_has_nothing_of_theirs(uninterrupted: Path) -> None:
    row = tiny_run.metrics(uninterrupted)[0]
    assert sorted(name for name in row if name.startswith("reward/")) == [
        "reward/accuracy",
        "reward/mean",
        "reward/std",
        "reward/undecided_fraction",
    ]
    assert "rewards" not in rollouts(uninterrupted)[0][0]
    assert not (uninterrupted / "rewards.log").exists()


def test_a_resumed_run_ends_in_the_same_bits_and_holds_to_its_functions(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, base, **{"run.steps": 4})
    tiny_run.finish("train", recipe, "--run.steps", 2)
    (tmp_path / "mine.py").write_text(SOURCE.replace('bonus"]', 'bonus"] * 2'))
    process = tiny_run.jaxrl("train", recipe)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "another content of reward.function; put the files back" in said
    (tmp_path / "mine.py").unlink()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "mine.py").write_text(SOURCE)
    recipe.write_text(recipe.read_text().replace('"mine.py:', '"moved/mine.py:'))
    assert "going on from step 2" in tiny_run.finish("train", recipe, "--reward.workers", 2)
    assert tiny_run.metrics(tmp_path / "run") == tiny_run.metrics(whole)
    ours, theirs = tiny_run.weights(tmp_path / "run", tmp_path / "a"), tiny_run.weights(whole, tmp_path / "b")
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_two_processes_give_the_same_rewards(whole: Path, base: Path, tmp_path: Path) -> None:
    test_processes.complete(write_recipe(tmp_path, base, **{"run.steps": 1}))
    one, two = tiny_run.metrics(whole)[0], tiny_run.metrics(tmp_path / "run")[0]
    names = [name for name in one if name.startswith("reward/")]
    assert len(names) == 9 and {name: one[name] for name in names} == {name: two[name] for name in names}
    assert rollouts(tmp_path / "run")[0] == [
        {**row, "logprobs": own["logprobs"], "logprob_mean": own["logprob_mean"]}
        for row, own in zip(rollouts(whole)[0], rollouts(tmp_path / "run")[0], strict=True)
    ]


@pytest.mark.parametrize("filter_", ["none", "refill"])
def test_without_a_verifier_functions_say_what_is_right_in_evaluations_too(
    filter_: str, base: Path, tmp_path: Path
) -> None:
    own = {"reward.verifier": "none", "reward.function": "mine.py:score", "reward.threshold": 0.7}
    own |= {"groups.filter": filter_, "run.steps": 2}
    own |= {"eval.path": str(tmp_path / "problems.jsonl"), "eval.every": 2, "eval.samples": 4}
    values = "[0.75 if p in r else 0.5 for p, r in zip(problem, responses)]"
    source = f"def score(responses, problem):\n    return {values}\n"
    recipe = write_recipe(tmp_path, base, source, **own)
    tiny_run.finish("train", recipe)
    assert [*tiny_run.evaluations(tmp_path / "run")] == [0, 2]
    for metrics, rows in zip(tiny_run.metrics(tmp_path / "run"), rollouts(tmp_path / "run"), strict=True):
        assert [row["score"] for row in rows] == [1.0 if row["reward"] == 0.75 else -1.0 for row in rows]
        assert {row["reward"] for row in rows} == {0.5, 0.75}
        assert metrics["reward/accuracy"] == np.mean([row["reward"] == 0.75 for row in rows])
        if filter_ == "refill":
            assert metrics["groups/trained"] <= 8 <= metrics["groups/sampled"] == len(rows) / 8
    result = json.loads((tmp_path / "run" / "eval" / "step_000002.json").read_text())
    assert 0 < result["accuracy"] < 1


def test_a_failure_ends_the_run_with_a_line(base: Path, tmp_path: Path) -> None:
    source = "def score(response, answer):\n    return 1 if response == answer else response.index('1')\n"
    process = tiny_run.jaxrl(
        "train", write_recipe(tmp_path, base, source, **{"reward.function": "mine.py:score"})
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith(
        f'jaxrl: reward.function = "{tmp_path}/mine.py:score" raised ValueError: substring not found (mine.py, line '
        "2), for an answer to prompt "
    )
    assert "line 2, in score" in (tmp_path / "run" / "rewards.log").read_text()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "there is no file mine.py; give its path from the recipe's folder or from the current one"),
        ("def other(): return 1\n", "/mine.py has no function score; its functions are: other"),
        (
            "def score(response, difficulty): return 1\n",
            "problems.jsonl: no row has a column 'difficulty'. Set the arguments of {path}, which are response, "
            "answer, prompt, tokens, finish_reason and columns",
        ),
        (
            "def score(response): return 'good'\n",
            "returned 'good' (str); a reward is a finite number, or a dict of names and such numbers, for an answer to "
            "prompt 1; correct it",
        ),
    ],
)
def test_what_fails_anyway_is_said_before_a_sampler_starts(
    source: str | None, message: str, base: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, base, source or "", **{"reward.function": "mine.py:score"})
    if source is None:
        (tmp_path / "mine.py").unlink()
    with pytest.raises(InputError) as caught:
        load(config.load(recipe), None, silent)
    assert message.format(path=tmp_path / "mine.py:score") in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_missing_column_of_parquet_is_named(base: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    source = "def score(response, extra, level=3): return extra['bonus'] + level\n"
    for name, columns in (("good", {"extra": [{"bonus": 1}], "level": [4]}), ("bad", {"other": [1]})):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"problem": ["0"], "answer": ["0"]} | columns), path)
        own = {"reward.function": "mine.py:score", "data.path": str(path)}
        recipe = config.load(write_recipe(tmp_path, base, source, **own))
        if name == "good":
            (work,) = load(recipe, None, silent).works
            assert work.prompts.prompts[0].columns == {"extra": {"bonus": 1}, "level": 4}
            continue
        with pytest.raises(
            InputError, match=r"no column 'extra'; there are: problem, answer, other\. Set the arg"
        ):
            load(recipe, None, silent)


def test_a_stage_may_have_functions_of_its_own(base: Path, tmp_path: Path) -> None:
    source = "def one(response): return 1\ndef two(response): return 2\n"
    own = {"reward.function": "mine.py:one", "reward.verifier_weight": 0.0}
    recipe = write_recipe(tmp_path, base, source, **own)
    stages = "".join(
        f'[[stages]]\nuntil = {until}\nreward.function = "mine.py:{name}"\n'
        for until, name in ((1, "one"), (2, "two"))
    )
    recipe.write_text(recipe.read_text().replace("steps = 6\n", "") + stages)
    train(config.load(recipe), say=silent)
    assert [row["reward/mean"] for row in tiny_run.metrics(tmp_path / "run")] == [1.0, 2.0]
