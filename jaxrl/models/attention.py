"""Causal attention over packed tokens.

A stream is `[N]` tokens of several sequences, one after another. The backends "xla" and "cudnn" visit the segments
in order, each at its length rounded up to a bucket, so that a handful of static shapes serve every stream and no
`[N, N]` mask exists. A bucket may overrun its segment: causality keeps the overrun out of the segment's own outputs,
the next segment overwrites what it left behind, and the backward pass masks the incoming gradient. "cudnn_packed"
hands the whole stream to cuDNN's packed layout.

For the backward pass every backend keeps its output and the log-sum-exp of the scores, both named "attention": a
remat policy that saves this name never runs attention forward twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl.errors import InputError
from jaxrl.types import Backend

ROWS = 128  # queries that "xla" scores at one time


class Segments(NamedTuple):
    """Where the sequences of one stream lie, in order, starts[i] + lengths[buckets[i]] <= N."""

    starts: jax.Array  # [S] int32: first token of each segment
    buckets: jax.Array  # [S] int32: index into the bucket lengths; -1 past the last segment


def choose_backend(requested: str, dtype: str) -> Backend:
    """cuDNN where it runs (NVIDIA Ampere and later, half precision), XLA elsewhere.

    Raises:
      InputError: for a backend that cannot run here.
    """
    gpu = jax.default_backend() == "gpu"
    capability = float(getattr(jax.local_devices()[0], "compute_capability", 0)) if gpu else 0.0
    fits = capability >= 8 and dtype == "bfloat16"
    if requested == "auto":
        return "cudnn" if fits else "xla"
    if requested.startswith("cudnn") and not fits:
        raise InputError(
            f"model.attention = {requested} needs model.dtype = bfloat16 and an NVIDIA GPU of the Ampere generation or "
            "later; set it to auto"
        )
    if requested == "cudnn_packed" and (capability < 9 or jax.__version_info__ < (0, 11, 1)):
        raise InputError(
            "model.attention = cudnn_packed needs a Hopper GPU or later and jax 0.11.1 or later, before which grouped "
            "heads come out wrong; set it to cudnn"
        )
    return requested  # type: ignore[return-value]


def packed_attention(
    q_NxHxD: jax.Array,
    k_NxKxD: jax.Array,
    v_NxKxD: jax.Array,
    segments: Segments,
    lengths: tuple[int, ...],
    backend: Backend,
) -> jax.Array:
    """Causal self-attention inside each segment. Returns [N, H, D]; tokens outside all segments get anything finite.

    The gradient that comes back must be zero there.

    Args:
      q_NxHxD, k_NxKxD, v_NxKxD: queries, keys and values; K divides H.
      segments: starts and buckets.
      lengths: bucket lengths in tokens, ascending; static.
      backend: "xla", "cudnn" or "cudnn_packed".
    """
    chex.assert_rank([q_NxHxD, k_NxKxD, v_NxKxD], 3)
    chex.assert_equal_shape([k_NxKxD, v_NxKxD])
    run = _whole_stream if backend == "cudnn_packed" else _by_segment
    return run(q_NxHxD, k_NxKxD, v_NxKxD, segments, lengths, backend)


class Kernel(NamedTuple):
    """Causal attention of one sequence: q [L, H, D], k and v [L, K, D]."""

    forward: Callable[
        ..., tuple[jax.Array, jax.Array]
    ]  # (q, k, v) -> out [L, H, D], log-sum-exp [L, H] float32
    backward: Callable[..., tuple[jax.Array, ...]]  # (q, k, v, out, log-sum-exp, d_out) -> dq, dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_segment(q, k, v, segments, lengths, backend):
    return _by_segment_forward(q, k, v, segments, lengths, backend)[0]


def _by_segment_forward(q, k, v, segments, lengths, backend):
    def attend(length: int, carry: tuple, start: jax.Array, _: jax.Array) -> tuple:
        new = _kernel(backend).forward(*(_slice(x, start, length) for x in (q, k, v)))
        return jax.tree.map(functools.partial(_write, start=start), carry, new)

    blank = (jnp.zeros_like(q), jnp.zeros(q.shape[:2], jnp.float32))
    out, lse = _for_each_segment(attend, blank, segments, lengths)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, out, lse, segments)


def _by_segment_backward(lengths, backend, residuals, d_out):
    *arrays, lse, segments = residuals

    def attend(length: int, grads: tuple, start: jax.Array, end: jax.Array) -> tuple:
        own = (start + jnp.arange(length) < end)[:, None]
        # behind the end lies the next segment's, with which exp(score - lse) may overflow; this makes it 0
        own_lse = jnp.where(own, _slice(lse, start, length), 1e30)
        d = jnp.where(own[..., None], _slice(d_out, start, length), 0)
        new = _kernel(backend).backward(*(_slice(x, start, length) for x in arrays), own_lse, d)
        # an overrun writes zeros, which the segments that own those tokens then overwrite
        return jax.tree.map(functools.partial(_write, start=start), grads, new)

    zeros = tuple(map(jnp.zeros_like, arrays[:3]))
    return (*_for_each_segment(attend, zeros, segments, lengths), None)


_by_segment.defvjp(_by_segment_forward, _by_segment_backward)


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
    return lax.dynamic_slice_in_dim(x, start, length, 0)


def _write(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, 0)


def _kernel(backend: Backend) -> Kernel:
    return {"xla": Kernel(_xla_forward, _xla_backward), "cudnn": Kernel(_cudnn_forward, _cudnn_backward)}[
        backend
    ]


def _xla_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    length, kv_heads, _ = k.shape
    q, k, v = (_by_group(x, kv_heads) for x in (q, k, v))

    def attend(_: None, q: jax.Array, at: jax.Array, seen: int) -> tuple[None, tuple]:
        scores = _scores(q, k[:, :seen], at)
        most = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        out = _dot("krm,kmd->krd", weights.astype(v.dtype), v[:, :seen]) / total
        return None, (out.astype(q.dtype), most + jnp.log(total))

    _, (out, lse) = _over_rows(attend, None, length, (q,))
    return _by_head(out, length), _by_head(lse, length)[..., 0]


def _xla_backward(q, k, v, out, lse, d_out):
    """From the log-sum-exp, a block of queries at a time (FlashAttention, arXiv 2205.14135, algorithm 4)."""
    length, kv_heads, _ = k.shape
    delta = _dot("nhd,nhd->nh", out, d_out)
    q, k, v, d_out, lse, delta = (
        _by_group(x, kv_heads) for x in (q, k, v, d_out, lse[..., None], delta[..., None])
    )
    scale = q.shape[-1] ** -0.5

    def attend(carry: tuple, q, d_out, lse, delta, at: jax.Array, seen: int) -> tuple[tuple, jax.Array]:
        dk, dv = carry
        weights = jnp.exp(_scores(q, k[:, :seen], at) - lse)
        d_weights = _dot("krd,kmd->krm", d_out, v[:, :seen])
        d_scores = (scale * weights * (d_weights - delta)).astype(q.dtype)
        dv = dv.at[..., :seen].add(_dot("krd,krm->kdm", d_out, weights.astype(q.dtype)))
        dk = dk.at[..., :seen].add(_dot("krd,krm->kdm", q, d_scores))
        return (dk, dv), _dot("krm,kmd->krd", d_scores, k[:, :seen]).astype(q.dtype)

    zeros = jnp.zeros((kv_heads, k.shape[2], length), jnp.float32)
    (dk, dv), dq = _over_rows(attend, (zeros, zeros), length, (q, d_out, lse, delta))
    dk, dv = jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)
    return tuple(_by_head(x, length).astype(q.dtype) for x in (dq, dk, dv))


def _over_rows(attend: Callable, carry: Any, length: int, arrays: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """Scans blocks of ROWS queries, in at most 8 parts, each of which sees only the keys up to its own end.

    The arrays and what `attend` gives are [K, R, ...], see `_by_group`.
    """
    group = arrays[0].shape[1] // length
    rows = min(length, math.gcd(length, ROWS) if length > ROWS else length)
    blocks = length // rows
    parts = min(blocks, 8)
    results = []
    for part in range(parts):
        first, last = blocks * part // parts * rows, blocks * (part + 1) // parts * rows
        at = jnp.repeat(jnp.arange(first, last), group).reshape(-1, rows * group)
        own = [x[:, first * group : last * group] for x in arrays]
        xs = [jnp.swapaxes(x.reshape(len(x), -1, rows * group, x.shape[2]), 0, 1) for x in own]

        def step(carry: Any, x: tuple, seen: int = last) -> tuple[Any, Any]:
            return attend(carry, *x, seen)

        carry, result = lax.scan(step, carry, (*xs, at))
        results.append(
            jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, x.shape[3]), result)
        )
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)


def _scores(q: jax.Array, k: jax.Array, at: jax.Array) -> jax.Array:
    """q [K, R, D] at positions [R], k [K, m, D] -> masked, scaled scores [K, R, m] float32."""
    seen = at[:, None] >= jnp.arange(k.shape[1])[None]
    return jnp.where(seen[None], _dot("krd,kmd->krm", q, k) * q.shape[-1] ** -0.5, -jnp.inf)


def _by_group(x: jax.Array, kv_heads: int) -> jax.Array:
    """[L, H, D] -> [K, R, D], R = L * H / K: with a key head, all queries that read it, as rows of one matrix."""
    length, heads, size = x.shape
    grouped = x.reshape(length, kv_heads, heads // kv_heads, size)
    return jnp.swapaxes(grouped, 0, 1).reshape(kv_heads, -1, size)


def _by_head(x: jax.Array, length: int) -> jax.Array:
    """[K, R, D] -> [L, H, D]."""
    return jnp.swapaxes(x.reshape(len(x), length, -1, x.shape[2]), 0, 1).reshape(length, -1, x.shape[2])


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    out, vjp = jax.vjp(_cudnn, q[None], k[None], v[None])
    lse = jax.tree.leaves(vjp)[-2]  # see _cudnn_backward; the public residual is rounded to bfloat16
    chex.assert_shape(lse, (1, q.shape[1], q.shape[0]))
    return out[0], lse[0].T


def _cudnn_backward(q, k, v, out, lse, d_out):
    """`jax.vjp` without its forward run: its closure holds q, k, v, what is not used here, log-sum-exp and out."""
    batch = tuple(x[None] for x in (q, k, v, lse.T, out))
    closure = jax.eval_shape(lambda *qkv: jax.vjp(_cudnn, *qkv)[1], *batch[:3])
    leaves, structure = jax.tree.flatten(closure)
    unused = [jnp.zeros(x.shape, x.dtype) for x in leaves[3:-2]]
    filled = [*batch[:3], *unused, *batch[3:]]
    chex.assert_trees_all_equal_shapes_and_dtypes(leaves, [jax.typeof(x) for x in filled])
    return tuple(grad[0] for grad in jax.tree.unflatten(structure, filled)(d_out[None]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _whole_stream(q, k, v, segments, lengths, backend):
    return _whole_stream_forward(q, k, v, segments, lengths, backend)[0]


def _whole_stream_forward(q, k, v, segments, lengths, backend):
    starts, buckets = segments
    count = jnp.sum(buckets >= 0)
    end = (
        starts[count - 1] + jnp.asarray(lengths, jnp.int32)[buckets[count - 1]]
    )  # of the last, overrun included
    live = jnp.arange(starts.size) < count
    ends = jnp.where(jnp.arange(starts.size) + 1 < count, jnp.roll(starts, -1), end)
    offsets = jnp.where(jnp.arange(starts.size + 1) < count, jnp.append(starts, 0), -1).at[count].set(end)
    out, vjp = jax.vjp(
        lambda q, k, v: _cudnn_packed(q, k, v, jnp.where(live, ends - starts, -1)[None], offsets[None]),
        q[None], k[None], v[None],
    )  # fmt: skip
    leaves, structure = jax.tree.flatten(vjp)
    leaves[-2:] = [checkpoint_name(x, "attention") for x in leaves[-2:]]  # log-sum-exp and out
    inside = (jnp.arange(len(q)) < jnp.where(count > 0, end, 0))[:, None, None]
    # cuDNN writes nothing past the last segment, and nothing may be NaN
    return checkpoint_name(jnp.where(inside, out[0], 0), "attention"), (
        jax.tree.unflatten(structure, leaves),
        inside,
    )


def _whole_stream_backward(lengths, backend, residuals, d_out):
    vjp, inside = residuals
    return (*(jnp.where(inside, grad[0], 0) for grad in vjp(jnp.where(inside, d_out, 0)[None])), None)


_whole_stream.defvjp(_whole_stream_forward, _whole_stream_backward)


def _cudnn_packed(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, offsets: jax.Array
) -> jax.Array:
    """[1, N, heads, D] of segments with lengths [1, S] at offsets [1, S + 1], -1 past the last; no public name yet."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL, qkv_layout="BTNH",
    )  # fmt: skip
