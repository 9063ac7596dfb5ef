"""Benchmarks during training, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny_run
from evals import in_training
from evals.task import Task
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.types import Rollout

TOKENIZER = tiny_run.make_tokenizer()


def recipe(folder: Path, **changes: object) -> config.Recipe:
    rows = [{"problem": d, "answer": d} for d in "012"]
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.toml").write_text(
        f'[digits]\ntitle = "Digits"\npath = "{folder}/digits.jsonl"\nsamples = 4\n'
        f'[again]\npath = "{folder}/digits.jsonl"\nproblems = 3\nsamples = 2\n'
    )
    changes = {"eval.benchmarks": str(folder / "mine.toml"), "eval.every": 2} | changes
    return config.load(tiny_run.write_recipe(folder, folder, **changes))


def load(folder: Path, **changes: object) -> list[Task]:
    return in_training.load_benchmarks(recipe(folder, **changes), TOKENIZER)


def test_prompts_have_the_training_instruction(tmp_path: Path) -> None:
    digits, again = load(tmp_path, **{"data.suffix": "2"})
    assert (digits.name, digits.title, digits.samples, len(digits.prompts)) == ("digits", "Digits", 4, 3)
    assert (again.name, again.title, again.samples, len(again.prompts)) == ("again", "again", 2, 3)
    assert digits.prompts[1].tokens.tolist() == [2, 7, 8, 3]  # <user> 1 2 <assistant>


@pytest.mark.parametrize(
    "changes, samples", [({"eval.benchmark_samples": 7}, 7), ({"eval.temperature": 0.0}, 1), ({}, 4)]
)
def test_how_many_are_sampled(changes: dict[str, object], samples: int, tmp_path: Path) -> None:
    digits, _ = load(tmp_path, **changes)
    assert digits.samples == samples


def test_a_prompt_that_does_not_fit_is_named_before_training(tmp_path: Path) -> None:
    message = r"a prompt of digits has 3 tokens; raise data\.max_prompt_tokens = 2"
    with pytest.raises(InputError, match=message):
        load(tmp_path, **{"data.max_prompt_tokens": 2})


def test_accuracy_is_of_each_benchmark_by_both_rules(tmp_path: Path) -> None:
    tasks = load(tmp_path)
    right = {"digits": [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], "again": [[0, 1], [0, 0], [0, 1]]}
    texts, rollouts = [r"\boxed{0}", r"\boxed{2^0}", r"\boxed{2}", "none"], []
    for task in tasks:
        for prompt, marks in zip(task.prompts, right[task.name], strict=True):
            for mark in marks:  # wrong ones have no box and are cut short
                token = int(prompt.answer) if mark else 3
                finish = "stop" if mark else "length"
                tokens = np.array([token] * (3 if mark else 5), np.int32)
                rollouts.append(Rollout(prompt, tokens, np.zeros(len(tokens), np.float32), finish, 0))
    found, average, corrected = in_training.measure(tasks, rollouts, lambda ids: texts[ids[0]])
    digits, again = found["digits"], found["again"]
    assert (digits["pass@1"], again["pass@1"]) == pytest.approx((2 / 12, 2 / 6))  # 2^0 is refused for 1
    assert (digits["corrected"]["pass@1"], again["corrected"]["pass@1"]) == pytest.approx((6 / 12, 2 / 6))
    assert digits["pass@k"][4] == pytest.approx(1 / 3) and digits["truncated"] == digits["no_box"] == 0.5
    assert digits["length_mean"] == 4 and again["length_mean"] == pytest.approx((2 * 3 + 4 * 5) / 6)
    assert average["pass@1"] == pytest.approx((2 / 12 + 2 / 6) / 2)
    assert corrected["pass@1"] == pytest.approx((6 / 12 + 2 / 6) / 2)
