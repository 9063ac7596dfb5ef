"""math-verify in the sandbox says what the library says; rules of thoughts; and either of two verifiers."""

from __future__ import annotations

import random
import time

import pytest

from jaxrl.rewards import VERIFIERS, equivalent, equivalent_or_math_verify, math_verify, sandbox, verifier_of
from jaxrl.rewards.deepscaler import after_thoughts
from jaxrl.rewards.math_verify import TAIL
from jaxrl.types import Thoughts

WORK = "First $x^2 - 4 = 0$ is solved, (as usual) on $[0, \\infty)$. "
RESPONSES = [
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
    (r"\boxed{50\%}", "0.5", True),
    (r"\boxed{x = 5}", "5", True),
    (r"\boxed{5}", "6", False),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}", True),
    (r"\boxed{(1, 2)}", "(2, 1)", False),
    (r"\boxed{[1, 2)}", "[1,2)", True),
    (r"\boxed{[1, 2]}", "[1,2)", False),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", True),
    (r"\boxed{10\text{ cm}}", "10", True),
    (r"\boxed{\text{even}}", r"\text{even}", True),
    (r"\boxed{1,000}", "1000", True),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
    (r"\boxed{1} and \boxed{2}", "1, 2", True),
    (r"\boxed{1} or else, \boxed{2}", "2", False),
    ("The final answer is $7$. I hope it is correct. \\boxed{8}", "7", True),
    ("The answer is 5", "5", True),
    ("so it is 7/2", "3.5", True),
    ("no number at all", "3", False),
    (r"\boxed{", "3", False),
    ("", "3", False),
    (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", True),
    (r"\boxed{y = 2x + 3}", "y=3+2x", True),
]


def by_library(response: str, truth: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    wanted = parse(f"\\boxed{{{truth}}}", [LatexExtractionConfig()])
    return verify(wanted, parse(response, [ExprExtractionConfig(), LatexExtractionConfig()]))


@pytest.mark.parametrize(("response", "truth", "right"), RESPONSES)
@pytest.mark.parametrize("before", ["", WORK * 3, WORK * 100])
def test_it_says_what_the_library_says_of_the_whole(
    before: str, response: str, truth: str, right: bool
) -> None:
    found = math_verify(before + response, truth) == 1.0
    assert found == by_library(before + response, truth)
    assert not response or found == right or before  # alone it is as in the table


def test_an_answer_of_its_own_spelling_is_right_for_the_library_too() -> None:
    """Such answers are not sent to a worker."""
    for _, truth, _ in RESPONSES:
        assert by_library(f"\\boxed{{{truth}}}", truth), truth


def test_it_is_quick_and_never_raises_on_any_text() -> None:
    rng = random.Random(0)
    pieces = [
        "\\boxed{",
        "}",
        "}",
        "$",
        "\\frac",
        "final answer is ",
        "answer",
        ":",
        "1",
        "^",
        "9" * 40,
        "\\(",
    ]
    texts = ["".join(rng.choices([*pieces, "]", ", and"], k=400)) for _ in range(20)]
    texts += ["$" * 5000, "\\boxed{" * 3000, "final answer " * 3000, "9^" * 900 + "9", "1,and" * 999]
    texts += ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{10000!!!}"]
    sandbox.forget()
    start = time.perf_counter()
    assert {math_verify(text, "7.5") for text in texts} == {-1.0}
    assert time.perf_counter() - start < 200


def test_what_a_response_says_before_its_end_does_not_count() -> None:
    assert math_verify("\\boxed{5}" + "x " * TAIL, "5") == -1.0


THOUGHTS: dict[str, dict[Thoughts, str | None]] = {
    "<think>a</think>b": {"required": "b", "closed": "b", "optional": "b"},
    "a</think>b": {"required": None, "closed": "b", "optional": "b"},
    "a</think>b</think>c": {"required": None, "closed": "b", "optional": "b"},
    "<think>a</think>b</think>c": {"required": "b", "closed": "b", "optional": "b"},
    "<think>a": {"required": None, "closed": None, "optional": "<think>a"},
    "a": {"required": None, "closed": None, "optional": "a"},
}


@pytest.mark.parametrize("response", THOUGHTS)
def test_rules_of_thoughts(response: str) -> None:
    for rule, expected in THOUGHTS[response].items():
        assert after_thoughts(response, rule) == expected, rule
        boxed = response.replace("b", "\\boxed{7}").replace("a", "\\boxed{8}").replace("c", "\\boxed{9}")
        for truth in ("7", "8", "9"):
            right = expected is not None and {"7": "b", "8": "a", "9": "c"}[truth] in expected
            for name in ("equivalent", "equivalent_or_math_verify"):
                assert (verifier_of(name, rule)(boxed, truth) > 0) == right, (name, rule, truth)


def test_either_verifier_is_enough() -> None:
    tagged = "<think></think>"
    only_theirs, only_ours = ("\\boxed{10^{3}}", "1000"), ("\\boxed{x^2}", "x**2")
    for (text, truth), verdicts in ((only_theirs, (-1.0, 1.0)), (only_ours, (1.0, -1.0))):
        assert (equivalent(tagged + text, truth), math_verify(text, truth)) == verdicts
        assert equivalent_or_math_verify(tagged + text, truth) == 1.0
        assert equivalent_or_math_verify(text, truth) == -1.0  # badly formatted
    assert equivalent_or_math_verify(tagged + "\\boxed{3}", "4") == -1.0
    assert VERIFIERS["equivalent_or_math_verify"] is equivalent_or_math_verify
