"""Statistics of marked responses: intervals, pass@k, majority@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 10_000


def bootstrap(per_problem: Float[np.ndarray, " P"], seed: int = 0) -> Float[np.ndarray, " R"]:
    """Means over problems drawn with replacement, RESAMPLES of them: problems are the independent units."""
    rng, size = np.random.default_rng(seed), len(per_problem)
    return np.array([per_problem[rng.integers(size, size=size)].mean() for _ in range(RESAMPLES)])


def interval(means: Float[np.ndarray, " R"]) -> list[float]:
    """The central 95% of bootstrapped means: [low, high]."""
    return [float(x) for x in np.percentile(means, (2.5, 97.5))]


def confidence(per_problem: Float[np.ndarray, " P"]) -> list[float]:
    """The 95% interval of the mean over problems; one problem says nothing about others: [0, 1]."""
    return interval(bootstrap(per_problem)) if len(per_problem) > 1 else [0.0, 1.0]


def pass_at(samples: int, right: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one (arXiv 2107.03374)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at(votes: Sequence[str | None], right: Sequence[bool] | Bool[np.ndarray, " N"], k: int) -> float:
    """Mean over the blocks of k samples of whether their commonest answer is right; ties are shared.

    Args:
      votes: the answer of each sample in one spelling, None without one.
      right: whether it was marked right.
      k: samples of a block; what is left over does not vote.
    """
    blocks = [range(first, first + k) for first in range(0, len(votes) - k + 1, k)]
    return float(np.mean([_majority([votes[i] for i in b], [float(right[i]) for i in b]) for b in blocks]))


def _majority(votes: Sequence[str | None], right: Sequence[float]) -> float:
    counts = Counter(v for v in votes if v is not None)
    if not counts:
        return 0.0
    winners = [v for v, n in counts.items() if n == max(counts.values())]
    marks = [[r for v, r in zip(votes, right, strict=True) if v == winner] for winner in winners]
    return float(np.mean([np.mean(m) for m in marks]))  # a judge may have marked one spelling in two ways


def distinct(texts: Sequence[str]) -> float:
    """Share of different ones among the sequences of 4 words of all the texts."""
    return distinct_4grams([text.split() for text in texts])


def distinct_4grams(sequences: Iterable[Sequence[Hashable]]) -> float:
    """Share of different ones among the 4-grams of all the sequences; 0 where none has one."""
    grams = [gram for s in sequences for gram in zip(*(s[i:] for i in range(4)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0
