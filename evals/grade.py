r"""The rule stage of JustRL's benchmark grader: the last box of a response against the reference answer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from jaxrl.rewards import sandbox
from jaxrl.rewards.latex_equality import last_box, reference, same_spelling


def grade(response: str, ground_truth: str) -> bool:
    r"""Whether the last `\boxed{}` of the response, thoughts included, is equivalent to `ground_truth`.

    docs/grading.md defines that. It is quick on any text, because the cost of a comparison is limited.
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
    """Grades each (response, ground_truth) as `grade` does, in parallel.

    Args:
      pairs: responses and their ground truths.
      workers: child processes; one for each core by default.
      timeout: seconds; a comparison that takes longer is False, and so is one that crashes its process.
    """

    def graded(pair: tuple[str, str]) -> bool:
        return _grade(*pair, timeout)

    with ThreadPoolExecutor(workers or os.cpu_count()) as threads:  # each waits for a process of its own
        return list(threads.map(graded, pairs))
