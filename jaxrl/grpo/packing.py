"""From rollouts to streams: which token of which sequence lies where, on which device.

All of it is NumPy on the host, a pure function of the rollouts. Each device gets its own streams `[M, N]`. `lay_out`
decides where sequences lie, from their lengths alone; `fill` puts values there, one a sequence or one a token. What
becomes of a sequence (its weight, its advantage) is data in the streams, so the way they are cut changes nothing.

Shape letters: G devices, M streams (micro-batches) of a device, N tokens of a stream, S sequences of a stream,
B sequences of a mini-batch.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import chex
import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from jaxrl.arrays import Array
from jaxrl.grpo.advantages import sequence_weights
from jaxrl.types import Rollout, Values

MOST_BUCKETS = 32  # attention lengths: each is a branch of the compiled program
STREAM_STEPS = 16  # stream lengths are this fraction of the longest apart: each is a program of its own
WORTHWHILE = (
    0.98  # of the best cost so far: a shorter stream, which may have to be compiled, must save as much
)


class PackedBatch(flax.struct.PyTreeNode):
    """One mini-batch as per-device streams."""

    tokens: Int32[Array, "G M N"]  # prompt and completion of each sequence, one after another
    positions: Int32[Array, "G M N"]  # from 0 in each sequence
    starts: Int32[Array, "G M S"]  # first token of each sequence
    buckets: Int32[Array, "G M S"]  # index of each sequence's attention length; -1 past the last
    weights: Float32[Array, "G M N"]  # of each completion token in the loss; 0 elsewhere
    advantages: Float32[Array, "G M N"]
    old_logprobs: Float32[Array, "G M N"]  # under the policy before the step; not read when on_policy
    sampler_logprobs: Float32[Array, "G M N"]  # as the sampler gave them
    micro_batches: Int32[Array, " G"]  # streams in use, the rest of M is padding
    on_policy: Bool[Array, " G"]  # the policy is the one that sampled, the ratio is 1 by definition
    response_tokens: Float32[Array, " G"]  # of the whole mini-batch, the sequences left out included
    learning_rate: Float32[Array, " G"]  # of this update
    # Terms that a recipe does not have are absent, and cost nothing; see `Terms`.
    corrections: Float32[Array, "G M N"] | None = None
    ratio_low: Float32[Array, "G M N"] | None = None
    ratio_high: Float32[Array, "G M N"] | None = None
    ref_logprobs: Float32[Array, "G M N"] | None = None
    kl_weights: Float32[Array, "G M N"] | None = None
    entropy_weights: Float32[Array, "G M N"] | None = None


class Terms(NamedTuple):
    """What the objective has besides weights and advantages; None is absent, else one a sequence or one a token."""

    corrections: Values | None = (
        None  # factors of the weights in the policy's term alone; 0 leaves a token out of it
    )
    ratio_low: Values | None = None  # bounds of each token's ratio, in place of the objective's own
    ratio_high: Values | None = None
    ref_logprobs: Values | None = None  # under the reference (nats)
    kl_weights: Values | None = None  # of each token's KL divergence from the reference in the loss
    entropy_weights: Values | None = None  # of each token's entropy, taken off the loss

    def present(self) -> dict[str, Values]:
        """Those that are there, by name."""
        return {name: values for name, values in self._asdict().items() if values is not None}


NO_TERMS = Terms()


@dataclasses.dataclass(frozen=True)
class Layout:
    """What streams may look like; the same for all batches of a run."""

    streams: tuple[int, ...]  # tokens that a stream may hold, ascending; see `stream_lengths`
    buckets: tuple[int, ...]  # attention lengths, ascending, none above streams[0]; see `bucket_lengths`
    segments: int = 64  # S, sequences that a stream may hold
    attention_cost: float = 0.0  # work of attending to one token, in units of a token's work in dense layers


class Place(NamedTuple):
    """Where a sequence lies."""

    device: int
    micro_batch: int
    start: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the sequences of one mini-batch lie."""

    places: dict[int, Place]  # of each sequence that was not left out, by its index
    prompts: Int[np.ndarray, " B"]  # tokens
    responses: Int[np.ndarray, " B"]  # tokens
    shape: tuple[int, int, int]  # G, M, N
    starts: Int32[np.ndarray, "G M S"]
    buckets: Int32[np.ndarray, "G M S"]
    micro_batches: Int32[np.ndarray, " G"]


