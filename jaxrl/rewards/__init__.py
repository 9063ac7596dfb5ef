"""Verifiers: functions that mark a response as right or wrong.

A verifier is `(response, ground_truth) -> +1.0 | -1.0`. It gets decoded text without special tokens, is pure, never
raises on any text, and is quick on adversarial text: it runs inline, between sampling and the update, on whatever a
policy has found to write.

`WINNING` has the form in which each verifier looks for an answer, for checks that an answer can be matched at all.

A recipe's own functions are another matter: functions.py calls them in processes, where worker.py is.

To add a verifier, write a module here with the function and an `extract(response)` that returns the answer it compares
(for reading rollouts). Add its name to `Verifier` in `jaxrl/types.py` and the function to `VERIFIERS`, with its form in
`WINNING`; recipes choose by that name. The functions shadow their modules as attributes of this package, so import
other names by `from jaxrl.rewards.minerva import extract`. Keep imports light: samplers mark rollouts without JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

from jaxrl.rewards.corrected import corrected
from jaxrl.rewards.deepscaler import equivalent
from jaxrl.rewards.math_verify import equivalent_or_math_verify, math_verify
from jaxrl.rewards.minerva import minerva
from jaxrl.rewards.strict_boxed import strict_boxed
from jaxrl.types import ByThoughts, Thoughts, Verifier

VERIFIERS: dict[Verifier, Callable[..., float]] = {
    "strict_boxed": strict_boxed,
    "minerva": minerva,
    "equivalent": equivalent,
    "corrected": corrected,
    "math_verify": math_verify,
    "equivalent_or_math_verify": equivalent_or_math_verify,
}

ANSWER = "<answer>"
WINNING: dict[Verifier, str] = {
    "strict_boxed": f"\\boxed{{{ANSWER}}}",
    "minerva": f"Answer: {ANSWER}",
    "equivalent": f"<think></think>\\boxed{{{ANSWER}}}",
    "corrected": f"\\boxed{{{ANSWER}}}",
    "math_verify": f"\\boxed{{{ANSWER}}}",
    "equivalent_or_math_verify": f"<think></think>\\boxed{{{ANSWER}}}",
}

__all__ = [
    "VERIFIERS",
    "WINNING",
    "can_win",
    "corrected",
    "equivalent",
    "equivalent_or_math_verify",
    "math_verify",
    "minerva",
    "strict_boxed",
    "verifier_of",
    "winning",
]


def verifier_of(name: Verifier, thoughts: Thoughts) -> Callable[[str, str], float]:
    """A verifier by its name, with the recipe's rule of thoughts where it has one."""
    if name not in get_args(ByThoughts):
        return VERIFIERS[name]
    return functools.partial(VERIFIERS[name], thoughts=thoughts)


def winning(verifier: Verifier, answer: str) -> str:
    """The shortest response that gives `answer` in the form in which the verifier looks for it."""
    return WINNING[verifier].replace(ANSWER, answer)


def can_win(verifier: Verifier, answer: str) -> bool:
    """True if a response that gives exactly `answer` scores +1, and one that gives an empty answer does not.

    A verifier that has no form in `WINNING` is trusted.
    """
    if verifier not in WINNING:
        return True
    mark = VERIFIERS[verifier]
    if mark(winning(verifier, answer), answer) < 0:
        return False
    # No verifier normalizes a digit away that is behind the last "=", and `equivalent` takes milliseconds.
    return any(map(str.isdigit, answer.rpartition("=")[2])) or mark(winning(verifier, ""), answer) < 0
