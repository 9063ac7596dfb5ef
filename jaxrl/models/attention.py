"""Causal attention over packed tokens.

A stream is `[N]` tokens of several sequences, one after another. The backends "xla" and "cudnn" visit the segments
in order, each at its length rounded up to a bucket, so that a handful of static shapes serve every stream and no
`[N, N]` mask exists. A bucket may overrun its segment: causality keeps the overrun out of the segment's own outputs,
the next segment overwrites what it left there, and the backward pass masks the incoming gradient. "cudnn_packed"
hands the whole stream to cuDNN's packed layout.

For the backward pass every backend keeps its output and the log-sum-exp of the scores, both named "attention": a
remat policy that saves this name never runs attention forward twice.

Shape letters: N tokens of a stream, S segments, L tokens of a bucket, H query heads, K key/value heads, D size of a
head, R = L H / K queries that read one key head, M keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from jaxrl.errors import InputError
from jaxrl.types import Backend

ROWS = 128  # queries that "xla" scores at one time
PARTS = 8  # of a sequence, each with the keys up to its own end: 1 / PARTS more scores than the causal half
LARGE_LSE = 1e30  # finite, and exp(score - LARGE_LSE) is 0

Carry = TypeVar("Carry")  # pytrees of arrays
Result = TypeVar("Result")


class Segments(NamedTuple):
    """Where the sequences of one stream lie, in order; starts[i] + lengths[buckets[i]] <= N."""

    starts: Int32[Array, " S"]  # first token of each segment
    buckets: Int32[Array, " S"]  # index into the bucket lengths; -1 past the last segment


def choose_backend(requested: Literal["auto", Backend], dtype: str) -> Backend:
    """Chooses cuDNN where it runs (NVIDIA Ampere and later, half precision), XLA elsewhere.

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
    return requested


def packed_attention(
    q: Float[Array, "N H D"],
    k: Float[Array, "N K D"],
    v: Float[Array, "N K D"],
    segments: Segments,
    lengths: tuple[int, ...],
    backend: Backend,
) -> Float[Array, "N H D"]:
    """Causal self-attention inside each segment.

    Args:
      q, k, v: queries, keys and values; K divides H.
      segments: starts and buckets.
      lengths: bucket lengths in tokens, ascending; static.
      backend: "xla", "cudnn" or "cudnn_packed".

    Returns:
      [N, H, D]; tokens outside all segments get anything finite. The gradient that comes back must be zero there.
    """
    chex.assert_rank([q, k, v], 3)
    chex.assert_equal_shape([k, v])
    run = _whole_stream if backend == "cudnn_packed" else _by_segment
    return run(QKV(q, k, v), segments, lengths, backend)


class QKV(NamedTuple):
    """Queries, keys and values of a stream, or their gradients."""

    q: Float[Array, "N H D"]
    k: Float[Array, "N K D"]
    v: Float[Array, "N K D"]


class Attended(NamedTuple):
    """Attention's output, and the log-sum-exp of each query's scores."""

    out: Float[Array, "L H D"]
    lse: Float32[Array, "L H"]


