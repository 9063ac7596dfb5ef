"""Causal attention over packed tokens on TPUs, by JAX's splash attention (a Pallas kernel).

The kernel takes a whole stream, with an id of its segment for each token, and computes a block of queries and a block
of keys at a time. Blocks that share no segment are skipped, so that the work is that of the segments.

Shape letters: N tokens of a stream, S segments, H query heads, K key/value heads, D size of a head, B blocks.
"""

from __future__ import annotations

import operator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

# Queries, and keys, of a block: axlearn's choice on v6e (apple/axlearn pull request 958); on v5p, training on long
# sequences is a quarter faster than with 512 (AI-Hypercomputer/maxtext pull request 4929).
BLOCK = 1024
LANES = 128  # of a TPU's vectors; blocks are multiples


def splash_attention(
    q: Float[Array, "N H D"],
    k: Float[Array, "N K D"],
    v: Float[Array, "N K D"],
    starts: Int32[Array, " S"],
    buckets: Int32[Array, " S"],
    lengths: tuple[int, ...],
    *,
    interpret: bool = False,
) -> Float[Array, "N H D"]:
    """Causal self-attention inside each segment; its output and log-sum-exp are named "attention".

    Args:
      q, k, v: queries, keys and values; K divides H.
      starts: first token of each segment, ascending.
      buckets: index of each segment into `lengths`; -1 past the last segment.
      lengths: bucket lengths in tokens; static.
      interpret: runs on any device, slowly.

    Returns:
      [N, H, D]; 0 before the first segment and past the last one's bucket, where gradients are 0 too.
    """
    tokens, _, size = q.shape
    count = -(-tokens // BLOCK)
    block = -(-tokens // (count * LANES)) * LANES
    at, live = jnp.arange(count * block), buckets >= 0
    begun = jnp.sum(at[:, None] >= jnp.where(live, starts, at.size)[None], axis=1)
    end = jnp.max(jnp.where(live, starts + jnp.asarray(lengths, jnp.int32)[buckets], 0))
    # the kernel has heads first, and does not scale
    padding = ((0, at.size - tokens), (0, 0), (0, 0))
    q, k, v = (jnp.swapaxes(jnp.pad(x, padding), 0, 1) for x in (q * size**-0.5, k, v))
    out = _by_blocks(q, k, v, begun + (at >= end), block, interpret)
    inside = (begun > 0) & (at < end)
    return jnp.where(inside[:, None, None], jnp.swapaxes(out, 0, 1), 0)[:tokens]


def _by_blocks(
    q: Float[Array, "H N D"],
    k: Float[Array, "K N D"],
    v: Float[Array, "K N D"],
    ids: Int32[Array, " N"],
    block: int,
    interpret: bool,
) -> Float[Array, "H N D"]:
    """Causal attention between equal ids, which ascend, without a scale.

    JAX's own way to the kernel, `make_splash_mha`, computes a mask [N, N] on the host, which takes seconds, and skips
    only what is above the diagonal.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    at = jnp.arange(len(ids) // block)
    queries, keys = at[:, None], at[None]
    run = (queries >= keys) & (ids[None, block - 1 :: block] >= ids[::block, None])  # [B, B]
    # a block that is skipped names the nearest one that is not, so that nothing is loaded for it
    first, last = queries + 1 - run.sum(1, keepdims=True), keys - 1 + run.sum(0, keepdims=True)
    of_queries, of_keys = (
        MaskInfo(
            data_next=jnp.clip(*bounds)[None],
            mask_next=None,
            block_mask=run.astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=np.arange(len(ids), dtype=np.int32),
        )
        for bounds in ((keys, first, queries), (queries, keys, last))
    )
    kernel = splash.SplashAttentionKernel(
        of_queries,
        of_queries,
        of_keys,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention",
        mask_function=operator.ge,
        interpret=interpret,
    )
    out = kernel(q, k, v, splash.SegmentIds(ids, ids))
    assert isinstance(out, Array)  # as no residuals are asked for
    return out
