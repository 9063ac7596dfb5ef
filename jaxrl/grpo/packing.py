"""From rollouts to streams: which token of which sequence lies where, on which device.

All of it is NumPy on the host, a pure function of the rollouts. Each device gets its own streams `[M, N]`; what
becomes of a sequence (its weight, its advantage) is data in those streams, so the way they are cut changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from jaxrl.grpo.advantages import Normalization, sequence_weights
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
    """Attention lengths: the multiples of `bucket` up to `longest`, at most 32 of them."""
    step = bucket * -(-longest // (32 * bucket))
    return tuple(range(step, longest + step, step))


def plan(
    lengths: Sequence[int], devices: int, stream: int, buckets: tuple[int, ...], attention_cost: float
) -> list[Place]:
    """Places sequences so that devices cost the same and streams are few.

    Longest first, each to the device with the least work so far (LPT, Graham 1969); on a device, into the first
    stream whose rest holds the sequence's attention bucket.

    Args:
      lengths: tokens of each sequence.
      devices: G.
      stream: N, tokens a stream holds.
      buckets: attention lengths; the last is at most `stream`.
      attention_cost: work of attending to one token, in units of the work of one token's dense layers.
    """
    places: list[Place | None] = [None] * len(lengths)
    work = np.zeros(devices)
    used: list[list[int]] = [[] for _ in range(devices)]  # tokens in each stream of each device
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        room = buckets[np.searchsorted(buckets, length)]
        device = int(np.argmin(work))
        work[device] += length + attention_cost * room * room / 2
        streams = used[device]
        fits = next((m for m, n in enumerate(streams) if n + room <= stream), len(streams))
        if fits == len(streams):
            streams.append(0)
        places[i] = Place(device, fits, streams[fits])
        streams[fits] += length
    return [place for place in places if place is not None]


def pack(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    *,
    devices: int,
    stream: int,
    buckets: tuple[int, ...],
    normalization: Normalization,
    max_tokens: int,
    attention_cost: float = 0.0,
    on_policy: bool = False,
    skip_zero_advantage: bool = True,
) -> PackedBatch:
    """Packs one mini-batch.

    Args:
      rollouts: B sequences.
      advantages: [B] float32, one a sequence.
      devices, stream, buckets, attention_cost: see `plan`.
      normalization, max_tokens: how token losses are averaged, over all B sequences (see `token_weights`).
      on_policy: take the ratio as 1 (nothing has been updated since these were sampled).
      skip_zero_advantage: leave out sequences whose loss and gradient are exactly 0; the averages still count them.

    Returns:
      a PackedBatch of NumPy arrays. M is B / G, which holds the longest sequences there can be, so that a run has
      one shape; what is computed depends on `micro_batches`.
    """
    response = np.array([len(r.tokens) for r in rollouts])
    weight = sequence_weights(response, normalization, max_tokens)
    kept = [i for i in range(len(rollouts)) if advantages[i] != 0 or not skip_zero_advantage]
    lengths = [len(rollouts[i].prompt.tokens) + len(rollouts[i].tokens) for i in kept]
    places = plan(lengths, devices, stream, buckets, attention_cost)
    used = np.zeros(devices, np.int32)
    for place in places:
        used[place.device] = max(used[place.device], place.micro_batch + 1)
    rows = max(-(-len(rollouts) // devices), int(used.max(initial=1)))
    segments = stream // 2  # a segment has a prompt token and a completion token at least

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
        batch.weights[at][completion] = weight[i]
        batch.advantages[at][completion] = advantages[i]
        batch.sampler_logprobs[at][completion] = rollout.logprobs
        filled[at] += 1
    return batch
