"""The policy objective: a surrogate of the ratio between two policies, as a weighted sum over tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxrl.arrays import Array
from jaxrl.types import Estimator, Ratio

Tokens = Float[Array, " ..."]
Bound = Tokens | float
Losses = tuple[Tokens, Bool[Array, " ..."]]


class Surrogate(Protocol):
    """The loss of tokens, without their weights. Recipes may name one of their own as "module:function"."""

    def __call__(
        self, logprobs: Tokens, ratio: Tokens, advantages: Tokens, low: Bound, high: Bound
    ) -> Losses:
        """The losses, and where a bound of the ratio has cut the gradient off.

        Args:
          logprobs: of the tokens (nats), under the policy that learns.
          ratio: of probabilities, that policy over the old one; it carries the gradient to `logprobs` too.
          advantages: of the tokens.
          low, high: bounds of the ratio.
        """


def clip(logprobs: Tokens, ratio: Tokens, advantages: Tokens, low: Bound, high: Bound) -> Losses:
    """l = max(-A r, -A clip(r, low, high))  (PPO, arXiv 1707.06347, eq. 7)."""
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, low, high)
    return jnp.maximum(plain, clipped), clipped > plain


def score(logprobs: Tokens, ratio: Tokens, advantages: Tokens, low: Bound, high: Bound) -> Losses:
    """l = -sg(clip(r, low, high)) A log pi: every token keeps its gradient (CISPO, arXiv 2506.13585).

    CISPO's own bounds are 0 and, in TRL, 5; verl's are 1 - clip_low and 1 + clip_high. With both 1 it is REINFORCE
    (and GPG's, arXiv 2504.02546).
    """
    kept = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
    return -kept * advantages * logprobs, ((ratio > high) | (ratio < low)) & (advantages != 0)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """l = -A (4 / tau) sigmoid(tau (r - 1)), a soft clip without bounds (SAPO, arXiv 2511.20347).

    Attributes:
      positive, negative: tau where A > 0, and elsewhere.
    """

    positive: float = 1.0
    negative: float = 1.05

    def __call__(
        self, logprobs: Tokens, ratio: Tokens, advantages: Tokens, low: Bound, high: Bound
    ) -> Losses:
        tau = jnp.where(advantages > 0, self.positive, self.negative)
        return -advantages * 4 / tau * jax.nn.sigmoid(tau * (ratio - 1)), jnp.zeros_like(ratio, bool)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is maximized, as far as it is the same for all tokens; see `policy_objective`."""

    clip_low: float
    clip_high: float
    dual_clip: float
    temperature: float = 1.0  # of sampling: the policy is the distribution that was sampled from
    surrogate: Surrogate = clip
    ratio: Ratio = "token"
    log_ratio_bound: float = math.inf
    estimator: Estimator = "k3"  # of the KL term, see `jaxrl.grpo.kl`


def policy_objective(
    logprobs: Float[Array, " ..."],
    old_logprobs: Float[Array, " ..."],
    advantages: Float[Array, " ..."],
    weights: Float[Array, " ..."],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    corrections: Float[Array, " ..."] | None = None,
    bounds: tuple[Float[Array, " ..."], Float[Array, " ..."]] | None = None,
    surrogate: Surrogate = clip,
    ratio: Ratio = "token",
    sequences: Int[Array, " T"] | None = None,
    log_ratio_bound: float = math.inf,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
    """loss = sum_t w_t l_t, with r_t = exp(logp_t - old_t) and

        l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))     (PPO, arXiv 1707.06347, eq. 7, with
                                                                              DAPO's clip-higher, 2503.14476, eq. 10)
        l_t = min(l_t, -A_t dual_clip)   where A_t < 0                       (dual clip, arXiv 1912.09729, eq. 5)

    Other surrogates than `clip` take the place of the first line, and have no dual clip. Two ratios are one for all
    tokens of a sequence, and each token's own log-probability carries its gradient; with x_t = logp_t - old_t,

        sequence:  r = exp(mean_t x_t)                                       (GSPO, arXiv 2507.18071)
        geometric: r = exp(mean_t y_t), y_t = min(x_t, log high) where A_t > 0, else max(x_t, log low)
                                                                             (GMPO, arXiv 2507.20673)

    Args:
      logprobs, old_logprobs: [..., T] log-probabilities (nats) of the sampled tokens now and when sampled.
      advantages: [..., T].
      weights: [..., T]; 0 leaves a token out. They decide how the loss is averaged (see `token_weights`).
      clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high] ...
      dual_clip: bound on the loss of a token with A < 0, in units of -A; infinite is none.
      corrections: [..., T] factors of the weights, see `jaxrl.grpo.mismatch`; the means below are without them.
      bounds: ... or these, [..., T] each: low and high of every token.
      surrogate: of a token's ratio.
      ratio: "token", "sequence" or "geometric".
      sequences: [T] the number of each token's sequence, from 0; needed for the latter two.
      log_ratio_bound: logp_t - old_t is cut off at +- this (20 in verl since 0.4.1; infinite in 0.4.0, JustRL's).

    Returns:
      the scalar loss, and means over the tokens with nonzero weight: clip_fraction (the clip binds), its parts
      clip_fraction_low and clip_fraction_high by the bound that the ratio is beyond, clip_fraction_lower (the dual clip
      binds; verl's name), approx_kl (mean of old - new); and ratio_max.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, weights])
    live = weights != 0
    log_ratio = jnp.where(live, logprobs - old_logprobs, 0.0)
    if math.isfinite(log_ratio_bound):
        log_ratio = jnp.clip(log_ratio, -log_ratio_bound, log_ratio_bound)
    low, high = bounds if bounds else (1 - clip_low, 1 + clip_high)
    own, cut = log_ratio, None
    if ratio != "token":
        assert sequences is not None
        if ratio == "geometric":
            better = jnp.minimum(log_ratio, jnp.log(high))
            own = jnp.where(advantages > 0, better, jnp.maximum(log_ratio, jnp.log(low)))
            cut, own = live & (own != log_ratio), jnp.where(live, own, 0.0)
        own = own - jax.lax.stop_gradient(own - _sequence_means(own, live, sequences))
    ratios = jnp.exp(own)
    # clip does not read them
    own_logprobs = logprobs if surrogate is clip else jnp.where(live, logprobs, 0.0)
    loss, binds = surrogate(own_logprobs, ratios, advantages, low, high)
    binds = binds if cut is None else binds | cut
    dual = None
    if surrogate is clip and math.isfinite(dual_clip):
        bound = -advantages * dual_clip
        dual = (loss > bound) & (advantages < 0)
        loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    count = jnp.maximum(live.sum(), 1)

    def mean(x: Array) -> jax.Array:
        return jnp.sum(jnp.where(live, x, 0.0)) / count

    reached = ratios if cut is None else jnp.exp(log_ratio)
    metrics = {
        "clip_fraction": mean(binds),
        "clip_fraction_low": mean(binds & (reached < low)),
        "clip_fraction_high": mean(binds & (reached > high)),
        "clip_fraction_lower": jnp.zeros(()) if dual is None else mean(dual),
        "approx_kl": mean(-log_ratio),
        "ratio_max": jnp.max(jnp.where(live, ratios, 0.0)),
    }
    loss = jnp.where(live, loss, 0.0)
    return jnp.sum(weights * (loss if corrections is None else corrections * loss)), metrics


def _sequence_means(
    x: Float[Array, " T"], live: Bool[Array, " T"], sequences: Int[Array, " T"]
) -> Float[jax.Array, " T"]:
    """At each token, the mean over the live tokens of its sequence."""
    totals = jnp.zeros((2, len(x))).at[:, sequences].add(jnp.stack([jnp.where(live, x, 0.0), live]))
    return (totals[0] / jnp.maximum(totals[1], 1))[sequences]
