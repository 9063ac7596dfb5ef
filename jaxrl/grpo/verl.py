"""How verl 0.4 divides a step's sequences, and the weights that follow: `loss.normalization = "verl_dynamic"`.

verl deals all sequences to its ranks, each rank cuts its share into mini-batches, and those into micro-batches of
limited tokens. A micro-batch's loss is the mean over its tokens; micro-batches count by their sequences, and ranks the
same. For R ranks, B sequences of a rank's mini-batch, n_m sequences and T_m response tokens of a micro-batch m,

    L = 1/R sum_r sum_m (n_m / B) (sum of m's token losses) / T_m,   so a token of m weighs n_m / (R B T_m).

All of it is host code over lengths, whatever devices the run has: verl's ranks exist in these weights alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

Part = tuple[int, int, list[tuple[int, int]]]  # sum, count, (index, length) of its items


def divide(
    lengths: Sequence[int], ranks: int, minibatches: int, tokens: int
) -> list[list[list[Int[np.ndarray, " _"]]]]:
    """Divides a step's sequences into micro-batches, by mini-batch and rank.

    Args:
      lengths: tokens of each sequence of a step, prompt included.
      ranks: get equally many sequences.
      minibatches: of each rank's sequences.
      tokens: largest number in a micro-batch.

    Returns:
      indices into `lengths`. Where sequences cannot be dealt evenly, some mini-batches have one less.
    """
    whole = -(-len(lengths) // (ranks * minibatches)) * ranks * minibatches
    shares = partition([*lengths, *[0] * (whole - len(lengths))], ranks, equal=True)
    size = whole // (ranks * minibatches)
    found = []
    for first in range(0, size * minibatches, size):
        own = [[i for i in share[first : first + size] if i < len(lengths)] for share in shares]
        totals = [sum(lengths[i] for i in rank) for rank in own]
        count = max(1, max(min(len(rank), -(-t // tokens)) for rank, t in zip(own, totals, strict=True)))
        parts = [partition([lengths[i] for i in rank], count) for rank in own]
        micro_batches = zip((np.array(rank, int) for rank in own), parts, strict=True)
        found.append([[rank[part] for part in of_rank] for rank, of_rank in micro_batches])
    return found


def weights(
    micro_batches: list[list[Int[np.ndarray, " _"]]], response: Int[np.ndarray, " S"]
) -> tuple[Int[np.ndarray, " B"], Float64[np.ndarray, " B"]]:
    """The sequences of a mini-batch and the weight of each one's tokens, by rank and micro-batch.

    Args:
      micro_batches: one mini-batch of `divide`.
      response: response tokens of all sequences of the step.
    """
    sequences = max(sum(map(len, rank)) for rank in micro_batches)
    parts = [part for rank in micro_batches for part in rank if len(part)]
    scale = [len(part) / (len(micro_batches) * sequences * max(response[part].sum(), 1)) for part in parts]
    return np.concatenate(parts), np.repeat(scale, [len(part) for part in parts])


def partition(lengths: Sequence[int], parts: int, equal: bool = False) -> list[list[int]]:
    """Divides indices into sets of about equal sums, by the largest differencing method (Karmarkar and Karp, 1982).

    Ties are broken as in verl, so the sets are the same.

    Args:
      lengths: to be summed.
      parts: number of sets.
      equal: whether all sets have the same size; `parts` then divides the number of lengths.
    """
    ascending = sorted((n, i) for i, n in enumerate(lengths))
    step = parts if equal else 1
    heap = [
        _State([(i, n) for n, i in ascending[at : at + step]], parts) for at in range(0, len(ascending), step)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        first.merge(second)
        heapq.heappush(heap, first)
    return [sorted(i for i, _ in items) for _, _, items in heap[0].parts] if heap else [[]] * parts


class _State:
    """A partition of some of the items. The one with the largest spread sorts first."""

    def __init__(self, items: list[tuple[int, int]], count: int) -> None:
        single: list[Part] = [(n, 1, [(i, n)]) for i, n in items]
        self.parts = sorted([*single, *[(0, 0, [])] * (count - len(items))], reverse=True)

    def __lt__(self, other: _State) -> bool:
        if self.spread != other.spread:
            return self.spread > other.spread
        return self.parts[0] > other.parts[0]

    @property
    def spread(self) -> int:
        return self.parts[0][0] - self.parts[-1][0]

    def merge(self, other: _State) -> None:
        """Joins the largest set of one with the smallest of the other, and so on."""
        pairs = zip(self.parts, reversed(other.parts), strict=True)
        self.parts = sorted(((a + c, b + d, x + y) for (a, b, x), (c, d, y) in pairs), reverse=True)
