"""Causal attention over packed tokens.

A stream is `[N]` tokens of several sequences, one after another. Segments of about one length are attended to in a loop
of their own, padded to a static length, so that a handful of shapes serve every stream and no `[N, N]` mask exists. On
a GPU every trip of a loop costs a wait for the host, and a branch inside it two copies of the stream: so there are few
lengths, no branches, and a trip takes as many segments as fill TRIP tokens. What a trip computes past the end of a
segment is never written.

For the backward pass every backend keeps its output and the log-sum-exp of the scores, both named "attention": a
remat policy that saves this name never runs attention forward twice.

Shape letters: N tokens of a stream, S segments, B segments of a trip, L tokens that each is padded to, H query heads,
K key/value heads, D size of a head, R = L H / K queries that read one key head, M keys.
"""

from __future__ import annotations

import dataclasses
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
from jaxrl.models.splash import splash_attention
from jaxrl.types import Backend

ROWS = 128  # queries that "xla" scores at one time
PARTS = 8  # of a sequence, each with the keys up to its own end: 1 / PARTS more scores than the causal half
TRIP = 8192  # tokens that "cudnn" attends to in one trip
LARGE_LSE = 1e30  # finite, and exp(score - LARGE_LSE) is 0

Carry = TypeVar("Carry")  # pytrees of arrays
Result = TypeVar("Result")


class Segments(NamedTuple):
    """Where the sequences of one stream lie, in order; starts[i] + lengths[buckets[i]] <= N."""

    starts: Int32[Array, " S"]  # first token of each segment
    buckets: Int32[Array, " S"]  # index into the bucket lengths; -1 past the last segment


def choose_backend(requested: Literal["auto", Backend], dtype: str, device: jax.Device) -> Backend:
    """Chooses cuDNN where it runs (NVIDIA Ampere and later, half precision), splash on TPUs, XLA elsewhere.

    Args:
      requested: by the recipe.
      dtype: of the computation.
      device: that the program is for, which need not be this machine's.

    Raises:
      InputError: for a backend that cannot run there.
    """
    capability = float(device.compute_capability) if device.platform == "gpu" else 0.0
    fits = {"xla": True, "cudnn": capability >= 8 and dtype == "bfloat16", "splash": device.platform == "tpu"}
    if requested == "auto":
        return next(name for name in ("cudnn", "splash", "xla") if fits[name])
    if not fits[requested]:
        gpu = "model.dtype = bfloat16 and an NVIDIA GPU of the Ampere generation or later"
        needed = gpu if requested == "cudnn" else "a TPU"
        raise InputError(f"model.attention = {requested} needs {needed}; set it to auto")
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
      backend: "xla", "cudnn" or "splash".

    Returns:
      [N, H, D]; tokens outside all segments get anything finite. The gradient that comes back must be zero there.
    """
    chex.assert_rank([q, k, v], 3)
    chex.assert_equal_shape([k, v])
    if backend == "splash":
        return splash_attention(q, k, v, *segments, lengths)
    return _attend(QKV(q, k, v), segments, lengths, backend)


class QKV(NamedTuple):
    """Queries, keys and values of a stream, or their gradients."""

    q: Float[Array, "N H D"]
    k: Float[Array, "N K D"]
    v: Float[Array, "N K D"]


class Attended(NamedTuple):
    """Attention's output, and the log-sum-exp of each query's scores."""

    out: Float[Array, "*B L H D"]
    lse: Float32[Array, "*B L H"]


class Kernel(NamedTuple):
    """Causal attention of the sequences of a trip: q [B, L, H, D], k and v [B, L, K, D]."""

    forward: Callable[..., Attended]  # of q, k, v, lengths
    backward: Callable[..., QKV]  # gradients from (q, k, v, out, lse, gradient of out, lengths)
    trip: int  # tokens of a trip; 0 takes one segment at a time, at its bucket's length


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass, whole streams."""

    qkv: QKV
    attended: Attended
    segments: Segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(
    qkv: QKV, segments: Segments, lengths: tuple[int, ...], backend: Backend
) -> Float[Array, "N H D"]:
    return _attend_forward(qkv, segments, lengths, backend)[0]


