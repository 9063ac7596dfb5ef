"""Intervals and tests of paired differences, against simulation and scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evals.paired import difference, holm, seeds_needed


def simulated(rng: np.random.Generator, mean: float, seeds: int = 5, problems: int = 60) -> np.ndarray:
    """Differences of 8 answers a problem, which vary with the seed and, seed by seed, with the problem."""
    return (
        mean
        + rng.normal(0, 0.03, (seeds, 1))
        + rng.normal(0, 0.1, (1, problems))
        + rng.normal(0, 0.2, (seeds, problems))
    )


def test_the_interval_holds_the_difference_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        found = difference(simulated(rng, 0.05))
        held.append(found.low <= 0.05 <= found.high)
    assert 0.92 <= np.mean(held) <= 1.0


def test_a_difference_that_is_none_is_seldom_one() -> None:
    rng = np.random.default_rng(1)
    assert np.mean([difference(simulated(rng, 0.0)).p < 0.05 for _ in range(300)]) <= 0.08


def test_with_one_problem_it_is_the_t_interval() -> None:
    values = np.array([0.1, 0.3, 0.2, 0.25, 0.05])
    found, expected = difference(values[:, None]), stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(0.18)
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.05)
    assert found.p == pytest.approx(expected.pvalue, rel=0.2)


def test_one_seed_says_nothing() -> None:
    found = difference(np.full((1, 9), 0.2))
    assert (found.mean, found.low, found.high, found.p) == (pytest.approx(0.2), -np.inf, np.inf, 1.0)


def test_equal_differences_have_no_width() -> None:
    assert difference(np.zeros((3, 4)))[:4] == (0.0, 0.0, 0.0, 1.0)
    assert difference(np.full((3, 4), 0.5)).p == 0.0


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_the_seeds_that_are_said_see_the_difference_four_times_in_five() -> None:
    seeds, rng = seeds_needed(spread=0.04, wanted=0.05), np.random.default_rng(2)
    seen = [stats.ttest_1samp(rng.normal(0.05, 0.04, seeds), 0.0).pvalue < 0.05 for _ in range(1000)]
    fewer = [stats.ttest_1samp(rng.normal(0.05, 0.04, seeds - 1), 0.0).pvalue < 0.05 for _ in range(1000)]
    assert np.mean(seen) > 0.77
    assert np.mean(fewer) < 0.8