class Kernel(NamedTuple):
    """Causal attention of one sequence: q [L, H, D], k and v [L, K, D]."""

    forward: Callable[[Array, Array, Array], Attended]  # of q, k, v
    backward: Callable[..., QKV]  # gradients from (q, k, v, out, lse, gradient of out)


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass, whole streams."""

    qkv: QKV
    attended: Attended
    segments: Segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_segment(
    qkv: QKV, segments: Segments, lengths: tuple[int, ...], backend: Backend
) -> Float[Array, "N H D"]:
    return _by_segment_forward(qkv, segments, lengths, backend)[0]


def _by_segment_forward(
    qkv: QKV, segments: Segments, lengths: tuple[int, ...], backend: Backend
) -> tuple[Float[Array, "N H D"], Residuals]:
    def attend(length: int, carry: Attended, start: Int[Array, ""], _: Int[Array, ""]) -> Attended:
        new = _kernel(backend).forward(*(_slice(x, start, length) for x in qkv))
        return jax.tree.map(functools.partial(_write, start=start), carry, new)

    blank = Attended(jnp.zeros_like(qkv.q), jnp.zeros(qkv.q.shape[:2], jnp.float32))
    attended = _for_each_segment(attend, blank, segments, lengths)
    attended = Attended(*(checkpoint_name(x, "attention") for x in attended))
    return attended.out, Residuals(qkv, attended, segments)


def _by_segment_backward(
    lengths: tuple[int, ...], backend: Backend, residuals: Residuals, d_out: Float[Array, "N H D"]
) -> tuple[QKV, None]:
    qkv, (out, lse), segments = residuals

    def attend(length: int, grads: QKV, start: Int[Array, ""], end: Int[Array, ""]) -> QKV:
        own = (start + jnp.arange(length) < end)[:, None]
        # rows past the end are queries of the next segment: exp(their scores here - their lse there) may overflow
        own_lse = jnp.where(own, _slice(lse, start, length), LARGE_LSE)
        d = jnp.where(own[..., None], _slice(d_out, start, length), 0)
        new = _kernel(backend).backward(*(_slice(x, start, length) for x in (*qkv, out)), own_lse, d)
        # an overrun writes zeros, which the segments that own those tokens then overwrite
        return jax.tree.map(functools.partial(_write, start=start), grads, new)

    zeros = QKV(*map(jnp.zeros_like, qkv))
    return _for_each_segment(attend, zeros, segments, lengths), None


_by_segment.defvjp(_by_segment_forward, _by_segment_backward)


def _for_each_segment(
    body: Callable[[int, Carry, Array, Array], Carry],
    carry: Carry,
    segments: Segments,
    lengths: tuple[int, ...],
) -> Carry:
    """carry = body(length of i's bucket, carry, start of i, start of i + 1) for each segment i, in order."""
    starts, buckets = segments
    count = jnp.sum(buckets >= 0)
    past = jnp.iinfo(jnp.int32).max
    ends = jnp.where(jnp.arange(starts.size) + 1 < count, jnp.roll(starts, -1), past)
    branches = [functools.partial(body, length) for length in lengths]

    def step(i: Int[Array, ""], carry: Carry) -> Carry:
        return lax.switch(buckets[i], branches, carry, starts[i], ends[i])

    return lax.fori_loop(0, count, step, carry)


def _slice(x: Shaped[Array, "N ..."], start: Int[Array, ""], length: int) -> Shaped[Array, "L ..."]:
    return lax.dynamic_slice_in_dim(x, start, length, 0)


def _write(
    x: Shaped[Array, "N ..."], part: Shaped[Array, "L ..."], start: Int[Array, ""]
) -> Shaped[Array, "N ..."]:
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, 0)


def _kernel(backend: Backend) -> Kernel:
    if backend == "xla":
        return Kernel(_xla_forward, _xla_backward)
    return Kernel(_cudnn_forward, _cudnn_backward)


def _xla_forward(q: Float[Array, "L H D"], k: Float[Array, "L K D"], v: Float[Array, "L K D"]) -> Attended:
    length, kv_heads, _ = k.shape
    q, k, v = (_by_kv_head(x, kv_heads) for x in (q, k, v))

    def attend(_: None, q: Array, at: Array, seen: int) -> tuple[None, tuple[Array, Array]]:
        scores = _scores(q, k[:, :seen], at)
        most = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        out = _dot("krm,kmd->krd", weights.astype(v.dtype), v[:, :seen]) / total
        return None, (out.astype(q.dtype), most + jnp.log(total))

    _, (out, lse) = _over_rows(attend, None, length, (q,))
    return Attended(_by_head(out, length), _by_head(lse, length)[..., 0])


