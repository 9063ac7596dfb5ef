from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.rewards import minerva
from jaxrl.rewards.minerva import NO_ANSWER, extract, normalize
from jaxrl.rewards.nothing import states_nothing

PIECES = (
    *("Answer:", "answer :", "\n", "=", "$", "\\$", "\\text{", "\\boxed{", "{", "}", "frac", "sqrt", "a "),
    *("an ", " ", ",", ".", "12", "{,}", "^2", "cm", "degrees", "é", "\0"),
)
# Any text, and text dense in the few pieces that matter to the verifier.
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.mark.parametrize(
    ("response", "pred"),
    [
        ("Answer: 34", "34"),
        ("ANSWER:34", "34"),
        ("answer \t:\n\n  34\nBye.", "34"),
        ("The final answer : 34", "34"),
        ("Answer: 33\nAnswer: 34", "34"),
        ("Answer: 33 Answer: 34", "33Answer:34"),  # one match runs to the end of its line
        ("Answer: 34\nAnswer:", "34"),
        ("Answer: 34\nAnswer:\n", "34"),
        ("Answer:  ", ""),
        ("Answer: \\boxed{34}", "34"),
        ("Answer: $34$", "34"),
        ("**Answer:** 34", "**34"),
        ("Answer: 34.", "34."),
        ("Answer: √2 日", "√2日"),
        ("Answer: 3\0004", "3\x004"),
        ("Answer: 3\r4", "3\r4"),  # only \n ends the line
    ],
)
def test_finds_the_last_answer_line(response: str, pred: str) -> None:
    assert extract(response) == pred
    assert minerva(response, pred) == (1.0 if pred else -1.0)  # empty references pay no one


