r"""Hugging Face's math-verify, and its union with DeepScaleR's verifier, which ProRL takes (arXiv 2505.24864, D.1).

The library looks for "final answer is", a box, "answer", any formula, in that order, and compares by sympy. As in verl,
a reference is read as LaTeX, and a response as LaTeX or as plain text. Its own limits are of time, and off; `sandbox`
has limits of work.
"""

from __future__ import annotations

from jaxrl.rewards import sandbox
from jaxrl.rewards.deepscaler import after_thoughts, equivalent
from jaxrl.rewards.latex_equality import last_box, reference
from jaxrl.types import Thoughts

# characters of a response's end: where answers are; all of it is more than a worker may read
TAIL = sandbox.RULES["math_verify"].longest
MOST_BOXES = 8  # in them; the library's expressions take quadratic time, which no budget of calls sees


def math_verify(response: str, ground_truth: str) -> float:
    """+1.0 if the library finds an answer in the response's end that equals `ground_truth`, else -1.0."""
    given, truth = extract(response), reference(ground_truth)
    if truth is None or not given.strip():
        return -1.0
    spelled = given == f"\\boxed{{{truth}}}"  # most right answers, without a worker
    return 1.0 if spelled or sandbox.compare("math_verify", given, truth) else -1.0


def extract(response: str) -> str:
    r"""What the library is given: the end of the response, or the box if nothing else there goes before it.

    So most answers of a group are equal texts, which are compared once.
    """
    end = response[-TAIL:]
    if end.count("\\boxed") > MOST_BOXES:
        end = "\\boxed" + "\\boxed".join(end.split("\\boxed")[-MOST_BOXES:])
    box = last_box(end) if end.count("\\boxed") == 1 and "final answer" not in end.lower() else None
    return end if box is None else f"\\boxed{{{box}}}"


def equivalent_or_math_verify(response: str, ground_truth: str, thoughts: Thoughts = "required") -> float:
    """+1.0 if `equivalent` or `math_verify` says so of what comes after the thoughts, else -1.0."""
    answer = after_thoughts(response, thoughts)
    if answer is None:
        return -1.0
    if equivalent(response, ground_truth, thoughts) > 0:
        return 1.0
    return math_verify(answer, ground_truth)


def same(given: str, truth: str) -> bool:
    """Whether the library finds the reference's value in a text. Call it through `sandbox`, which limits it."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    wanted = parse(f"\\boxed{{{truth}}}", [LatexExtractionConfig()], parsing_timeout=None)
    found = parse(given, [ExprExtractionConfig(), LatexExtractionConfig()], parsing_timeout=None)
    return bool(verify(wanted, found, timeout_seconds=None))
