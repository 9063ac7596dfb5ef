from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxrl.rewards import equivalent, latex_equality
from jaxrl.rewards.deepscaler import extract
from jaxrl.rewards.latex_equality import LONGEST, canonical, elements, spelling
from jaxrl.rewards.nothing import states_nothing

PIECES = (
    *(
        r"\frac",
        r"\sqrt",
        r"\sqrt[",
        r"\text{",
        r"\boxed{",
        r"\left(",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "$",
        "%",
    ),
    *(
        "\\",
        "=",
        "1",
        "23",
        "0.5",
        ".",
        ",",
        "/",
        "*",
        "**",
        "^",
        "+",
        "-",
        "!",
        " ",
        "x",
        "n",
        "pi",
        "e",
        "i",
    ),
    *("sqrt", "million", " cm", "\n", "\0", "é", "√", "²", "_", "'", "@", "9^9^9", "<think>", "</think>"),
)
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


def score(answer: str, ground_truth: str | float | list[str]) -> float:
    return equivalent(f"<think>\nhm\n</think>\n\\boxed{{{answer}}}", ground_truth)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<think></think>\boxed{34}", "34"),
        (r"<think>\boxed{33}</think>\boxed{34}", "34"),
        (r"</think>\boxed{34}<think>", "34"),  # the marks may stand anywhere
        (r"<think></think>\boxed{33}</think>\boxed{34}", "33"),  # up to the second end of thought
        (r"<think></think>\boxed{33} \boxed{34}", "34"),
        (r"<think></think>\boxed{\boxed{34}}", "34"),
        (r"<think></think>\boxed{\frac{1}{2}}}", r"\frac{1}{2}"),
        (r"\boxed{34}", None),
        (r"<think>\boxed{34}", None),
        (r"</think>\boxed{34}", None),
        (r"<think>\boxed{34}</think>", None),
        (r"<think></think>\fbox{34}", None),
        (r"<think></think>\boxed 34", None),
        (r"<think></think>\boxed {34}", None),
        (r"<think></think>\boxed{34", None),
        (r"<think></think>\boxed{34} \boxed{", None),
        (r"<think></think>\boxed{34} \boxed 35", None),
        ("", None),
    ],
)
def test_finds_the_last_box_after_the_thought(response: str, answer: str | None) -> None:
    assert extract(response) == answer
    assert equivalent(response, "34" if answer is None else answer) == (-1.0 if answer is None else 1.0)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (r"\text{ (A) }", "(A)"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac1{23}", r"\frac{1}{23}"),
        (r"\frac{1}2", r"\frac{1}2"),
        ("1/2", r"\frac{1}{2}"),
        ("-1/2", r"\frac{-1}{2}"),
        ("01/2", "01/2"),
        ("1/2/3", "1/2/3"),
        ("x/2", "x/2"),
        ("0.5", r"\frac{1}{2}"),
        (".5", r"\frac{1}{2}"),
        (r"{.5}", "{0.5}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\sqrt[3]{2}", r"\sqrt{[}3]{2}"),
        (r"\sqrt", r"\sqrt"),
        (r"\left( 1,\! 2 \right)", "(1,2)"),
        ("a\\\\b", "a\\b"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$5\%", "5"),
        (r"5\text{ cm}", "5"),
        (r"5\text{ cm}\text{ or so}", r"5\text{ cm}\text{ or so}"),  # given up as it was
        (r"5 \frac", r"5 \frac"),
        ("x=5", "5"),
        ("x =5", "5"),
        ("xyz=5", "xyz=5"),
        ("a=b=5", "a=b=5"),
        (" 1\n2 ", "12"),
        ("", ""),
    ],
)
def test_spelling(answer: str, normal: str) -> None:
    assert spelling(answer) == normal


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (r"\text{Yes}", "yes"),
        (r"\$1{,}000", "1000"),
        ("1,000", "1000"),
        (r"1,\! 000", "1000"),
        ("5.0", "5"),
        ("5e2", "500"),
        ("5.99999999", "6"),
        ("5 million", "5*10^6"),
        ("3 feet", "3"),
        ("3 centimeters^2", "3"),
        ("3 millimeters", "3milli"),  # units go wherever they stand
        (r"45^ \circ", "45"),
        ("{7}", "7"),
        ("50%", "50"),
        ("1 or 2", "1,2"),
        ("7 3/4", "7+3/4"),
        (r"7\frac{3}{4}", "7+3/4"),
        (r"\frac{1+x}{2}", "1+x/2"),  # latex2text drops the grouping
        (r"2\sqrt{3}\cdot\pi", "2sqrt(3)*pi"),
        (r"(0,\infty)", "(0,inf)"),
        ("- 5", "-5"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("1_000", "1000"),
    ],
)
def test_canonical(answer: str, normal: str) -> None:
    assert canonical(answer) == normal


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("(1,2)", ["1", "2"]),
        ("[0,1)", ["0", "1"]),
        ("(1,000,2)", ["1000", "2"]),
        ("(1,\n2)", ["1", "2"]),
        ("(1,(2,3))", ["(1,(2,3))"]),
        ("1,2", ["1,2"]),
        ("()", ["()"]),
        ("", []),
    ],
)
def test_elements(text: str, parts: list[str]) -> None:
    assert elements(text) == parts


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("34.0", "34"),
        ("034", "34"),
        ("3,400", "3400"),
        (r"\text{34}", "34"),
        ("0.25", r"\frac{1}{4}"),
        ("x=5", "5"),
        ("1.60", r"1.6\text{ cm}"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        (r"1+\sqrt{2}", r"\sqrt2 + 1"),
        ("x(x+1)", "x^2+x"),
        ("n!/(n-1)!", "n"),
        ("2x+0", "2x"),
        ("(x**50+1)-1", "x**50"),
        ("(0.50,2)", r"(\frac{1}{2},2)"),
        ("5!!+x", "15+x"),
        ("sqrt(-sqrt(4))+x", "sqrt(-2)+x"),
        ("0.[3]", "1/3"),
        ("yes", r"\text{Yes}"),
        ("9^9^9", "9^9^9"),
        ("34", r"\boxed{34}"),
    ],
)
def test_accepts(answer: str, truth: str) -> None:
    assert score(answer, truth) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("35", "34"),
        ("", "34"),
        ("34", ""),
        ("2/4", "1/2"),  # not reduced
        ("17*2", "34"),  # not worked out
        ("34", "17*2"),
        ("(2,1)", "(1,2)"),
        ("[1,2]", "(1,2)"),
        ("(1,2,3)", "(1,2)"),
        ("0.333333", r"\frac{1}{3}"),
        ("3.14159265358979", r"\pi"),
        (r"\sin(0)+1.5", "1.5"),  # more than two letters
        ("x^{12}+0", "x^{12}"),  # an exponent of two digits
        ("2^3^2+x", "512+x"),
        ("x==x", "1"),
        ("1/0", "2/0"),
        ("x.x", "1.5"),
        ("34", r"\boxed"),
        ("34", r"\boxed{34"),
    ],
)
def test_rejects(answer: str, truth: str) -> None:
    assert score(answer, truth) == -1.0