def _attend_forward(
    qkv: QKV, segments: Segments, lengths: tuple[int, ...], backend: Backend
) -> tuple[Float[Array, "N H D"], Residuals]:
    kernel = _kernel(backend)

    def attend(carry: Attended, trip: Trip) -> Attended:
        new = kernel.forward(*map(trip.read, qkv), trip.lengths)
        return jax.tree.map(trip.write, carry, new)

    blank = Attended(jnp.zeros_like(qkv.q), jnp.zeros(qkv.q.shape[:2], jnp.float32))
    attended = _for_each_trip(attend, blank, segments, lengths, kernel.trip)
    attended = Attended(*(checkpoint_name(x, "attention") for x in attended))
    return attended.out, Residuals(qkv, attended, segments)


def _attend_backward(
    lengths: tuple[int, ...], backend: Backend, residuals: Residuals, d_out: Float[Array, "N H D"]
) -> tuple[QKV, None]:
    qkv, (out, lse), segments = residuals
    kernel = _kernel(backend)

    def attend(grads: tuple[Array, Array], trip: Trip) -> tuple[Array, Array]:
        # rows past the end are queries of the next segment: exp(their scores here - their lse there) may overflow
        own_lse = jnp.where(trip.own[..., None], trip.read(lse), LARGE_LSE)
        d = jnp.where(trip.own[..., None, None], trip.read(d_out), 0)
        new = kernel.backward(*map(trip.read, (*qkv, out)), own_lse, d, trip.lengths)
        return trip.write(grads[0], new.q), trip.write(grads[1], jnp.concatenate(new[1:], axis=2))

    # keys and values in one array: of two alike, XLA would copy the zeros of one to have the other
    zeros = jnp.zeros_like(qkv.q), jnp.zeros_like(jnp.concatenate(qkv[1:], axis=1))
    dq, dkv = _for_each_trip(attend, zeros, segments, lengths, kernel.trip)
    return QKV(dq, *jnp.split(dkv, 2, axis=1)), None


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class Trip:
    """What one trip of a loop attends to."""

    starts: Int32[Array, " B"]
    lengths: Int32[Array, " B"]  # tokens; 0 where there is no segment
    padded: int  # L
    windows: bool  # B is 1, and starts + L lie inside the stream

    @property
    def own(self) -> Bool[Array, "B L"]:
        """Which rows belong to their segment."""
        return jnp.arange(self.padded)[None] < self.lengths[:, None]

    def read(self, x: Shaped[Array, "N ..."]) -> Shaped[Array, "B L ..."]:
        """The rows of each segment, and others past its end."""
        if self.windows:
            return lax.dynamic_slice_in_dim(x, self.starts[0], self.padded, 0)[None]
        return jnp.take(x, self._rows, axis=0, mode="clip")

    def write(self, x: Shaped[Array, "N ..."], new: Shaped[Array, "B L ..."]) -> Shaped[Array, "N ..."]:
        """x with the segments' own rows replaced."""
        if self.windows:
            own = self.own.reshape(-1, *(1,) * (x.ndim - 1))
            rows = jnp.where(own, new[0].astype(x.dtype), self.read(x)[0])
            return lax.dynamic_update_slice_in_dim(x, rows, self.starts[0], 0)
        past = len(x) + jnp.arange(self.own.size).reshape(self.own.shape)  # distinct, and dropped
        rows = jnp.where(self.own, self._rows, past)
        return x.at[rows].set(new.astype(x.dtype), mode="drop", unique_indices=True)

    @property
    def _rows(self) -> Int32[Array, "B L"]:
        return self.starts[:, None] + jnp.arange(self.padded)[None]


