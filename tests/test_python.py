"""Whole experiments from Python: rows and reward functions that are objects of the program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

import jaxrl
import tiny_run
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.objects import paths_of
from jaxrl.rewards.functions import describe
from jaxrl.types import silent
from tiny import lines, rollout_rows

ROWS = [{"problem": d, "answer": d, "level": int(d)} for d in "012"]


def bonus(answer: str, response: str, level: int) -> float:
    return level if answer in response else 0.0


@pytest.fixture
def recipe(tmp_path: Path, base: Path) -> config.Recipe:
    return jaxrl.load_recipe(tiny_run.write_recipe(tmp_path, base, **{"run.steps": 2, "reward.workers": 1}))


def test_values_by_key_are_those_of_the_command_line() -> None:
    by_key = jaxrl.load_recipe("demo", {"run.steps": 3, "rollout.temperature": 1, "run.trackers": ("wandb",)})
    line = ["--run.steps", "3", "--rollout.temperature", "1", "--run.trackers", "wandb"]
    assert by_key == jaxrl.load_recipe("demo", line)
    assert jaxrl.load_recipe(by_key, {"run.steps": 4}).run.steps == 4


def test_stages_are_given_as_a_list() -> None:
    found = jaxrl.load_recipe("demo", {"stages": [{"until": 3}, {"until": 5, "rollout": {"max_tokens": 10}}]})
    assert found.run.steps == 5
    assert found.stages[1].changes == {"rollout": {"max_tokens": 10}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 1.0}, "did you mean optimizer.learning_rate?"),
        ({"output_dir": "here"}, "did you mean run.directory?"),
        ({"run.step": 3}, "unknown key 'run.step'; did you mean 'steps'?"),
        ({"run.steps": "3"}, "run.steps = '3'"),
        ({"stages.0.until": 3}, "values are given by section.key"),
    ],
)
def test_a_change_that_no_recipe_has_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        jaxrl.load_recipe("demo", changes)
    assert said in str(caught.value)


def test_a_run_on_objects_is_the_run_on_files(recipe: config.Recipe, base: Path, tmp_path: Path) -> None:
    """Rows and a function, one of them of a closure, against the same in files; then once more, which has no step."""

    def weighted(level: float) -> Callable[..., float]:
        return lambda response, answer: level * (answer in response)

    rewards = {"bonus": (bonus, 0.5), "other": weighted(0.25)}
    changes = {"run.directory": str(tmp_path / "objects"), "eval.every": 2, "eval.samples": 2}
    run = jaxrl.train(recipe, changes, data=ROWS, held_out=ROWS, reward=rewards, quiet=True)
    source = (
        "def bonus(answer, response, level):\n    return level if answer in response else 0.0\n"
        "def other(response, answer):\n    return 0.25 * (answer in response)\n"
    )
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    functions = [{"path": f"{tmp_path}/mine.py:bonus", "weight": 0.5}, {"path": f"{tmp_path}/mine.py:other"}]
    paths = {"data.path": str(tmp_path / "rows.jsonl"), "eval.path": str(tmp_path / "rows.jsonl")}
    more = {"run.directory": str(tmp_path / "files"), "reward.functions": functions}
    files = jaxrl.train(recipe, changes | paths | more, quiet=True)
    exported = [jaxrl.export(each, tmp_path / each.name / "out", "float32", silent) for each in (run, files)]
    weights, expected = ((folder / "model.safetensors").read_bytes() for folder in exported)
    assert weights == expected
    assert rollout_rows(run, 1) == rollout_rows(files, 1)
    assert {"bonus", "other"} <= rollout_rows(run, 1)[0]["rewards"].keys()
    assert (run / "eval" / "step_000002.json").exists()

    said: list[str] = []
    assert jaxrl.train(recipe, changes, data=ROWS, held_out=ROWS, reward=rewards, say=said.append) == run
    assert any("has its 2 steps" in line for line in said)
    with pytest.raises(InputError, match=r"reward\.function"):
        changed = rewards | {"other": weighted(0.5)}
        jaxrl.train(recipe, changes | {"run.steps": 3}, data=ROWS, reward=changed, held_out=ROWS)
    with pytest.raises(InputError, match=r"data\.path"):
        jaxrl.train(recipe, changes | {"run.steps": 3}, data=ROWS[:2], reward=rewards, held_out=ROWS)

    # what the run was is a recipe and files
    tiny_run.finish("train", run / "recipe.toml", "--run.steps", "3")
    assert [row["step"] for row in tiny_run.metrics(run)] == [0, 1, 2]


def test_a_model_is_evaluated_and_exported(recipe: config.Recipe, base: Path, tmp_path: Path) -> None:
    run = jaxrl.train(recipe, data=ROWS, quiet=True)
    folder = jaxrl.export(run, tmp_path / "out", "float32", silent)
    assert jaxrl.export(run, say=silent) == run / "hf"
    rows = [*ROWS, *ROWS]
    of_run = jaxrl.evaluate(run, changes={"eval.samples": 2}, held_out=rows, name="mine")
    assert of_run == json.loads((run / "eval" / "mine.json").read_text())
    assert of_run["problems"] == 3  # repeated ones are left out
    again = jaxrl.evaluate(folder, recipe, {"eval.samples": 2}, held_out=ROWS, out=tmp_path / "again.json")
    assert again["problems"] == 3
    assert (tmp_path / "again.json").exists()
    with pytest.raises(TypeError, match="sample'"):
        jaxrl.evaluate(run, sample=2)
    with pytest.raises(InputError, match="not a run folder"):
        jaxrl.evaluate(base)


def test_a_table_of_another_library_is_taken(recipe: config.Recipe) -> None:
    """Numbers of 32 bits stay the decimals that they were written as."""
    rows = {
        "problem": ["1", "2"],
        "answer": np.array([0.1, 0.5], np.float32),
        "more": [{"a": [1]}, {"a": []}],
    }
    tables = [datasets.Dataset.from_dict(rows), pandas.DataFrame({**rows, "answer": list(rows["answer"])})]
    for table in tables:
        values = paths_of(recipe, data=table)
        assert values["data.sources"] == ()
        read = pandas.read_parquet(str(values["data.path"]))
        assert read["problem"].tolist() == ["1", "2"]
        assert str(values["data.path"]) == paths_of(recipe, data=table)["data.path"]
    values = paths_of(recipe, data=[{"problem": "1", "answer": np.float32(0.5), "more": np.arange(2)}])
    assert lines(Path(str(values["data.path"]))) == [{"problem": "1", "answer": 0.5, "more": [0, 1]}]
    assert paths_of(recipe, data="some/path")["data.path"] == "some/path"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": ["text"]}, "data, row 1: a str; rows are dicts"),
        ({"held_out": [{"a": 1}, {"a": object()}]}, "held_out, row 2: a object is not JSON"),
        ({"reward": [bonus, bonus]}, "two functions are called bonus"),
        ({"reward": {"bonus": 3}}, "'bonus' is no function"),
        ({"reward": {"bo nus": bonus}}, "'bo nus' is no function"),
        (
            {"reward": (lambda held: lambda response: held)(sys._getframe())},
            "cannot be given to another process",
        ),
    ],
)
def test_an_object_that_cannot_be_used_is_named(
    recipe: config.Recipe, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        paths_of(recipe, **given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stage_with_data_of_its_own_is_no_place_for_rows(recipe: config.Recipe) -> None:
    stages = [{"until": 1}, {"until": 2, "data": {"path": "elsewhere"}}]
    with pytest.raises(InputError, match=r"the stage until 2 has data\.path of its own"):
        jaxrl.train(recipe, {"stages": stages}, data=ROWS)


PROGRAM = """
import sys
from jaxrl.config import Recipe, Run
from jaxrl.objects import paths_of

