"""Whether sampler and trainer still agree on the log-probabilities of the same tokens as they did before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

METRIC = "sampler/logprob_diff_mean"  # nats a token
USUAL = 0.02  # above what bfloat16 makes of it
LEAST = 1e-3  # below this no change matters
STEPS, TIMES = 20, 5.0


def bound(before: Sequence[float]) -> float:
    """How large the metric may be after steps with these values: 5 times the median of the last 20; USUAL at first."""
    return max(LEAST, TIMES * float(np.median(before[-STEPS:]))) if before else USUAL


def disagreement(before: Sequence[float], value: float) -> str | None:
    """A line that says that the metric has left the band it had, if it has."""
    if not value > bound(before):
        return None
    usual = f"{np.median(before[-STEPS:]):.2g} in the steps before" if before else f"at most {USUAL} usually"
    return (
        f"sampler and trainer differ by {value:.2g} nats a token ({METRIC}), and by {usual}: do the servers still have "
        "the options and the weights of this run?"
    )
