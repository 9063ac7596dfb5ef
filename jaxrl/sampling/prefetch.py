"""Batches that are sampled while the trainer works on earlier ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Sampled(NamedTuple, Generic[T]):
    value: T
    began: float  # time.monotonic()
    ended: float


class Prefetch(Generic[T]):
    """Asks for the batches of steps one after another, each up to `distance` steps before it is taken.

    With distance 0 a batch is sampled when it is taken, in the caller's thread.
    """

    def __init__(self, ask: Callable[[int], T], first: int, last: int, distance: int):
        """Args: first, last: the steps are first, ..., last - 1."""
        self._ask, self._next, self._last, self._distance = ask, first, last, distance
        self._under_way: deque[Future[Sampled[T]]] = deque()
        self._pool = ThreadPoolExecutor(1, "ahead")

    def take(self, step: int) -> Sampled[T]:
        """Those of `step`, which are asked for in order; before it returns, the next ones are under way."""
        if not self._distance:
            return self._sample(step)
        self._ask_until(step)
        result = self._under_way.popleft().result()
        self._ask_until(step + self._distance)  # with weights that are no older than this step's
        return result

    def close(self) -> None:
        """Does not wait for what is under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask_until(self, step: int) -> None:
        while self._next <= min(step, self._last - 1):
            self._under_way.append(self._pool.submit(self._sample, self._next))
            self._next += 1

    def _sample(self, step: int) -> Sampled[T]:
        began = time.monotonic()
        return Sampled(self._ask(step), began, time.monotonic())
