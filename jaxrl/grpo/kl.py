"""Estimates of the KL divergence from a reference, token by token."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float

from jaxrl.types import Estimator

Values = TypeVar("Values", np.ndarray, jax.Array)
# nats; of values, as in verl and OpenRLHF, and of log-ratios, where verl keeps an exponential finite
BOUNDS: dict[Estimator, tuple[float, float]] = {
    "k1": (math.inf, math.inf),
    "abs": (math.inf, math.inf),
    "k2": (10.0, math.inf),
    "k3": (10.0, 20.0),
}


def kl_penalty(
    logprobs: Float[Values, " ..."],
    reference: Float[Values, " ..."],
    estimator: Estimator,
    bounds: tuple[float, float] | None = None,
) -> Float[Values, " ..."]:
    """An estimate of KL(policy || reference) in nats from each token that the policy sampled; d = reference - policy:

        k1: -d    abs: |d|    k2: d^2 / 2    k3: e^d - d - 1      (Schulman 2020, "Approximating KL divergence")

    k2 and k3 lie within +-10 and have no gradient beyond that: k2's ends at |d| = 4.5, k3's where the policy finds a
    token 14 times less likely than the reference does. As a loss, the gradient of k1 has mean zero, and that of k2 is
    the divergence's own (arXiv 2506.09477).

    DeepScaleR, FastCuRL, e3 and Archer have k3 in the loss (coefficient 1e-3), ProRL v2 k2 (1e-4), STILL-3 k1 in the
    reward (1e-3); JustRL, Polaris and QuestA have none.

    Args:
      logprobs, reference: log-probabilities (nats) of the sampled tokens under both, of NumPy or JAX.
      estimator: see above.
      bounds: at which the estimate and d are cut off on both sides; by default those of `BOUNDS`.
    """
    xp = logprobs.__array_namespace__()
    bound, log_ratio_bound = bounds or BOUNDS[estimator]
    d = xp.clip(reference - logprobs, -log_ratio_bound, log_ratio_bound)
    if estimator == "k1":
        estimate = -d
    elif estimator == "abs":
        estimate = d * xp.sign(d)
    else:
        estimate = d**2 / 2 if estimator == "k2" else xp.exp(d) - d - 1
    return xp.clip(estimate, -bound, bound)
