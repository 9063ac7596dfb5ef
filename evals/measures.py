"""Measures of graded responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float

from evals.generate import Responses
from evals.grade import grade_many
from evals.statistics import bootstrap, confidence, distinct, interval, majority_at, pass_at
from jaxrl.results import Average, Measures, Released, ResponseStats
from jaxrl.rewards.latex_equality import last_box, spelling
from jaxrl.types import Rules


def grade_by_both(pairs: Sequence[tuple[str, str]]) -> tuple[Bool[np.ndarray, " N"], ...]:
    """Grades each (response, ground_truth) by both rules.

    Returns:
      what is right by the released rules, what by the corrected ones, and what either of them leaves undecided.
    """
    released, corrected = (np.array(grade_many(pairs, rules), object) for rules in get_args(Rules))
    undecided = (released == None) | (corrected == None)  # noqa: E711  # element by element
    return released.astype(bool), corrected.astype(bool), undecided


def describe(responses: Responses) -> ResponseStats:
    """Measures what does not depend on grading: lengths (tokens), and shares of responses."""
    flat = [response for group in responses for response in group]
    return {
        "problems": len(responses),
        "samples": len(responses[0]),
        "length_mean": float(np.mean([r.tokens for r in flat])),
        "truncated": float(np.mean([r.finish_reason == "length" for r in flat])),
        "no_box": float(np.mean([last_box(r.response) is None for r in flat])),
        "distinct_4gram": float(np.mean([distinct([r.response for r in group]) for group in responses])),
    }


def measure(right: Bool[np.ndarray, "P G"], responses: Responses) -> Measures:
    """Computes pass@1 with its 95% bootstrap interval over problems, pass@k and majority@k.

    Args:
      right: the grade of each response.
      responses: [P][G].
    """
    samples = right.shape[1]
    sizes = sorted({2**i for i in range(samples.bit_length())} | {samples})
    votes = [[vote(r.response) for r in group] for group in responses]
    return {
        "pass@1": float(right.mean()),
        "ci95": confidence(right.mean(axis=1)),
        "pass@k": {
            k: float(np.mean([pass_at(samples, int(c), k) for c in right.sum(axis=1)])) for k in sizes
        },
        "majority@k": {
            k: float(np.mean([majority_at(v, list(r), k) for v, r in zip(votes, right, strict=True)]))
            for k in sizes
        },
    }


def vote(response: str) -> str | None:
    """The answer for which a response votes: its box in one spelling."""
    box = last_box(response)
    return None if box is None else spelling(box)


def released(right: Bool[np.ndarray, "P G"], responses: Responses) -> Released:
    """Computes the figures of JustRL's released script; its length is 0 whatever the responses."""
    return {
        "mean_score": float(right.mean()),
        "best_score": float(right.any(axis=1).mean()),
        "solve_none": int((~right.any(axis=1)).sum()),
        "solve_all": int(right.all(axis=1).sum()),
        "distinct_4gram": float(np.mean([distinct([r.response for r in group]) for group in responses])),
        "avg_output_length": 0,
        "format_error_rollouts": sum("boxed" not in r.response for group in responses for r in group),
    }


def average(per_problem: Sequence[Float[np.ndarray, " P"]]) -> Average:
    """Averages the benchmarks' accuracies, each with the same weight.

    Args:
      per_problem: for each benchmark, the share of right responses to each of its problems.

    Returns:
      the average and its interval, for which problems are drawn within each benchmark.
    """
    means = [bootstrap(values, seed) for seed, values in enumerate(per_problem)]
    accuracy = float(np.mean([values.mean() for values in per_problem]))
    return {"pass@1": accuracy, "ci95": interval(np.mean(means, axis=0))}