def test_several_answers_and_numbers() -> None:
    assert score("34", ["33", r"\boxed{34}"]) == 1.0
    assert score("34", ["33", "35"]) == score("34", []) == -1.0
    assert score("34", 34) == score("0.5", 0.5) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("9**9**9", "9"),
        ("9**9**9+x", "x+9**9**9"),
        ("(10**8)!", "x"),
        ("((10!)!)!", "x+1"),
        ("5!!!!!!", "2.5"),
        ("x**(10**9)", "x**10**9+0"),
        ("(3+4*x)**500/(1+x)**499", r"\frac{1}{2}"),
        ("1e308*1e308", "1.5"),
        ("1/7**9999999", "0.5"),
        ("{" * 50_000, "1"),
        ("{" * 50_000 + "}" * 50_000, "x+1"),
        ("(" * 400, "x+1"),
        ("-" * 900 + "x", "x+1"),
        ("1+" * 400 + "1", "401+x"),
        (r"\frac{" * 150, "x"),  # 2**150 steps for the LaTeX reader
        (r"\sqrt[" * 40 + "]" * 40, "x"),
        (r"\frac{1}{" * 60 + "}" * 60, "x"),
        ("\\" * 999, "x"),
        ("x" * 100_000, "y"),
        ("7" * 100_000, "77"),
        ("1," * 50_000, "(1,2)"),
        ("a\0b", "b"),
        ("\ud800", "x"),
        ("١+x", "y"),
        ('"a"*10**9', "x"),
        ("[1]*10**9", "x"),
        ("().__class__", "x"),
        ("lambda: 1", "x"),
    ],
)
def test_no_text_hangs_or_crashes(answer: str, truth: str) -> None:
    start = time.perf_counter()
    assert score(answer, truth) == -1.0
    assert score(truth, answer) == -1.0
    assert time.perf_counter() - start < 8.0


def test_nothing_but_arithmetic_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setitem(latex_equality._names(), "re", seen.append)
    for code in ("re(1)", "re", "x.re(1)", "[re(1)]", "(1, re(1))[0]", "re(1) if 1 else 2", "1+re(1)"):
        assert not latex_equality._same_formula(code, code)
    assert not seen


@settings(deadline=5000)
@given(TEXTS, TEXTS)
@example("9^9^9", "9**9**9")
def test_any_text_gets_plus_or_minus_one(answer: str, ground_truth: str) -> None:
    assert score(answer, ground_truth) in (-1.0, 1.0)
    assert equivalent(answer, ground_truth) in (-1.0, 1.0)


@given(TEXTS)
def test_an_answer_equals_itself(answer: str) -> None:
    boxed = f"<think></think>\\boxed{{{answer}}}"
    if r"\boxed" not in answer and "</think>" not in answer and extract(boxed) == answer:
        if states_nothing(answer):
            assert equivalent(boxed, answer) == -1.0
            return
        assert equivalent(boxed, answer) == equivalent(boxed, f"\\boxed{{{answer}}}") == 1.0


def test_too_long_a_text_is_compared_by_its_spelling_alone() -> None:
    assert score("7" * (LONGEST + 1), "7" * (LONGEST + 1)) == 1.0
    assert score("0" * LONGEST + "7", "7") == -1.0
