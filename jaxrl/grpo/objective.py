"""The policy objective: PPO's clipped surrogate, an asymmetric clip range and a dual clip for negative advantages."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxrl.arrays import Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is maximized, as far as it is the same for all tokens; see `policy_objective`."""

    clip_low: float
    clip_high: float
    dual_clip: float
    temperature: float = 1.0  # of sampling: the policy is the distribution that was sampled from


def policy_objective(
    logprobs: Float[Array, " ..."],
    old_logprobs: Float[Array, " ..."],
    advantages: Float[Array, " ..."],
    weights: Float[Array, " ..."],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
    """loss = sum_t w_t l_t, with r_t = exp(logp_t - old_t) and

        l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))     (PPO, arXiv 1707.06347, eq. 7, with
                                                                              DAPO's clip-higher, 2503.14476, eq. 10)
        l_t = min(l_t, -A_t dual_clip)   where A_t < 0                       (dual clip, arXiv 1912.09729, eq. 5)

    Args:
      logprobs, old_logprobs: [..., T] log-probabilities (nats) of the sampled tokens now and when sampled.
      advantages: [..., T].
      weights: [..., T]; 0 leaves a token out. They decide how the loss is averaged (see `token_weights`).
      clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high].
      dual_clip: bound on the loss of a token with A < 0, in units of -A.

    Returns:
      the scalar loss, and means over the tokens with nonzero weight: clip_fraction (the clip binds),
      clip_fraction_lower (the dual clip binds), approx_kl (mean of old - new); and ratio_max.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, weights])
    live = weights != 0
    log_ratio = jnp.where(live, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(plain, clipped)
    bound = -advantages * dual_clip
    bounded = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    count = jnp.maximum(live.sum(), 1)

    def mean(x: Array) -> jax.Array:
        return jnp.sum(jnp.where(live, x, 0.0)) / count

    metrics = {
        "clip_fraction": mean(clipped > plain),
        "clip_fraction_lower": mean((loss > bound) & (advantages < 0)),
        "approx_kl": mean(-log_ratio),
        "ratio_max": jnp.max(jnp.where(live, ratio, 0.0)),
    }
    return jnp.sum(weights * jnp.where(live, bounded, 0.0)), metrics
