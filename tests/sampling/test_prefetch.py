"""Batches that are sampled early."""

from __future__ import annotations

import threading

import pytest

from jaxrl.sampling.prefetch import Prefetch


def test_at_no_distance_a_batch_is_sampled_when_it_is_taken_and_where() -> None:
    threads = []

    def sample(step: int) -> int:
        threads.append(threading.current_thread())
        return step

    batches = Prefetch(sample, 3, 6, 0)
    assert [batches.take(step).value for step in (3, 4, 5)] == [3, 4, 5]
    assert set(threads) == {threading.main_thread()}


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_weights_are_never_older_than_the_distance_allows(distance: int) -> None:
    """The "weights" are the number of updates; a batch carries the number that it was sampled with."""
    updates, first, last = 4, 4, 12
    batches = Prefetch(lambda step: (step, updates), first, last, distance)
    for step in range(first, last):
        asked, version = batches.take(step).value
        assert asked == step and step - distance <= version <= step
        updates += 1
    batches.close()


def test_the_next_batch_is_under_way_while_one_is_worked_on() -> None:
    begun = {step: threading.Event() for step in range(4)}
    goes_on = threading.Event()

    def sample(step: int) -> int:
        begun[step].set()
        assert step == 0 or goes_on.wait(10)
        return step

    batches = Prefetch(sample, 0, 4, 1)
    assert batches.take(0).value == 0
    assert begun[1].wait(10) and not begun[2].is_set()
    goes_on.set()
    assert batches.take(1).value == 1
    assert [batches.take(step).value for step in (2, 3)] == [2, 3]  # and none after the last
    batches.close()


def test_a_failure_reaches_whoever_takes_the_batch() -> None:
    def sample(step: int) -> int:
        if step == 1:
            raise ValueError("no servers")
        return step

    batches = Prefetch(sample, 0, 3, 1)
    batches.take(0)
    with pytest.raises(ValueError, match="no servers"):
        batches.take(1)
    batches.close()
