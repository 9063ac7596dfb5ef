r"""The rule stage of JustRL's benchmark grader: the last box of a response against the reference answer."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from jaxrl.rewards import sandbox
from jaxrl.rewards.latex_equality import last_box, reference, same_spelling


def grade(response: str, ground_truth: str) -> bool:
    r"""Whether the last `\boxed{}` of the response, thoughts included, is equivalent to `ground_truth`.

    What that means is in docs/grading.md. Quick on any text: what a comparison may cost is limited.
    """
    return _grade(response, ground_truth, sandbox.WALL_SECONDS)


def _grade(response: str, ground_truth: str, timeout: float) -> bool:
    answer, truth = last_box(response), reference(ground_truth)
    if answer is None or truth is None or not ground_truth:
        return False
    return same_spelling(answer, truth) or sandbox.same_value(answer, truth, timeout)


def grade_many(
    pairs: Iterable[tuple[str, str]], *, workers: int | None = None, timeout: float = sandbox.WALL_SECONDS
) -> list[bool]:
    """`grade` of each (response, ground_truth), by `workers` processes (default: one for each core).

    A comparison that its process has not answered after `timeout` seconds is False, and so is one that ends it.
    """
    with ThreadPoolExecutor(workers or os.cpu_count()) as threads:  # each waits for a process of its own
        return list(threads.map(lambda pair: _grade(pair[0], pair[1], timeout), pairs))
