"""Benchmarks during training, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evals import in_training
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.types import Rollout

import tiny_run  # isort: skip


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


def test_prompts_have_the_training_instruction(tmp_path: Path) -> None:
    made = recipe(tmp_path, **{"data.suffix": "2"})
    tests = in_training.load_benchmarks(made, TOKENIZER)
    assert {name: (t.title, t.samples, len(t.prompts)) for name, t in tests.items()} == {
        "digits": ("Digits", 4, 3), "again": ("again", 2, 3),
    }  # fmt: skip
    assert tests["digits"].prompts[1].tokens.tolist() == [2, 7, 8, 3]  # <user> 1 2 <assistant>


@pytest.mark.parametrize(
    "changes, samples", [({"eval.benchmark_samples": 7}, 7), ({"eval.temperature": 0.0}, 1), ({}, 4)]
)
def test_how_many_are_sampled(changes: dict, samples: int, tmp_path: Path) -> None:
    tests = in_training.load_benchmarks(recipe(tmp_path, **changes), TOKENIZER)
    assert tests["digits"].samples == samples


def test_a_prompt_that_does_not_fit_is_named_before_training(tmp_path: Path) -> None:
    made = recipe(tmp_path, **{"data.max_prompt_tokens": 2})
    with pytest.raises(
        InputError, match=r"a prompt of digits has 3 tokens; raise data\.max_prompt_tokens = 2"
    ):
        in_training.load_benchmarks(made, TOKENIZER)


def test_scores_are_of_each_benchmark_by_rule(tmp_path: Path) -> None:
    tests = in_training.load_benchmarks(recipe(tmp_path), TOKENIZER)
    right = {"digits": [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], "again": [[0, 1], [0, 0], [0, 1]]}
    texts, rollouts = [*(f"\\boxed{{{d}}}" for d in "012"), "none"], []
    for name, test in tests.items():
        for prompt, marks in zip(test.prompts, right[name], strict=True):
            for mark in marks:  # wrong ones have no box and are cut short
                token = int(prompt.answer) if mark else 3
                finish = "stop" if mark else "length"
                tokens = np.array([token] * (3 if mark else 5), np.int32)
                rollouts.append(Rollout(prompt, tokens, np.zeros(len(tokens), np.float32), finish, 0))
    found = in_training.scores(tests, rollouts, lambda ids: texts[ids[0]])
    digits, again = found["benchmarks"]["digits"], found["benchmarks"]["again"]
    assert (digits["pass@1"], again["pass@1"]) == pytest.approx((6 / 12, 2 / 6))
    assert digits["pass@k"][4] == pytest.approx(2 / 3) and digits["truncated"] == digits["no_box"] == 0.5
    assert digits["length_mean"] == 4 and again["length_mean"] == pytest.approx((2 * 3 + 4 * 5) / 6)
    assert found["average"]["pass@1"] == pytest.approx((6 / 12 + 2 / 6) / 2)
