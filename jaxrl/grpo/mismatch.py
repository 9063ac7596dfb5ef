"""Sampler and trainer on the same tokens: how far they are apart, and a correction for it."""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxrl.arrays import Array

_SIDE = np.geomspace(1e-7, 20, 84)
EDGES = np.concatenate([-_SIDE[::-1], _SIDE]).astype(np.float32)  # of log-ratios (nats), ten bins a decade


def importance_weights(
    trainer: Float[Array, "..."],
    sampler: Float[Array, "..."],
    correction: Literal["truncated", "masked"],
    cap: float,
) -> Float[jax.Array, "..."]:
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


def ratio_histogram(
    trainer: Float[jax.Array, "..."], sampler: Float[jax.Array, "*T"], live: Bool[jax.Array, "*T"]
) -> Float[jax.Array, " bins"]:
    """Counts [len(EDGES) + 1] of the live tokens' log-ratios. Counts add up, so a psum gives those of all devices."""
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
