"""The mismatch between sampler and trainer on the same tokens: its size, and a correction for it."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float64

from jaxrl.types import Level, Truncation

_SIDE = np.geomspace(1e-7, 20, 84)
EDGES = np.concatenate([-_SIDE[::-1], _SIDE]).astype(np.float32)  # of log-ratios (nats), ten bins a decade


def importance_weights(
    trainer: Sequence[Float[np.ndarray, " _"]],
    sampler: Sequence[Float[np.ndarray, " _"]],
    correction: Truncation,
    cap: float,
    floor: float | None = None,
    level: Level = "token",
) -> list[Float64[np.ndarray, " _"]]:
    """Importance weights of tokens that a slightly different policy sampled, from their log-ratios d_t.

    With d_t = trainer_t - sampler_t, the ratio r of a token is by `level`

        token:     exp(d_t)
        sequence:  exp(sum of d over the sequence), the sum held within 20 nats as in verl
        geometric: exp(mean of d over the sequence)          (GSPO, arXiv 2507.18071)

    and its weight by `correction`

        truncated: r, no less than floor and no more than cap (IMPALA's rho, arXiv 1802.01561; TIS, Yao et al. 2025)
        masked:    r where floor <= r <= cap, else 0          (IcePop, arXiv 2510.18855; decoupled PPO's cap)
        filtered:  exp(d_t) where floor <= r <= cap, else 0   (OpenRLHF's and NeMo RL's seq-mask-tis: geometric)

    The loss is divided by what it is without weights: a token of weight 0 counts in its denominators.

    Args:
      trainer: of each sequence the log-probabilities (nats) [T_i] of its response tokens under the trainer's
        parameters before the update.
      sampler: log-probabilities as the sampler gave them; the same shapes.
      correction: how large and small ratios are treated, see above.
      cap: largest ratio that is left as it is, at least 1.
      floor: smallest one; by default 0 where ratios are truncated, else 1 / cap.
      level: what a ratio is taken over, see above.
    """
    least = (0.0 if correction == "truncated" else 1 / cap) if floor is None else floor
    weights = []
    for ours, theirs in zip(trainer, sampler, strict=True):
        chex.assert_equal_shape([ours, theirs])
        apart = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
        total = apart.sum()
        over = {"token": apart, "sequence": np.clip(total, -20, 20), "geometric": total / max(len(apart), 1)}
        ratio = np.exp(np.broadcast_to(over[level], apart.shape))
        if correction == "truncated":
            weights.append(np.clip(ratio, least, cap))
        else:
            kept = (least <= ratio) & (ratio <= cap)
            weights.append(np.where(kept, np.exp(apart) if correction == "filtered" else ratio, 0.0))
    return weights


def ratio_histogram(
    trainer: Float[jax.Array, "*T"], sampler: Float[jax.Array, "*T"], live: Bool[jax.Array, "*T"]
) -> Float[jax.Array, " bins"]:
    """Counts the live tokens' log-ratios in len(EDGES) + 1 bins. A psum of counts gives those of all devices."""
    bins = jnp.searchsorted(jnp.asarray(EDGES), trainer - sampler)
    return jnp.zeros(len(EDGES) + 1).at[bins].add(live.astype(jnp.float32))


def mismatch_sums(
    trainer: Float[jax.Array, "*T"], sampler: Float[jax.Array, "*T"], live: Bool[jax.Array, "*T"]
) -> dict[str, Float[jax.Array, ""]]:
    """Sums over live tokens, of r = exp(trainer - sampler) with the exponent within 20 nats; see `mismatch`."""
    apart = jnp.where(live, jnp.clip(trainer - sampler, -20, 20), 0.0)
    ratio = jnp.where(live, jnp.exp(apart), 0.0)
    return {
        "mismatch_k3": jnp.sum(jnp.expm1(apart) - apart),
        "mismatch_ratio": jnp.sum(ratio),
        "mismatch_square": jnp.sum(ratio**2),
    }


def mismatch(k3: float, ratio: float, square: float, tokens: float) -> tuple[float, float]:
    """Sampler against trainer, from the sums of `mismatch_sums` over so many tokens; NaN over none.

    Returns:
      k3: mean of r - 1 - log r, an estimate of KL(sampler || trainer) in nats (Schulman 2020).
      ess: (sum r)^2 / (tokens x sum r^2), the share of tokens that the same gradient's variance would take had the
        trainer sampled them (Kong 1992); 1 where sampler and trainer agree.
    """
    return (k3 / tokens, ratio**2 / (tokens * square)) if tokens else (float("nan"), float("nan"))


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
