"""Intervals and tests of paired differences, against simulation and scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evals.paired import difference, holm, p_values, seeds_needed


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


def arms(
    rng: np.random.Generator, shift: float, count: int = 12, seeds: int = 5
) -> dict[str, dict[int, np.ndarray]]:
    """Scores of a baseline and variants over the same seeds; the last one's are better by the shift."""
    of_seed, of_problem = rng.normal(0, 0.1, seeds), rng.normal(0, 0.2, 60)
    widths = rng.uniform(0.02, 0.06, count)  # how much a variant varies is its own
    return {
        str(v): {
            s: 0.5
            + shift * (v == count - 1)
            + of_seed[s]
            + of_problem
            + rng.normal(0, widths[v])
            + rng.normal(0, 0.1, 60)
            for s in range(seeds)
        }
        for v in range(count)
    }


def test_evidence_of_nothing_is_as_rare_as_it_says() -> None:
    rng, wrong = np.random.default_rng(1), []
    for _ in range(300):
        wrong.append(min(holm([*p_values(arms(rng, 0.0), "0").values()])) < 0.05)
    assert np.mean(wrong) <= 0.08


def test_variants_lend_each_other_evidence() -> None:
    rng, own, lent = np.random.default_rng(3), [], []
    for _ in range(100):
        scores = arms(rng, 0.12)
        lent.append(p_values(scores, "0")["11"])
        own.append(p_values({name: scores[name] for name in ("0", "11")}, "0")["11"])
    assert np.median(lent) < np.median(own) / 5


def test_one_variant_has_the_paired_t_test() -> None:
    a, b = {0: 0.4, 1: 0.5, 2: 0.7}, {0: 0.5, 1: 0.55, 2: 0.72}
    scores = {"base": a, "other": b}
    (found,) = p_values(
        {n: {s: np.array([x]) for s, x in v.items()} for n, v in scores.items()}, "base"
    ).values()
    assert found == pytest.approx(stats.ttest_rel([*b.values()], [*a.values()]).pvalue)


def test_a_seed_that_is_missing_and_a_single_one() -> None:
    scores = arms(np.random.default_rng(4), 0.3)
    del scores["11"][2], scores["3"][0]
    assert p_values(scores, "0")["11"] < 1e-3
    assert (
        p_values({name: {0: own[0]} for name, own in arms(np.random.default_rng(4), 0.3).items()}, "0")["11"]
        == 1
    )


def test_with_one_problem_it_is_the_t_interval() -> None:
    values = np.array([0.1, 0.3, 0.2, 0.25, 0.05])
    found, expected = difference(values[:, None]), stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(0.18)
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.05)


def test_one_seed_says_nothing() -> None:
    found = difference(np.full((1, 9), 0.2))
    assert (found.mean, found.low, found.high) == (pytest.approx(0.2), -np.inf, np.inf)


def test_equal_differences_have_no_width() -> None:
    assert difference(np.zeros((3, 4))) == (0.0, 0.0, 0.0, 0.0)


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_the_seeds_that_are_said_see_the_difference_four_times_in_five() -> None:
    seeds, rng = seeds_needed(spread=0.04, wanted=0.05), np.random.default_rng(2)
    seen = [stats.ttest_1samp(rng.normal(0.05, 0.04, seeds), 0.0).pvalue < 0.05 for _ in range(1000)]
    fewer = [stats.ttest_1samp(rng.normal(0.05, 0.04, seeds - 1), 0.0).pvalue < 0.05 for _ in range(1000)]
    assert np.mean(seen) > 0.77
    assert np.mean(fewer) < 0.8
