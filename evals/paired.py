"""Differences between two recipes over the same seeds and problems: interval, evidence, and the seeds it would take.

Seeds are few and problems many. A difference varies with both, so both are drawn anew in a bootstrap, whose standard
error goes into Student's quantiles for the seeds: percentiles of a bootstrap of five numbers are too narrow.

Five seeds of one variant say little about how much it varies, those of all say more: evidence borrows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

RESAMPLES = 2_000
POWER = 0.8  # chance to see a difference that there is


class Difference(NamedTuple):
    """Of two means, over seeds."""

    mean: float
    low: float  # 95% interval
    high: float
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
        return Difference(mean, -np.inf, np.inf, np.inf)
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    columns = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems
    drawn = np.einsum("rs,sp,rp->r", rows, values, columns, optimize=True)
    # a bootstrap of S numbers has (S - 1) / S of their variance
    error = float(drawn.std() * np.sqrt(seeds / (seeds - 1)))
    half = float(stats.t.ppf(0.975, seeds - 1)) * error
    return Difference(mean, mean - half, mean + half, error)


def p_values(scores: Mapping[str, Mapping[int, Float[np.ndarray, " P"]]], baseline: str) -> dict[str, float]:
    """Of each variant's difference to the baseline being none, two-sided.

    Accuracies are those of a two-way layout, by variant and seed, in which each variant has a variance of its own.
    These are shrunk to their common one by as much as their spread allows (the moderated t of Smyth 2004, as in limma).
    With one variant it is the paired t test.

    Args:
      scores: each problem's, by variant and seed.
      baseline: its name among them.

    Returns:
      by variant but for the baseline; 1 where it cannot be told.
    """
    names = list(scores)
    cells = [(v, seed) for v, name in enumerate(names) for seed in scores[name]]
    seeds = sorted({seed for _, seed in cells})
    design = np.zeros((len(cells), len(names) + len(seeds) - 1))
    for row, (v, seed) in enumerate(cells):
        design[row, v] = 1
        if seed != seeds[0]:
            design[row, len(names) + seeds.index(seed) - 1] = 1
    q, r = np.linalg.qr(design)
    q = q[:, np.abs(np.diag(r)) > 1e-9]
    means = np.array([scores[names[v]][seed].mean() for v, seed in cells])
    free, residuals = 1 - (q**2).sum(axis=1), means - q @ (q.T @ means)
    freedom, squares = (
        np.bincount([v for v, _ in cells], values, len(names)) for values in (free, residuals**2)
    )
    if freedom.min() < 1e-9:  # a variant with one seed
        return {name: 1.0 for name in names if name != baseline}
    variances, prior = _shrunk(squares / freedom, freedom)
    base, found = names.index(baseline), {}
    for v, name in enumerate(names):
        if v == base:
            continue
        both = sorted({*scores[name]} & {*scores[baseline]})
        pairs = np.array([scores[name][seed] - scores[baseline][seed] for seed in both])
        of_problems = pairs.mean(axis=0).var() / pairs.shape[1]
        error = np.sqrt((variances[v] + variances[base]) / len(both) + of_problems)
        degrees = min(prior + min(freedom[v], freedom[base]), freedom.sum())
        found[name] = float(2 * stats.t.sf(abs(pairs.mean()) / error, degrees)) if error else 1.0
    return found


def _shrunk(
    variances: Float[np.ndarray, " V"], freedom: Float[np.ndarray, " V"]
) -> tuple[Float[np.ndarray, " V"], float]:
    """Variances drawn to their common one, and the degrees of freedom that it is worth (Smyth 2004, section 6.2)."""
    if not variances.any():
        return variances, 0.0
    logs = np.log(np.maximum(variances, 1e-5 * np.median(variances[variances > 0])))
    logs += np.log(freedom / 2) - special.digamma(freedom / 2)
    beyond = logs.var(ddof=1) - special.polygamma(1, freedom / 2).mean()
    if beyond <= 0:  # no more than chance would make it
        return np.full_like(variances, np.average(variances, weights=freedom)), np.inf
    prior = 2 * optimize.brentq(lambda x: special.polygamma(1, x) - beyond, 1e-6, 1e8)
    common = np.exp(logs.mean() + special.digamma(prior / 2) - np.log(prior / 2))
    return (prior * common + freedom * variances) / (prior + freedom), prior


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
