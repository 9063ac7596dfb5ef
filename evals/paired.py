"""Differences between two recipes over the same seeds and problems: interval, evidence, and the seeds it would take.

Seeds are few and problems many. A difference varies with both, so both are drawn anew in a bootstrap, whose standard
error goes into Student's quantiles for the seeds: percentiles of a bootstrap of five numbers are too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 2_000
POWER = 0.8  # chance to see a difference that there is


class Difference(NamedTuple):
    """Of two means, over seeds."""

    mean: float
    low: float  # 95% interval
    high: float
    p: float  # two-sided; 1 where it cannot be told
    error: float  # standard error


def difference(values: Float[np.ndarray, "S P"], seed: int = 0) -> Difference:
    """The mean of paired differences with its interval.

    Args:
      values: of S seeds and P problems: what a variant has more than the baseline of the same seed and problem.
      seed: of the bootstrap.

    Returns:
      the difference; without an interval (infinite) of a single seed, which says nothing about others.
    """
    seeds, problems = values.shape
    mean = float(values.mean())
    if seeds < 2:
        return Difference(mean, -np.inf, np.inf, 1.0, np.inf)
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    columns = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems
    drawn = np.einsum("rs,sp,rp->r", rows, values, columns, optimize=True)
    # a bootstrap of S numbers has (S - 1) / S of their variance
    error = float(drawn.std() * np.sqrt(seeds / (seeds - 1)))
    if error == 0:
        return Difference(mean, mean, mean, float(mean == 0), 0.0)
    half = float(stats.t.ppf(0.975, seeds - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, seeds - 1))
    return Difference(mean, mean - half, mean + half, p, error)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values that hold for all of several comparisons together (Holm 1979), in the order of these."""
    order = np.argsort(ps)
    scaled = np.array(ps)[order] * np.arange(len(ps), 0, -1)
    found = np.empty(len(ps))
    found[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in found]


def seeds_needed(spread: float, wanted: float) -> int:
    """Seeds by which a paired difference is seen with POWER at the 5% level, by the t test.

    Args:
      spread: standard deviation of the difference over seeds.
      wanted: the difference.
    """
    for seeds in range(2, 10_000):
        shift = abs(wanted) / spread * np.sqrt(seeds) if spread else np.inf
        if stats.nct.sf(stats.t.ppf(0.975, seeds - 1), seeds - 1, shift) >= POWER or np.isinf(shift):
            return seeds
    return 10_000
