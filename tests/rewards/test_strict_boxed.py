from __future__ import annotations

import string
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.rewards import VERIFIERS, strict_boxed
from jaxrl.rewards.strict_boxed import extract
from jaxrl.types import Verifier

BOX34 = r"\boxed{34}"  # 10 characters
# Any text, and text dense in the few pieces that matter to the verifier.
TEXTS = st.text() | st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\", "34", " ", "é", "\0"])).map("".join)


@pytest.mark.parametrize(
    ("response", "ground_truth"),
    [
        (BOX34, "34"),
        (r"so $\boxed{34}$.", "34"),
        (r"\boxed{33} no, \boxed{34}", "34"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a}}", "a"),
        (r"\boxed{a}{", "a"),
        (r"\boxed{34\}", "34\\"),  # an escaped brace closes the box
        (r"\boxed{ 34 }", " 34 "),
        ("\\boxed{3\n4}", "3\n4"),
        (r"\boxed{√2 日}", "√2 日"),
        ("\\boxed{a\0b}", "a\0b"),
        (r"\boxed{\boxed{34}}", "34"),
        (r"<think> no end \boxed{34}", "34"),
    ],
)
def test_accepts(response: str, ground_truth: str) -> None:
    assert extract(response) == ground_truth
    assert strict_boxed(response, ground_truth) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{ 34 }",
        r"\boxed{34.0}",
        r"\boxed{034}",
        r"\boxed{+34}",
        r"\boxed{x=34}",
        r"\boxed{$34$}",
        r"\boxed{\text{34}}",
        r"\boxed{３４}",
        r"\boxed{34} or \boxed{35}",
        r"\boxed{34\boxed{}}",
    ],
)
def test_compares_raw_strings(response: str) -> None:
    assert extract(response) is not None
    assert strict_boxed(response, "34") == -1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "34",
        "Answer: 34",
        r"\boxed 34",
        r"\boxed {34}",
        r"\fbox{34}",
        r"\Boxed{34}",
        r"\boxed{34",
        r"\boxed{\frac{34}",
        r"\boxed{34} and \boxed{",
        "\\boxed{" * 14_000,
        "{" * 100_000,
        "\\boxed" + "{" * 99,
        "}" * 100_000,
    ],
)
def test_no_box(response: str) -> None:
    assert extract(response) is None
    assert strict_boxed(response, "34") == -1.0
    assert strict_boxed(response, "None") == -1.0


@pytest.mark.parametrize("filler", [" ", "é", "𝟙", "\n", "\0", "\u0301"])
def test_window_is_100_characters_not_bytes(filler: str) -> None:
    assert strict_boxed("x" * 500 + BOX34 + filler * 90, "34") == 1.0
    assert strict_boxed("x" * 500 + BOX34 + filler * 91, "34") == -1.0


def test_longest_answer_that_fits() -> None:
    assert strict_boxed(r"\boxed{" + "7" * 92 + "}", "7" * 92) == 1.0
    assert strict_boxed(r"\boxed{" + "7" * 93 + "}", "7" * 93) == -1.0


@pytest.mark.parametrize("tail", [200, 201, 290, 291])
def test_the_wider_window_gives_no_second_chance(tail: int) -> None:
    assert strict_boxed(BOX34 + "x" * tail, "34") == -1.0


@given(TEXTS, TEXTS)
def test_any_text_gets_plus_or_minus_one(response: str, ground_truth: str) -> None:
    assert strict_boxed(response, ground_truth) in (-1.0, 1.0)


@given(TEXTS, TEXTS, TEXTS)
def test_only_the_last_100_characters_count(head: str, tail: str, ground_truth: str) -> None:
    tail = tail[-100:].rjust(100)
    assert extract(head + tail) == extract(tail)
    assert strict_boxed(head + tail, ground_truth) == strict_boxed(tail, ground_truth)


def says_something(answer: str) -> bool:
    return answer.strip(" $").lower() not in ("", "nan")


@given(TEXTS)
def test_extract_is_balanced_text_from_a_box(response: str) -> None:
    answer = extract(response)
    if answer is not None:
        assert "\\boxed{" + answer + "}" in response
        assert answer.count("{") == answer.count("}")
        assert strict_boxed(response, answer) == (1.0 if says_something(answer) else -1.0)


@given(TEXTS, st.text(string.ascii_letters + string.digits + " \\^_+-/", max_size=92))
def test_any_plain_answer_in_a_final_box_is_accepted(reasoning: str, answer: str) -> None:
    expected = 1.0 if says_something(answer) else -1.0
    assert strict_boxed(reasoning + r"\boxed{" + answer + "}", answer) == expected


def test_registry_names_the_functions() -> None:
    assert VERIFIERS["strict_boxed"] is strict_boxed
    assert VERIFIERS["strict_boxed"](BOX34, "34") == 1.0
    assert VERIFIERS["minerva"]("Answer: 34", "34") == 1.0


def test_recipes_can_choose_every_verifier_and_nothing_else() -> None:
    assert tuple(VERIFIERS) == get_args(Verifier)


def test_import_is_light() -> None:
    code = "import sys, jaxrl.rewards; sys.exit(bool({'jax', 'numpy', 'sympy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
