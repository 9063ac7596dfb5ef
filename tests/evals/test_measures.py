"""Each number against the plainest other way to get it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evals import measures, statistics
from evals.generate import Response


def responses(texts: list[list[str]], tokens: int = 5) -> list[list[Response]]:
    return [
        [Response(p, g, "", tokens + g, "length" if g == 0 else "stop", text) for g, text in enumerate(group)]
        for p, group in enumerate(texts)
    ]


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for right in range(samples + 1):
        marks = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            drawn = [any(subset) for subset in itertools.combinations(marks, k)]
            assert statistics.pass_at(samples, right, k) == pytest.approx(np.mean(drawn))


def test_majority_is_the_share_of_blocks_whose_commonest_answer_is_right() -> None:
    votes = ["1", "2", "2", None, "1", "1", None, None]
    right = [v == "1" for v in votes]

    def at(k: int) -> float:
        return statistics.majority_at(votes, right, k)

    assert at(8) == 1.0  # three against two
    assert at(4) == pytest.approx((0 + 1) / 2)  # 1 2 2 -: wrong; 1 1 - -: right
    assert at(2) == pytest.approx((0.5 + 0 + 1 + 0) / 4)  # a tie is shared; nobody votes: wrong
    assert at(1) == pytest.approx(3 / 8)
    assert statistics.majority_at(["1", "2", "3"], [True, False, False], 2) == 0.5  # the third is left over


def test_votes_are_in_one_spelling() -> None:
    half = measures.vote(r"\boxed{\dfrac12}")
    assert half == measures.vote(r"\boxed{ \frac{1}{2} }") != measures.vote(r"\boxed{2}")
    assert measures.vote("so 5") is None


def test_the_interval_is_of_problems() -> None:
    rng = np.random.default_rng(1)
    per_problem = rng.random(200)
    mean, error = per_problem.mean(), 1.96 * per_problem.std() / math.sqrt(200)
    assert statistics.confidence(per_problem) == pytest.approx([mean - error, mean + error], abs=0.1 * error)
    assert statistics.confidence(np.ones(30)) == [1.0, 1.0]


def test_one_problem_leaves_everything_open() -> None:
    assert statistics.confidence(np.ones(1)) == [0.0, 1.0]


def test_the_average_counts_each_benchmark_once() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.random(100), rng.random(100) / 2, rng.random(400)]
    average = measures.average(parts)
    assert average["pass@1"] == pytest.approx(sum(p.mean() for p in parts) / 3)
    # Those of equal sizes are drawn independently too.
    error = 1.96 * math.sqrt(sum(p.var() / len(p) for p in parts)) / 3
    assert np.diff(average["ci95"])[0] == pytest.approx(2 * error, rel=0.05)


def test_distinct_4grams() -> None:
    assert statistics.distinct(["a b c d e", "a b c d"]) == pytest.approx(2 / 3)  # abcd, bcde, abcd
    assert statistics.distinct(["a b c", ""]) == 0.0


def test_all_of_a_benchmark() -> None:
    groups = responses([[r"a b c d \boxed{1}", r"\boxed{1}"], ["a b c d e f", r"\boxed 3"]])
    right = np.array([[True, True], [False, False]])
    found = measures.measure(right, groups)
    assert found["pass@1"] == 0.5
    assert found["pass@k"] == found["majority@k"] == {1: 0.5, 2: 0.5}
    assert measures.describe(groups) == {
        "problems": 2,
        "samples": 2,
        "length_mean": 5.5,
        "truncated": 0.5,
        "no_box": 0.5,
        "distinct_4gram": 1.0,
    }
    assert measures.released(right, groups) == {
        "mean_score": 0.5,
        "best_score": 0.5,
        "solve_none": 1,
        "solve_all": 1,
        "distinct_4gram": 1.0,
        "avg_output_length": 0,
        "format_error_rollouts": 1,
    }