def _xla_backward(
    q: Float[Array, "L H D"],
    k: Float[Array, "L K D"],
    v: Float[Array, "L K D"],
    out: Float[Array, "L H D"],
    lse: Float32[Array, "L H"],
    d_out: Float[Array, "L H D"],
) -> QKV:
    """From the log-sum-exp, a block of queries at a time (FlashAttention, arXiv 2205.14135, algorithm 4)."""
    length, kv_heads, _ = k.shape
    delta = _dot("nhd,nhd->nh", out, d_out)
    by_head = (q, k, v, d_out, lse[..., None], delta[..., None])
    q, k, v, d_out, lse, delta = (_by_kv_head(x, kv_heads) for x in by_head)
    scale = q.shape[-1] ** -0.5

    def attend(
        carry: tuple[Array, Array], q: Array, d_out: Array, lse: Array, delta: Array, at: Array, seen: int
    ) -> tuple[tuple[Array, Array], Array]:
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
    return QKV(*(_by_head(x, length).astype(q.dtype) for x in (dq, dk, dv)))


def _over_rows(
    attend: Callable[..., tuple[Carry, Result]], carry: Carry, length: int, arrays: tuple[Array, ...]
) -> tuple[Carry, Result]:
    """Scans blocks of ROWS queries, in at most PARTS parts, each of which sees only the keys up to its own end.

    Args:
      attend: (carry, block of each array, positions [r] of its rows, number of keys) -> (carry, result).
      carry: what `attend` takes from one block to the next.
      length: L.
      arrays: [K, R, ...], see `_by_kv_head`; so are the results.
    """
    shared = arrays[0].shape[1] // length  # query heads that read the same key head
    rows = min(length, math.gcd(length, ROWS) if length > ROWS else length)
    blocks = length // rows
    parts = min(blocks, PARTS)
    results = []
    for part in range(parts):
        first, last = blocks * part // parts * rows, blocks * (part + 1) // parts * rows
        at = jnp.repeat(jnp.arange(first, last), shared).reshape(-1, rows * shared)
        own = [x[:, first * shared : last * shared] for x in arrays]
        xs = [jnp.swapaxes(x.reshape(len(x), -1, rows * shared, x.shape[2]), 0, 1) for x in own]

        def step(carry: Carry, x: tuple[Array, ...], seen: int = last) -> tuple[Carry, Result]:
            return attend(carry, *x, seen)

        carry, result = lax.scan(step, carry, (*xs, at))
        results.append(jax.tree.map(_join_blocks, result))
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)


def _join_blocks(x: Float[Array, "blocks K r D"]) -> Float[Array, "K R D"]:
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, x.shape[3])


def _scores(
    q: Float[Array, "K R D"], k: Float[Array, "K M D"], at: Int[Array, " R"]
) -> Float32[Array, "K R M"]:
    """Masked and scaled scores of queries at the positions `at`."""
    seen = at[:, None] >= jnp.arange(k.shape[1])[None]
    return jnp.where(seen[None], _dot("krd,kmd->krm", q, k) * q.shape[-1] ** -0.5, -jnp.inf)


