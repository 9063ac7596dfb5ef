"""Each number against the plainest other way to get it."""

import itertools
import math

import numpy as np
import pytest

from evals import tables
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
            assert tables.pass_at(samples, right, k) == pytest.approx(np.mean(drawn))


def test_majority() -> None:
    votes = ["1", "2", "2", None, "1", "1", None, None]
    right = [v == "1" for v in votes]
    at = lambda k: tables.majority_at(votes, right, k)  # noqa: E731
    assert at(8) == 1.0  # three against two
    assert at(4) == pytest.approx((0 + 1) / 2)  # 1 2 2 -: wrong; 1 1 - -: right
    assert at(2) == pytest.approx((0.5 + 0 + 1 + 0) / 4)  # a tie is shared; nobody votes: wrong
    assert at(1) == pytest.approx(3 / 8)
    assert tables.majority_at(["1", "2", "3"], [True, False, False], 2) == 0.5  # an odd one out is left over


def test_votes_are_in_one_spelling() -> None:
    assert (
        tables.vote(r"\boxed{\dfrac12}") == tables.vote(r"\boxed{ \frac{1}{2} }") != tables.vote(r"\boxed{2}")
    )
    assert tables.vote("so 5") is None


def test_the_interval_is_of_problems() -> None:
    rng = np.random.default_rng(1)
    per_problem = rng.random(200)
    low, high = tables.interval(tables.bootstrap(per_problem))
    error = 1.96 * per_problem.std() / math.sqrt(200)
    assert [low, high] == pytest.approx(
        [per_problem.mean() - error, per_problem.mean() + error], abs=0.1 * error
    )
    assert tables.interval(tables.bootstrap(np.ones(30))) == [1.0, 1.0]


def test_the_average_counts_each_benchmark_once() -> None:
    rng = np.random.default_rng(1)
    parts = {"a": rng.random(100), "b": rng.random(100) / 2, "c": rng.random(400)}
    average = tables.average(parts)
    assert average["pass@1"] == pytest.approx(sum(p.mean() for p in parts.values()) / 3)
    error = (
        1.96 * math.sqrt(sum(p.var() / len(p) for p in parts.values())) / 3
    )  # independent, though sizes agree
    assert np.diff(average["ci95"])[0] == pytest.approx(2 * error, rel=0.05)


def test_distinct_4grams() -> None:
    assert tables.distinct(["a b c d e", "a b c d"]) == pytest.approx(2 / 3)  # abcd, bcde, abcd
    assert tables.distinct(["a b c", ""]) == 0.0


def test_all_of_a_benchmark() -> None:
    groups = responses([[r"a b c d \boxed{1}", r"\boxed{1}"], ["a b c d e f", r"\boxed 3"]])
    right = np.array([[True, True], [False, False]])
    found = tables.measure(right, groups)
    assert (
        found["pass@1"] == 0.5
        and found["pass@k"] == {1: 0.5, 2: 0.5}
        and found["majority@k"] == {1: 0.5, 2: 0.5}
    )
    described = tables.describe(groups)
    assert described == {
        "problems": 2, "samples": 2, "length_mean": 5.5, "truncated": 0.5, "no_box": 0.5, "distinct_4gram": 1.0
    }  # fmt: skip
    assert tables.released(right, groups) == {
        "mean_score": 0.5, "best_score": 0.5, "solve_none": 1, "solve_all": 1, "distinct_4gram": 1.0,
        "avg_output_length": 0, "format_error_rollouts": 1,
    }  # fmt: skip


def test_the_papers_averages() -> None:
    """As printed, all but one."""
    printed = {
        "DeepSeek-R1-Distill-Qwen-1.5B": 37.65, "DeepScaleR-1.5B-Preview": 44.88, "ProRL-V2": 53.08,
        "JustRL-DeepSeek-1.5B": 54.87, "OpenMath-Nemotron-1.5B": 56.74, "QuestA-Nemotron-1.5B": 63.81,
        "JustRL-Nemotron-1.5B": 64.32,
    }  # fmt: skip
    found = {r["model"]: np.mean(list(r["scores"].values())) for r in tables.paper() if len(r["scores"]) == 9}
    assert found.keys() == printed.keys()
    off = {model for model, mean in found.items() if abs(mean - printed[model]) > 0.0051}
    assert off == {"DeepScaleR-1.5B-Preview"}
    assert found["DeepScaleR-1.5B-Preview"] == pytest.approx(44.90, abs=0.005)
