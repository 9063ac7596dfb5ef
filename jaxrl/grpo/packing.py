"""From rollouts to streams: which token of which sequence lies where, on which device.

All of it is NumPy on the host, a pure function of the rollouts. Each device gets its own streams `[M, N]`; what
becomes of a sequence (its weight, its advantage) is data in those streams, so the way they are cut changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from jaxrl.grpo.advantages import sequence_weights
from jaxrl.sampling.sampler import Rollout


@flax.struct.dataclass
class PackedBatch:
    """One mini-batch as per-device streams. G devices, M micro-batches, N tokens, S segments."""

    tokens: Any  # [G, M, N] int32: prompt and completion of each segment, one after another
    positions: Any  # [G, M, N] int32: from 0 in each segment
    starts: Any  # [G, M, S] int32: first token of each segment
    buckets: Any  # [G, M, S] int32: attention length of each segment; -1 past the last
    weights: Any  # [G, M, N] float32: of each completion token in the loss; 0 elsewhere
    advantages: Any  # [G, M, N] float32
    old_logprobs: Any  # [G, M, N] float32: under the policy before the step; not read when on_policy
    sampler_logprobs: Any  # [G, M, N] float32: as the sampler gave them
    micro_batches: Any  # [G] int32: streams in use, the rest of M is padding
    on_policy: Any  # [G] bool: the weights are the ones that sampled, the ratio is 1 by definition
    response_tokens: Any  # [G] float32: of the whole mini-batch, the sequences left out included


class Place(NamedTuple):
    device: int
    micro_batch: int
    start: int


def bucket_lengths(bucket: int, longest: int) -> tuple[int, ...]:
    """Attention lengths: at most 32 multiples of `bucket`, evenly spaced; the last just holds `longest`."""
    step = bucket * -(-longest // (32 * bucket))
    return (*range(step, longest, step), bucket * -(-longest // bucket))


def stream_lengths(stream: int, longest: int, unit: int) -> tuple[int, ...]:
    """What a stream may measure, so that little of the last one is padding: at most 9 multiples of `unit`.

    They lie between half of `stream` and `stream`, and all hold `longest`.
    """
    step = unit * -(-stream // (16 * unit))
    return tuple(n for n in range(stream, 0, -step) if n >= longest and 2 * n >= stream)[::-1]


def plan(
    lengths: Sequence[int],
    devices: int,
    streams: tuple[int, ...],
    segments: int,
    buckets: tuple[int, ...],
    attention_cost: float,
) -> tuple[int, list[Place]]:
    """Places sequences so that the busiest device has the least to compute.

    That is its streams, padding included, and its attention. For each stream length: longest first, to the device with
    the least work so far (LPT, Graham 1969) that has room, there into the stream it fills best; with one stream more a
    device if that does not work out.

    Args:
      lengths: tokens of each sequence.
      devices: G.
      streams: tokens that a stream may hold, ascending.
      segments: S, sequences that a stream may hold.
      buckets: attention lengths; the last is at most streams[0].
      attention_cost: work of attending to one token, in units of the work of one token's dense layers.

    Returns:
      the stream length N, and a place for each sequence.
    """
    rooms = np.array(buckets)[np.searchsorted(buckets, lengths)] if len(lengths) else np.zeros(0, int)
    if rooms.max(initial=0) > streams[0]:
        raise ValueError(f"streams of {streams[0]} tokens cannot hold attention over {rooms.max()}")
    attention = attention_cost * rooms.astype(float) ** 2 / 2
    best_cost, best = np.inf, (streams[-1], list[Place]())
    for n in streams[::-1]:
        count = -(-sum(lengths) // (devices * n))
        while (places := _fill(lengths, rooms, attention, devices, n, count, segments)) is None:
            count += 1
        of_device = np.bincount([p.device for p in places], attention, devices)
        cost = count * n + of_device.max(initial=0)
        if cost < 0.98 * best_cost:  # a shorter stream, which may have to be compiled, must be worth it
            best_cost, best = cost, (n, places)
    return best


def _fill(
    lengths: Sequence[int],
    rooms: np.ndarray,
    attention: np.ndarray,
    devices: int,
    stream: int,
    count: int,
    segments: int,
) -> list[Place] | None:
    """Places all sequences in `count` streams a device, or says that they do not fit."""
    places = [Place(0, 0, 0)] * len(lengths)
    used = np.zeros((devices, count), int)
    held = np.zeros((devices, count), int)
    work = np.zeros(devices)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = (used + rooms[i] <= stream) & (held < segments)
        possible = fits.any(axis=1)
        if not possible.any():
            return None
        device = int(np.argmin(np.where(possible, work, np.inf)))
        m = int(np.argmax(np.where(fits[device], used[device], -1)))
        places[i] = Place(device, m, int(used[device, m]))
        used[device, m] += lengths[i]
        held[device, m] += 1
        work[device] += lengths[i] + attention[i]
    return places


def pack(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    *,
    devices: int,
    streams: tuple[int, ...],
    buckets: tuple[int, ...],
    weights: np.ndarray | None = None,
    segments: int = 64,
    attention_cost: float = 0.0,
    on_policy: bool = False,
    skip_zero_advantage: bool = True,
) -> PackedBatch:
    """Packs one mini-batch.

    Args:
      rollouts: B sequences.
      advantages: [B] float32, one a sequence.
      devices, streams, segments, buckets, attention_cost: see `plan`.
      weights: [B] of each token of a sequence in the loss (see `sequence_weights`); None gives the token mean.
      on_policy: take the ratio as 1 (nothing has been updated since these were sampled).
      skip_zero_advantage: leave out sequences whose loss and gradient are exactly 0; the averages still count them.

    Returns:
      a PackedBatch of NumPy arrays. M is what the longest sequences there can be would take, so that a run has a shape
      for each stream length and no more; what is computed depends on `micro_batches`.
    """
    response = np.array([len(r.tokens) for r in rollouts])
    weights = sequence_weights(response, "token_mean", 0) if weights is None else weights
    kept = [i for i in range(len(rollouts)) if advantages[i] != 0 or not skip_zero_advantage]
    lengths = [len(rollouts[i].prompt.tokens) + len(rollouts[i].tokens) for i in kept]
    stream, places = plan(lengths, devices, streams, segments, buckets, attention_cost)
    used = np.zeros(devices, np.int32)
    for place in places:
        used[place.device] = max(used[place.device], place.micro_batch + 1)
    most = -(-len(rollouts) // (devices * min(segments, stream // buckets[-1])))
    rows = max(most, int(used.max(initial=1)))

    def grid(dtype: Any, *shape: int, fill: int = 0) -> np.ndarray:
        return np.full((devices, rows, *shape), fill, dtype)

    batch = PackedBatch(
        tokens=grid(np.int32, stream),
        positions=grid(np.int32, stream),
        starts=grid(np.int32, segments),
        buckets=grid(np.int32, segments, fill=-1),
        weights=grid(np.float32, stream),
        advantages=grid(np.float32, stream),
        old_logprobs=grid(np.float32, stream),
        sampler_logprobs=grid(np.float32, stream),
        micro_batches=used,
        on_policy=np.full(devices, on_policy),
        response_tokens=np.full(devices, response.sum(), np.float32),
    )
    filled = np.zeros((devices, rows), np.int32)
    for (device, row, start), i, length in sorted(zip(places, kept, lengths, strict=True)):
        rollout, at = rollouts[i], (device, row)  # in order of start, as attention goes through them
        whole = slice(start, start + length)
        completion = slice(start + len(rollout.prompt.tokens), start + length)
        batch.tokens[at][whole] = np.concatenate([rollout.prompt.tokens, rollout.tokens])
        batch.positions[at][whole] = np.arange(length)
        batch.starts[at][filled[at]] = start
        batch.buckets[at][filled[at]] = np.searchsorted(buckets, length)
        batch.weights[at][completion] = weights[i]
        batch.advantages[at][completion] = advantages[i]
        batch.sampler_logprobs[at][completion] = rollout.logprobs
        filled[at] += 1
    return batch
