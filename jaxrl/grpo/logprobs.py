"""Log-probabilities and entropies of tokens without ever holding the logits of a sequence.

Shape letters: N tokens of a stream, D width of the model, V vocabulary.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from jaxrl.arrays import Array


def token_logprobs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    temperature: float,
    chunk: int,
) -> tuple[Float32[jax.Array, " N"], Float32[jax.Array, " N"]]:
    """log softmax(h W^T / temperature)[target] and the softmax's entropy, for each token.

    Args:
      hidden: in the compute dtype.
      head: in float32: cast chunk by chunk, so that its gradient is summed over chunks in float32.
      targets: token ids.
      temperature: of sampling; the policy is the distribution that was sampled from.
      chunk: tokens whose [chunk, V] logits exist at one time, recomputed in the backward pass; divides N.

    Returns:
      log-probabilities and entropies in nats. The entropy carries no gradient.
    """
    chex.assert_rank([hidden, head, targets], [2, 2, 1])
    chex.assert_is_divisible(hidden.shape[0], chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(_: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        h, target = x
        logits = jnp.einsum("nd,vd->nv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        logits = logits / temperature
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        fixed = jax.lax.stop_gradient(logits)
        entropy = log_z - jnp.sum(jnp.exp(fixed - log_z[:, None]) * fixed, axis=-1)
        return None, (chosen - log_z, jax.lax.stop_gradient(entropy))

    chunks = (hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk))
    _, (logprobs, entropy) = jax.lax.scan(of_chunk, None, chunks)
    return logprobs.reshape(-1), entropy.reshape(-1)