def _by_kv_head(x: Float[Array, "L H D"], kv_heads: int) -> Float[Array, "K R D"]:
    """Collects all queries that read a key head, R = L * H / K, as rows of one matrix."""
    length, heads, size = x.shape
    grouped = x.reshape(length, kv_heads, heads // kv_heads, size)
    return jnp.swapaxes(grouped, 0, 1).reshape(kv_heads, -1, size)


def _by_head(x: Float[Array, "K R D"], length: int) -> Float[Array, "L H D"]:
    """Undoes `_by_kv_head`."""
    return jnp.swapaxes(x.reshape(len(x), length, -1, x.shape[2]), 0, 1).reshape(length, -1, x.shape[2])


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _cudnn(
    q: Float[Array, "B L H D"], k: Float[Array, "B L K D"], v: Float[Array, "B L K D"]
) -> Float[Array, "B L H D"]:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_forward(q: Float[Array, "L H D"], k: Float[Array, "L K D"], v: Float[Array, "L K D"]) -> Attended:
    out, vjp = jax.vjp(_cudnn, q[None], k[None], v[None])
    lse = jax.tree.leaves(vjp)[-2]  # see _cudnn_backward; the public residual is rounded to bfloat16
    chex.assert_shape(lse, (1, q.shape[1], q.shape[0]))
    return Attended(out[0], lse[0].T)


def _cudnn_backward(
    q: Float[Array, "L H D"],
    k: Float[Array, "L K D"],
    v: Float[Array, "L K D"],
    out: Float[Array, "L H D"],
    lse: Float32[Array, "L H"],
    d_out: Float[Array, "L H D"],
) -> QKV:
    """`jax.vjp` without its forward run: its closure holds q, k, v, what is not used here, log-sum-exp and out."""
    batch = tuple(x[None] for x in (q, k, v, lse.T, out))
    closure = jax.eval_shape(lambda *qkv: jax.vjp(_cudnn, *qkv)[1], *batch[:3])
    leaves, structure = jax.tree.flatten(closure)
    unused = [jnp.zeros(x.shape, x.dtype) for x in leaves[3:-2]]
    filled = [*batch[:3], *unused, *batch[3:]]
    chex.assert_trees_all_equal_shapes_and_dtypes(leaves, [jax.typeof(x) for x in filled])
    return QKV(*(grad[0] for grad in jax.tree.unflatten(structure, filled)(d_out[None])))


class StreamResiduals(NamedTuple):
    """What the backward pass of a whole stream needs of its forward pass."""

    vjp: Callable[[Float[Array, "1 N H D"]], tuple[Array, Array, Array]]
    inside: Bool[Array, "N 1 1"]  # tokens up to the end of the last segment's bucket


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _whole_stream(
    qkv: QKV, segments: Segments, lengths: tuple[int, ...], backend: Backend
) -> Float[Array, "N H D"]:
    return _whole_stream_forward(qkv, segments, lengths, backend)[0]


def _whole_stream_forward(
    qkv: QKV, segments: Segments, lengths: tuple[int, ...], _: Backend
) -> tuple[Float[Array, "N H D"], StreamResiduals]:
    starts, buckets = segments
    count = jnp.sum(buckets >= 0)
    # of the last segment, overrun included
    end = starts[count - 1] + jnp.asarray(lengths, jnp.int32)[buckets[count - 1]]
    live = jnp.arange(starts.size) < count
    ends = jnp.where(jnp.arange(starts.size) + 1 < count, jnp.roll(starts, -1), end)
    offsets = jnp.where(jnp.arange(starts.size + 1) < count, jnp.append(starts, 0), -1).at[count].set(end)

    def attend(q: Array, k: Array, v: Array) -> Array:
        return _cudnn_packed(q, k, v, jnp.where(live, ends - starts, -1)[None], offsets[None])

    out, vjp = jax.vjp(attend, *(x[None] for x in qkv))
    leaves, structure = jax.tree.flatten(vjp)
    leaves[-2:] = [checkpoint_name(x, "attention") for x in leaves[-2:]]  # log-sum-exp and out
    inside = (jnp.arange(len(qkv.q)) < jnp.where(count > 0, end, 0))[:, None, None]
    # cuDNN writes nothing past the last segment, and nothing may be NaN
    out = checkpoint_name(jnp.where(inside, out[0], 0), "attention")
    return out, StreamResiduals(jax.tree.unflatten(structure, leaves), inside)


def _whole_stream_backward(
    _: tuple[int, ...], __: Backend, residuals: StreamResiduals, d_out: Float[Array, "N H D"]
) -> tuple[QKV, None]:
    vjp, inside = residuals
    grads = vjp(jnp.where(inside, d_out, 0)[None])
    return QKV(*(jnp.where(inside, grad[0], 0) for grad in grads)), None


_whole_stream.defvjp(_whole_stream_forward, _whole_stream_backward)


def _cudnn_packed(
    q: Float[Array, "1 N H D"],
    k: Float[Array, "1 N K D"],
    v: Float[Array, "1 N K D"],
    lengths: Int[Array, "1 S"],
    offsets: Int[Array, "1 S+1"],
) -> Float[Array, "1 N H D"]:
    """Attention in segments of these lengths at these offsets, -1 past the last; has no public name in JAX yet."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
    )
