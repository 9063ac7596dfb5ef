from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import grade
from evals.grade import grade_many
from jaxrl.rewards import sandbox


@pytest.mark.parametrize(
    ("response", "ground_truth"),
    [
        (r"so \boxed{33}", "033"),
        (r"\boxed{33}", r"\boxed{033}"),  # AIME 2024's answers come in a box
        (r"<think>\boxed{34}", "34"),  # a thought that never ends
        (r"\boxed{33} no, \boxed{34}", "34"),
        (r"\boxed{1/2}", "0.5"),
        (r"\boxed{\dfrac{1}{2}}", "0.50"),
        (r"\boxed{1.6 \text{ cm}}", "1.6"),
        (r"\boxed{x=5}", "5"),
        (r"\boxed{$(3, \frac{\pi}{2})$}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$"),
        (r"\boxed{q - p + 0}", "-p+q"),
        (r"\boxed{4.5e33}", "4.5e33"),
        (r"\boxed{\text{evelyn}}", r"\text{Evelyn}"),
    ],
)
def test_equivalent_answers_are_right(response: str, ground_truth: str) -> None:
    assert grade(response, ground_truth) is True


@pytest.mark.parametrize(
    ("response", "ground_truth"),
    [
        (r"\boxed{2/4}", "1/2"),
        (r"\boxed{1,2}", "2,1"),
        (r"\boxed{(1,2)}", "[1,2]"),
        (r"\boxed{2^{10}}", "1024"),
        (r"\boxed 5", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{5} \boxed{", "5"),
        ("5", "5"),
        ("", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{5}", r"\boxed{5"),
    ],
)
def test_other_answers_are_wrong(response: str, ground_truth: str) -> None:
    assert grade(response, ground_truth) is False


def test_many_keep_their_order_whatever_is_among_them() -> None:
    hard = [
        (r"\boxed{9**9**9}", "x+1"),
        (r"\boxed{(((1+1/10**15)**300)**300)**300}", "1.5"),  # takes its process with it
        ("\\boxed{" + "{" * 100_000, "1"),
        ("\\boxed" + "{" * 50_000 + "}" * 50_000, "1"),
        ("\\boxed{" + r"\sqrt[" * 11 + "]" * 11 + "}", "x"),
        ("\\boxed{\0\ud800é}", "√2"),
    ]
    easy = [(rf"\boxed{{x+{n}}}", f"{n + n % 2}+x") for n in range(60)]
    start = time.perf_counter()
    pairs = [*easy[:30], *hard, *easy[30:]]
    assert grade_many(pairs, workers=2) == [
        *(n % 2 == 0 for n in range(30)),
        *[False] * len(hard),
        *(n % 2 == 0 for n in range(30, 60)),
    ]
    assert time.perf_counter() - start < 20.0
    assert grade_many([], workers=2) == []


def test_too_much_work_is_undecided_and_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "BUDGET", 50_000)
    sandbox.forget()
    pairs = [(r"\boxed{x+x}", "2x"), (r"\boxed{x+x}", "3x"), (r"\boxed{(x+y)(x-y)}", "x^2-y^2"), ("", "2")]
    assert grade_many(pairs) == [True, False, None, False]
    assert grade(*pairs[2]) is False
    monkeypatch.undo()
    sandbox.forget()
    assert grade_many(pairs) == [True, False, True, False]


def test_the_rules_are_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []
    monkeypatch.setattr(sandbox, "compare", lambda *question: asked.append(question))
    assert grade_many([(r"\boxed{1/2}", r"\boxed{0.5}")], "corrected") == [None]
    assert asked == [("corrected", "1/2", "0.5")]  # the released spelling counts for the released rules only
    assert grade_many([(r"\boxed{1/2}", "0.5")]) == [True]
    assert len(asked) == 1


@settings(deadline=5000)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_gets_a_bool(answer: str, ground_truth: str) -> None:
    assert grade(f"\\boxed{{{answer}}}", ground_truth) in (True, False)
    assert grade(answer, ground_truth) is False or r"\boxed{" in answer


def test_import_is_light() -> None:
    code = "import sys, evals; sys.exit(bool({'jax', 'numpy', 'sympy', 'pylatexenc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
