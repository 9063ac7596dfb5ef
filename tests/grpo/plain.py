"""The loss as it is without techniques, line for line: what the plain recipe has to compile to.

It takes the place of the product's own in test_plain_program.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl.grpo.logprobs import Residuals, _logits
from jaxrl.grpo.mismatch import mismatch_sums, ratio_histogram


def policy_objective(logprobs, old_logprobs, advantages, weights, *, clip_low, clip_high, dual_clip):
    live = weights != 0
    log_ratio = jnp.where(live, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss, binds = jnp.maximum(plain, clipped), clipped > plain
    bound = -advantages * dual_clip
    bounded = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    count = jnp.maximum(live.sum(), 1)

    def mean(x):
        return jnp.sum(jnp.where(live, x, 0.0)) / count

    metrics = {
        "clip_fraction": mean(binds),
        "clip_fraction_low": mean(binds & (ratio < 1 - clip_low)),
        "clip_fraction_high": mean(binds & (ratio > 1 + clip_high)),
        "clip_fraction_lower": mean((loss > bound) & (advantages < 0)),
        "approx_kl": mean(-log_ratio),
        "ratio_max": jnp.max(jnp.where(live, ratio, 0.0)),
    }
    return jnp.sum(weights * jnp.where(live, bounded, 0.0)), metrics


def loss(self, held, micro):
    """Of update._OnDevice."""
    logprobs, entropy = self._logprobs(held, micro)
    old = jnp.where(micro.on_policy, jax.lax.stop_gradient(logprobs), micro.old_logprobs)
    loss, metrics = policy_objective(
        logprobs,
        old,
        micro.advantages,
        micro.weights,
        clip_low=self.objective.clip_low,
        clip_high=self.objective.clip_high,
        dual_clip=self.objective.dual_clip,
    )
    live = micro.weights != 0
    count = live.sum().astype(jnp.float32)
    difference = jnp.where(live, jnp.abs(old - micro.sampler_logprobs), 0.0)
    sums = {name: value * count for name, value in metrics.items() if name != "ratio_max"}
    sums |= {"loss": loss, "tokens": count, "sequences": jnp.sum(micro.buckets >= 0).astype(jnp.float32)}
    sums |= {"entropy": jnp.sum(jnp.where(live, entropy, 0.0)), "logprob_diff_mean": difference.sum()}
    sums |= {"ratio_histogram": ratio_histogram(old, micro.sampler_logprobs, live)}
    sums |= mismatch_sums(old, micro.sampler_logprobs, live)
    peaks = {"ratio_max": metrics["ratio_max"], "logprob_diff_max": difference.max()}
    return loss, {"sums": sums, "peaks": peaks}


def logprobs(self, params, batch):
    """Of update._OnDevice; its result was the log-probabilities alone."""
    from jaxrl.grpo.update import Likelihoods, _micro_batch

    own = jax.tree.map(lambda x: x[0], batch)
    held = self.sharded.hold(params)

    def one(m, out):
        return out.at[m].set(self._logprobs(held, _micro_batch(own, m))[0])

    rounds = self.sharded.rounds(own.micro_batches)
    return Likelihoods(jax.lax.fori_loop(0, rounds, one, jnp.zeros_like(own.weights))[None], None)


def backward(temperature, _, __, residuals: Residuals, gradients):
    """Of logprobs._token_logprobs."""
    hidden, head, targets, log_z, _ = residuals
    words = jnp.arange(len(head))[None]

    def of_chunk(d_head, x):
        h, target, z, g = (y[:, None] if y.ndim == 1 else y for y in x)
        softmax = jnp.exp(_logits(h, head, temperature) - z)
        d_logits = (((words == target) - softmax) * (g / temperature)).astype(h.dtype)
        d_hidden = jnp.einsum("nv,vd->nd", d_logits, head).astype(h.dtype)
        return d_head + jnp.einsum("nv,nd->vd", d_logits, h, preferred_element_type=jnp.float32), d_hidden

    chunks = (hidden, targets, log_z, gradients[0].reshape(log_z.shape))
    d_head, d_hidden = jax.lax.scan(of_chunk, jnp.zeros(head.shape, jnp.float32), chunks)
    return d_hidden.reshape(-1, hidden.shape[-1]), d_head, None