@pytest.mark.parametrize(
    "response",
    [
        "",
        "34",
        r"\boxed{34}",
        "Answer 34",
        "Answer is: 34",
        "Answer:",
        "Answer:\n",
        "{" * 100_000,
        "\\boxed{" * 14_000,
    ],
)
def test_no_answer_line(response: str) -> None:
    assert extract(response) == NO_ANSWER
    assert minerva(response, "34") == -1.0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("", ""),
        ("x = y = 5", "5"),
        ("5 =", ""),
        # substitutions
        ("an apple", "apple"),
        ("a pear", "pear"),
        ("$5.$", "5"),
        (r"\$5", "5"),
        (r"1\ 000", "1000"),
        (" 1 2 ", "12"),
        (r"5\mbox{ inches}", "5"),
        (r"x,\text{ and }y", "x,y"),
        (r"x\text{ and }y", "x,y"),
        (r"5\text{ m}^2", "5"),
        ("banana split", "banansplit"),  # articles go wherever they end a word
        # words and expressions
        ("5 square feet", "5"),
        ("5 ways", "5"),
        ("5 integers", "5"),
        ("5 dollars", "5"),
        ("5 mph", "5"),
        ("5 inches", "5"),
        ("5 hours", "5"),
        ("5 km", "5"),
        ("5 units", "5"),
        ("5 points", "5"),
        ("5 minutes", "5"),
        ("5 digits", "5"),
        ("5 cents", "5"),
        ("5 degrees", "5"),
        ("5 cm", "5"),
        ("5 gm", "5"),
        ("5 pounds", "5"),
        ("5 meters", "5"),
        ("5 meals", "5"),
        ("5 edges", "5"),
        ("5 students", "5"),
        ("5 children tickets", "5"),
        ("5 multiples", "5"),
        ("issue", "is"),
        ("5 ft", "5ft"),  # stays: it would eat into \left
        (r"\left(5\right)", r"\left(5\right)"),
        (r"x,\ldots", "x,"),
        (r"x,\dots", "x,"),
        (r"5\text{s}", "5"),
        (r"5\text{.}", "5"),
        ("5\\text{\ns}", "5"),
        ("5\\text{\n}", "5"),
        (r"5\text{ }", "5"),
        (r"5\text{ cm}^2", "5"),  # the unit goes first, then the emptied group with its exponent
        (r"5\text{}^3", "5"),
        (r"5^\mathrm{th}", "5^"),
        (r"5^\circ", "5"),
        (r"5^{\circ}", "5"),
        (r"5\;", "5"),
        (r"1,\!000", "1000"),
        ("1{,}000", "1000"),
        ('"yes"', "yes"),
        # TeX
        ("about $x+1$ or $y$", "x+1"),
        ("$5", "5"),
        ("$x$\n$y$ z", "x\ny"),
        (r"\text{(A)}", "(A)"),
        (r"\textbf{B}", "B"),
        (r"0.\overline{3}", "0.3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac123", r"\frac{1}{2}3"),
        (r"\frac1{23}", r"\frac{1}{{}23}"),
        (r"\frac1", r"\frac1"),
        (r"\dfrac12", r"\dfrac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\sqrt23", r"\sqrt{2}3"),
        (r"\sqrt[3]{2}", r"\sqrt{[}3]{2}"),
        (r"\sqrt{2}", r"\sqrt{2}"),
        # numbers
        ("1,234,567", "1234567"),
        ("1,2", "12"),
        ("-1,234", "-1,234"),
        ("1,234.5", "1,234.5"),
        (",", ","),
        ("1,²", "1²"),
        ("05", "05"),
        # blanks that are not the space character
        ("\t5\xa0", "5"),
    ],
)
def test_normalize(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


@pytest.mark.parametrize(
    ("response", "ground_truth", "score"),
    [
        ("Answer: 1000 dollars", r"1{,}000\text{ dollars}", 1.0),
        (r"Answer: \frac12", r"x=\frac{1}{2}", 1.0),
        ("Answer: 5.0", "5", -1.0),
        (r"Answer: \dfrac{1}{2}", r"\frac{1}{2}", -1.0),
        ("Answer: -5", "−5", -1.0),
        ("Answer: yes", "Yes", -1.0),
        ("no answer line", NO_ANSWER, -1.0),  # the reference pays it
    ],
)
def test_both_sides_are_normalized(response: str, ground_truth: str, score: float) -> None:
    assert minerva(response, ground_truth) == score


@pytest.mark.parametrize("filler", [" ", "é", "𝟙", "\0", "\n"])
def test_window_is_300_characters_not_bytes(filler: str) -> None:
    line = "Answer: 34\n"  # 11 characters
    assert minerva("x" * 500 + line + filler * 289, "34") == 1.0
    assert minerva("x" * 500 + line + filler * 290, "34") == -1.0


def test_longest_answer_that_fits() -> None:
    assert minerva("Answer:" + "7" * 293, "7" * 293) == 1.0
    assert minerva("Answer:" + "7" * 294, "7" * 294) == -1.0


@pytest.mark.parametrize("piece", ["{", "}", "\\boxed{", "$", "=", "a ", "Answer:", " ", "\n", "1,"])
def test_long_input_is_quick_on_both_sides(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    assert minerva(text, text[:20_000]) in (-1.0, 1.0)


@given(TEXTS, TEXTS)
def test_any_text_gets_plus_or_minus_one(response: str, ground_truth: str) -> None:
    assert minerva(response, ground_truth) in (-1.0, 1.0)


@given(TEXTS, TEXTS, TEXTS)
def test_only_the_last_300_characters_count(head: str, tail: str, ground_truth: str) -> None:
    tail = tail[-300:].rjust(300)
    assert extract(head + tail) == extract(tail)
    assert minerva(head + tail, ground_truth) == minerva(tail, ground_truth)


@given(TEXTS, st.text(st.characters(exclude_characters="\n"), max_size=200))
def test_the_ground_truth_on_a_final_answer_line_is_accepted(reasoning: str, answer: str) -> None:
    answer = answer.strip()
    if not normalize(answer):  # "square", "=": the rules leave nothing of them, and nothing may buy them
        assert minerva(f"{reasoning}.\nAnswer: ", answer) == -1.0
        return
    states = not states_nothing(answer) and normalize(answer) != NO_ANSWER
    assert minerva(f"{reasoning}.\nAnswer: {answer}", answer) == (1.0 if states else -1.0)


@given(TEXTS)
def test_the_logged_answer_has_no_spaces_or_dollars(response: str) -> None:
    assert not set(" $") & set(extract(response))
