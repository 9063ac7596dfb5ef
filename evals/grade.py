r"""The rule stage of JustRL's benchmark grader: the last box of a response against the reference answer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from jaxrl.rewards import sandbox
from jaxrl.rewards.latex_equality import last_box, reference, same_spelling
from jaxrl.types import Rules


def grade(response: str, ground_truth: str, rules: Rules = "released") -> bool:
    r"""Whether the last `\boxed{}` of the response, thoughts included, is equivalent to `ground_truth`.

    docs/grading.md defines that. It is quick on any text, because the work of a comparison is limited; one beyond the
    limit is False.
    """
    return bool(_decide(response, ground_truth, rules))


def grade_many(
    pairs: Iterable[tuple[str, str]], rules: Rules = "released", *, workers: int | None = None
) -> list[bool | None]:
    """Grades each (response, ground_truth) as `grade` does, in parallel; None is what is too much work to decide.

    Args:
      pairs: responses and their ground truths.
      rules: by which answers are equivalent.
      workers: child processes; one for each core by default.
    """

    def decided(pair: tuple[str, str]) -> bool | None:
        return _decide(*pair, rules)

    with ThreadPoolExecutor(workers or os.cpu_count()) as threads:  # each waits for a process of its own
        return list(threads.map(decided, pairs))


def undecided_note(count: int) -> str:
    """A line for people on the responses that `grade_many` left undecided."""
    return f"{count:,} responses are undecided (too much work to compare) and count as wrong"


def _decide(response: str, ground_truth: str, rules: Rules) -> bool | None:
    answer, truth = last_box(response), reference(ground_truth)
    if answer is None or truth is None or not ground_truth:
        return False
    if rules == "released" and same_spelling(answer, truth):
        return True
    return sandbox.compare(rules, answer, truth)
