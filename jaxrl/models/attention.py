"""Causal attention over packed tokens, one segment at a time.

A stream is `[N]` tokens of several sequences, one after another. Attention visits the segments in order, each at
its length rounded up to a bucket, so that a handful of static shapes serve every stream and no `[N, N]` mask
exists. A bucket may overrun its segment: causality keeps the overrun out of the segment's own outputs, the next
segment overwrites what it left behind, and the backward pass masks the incoming gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

Backend = Literal["xla", "cudnn"]


class Segments(NamedTuple):
    """Where the sequences of one stream lie, in order, starts[i] + lengths[buckets[i]] <= N."""

    starts: jax.Array  # [S] int32: first token of each segment
    buckets: jax.Array  # [S] int32: index into the bucket lengths; -1 past the last segment


def choose_backend(requested: str, dtype: str) -> Backend:
    """cuDNN where it exists (NVIDIA GPU, half precision), XLA elsewhere; a request is taken at its word."""
    if requested == "auto":
        return "cudnn" if jax.default_backend() == "gpu" and dtype == "bfloat16" else "xla"
    return requested  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def packed_attention(
    q_NxHxD: jax.Array,
    k_NxKxD: jax.Array,
    v_NxKxD: jax.Array,
    segments: Segments,
    lengths: tuple[int, ...],
    backend: Backend,
) -> jax.Array:
    """Causal self-attention inside each segment. Returns [N, H, D]; tokens outside all segments get anything finite.

    Args:
      q_NxHxD, k_NxKxD, v_NxKxD: queries, keys and values; K divides H.
      segments: starts and buckets.
      lengths: bucket lengths in tokens, ascending; static.
      backend: implementation of `jax.nn.dot_product_attention`.
    """
    chex.assert_rank([q_NxHxD, k_NxKxD, v_NxKxD], 3)
    chex.assert_equal_shape([k_NxKxD, v_NxKxD])

    def attend(length: int, out: jax.Array, start: jax.Array, _: jax.Array) -> jax.Array:
        qkv = (_slice(x, start, length) for x in (q_NxHxD, k_NxKxD, v_NxKxD))
        return lax.dynamic_update_slice_in_dim(out, _kernel(backend)(*qkv)[0], start, 0)

    return _for_each_segment(attend, jnp.zeros_like(q_NxHxD), segments, lengths)


def _forward(q, k, v, segments, lengths, backend):
    return packed_attention(q, k, v, segments, lengths, backend), (q, k, v, segments)


def _backward(lengths, backend, residuals, d_out):
    q, k, v, segments = residuals

    def attend(length: int, grads: tuple, start: jax.Array, end: jax.Array) -> tuple:
        own = (start + jnp.arange(length) < end)[None, :, None, None]
        _, vjp = jax.vjp(_kernel(backend), *(_slice(x, start, length) for x in (q, k, v)))
        new = vjp(jnp.where(own, _slice(d_out, start, length), 0))
        # an overrun writes zeros, which the segments that own those tokens then overwrite
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(lambda all_of_them, own: write(all_of_them, own[0]), grads, new)

    zeros = jax.tree.map(jnp.zeros_like, (q, k, v))
    return (*_for_each_segment(attend, zeros, segments, lengths), None)


packed_attention.defvjp(_forward, _backward)


def _kernel(backend: Backend) -> Callable[..., jax.Array]:
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=backend)


def _for_each_segment(
    body: Callable[..., Any], carry: Any, segments: Segments, lengths: tuple[int, ...]
) -> Any:
    """carry = body(length of i's bucket, carry, start of i, start of i + 1) for each segment i, in order."""
    starts, buckets = segments
    count = jnp.sum(buckets >= 0)
    past = jnp.iinfo(jnp.int32).max
    ends = jnp.where(jnp.arange(starts.size) + 1 < count, jnp.roll(starts, -1), past)
    branches = [functools.partial(body, length) for length in lengths]

    def step(i: jax.Array, carry: Any) -> Any:
        return lax.switch(buckets[i], branches, carry, starts[i], ends[i])

    return lax.fori_loop(0, count, step, carry)


def _slice(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, length, 0)[None]  # [1, length, heads, D]
