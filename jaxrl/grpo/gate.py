"""Archer's gate: tokens of high entropy are clipped widely and have no KL term (arXiv 2507.15778)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float


def high_entropy(
    entropies: Sequence[Float[np.ndarray, " _"]], quantile: float
) -> list[Bool[np.ndarray, " _"]]:
    """True where a token's entropy is above the quantile of its own sequence's (linear between two tokens).

    Archer's is 0.8, and is taken anew by the policy of every update; here it is of the policy before the step.
    """
    return [x > np.quantile(x, quantile) for x in entropies]
