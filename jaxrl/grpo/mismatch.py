"""The mismatch between sampler and trainer on the same tokens: its size, and a correction for it."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxrl.arrays import Array
from jaxrl.types import Truncation

_SIDE = np.geomspace(1e-7, 20, 84)
EDGES = np.concatenate([-_SIDE[::-1], _SIDE]).astype(np.float32)  # of log-ratios (nats), ten bins a decade


def importance_weights(
    trainer: Float[Array, " ..."],
    sampler: Float[Array, " ..."],
    correction: Truncation,
    cap: float,
) -> Float[jax.Array, " ..."]:
    """Importance weights of tokens that a slightly different policy sampled; with r_t = exp(trainer_t - sampler_t)

        truncated: min(r_t, cap)                             (IMPALA's rho, arXiv 1802.01561; TIS, Yao et al. 2025)
        masked:    r_t where 1 / cap <= r_t <= cap, else 0   (IcePop, arXiv 2510.18855)

    Args:
      trainer: log-probabilities (nats) of the sampled tokens under the trainer's parameters before the update.
      sampler: log-probabilities as the sampler gave them; the same shape.
      correction: how large ratios are treated, see above.
      cap: largest ratio that is left as it is, at least 1.
    """
    chex.assert_equal_shape([trainer, sampler])
    ratio = jnp.exp(trainer - sampler)
    if correction == "truncated":
        return jnp.minimum(ratio, cap)
    return jnp.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0)


def ratio_histogram(
    trainer: Float[jax.Array, "*T"], sampler: Float[jax.Array, "*T"], live: Bool[jax.Array, "*T"]
) -> Float[jax.Array, " bins"]:
    """Counts the live tokens' log-ratios in len(EDGES) + 1 bins. A psum of counts gives those of all devices."""
    bins = jnp.searchsorted(jnp.asarray(EDGES), trainer - sampler)
    return jnp.zeros(len(EDGES) + 1).at[bins].add(live.astype(jnp.float32))


def ratio_quantiles(histogram: Float[np.ndarray, " bins"], shares: tuple[float, ...]) -> list[float]:
    """The ratios below which these shares of tokens lie, to a tenth of a decade of their logarithm."""
    middle = np.sign(EDGES[1:]) * np.sqrt(np.abs(EDGES[:-1] * EDGES[1:]))
    # the bin between the signs
    middle[len(_SIDE) - 1] = 0.0
    middle = np.concatenate([EDGES[:1], middle, EDGES[-1:]])
    if not histogram.sum():
        return [float("nan")] * len(shares)
    reached = np.cumsum(histogram) / histogram.sum()
    return [float(np.exp(middle[np.searchsorted(reached, share)])) for share in shares]
