"""The summary of held-out problems, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from evals.held_out import summary
from evals.statistics import confidence
from jaxrl.errors import InputError
from jaxrl.types import Prompt, Rollout, SamplingParams

PARAMS = SamplingParams(temperature=0.7, top_p=0.9)


def rollout(right: bool, length: int = 2) -> Rollout:
    prompt = Prompt("", np.zeros(1, np.int32), "1")
    finish, score = ("stop", 1.0) if right else ("length", -1.0)
    ids, logprobs = np.zeros(length, np.int32), np.zeros(length, np.float32)
    return Rollout(prompt, ids, logprobs, finish, 0, score, undecided=length == 8)


def test_it_counts_problems_and_not_responses() -> None:
    groups = [[rollout(True), rollout(False, 8)], [rollout(False), rollout(False)]]
    found = summary(groups, PARAMS, "after", 3)
    assert (found["name"], found["step"], found["problems"], found["samples"]) == ("after", 3, 2, 2)
    assert (found["accuracy"], found["pass@2"], found["truncated_fraction"]) == (0.25, 0.5, 0.75)
    assert found["length_mean"] == 3.5 and found["undecided"] == 1
    assert found["ci95"] == confidence(np.array([0.5, 0.0])) == [0.0, 0.5]
    assert (found["temperature"], found["top_p"]) == (0.7, 0.9)


def test_a_refused_problem_is_not_left_out_of_the_accuracy() -> None:
    with pytest.raises(InputError, match="1 of 2 problems were refused"):
        summary([[rollout(True)], []], PARAMS, "after", 3)