LEVEL = {level}

def mine(response, level=LEVEL):
    return {factor} * len(response) + level

print(paths_of(Recipe(run=Run(directory=sys.argv[1])), reward=mine)["reward.functions"][0]["path"])
"""


def test_a_function_of_a_program_is_the_same_one_in_its_next_process(tmp_path: Path) -> None:
    """It is of `__main__`, which no other process can import; what it does and is bound to is what tells it apart."""

    def path(**values: int) -> str:
        (tmp_path / "program.py").write_text(PROGRAM.format(**values))
        call = [sys.executable, tmp_path / "program.py", tmp_path / "run"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    first, again = path(level=1, factor=1), path(level=1, factor=1)
    assert again == first
    described = describe(first)
    assert (dict(described.takes), list(described.optional)) == ({"response": "response"}, ["level"])
    others = {first, path(level=2, factor=1), path(level=1, factor=2)}
    assert len({describe(other).source for other in others}) == 3


def test_a_kept_function_that_is_gone_or_of_another_python_is_named(
    recipe: config.Recipe, tmp_path: Path
) -> None:
    (each,) = paths_of(recipe, reward=bonus)["reward.functions"]  # type: ignore[misc, attr-defined]
    file = Path(each["path"].rpartition(":")[0])
    header, pickled = file.read_bytes().split(b"\n", 1)
    file.write_bytes(json.dumps(json.loads(header) | {"python": "3.0"}).encode() + b"\n" + pickled[:20])
    with pytest.raises(
        InputError, match=r"written by Python 3\.0, and cannot be read here: .*run the program"
    ):
        describe(each["path"])
    file.unlink()
    with pytest.raises(InputError, match=r"there is no file .* run that again"):
        describe(each["path"])