def bucket_lengths(bucket: int, longest: int) -> tuple[int, ...]:
    """Attention lengths: at most MOST_BUCKETS multiples of `bucket`, evenly spaced; the last just holds `longest`."""
    step = bucket * -(-longest // (MOST_BUCKETS * bucket))
    return (*range(step, longest, step), bucket * -(-longest // bucket))


def stream_lengths(stream: int, longest: int, unit: int) -> tuple[int, ...]:
    """Lengths that a stream may have, so that little of the last one is padding.

    They are multiples of `unit` between half of `stream` and `stream`, at most 9, and all hold `longest`.
    """
    step = unit * -(-stream // (STREAM_STEPS * unit))
    return tuple(n for n in range(stream, 0, -step) if n >= longest and 2 * n >= stream)[::-1]


def place_sequences(lengths: Sequence[int], devices: int, layout: Layout) -> tuple[int, list[Place]]:
    """Places sequences so that the busiest device has the least to compute.

    That is its streams, padding included, and its attention. For each stream length: longest first, to the device with
    the least work so far (LPT, Graham 1969) that has room, there into the stream it fills best; with one stream more a
    device if that does not work out.

    Args:
      lengths: tokens of each sequence.
      devices: G.
      layout: see `Layout`.

    Returns:
      the stream length N, and a place for each sequence.

    Raises:
      ValueError: if a stream cannot hold the longest sequence.
    """
    buckets = np.array(layout.buckets)
    rooms = buckets[np.searchsorted(buckets, lengths)] if len(lengths) else np.zeros(0, int)
    if rooms.max(initial=0) > layout.streams[0]:
        raise ValueError(f"streams of {layout.streams[0]} tokens cannot hold attention over {rooms.max()}")
    attention = layout.attention_cost * rooms.astype(float) ** 2 / 2
    best_cost, best = np.inf, (layout.streams[-1], list[Place]())
    for n in layout.streams[::-1]:
        count = -(-sum(lengths) // (devices * n))
        if count * n + attention.sum() / devices >= WORTHWHILE * best_cost:
            continue  # the least that it could cost
        while (places := _into_streams(lengths, rooms, attention, (devices, count, n), layout)) is None:
            count += 1
        of_device = np.bincount([p.device for p in places], attention, devices)
        cost = count * n + of_device.max(initial=0)
        if cost < WORTHWHILE * best_cost:
            best_cost, best = cost, (n, places)
    return best


def _into_streams(
    lengths: Sequence[int],
    rooms: Int[np.ndarray, " B"],
    attention: Float[np.ndarray, " B"],
    shape: tuple[int, int, int],
    layout: Layout,
) -> list[Place] | None:
    """Places all sequences in streams of this shape [G, M, N], or returns None where they do not fit."""
    devices, count, stream = shape
    places = [Place(0, 0, 0)] * len(lengths)
    # Of each device: its streams with room for a sequence more, as (tokens used, -m) in order, and the least used one's
    open_streams = [[(0, -m) for m in reversed(range(count))] for _ in range(devices)]
    least = np.zeros(devices, int) if count else np.full(devices, stream)
    held = np.zeros((devices, count), int)
    work = np.zeros(devices)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = int(rooms[i])
        possible = least + room <= stream
        if not possible.any():
            return None
        device = int(np.argmin(np.where(possible, work, np.inf)))
        streams = open_streams[device]
        used, m = streams.pop(bisect.bisect_right(streams, (stream - room, 0)) - 1)
        places[i] = Place(device, -m, used)
        held[device, -m] += 1
        work[device] += lengths[i] + attention[i]
        if held[device, -m] < layout.segments:
            bisect.insort(streams, (used + lengths[i], m))
        least[device] = streams[0][0] if streams else stream
    return places


def lay_out(
    prompts: Sequence[int],
    responses: Sequence[int],
    devices: int,
    layout: Layout,
    kept: Sequence[int] | None = None,
    sequences: int = 0,
) -> Placement:
    """Decides where the sequences of a mini-batch lie.

    Args:
      prompts: [B] tokens of each sequence's prompt.
      responses: [B] tokens of each completion.
      devices: G.
      layout: see `Layout`.
      kept: indices of the sequences to place; all where None.
      sequences: those of a whole mini-batch, where this one may lack some.

    Returns:
      a Placement. Its M is what the longest sequences there can be would take, so that a run has a shape for each
      stream length and no more; what is computed depends on `micro_batches`.
    """
    chosen = list(range(len(prompts)) if kept is None else kept)
    lengths = [prompts[i] + responses[i] for i in chosen]
    stream, placed = place_sequences(lengths, devices, layout)
    used = np.zeros(devices, np.int32)
    for place in placed:
        used[place.device] = max(used[place.device], place.micro_batch + 1)
    rows = most_streams(max(sequences, len(prompts)), devices, stream, layout)
    rows = max(rows, int(used.max(initial=1)))
    starts = np.zeros((devices, rows, layout.segments), np.int32)
    buckets = np.full((devices, rows, layout.segments), -1, np.int32)
    filled = np.zeros((devices, rows), int)
    # in the order in which attention visits them
    for place, length in sorted(zip(placed, lengths, strict=True)):
        at = (*place[:2], filled[place[:2]])
        starts[at], buckets[at] = place.start, np.searchsorted(layout.buckets, length)
        filled[place[:2]] += 1
    places = dict(zip(chosen, placed, strict=True))
    shape = (devices, rows, stream)
    return Placement(places, np.array(prompts, int), np.array(responses, int), shape, starts, buckets, used)


def most_streams(sequences: int, devices: int, stream: int, layout: Layout) -> int:
    """M, the streams of a device that the longest sequences would take, in streams of that length."""
    return -(-sequences // (devices * min(layout.segments, stream // layout.buckets[-1])))


def abstract_batch(
    sequences: int,
    stream: int,
    layout: Layout,
    sharding: jax.sharding.NamedSharding,
    terms: Sequence[str] = (),
) -> PackedBatch:
    """Shapes, dtypes and shardings of mini-batches in streams of one length.

    Args:
      sequences: B.
      stream: N, one of the layout's.
      layout: see `Layout`.
      sharding: of all arrays, along G.
      terms: names of the `Terms` that are present.
    """
    devices = sharding.mesh.size
    streams = (devices, most_streams(sequences, devices, stream, layout))

    def array(dtype: type[np.generic], *shape: int) -> Array:
        return cast(Array, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))

    tokens, values = array(np.int32, *streams, stream), array(np.float32, *streams, stream)
    segments = array(np.int32, *streams, layout.segments)
    return PackedBatch(
        tokens=tokens,
        positions=tokens,
        starts=segments,
        buckets=segments,
        weights=values,
        advantages=values,
        old_logprobs=values,
        sampler_logprobs=values,
        micro_batches=array(np.int32, devices),
        on_policy=array(np.bool_, devices),
        response_tokens=array(np.float32, devices),
        learning_rate=array(np.float32, devices),
        **dict.fromkeys(terms, values),
    )


def without_terms(batch: PackedBatch) -> PackedBatch:
    """The batch as log-probabilities are computed of it: with no `Terms`."""
    return batch.replace(**dict.fromkeys(Terms._fields))


def fill(
    placement: Placement,
    values: Values | Sequence[np.ndarray],
    dtype: type[np.generic] = np.float32,
    prompts: bool = False,
) -> Array:
    """Puts values of sequences into streams, [G, M, N] of `dtype`, 0 where nothing lies.

    Args:
      placement: where sequences lie.
      values: [B] one a sequence, for each token of its completion; or B arrays of one a token.
      dtype: of the streams.
      prompts: whether the values are of whole sequences, prompts included, and not of completions alone.
    """
    chex.assert_equal(len(values), len(placement.prompts))
    streams = np.zeros(placement.shape, dtype)
    for i, (device, micro_batch, start) in placement.places.items():
        prompt, end = start + placement.prompts[i], start + placement.prompts[i] + placement.responses[i]
        streams[device, micro_batch, start if prompts else prompt : end] = values[i]
    return streams


def unfill(placement: Placement, streams: Float32[np.ndarray, "G M N"]) -> list[Float32[np.ndarray, " _"]]:
    """The values of each sequence's completion in streams, one a token; the inverse of `fill`.

    Args:
      placement: where sequences lie, none left out.
      streams: values in their places.
    """
    prompts, responses = placement.prompts, placement.responses
    starts = [place.start + prompts[i] for i, place in sorted(placement.places.items())]
    pairs = zip(sorted(placement.places.items()), starts, strict=True)
    return [streams[place.device, place.micro_batch, at : at + responses[i]] for (i, place), at in pairs]


def pack(
    rollouts: Sequence[Rollout],
    advantages: Values,
    devices: int,
    layout: Layout,
    *,
    learning_rate: float,
    weights: Values | None = None,
    old_logprobs: Values | None = None,
    terms: Terms = NO_TERMS,
    on_policy: bool = False,
    skip_zero_advantage: bool = True,
    sequences: int = 0,
    placement: Placement | None = None,
) -> PackedBatch:
    """Packs one mini-batch.

    Args:
      rollouts: B sequences.
      advantages: one a sequence or one a token.
      devices: G.
      layout: see `Layout`.
      learning_rate: of the update.
      weights: of each token of a sequence in the loss (see `sequence_weights`); None gives the token mean.
      old_logprobs: under the policy before the step (nats), where they are known; else 0.
      terms: see `Terms`.
      on_policy: take the ratio as 1 (nothing has been updated since these were sampled).
      skip_zero_advantage: leave out sequences whose loss and gradient are exactly 0, which are those without advantage,
        KL and entropy weight; the averages still count them.
      sequences: see `lay_out`.
      placement: where sequences lie, instead.

    Returns:
      a PackedBatch of NumPy arrays.
    """
    responses = [len(r.tokens) for r in rollouts]
    weights = sequence_weights(np.array(responses), "token_mean", 0) if weights is None else weights
    if placement is None:
        of_loss = [x for x in (advantages, terms.kl_weights, terms.entropy_weights) if x is not None]
        everyone = range(len(rollouts))
        kept = [i for i in everyone if not skip_zero_advantage or any(np.any(x[i]) for x in of_loss)]
        prompts = [len(r.prompt.tokens) for r in rollouts]
        placement = lay_out(prompts, responses, devices, layout, kept, sequences)
    whole = [np.zeros(0, np.int32)] * len(rollouts)
    for i in placement.places:
        whole[i] = np.concatenate([rollouts[i].prompt.tokens, rollouts[i].tokens])
    count = np.arange(max(map(len, whole), default=0))
    return PackedBatch(
        tokens=fill(placement, whole, np.int32, prompts=True),
        positions=fill(placement, [count[: len(ids)] for ids in whole], np.int32, prompts=True),
        starts=placement.starts,
        buckets=placement.buckets,
        weights=fill(placement, weights),
        advantages=fill(placement, advantages),
        old_logprobs=fill(placement, np.zeros(len(rollouts)) if old_logprobs is None else old_logprobs),
        sampler_logprobs=fill(placement, [r.logprobs for r in rollouts]),
        micro_batches=placement.micro_batches,
        on_policy=np.full(devices, on_policy),
        response_tokens=np.full(devices, sum(responses), np.float32),
        learning_rate=np.full(devices, learning_rate, np.float32),
        **{name: fill(placement, values) for name, values in terms.present().items()},
    )
