"""Accuracy on held-out problems with the training verifier: the before and after of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxrl.errors import InputError
from jaxrl.sampling.sampler import Rollout, SamplingParams


def summary(groups: list[list[Rollout]], params: SamplingParams) -> dict[str, Any]:
    """Of marked responses to each problem.

    Returns:
      accuracy (mean over problems of the share marked right), its 95% interval (normal approximation over
      problems, which are the independent units), pass@samples, mean length in tokens and truncated share.

    Raises:
      InputError: if there is a problem without responses.
    """
    if not all(groups):
        raise InputError(
            f"{groups.count([])} of {len(groups)} problems were refused by the sampler; see above why"
        )
    samples = len(groups[0])
    right = np.array([[rollout.score for rollout in group] for group in groups]) > 0  # [P, G]
    per_problem = right.mean(axis=1)
    accuracy = float(per_problem.mean())
    margin = 1.96 * float(per_problem.std(ddof=1)) / len(groups) ** 0.5 if len(groups) > 1 else 1.0
    flat = [rollout for group in groups for rollout in group]
    return {
        "accuracy": accuracy,
        "ci95": [max(accuracy - margin, 0.0), min(accuracy + margin, 1.0)],
        f"pass@{samples}": float(right.any(axis=1).mean()),
        "problems": len(groups),
        "samples": samples,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "length_mean": float(np.mean([len(r.tokens) for r in flat])),
        "truncated_fraction": float(np.mean([r.finish_reason == "length" for r in flat])),
    }
