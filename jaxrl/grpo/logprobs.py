"""Log-probabilities and entropies of tokens without ever holding the logits of a sequence.

Shape letters: N tokens of a stream, D width of the model, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from jaxrl.arrays import Array


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Float32[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    temperature: float,
    chunk: int,
    entropy_gradient: bool = False,
) -> tuple[Float32[jax.Array, " N"], Float32[jax.Array, " N"]]:
    """log softmax(h W^T / temperature)[target] and the softmax's entropy, for each token.

    Args:
      hidden: in the compute dtype.
      head: in float32, in which its gradient is summed over chunks.
      targets: token ids.
      temperature: of sampling; the policy is the distribution that was sampled from.
      chunk: tokens whose [chunk, V] logits exist at one time, computed again in the backward pass; divides N.
      entropy_gradient: whether the entropies carry a gradient.

    Returns:
      log-probabilities and entropies in nats.
    """
    chex.assert_rank([hidden, head, targets], [2, 2, 1])
    chex.assert_is_divisible(hidden.shape[0], chunk)
    with jax.named_scope("lm_head"):
        logprobs, entropy = _token_logprobs(hidden, head, targets, temperature, chunk, entropy_gradient)
    return logprobs, entropy if entropy_gradient else jax.lax.stop_gradient(entropy)


class Residuals(NamedTuple):
    """What the backward pass needs."""

    hidden: Float[jax.Array, "chunks chunk D"]
    head: Float[jax.Array, "V D"]  # in the compute dtype
    targets: Int[jax.Array, "chunks chunk"]
    log_z: Float32[jax.Array, "chunks chunk"]  # of the softmax
    entropy: Float32[jax.Array, "chunks chunk"] | None  # where it has a gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logprobs(
    hidden: Float[Array, "N D"],
    head: Float32[Array, "V D"],
    targets: Int[Array, " N"],
    temperature: float,
    chunk: int,
    entropy_gradient: bool,
) -> tuple[Float32[jax.Array, " N"], Float32[jax.Array, " N"]]:
    return _forward(hidden, head, targets, temperature, chunk, entropy_gradient)[0]


def _forward(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    temperature: float,
    chunk: int,
    entropy_gradient: bool,
) -> tuple[tuple[Float32[jax.Array, " N"], Float32[jax.Array, " N"]], Residuals]:
    head = jnp.asarray(head, hidden.dtype)

    def of_chunk(_: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        h, target = x
        logits = _logits(h, head, temperature)
        log_z, mean = jax.lax.platform_dependent(logits, cpu=_two_passes, default=_one_pass)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return None, (chosen - log_z, log_z - mean, log_z)

    chunks = (jnp.reshape(hidden, (-1, chunk, hidden.shape[-1])), jnp.reshape(targets, (-1, chunk)))
    _, (logprobs, entropy, log_z) = jax.lax.scan(of_chunk, None, chunks)
    residuals = Residuals(chunks[0], head, chunks[1], log_z, entropy if entropy_gradient else None)
    return (logprobs.reshape(-1), entropy.reshape(-1)), residuals


def _backward(
    temperature: float,
    _chunk: int,
    _entropy_gradient: bool,
    residuals: Residuals,
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[Float[jax.Array, "N D"], Float32[jax.Array, "V D"], None]:
    """d logits = (onehot - p) g / temperature, with p = softmax(logits) and g the gradient of the log-probability; of
    the entropy H, with gradient e, - p (log p + H) e / temperature more.

    Products take it in the compute dtype and sum in float32.
    """
    hidden, head, targets, log_z, entropy = residuals
    words = jnp.arange(len(head))[None]

    def of_chunk(
        d_head: Float32[jax.Array, "V D"], x: tuple[jax.Array, ...]
    ) -> tuple[Float32[jax.Array, "V D"], Float[jax.Array, "chunk D"]]:
        h, target, z, g, *of_entropy = (y[:, None] if y.ndim == 1 else y for y in x)
        logp = _logits(h, head, temperature) - z
        softmax = jnp.exp(logp)
        d_logits = ((words == target) - softmax) * (g / temperature)
        if of_entropy:
            own, e = of_entropy
            d_logits -= softmax * (logp + own) * (e / temperature)
        d_logits = d_logits.astype(h.dtype)
        d_hidden = jnp.einsum("nv,vd->nd", d_logits, head).astype(h.dtype)
        return d_head + jnp.einsum("nv,nd->vd", d_logits, h, preferred_element_type=jnp.float32), d_hidden

    chunks: tuple[jax.Array, ...] = (hidden, targets, log_z, gradients[0].reshape(log_z.shape))
    if entropy is not None:
        chunks += (entropy, gradients[1].reshape(log_z.shape))
    d_head, d_hidden = jax.lax.scan(of_chunk, jnp.zeros(head.shape, jnp.float32), chunks)
    return d_hidden.reshape(-1, hidden.shape[-1]), d_head, None


_token_logprobs.defvjp(_forward, _backward)


Normalizer = tuple[Float32[jax.Array, " chunk"], Float32[jax.Array, " chunk"]]


def _two_passes(logits: Float32[jax.Array, "chunk V"]) -> Normalizer:
    """log sum exp(logits), and the mean of the logits under their softmax."""
    most = logits.max(axis=-1)
    weights = jnp.exp(logits - most[:, None])
    total = weights.sum(axis=-1)
    return most + jnp.log(total), jnp.sum(weights * logits, axis=-1) / total


def _one_pass(logits: Float32[jax.Array, "chunk V"]) -> Normalizer:
    """The same, read once (arXiv 1805.02867, algorithm 3): memory is what an accelerator waits for."""

    def merge(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most = jnp.maximum(x[0], y[0])
        a, b = jnp.exp(x[0] - most), jnp.exp(y[0] - most)
        return most, x[1] * a + y[1] * b, x[2] * a + y[2] * b

    lowest = jnp.finfo(jnp.float32).min
    start = tuple(jnp.float32(x) for x in (lowest, 0, 0))
    most, total, weighted = jax.lax.reduce((logits, jnp.ones_like(logits), logits), start, merge, (1,))
    return most + jnp.log(total), weighted / total


def _logits(
    h: Float[Array, "chunk D"], head: Float[Array, "V D"], temperature: float
) -> Float32[jax.Array, "chunk V"]:
    return jnp.einsum("nd,vd->nv", h, head, preferred_element_type=jnp.float32) / temperature