def _for_each_trip(
    body: Callable[[Carry, Trip], Carry],
    carry: Carry,
    segments: Segments,
    lengths: tuple[int, ...],
    trip: int,
) -> Carry:
    """carry = body(carry, trip) until every segment has had its trip; see `Kernel.trip`."""
    starts, buckets = segments
    index, size = jnp.arange(starts.size), starts.size
    padded = jnp.asarray(lengths, jnp.int32)[buckets]
    # the last one's overrun counts as its own
    ends = jnp.where(index + 1 < jnp.sum(buckets >= 0), jnp.roll(starts, -1), starts + padded)
    shorter = 0
    for length in padded_lengths(lengths, trip):
        batch = max(1, min(trip // length, size))
        chosen = (buckets >= 0) & (padded > shorter) & (padded <= length)
        count, (members,) = chosen.sum(), jnp.nonzero(chosen, size=size, fill_value=0)

        def step(
            i: Int[Array, ""],
            carry: Carry,
            length: int = length,
            batch: int = batch,
            count: Int[Array, ""] = count,
            members: Int[Array, " S"] = members,
        ) -> Carry:
            at = i * batch + jnp.arange(batch)
            own = members[jnp.minimum(at, size - 1)]
            live = jnp.where(at < count, ends[own] - starts[own], 0)
            return body(carry, Trip(starts[own], live, length, windows=not trip))

        with jax.named_scope(f"padded_{length}"):
            carry = lax.fori_loop(0, -(-count // batch), step, carry)
        shorter = length
    return carry


def padded_lengths(lengths: tuple[int, ...], trip: int) -> tuple[int, ...]:
    """Lengths L that segments are padded to: the buckets, or where `trip` is set halves of the longest."""
    if not trip:
        return lengths
    unit, halves = lengths[0], [lengths[-1]]
    while halves[-1] > unit:
        halves.append(unit * -(-halves[-1] // (2 * unit)))
    return tuple(halves[::-1])


def _kernel(backend: Backend) -> Kernel:
    if backend == "xla":
        return Kernel(_xla_forward, _xla_backward, 0)
    return Kernel(_cudnn_forward, _cudnn_backward, TRIP)


def _xla_forward(
    q: Float[Array, "1 L H D"], k: Float[Array, "1 L K D"], v: Float[Array, "1 L K D"], __: Int[Array, " 1"]
) -> Attended:
    length, kv_heads = k.shape[1:3]
    q, k, v = (_by_kv_head(x[0], kv_heads) for x in (q, k, v))

    def attend(_: None, q: Array, at: Array, seen: int) -> tuple[None, tuple[Array, Array]]:
        scores = _scores(q, k[:, :seen], at)
        most = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        out = _dot("krm,kmd->krd", weights.astype(v.dtype), v[:, :seen]) / total
        return None, (out.astype(q.dtype), most + jnp.log(total))

    _, (out, lse) = _over_rows(attend, None, length, (q,))
    return Attended(_by_head(out, length)[None], _by_head(lse, length)[None, ..., 0])


def _xla_backward(
    q: Float[Array, "1 L H D"],
    k: Float[Array, "1 L K D"],
    v: Float[Array, "1 L K D"],
    out: Float[Array, "1 L H D"],
    lse: Float32[Array, "1 L H"],
    d_out: Float[Array, "1 L H D"],
    _: Int[Array, " 1"],
) -> QKV:
    """From the log-sum-exp, a block of queries at a time (FlashAttention, arXiv 2205.14135, algorithm 4)."""
    q, k, v, out, lse, d_out = (x[0] for x in (q, k, v, out, lse, d_out))
    length, kv_heads = k.shape[:2]
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
    return QKV(*(_by_head(x, length).astype(q.dtype)[None] for x in (dq, dk, dv)))


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
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L K D"],
    v: Float[Array, "B L K D"],
    lengths: Int32[Array, " B"],
) -> Float[Array, "B L H D"]:
    """Tiles past a sequence's own length are skipped."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        is_causal=True,
        implementation="cudnn",
    )


def _cudnn_forward(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L K D"],
    v: Float[Array, "B L K D"],
    lengths: Int32[Array, " B"],
) -> Attended:
    out, vjp = jax.vjp(functools.partial(_cudnn, lengths=jnp.maximum(lengths, 1)), q, k, v)
    lse = jax.tree.leaves(vjp)[-2]  # see _cudnn_backward; the public residual is rounded to bfloat16
    chex.assert_shape(lse, (*q.shape[:1], q.shape[2], q.shape[1]))
    return Attended(out, jnp.swapaxes(lse, 1, 2))


def _cudnn_backward(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L K D"],
    v: Float[Array, "B L K D"],
    out: Float[Array, "B L H D"],
    lse: Float32[Array, "B L H"],
    d_out: Float[Array, "B L H D"],
    lengths: Int32[Array, " B"],
) -> QKV:
    """`jax.vjp` without its forward run: its closure has q, k, v, lengths and what is not used, log-sum-exp and out."""
    lengths = jnp.maximum(lengths, 1)
    closure = jax.eval_shape(
        lambda *x: jax.vjp(functools.partial(_cudnn, lengths=x[3]), *x[:3])[1], q, k, v, lengths
    )
    leaves, structure = jax.tree.flatten(closure)
    others = [lengths if x.shape == lengths.shape else jnp.zeros(x.shape, x.dtype) for x in leaves[3:-2]]
    filled = [q, k, v, *others, jnp.swapaxes(lse, 1, 2), out]
    chex.assert_trees_all_equal_shapes_and_dtypes(leaves, [jax.typeof(x) for x in filled])
    return QKV(*jax.tree.unflatten(structure, filled)(d_out))
