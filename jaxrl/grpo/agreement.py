"""Sampler and trainer on the same tokens: how far they are apart, and a correction for it."""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

_SIDE = np.geomspace(1e-7, 20, 84)
EDGES = np.concatenate([-_SIDE[::-1], _SIDE]).astype(np.float32)  # of log-ratios (nats), ten bins a decade


def importance_weights(
    trainer: jax.Array, sampler: jax.Array, correction: Literal["truncated", "masked"], cap: float
) -> jax.Array:
    """Weights of tokens that a somewhat different policy sampled; with r_t = exp(trainer_t - sampler_t)

        truncated: min(r_t, cap)                             (IMPALA's rho, arXiv 1802.01561; TIS, Yao et al. 2025)
        masked:    r_t where 1 / cap <= r_t <= cap, else 0   (IcePop, arXiv 2510.18855)

    Args:
      trainer: [..., T] log-probabilities (nats) of the sampled tokens by the trainer, before the update.
      sampler: [..., T] the same by whatever sampled them.
    """
    chex.assert_equal_shape([trainer, sampler])
    ratio = jnp.exp(trainer - sampler)
    if correction == "truncated":
        return jnp.minimum(ratio, cap)
    return jnp.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0)


def ratio_histogram(trainer: jax.Array, sampler: jax.Array, live: jax.Array) -> jax.Array:
    """Counts [len(EDGES) + 1] of the live tokens' log-ratios; a sum over the mesh of them has everyone's."""
    bins = jnp.searchsorted(jnp.asarray(EDGES), trainer - sampler)
    return jnp.zeros(len(EDGES) + 1).at[bins].add(live.astype(jnp.float32))


def ratio_quantiles(histogram: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    """The ratios below which these shares of tokens lie, to a tenth of a decade of their logarithm."""
    middle = np.sign(EDGES[1:]) * np.sqrt(np.abs(EDGES[:-1] * EDGES[1:]))
    middle[len(_SIDE) - 1] = 0.0  # the bin between the signs
    middle = np.concatenate([EDGES[:1], middle, EDGES[-1:]])
    if not histogram.sum():
        return [float("nan")] * len(shares)
    reached = np.cumsum(histogram) / histogram.sum()
    return [float(np.exp(middle[np.searchsorted(reached, share)])) for share in shares]
