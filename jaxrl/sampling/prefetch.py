"""Batches that are sampled while the trainer works on earlier ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Sampled(NamedTuple, Generic[T]):
    """A batch, and when it was sampled."""

    value: T
    began: float  # time.monotonic()
    ended: float  # time.monotonic()


class Prefetch(Generic[T]):
    """Samples the batches of steps one after another, each up to `distance` steps before it is taken.

    With distance 0 a batch is sampled when it is taken, in the caller's thread.
    """

    def __init__(self, sample: Callable[[int], T], first: int, last: int, distance: int) -> None:
        """
        Args:
          sample: returns the batch of a step.
          first: the first step.
          last: the step before which batches end.
          distance: steps that may be sampled ahead.
        """
        self._sample, self._next, self._last, self._distance = sample, first, last, distance
        self._under_way: deque[Future[Sampled[T]]] = deque()
        self._pool = ThreadPoolExecutor(1, "prefetch")

    def take(self, step: int) -> Sampled[T]:
        """Returns the batch of `step` (call in order) and starts sampling the next ones."""
        if not self._distance:
            return self._timed(step)
        self._start_until(step)
        result = self._under_way.popleft().result()
        self._start_until(step + self._distance)  # by model weights that are no older than this step's
        return result

    def close(self) -> None:
        """Cancels what has not begun; does not wait for the batch under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start_until(self, step: int) -> None:
        while self._next <= min(step, self._last - 1):
            self._under_way.append(self._pool.submit(self._timed, self._next))
            self._next += 1

    def _timed(self, step: int) -> Sampled[T]:
        began = time.monotonic()
        return Sampled(self._sample(step), began, time.monotonic())
