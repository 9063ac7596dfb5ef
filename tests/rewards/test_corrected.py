r"""The corrected rules on pairs of answers that were judged by hand.

A line has two answers, `given ¦ truth`. `EQUAL` and `DIFFERENT` hold in both directions, `RIGHT` and `WRONG` in this
one.
"""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rewards import VERIFIERS, can_win, corrected, sandbox
from jaxrl.rewards.corrected import extract, same
from jaxrl.rewards.grammar import Unreadable, read
from jaxrl.rewards.latex_equality import same_spelling
from jaxrl.rewards.latex_equality import same_value as released
from jaxrl.rewards.numeric import value

EQUAL = r"""
    5 ¦ −5.0*-1
    −5 ¦ -5
    1/2 ¦ \frac12
    \frac{1}{2} ¦ \cfrac{1}{2}
    2/4 ¦ \frac12
    0.5 ¦ 1/2
    -3./2 ¦ -\frac{3}{2}
    0.\overline{3} ¦ \frac13
    0.1\overline{6} ¦ \frac16
    0.\overline{9} ¦ 1
    -1 \frac12 ¦ -\frac32
    -1\frac{1}{2} ¦ -1.5
    7 3/4 ¦ 7.75
    12_3 ¦ 12_{3}
    12_{10} ¦ 12
    \binom{9}{3} ¦ 84
    \dbinom{n}{2} ¦ \frac{n(n-1)}{2}
    2^{x+1} ¦ 2\cdot 2^x
    \frac{1+x}{2} ¦ (1+x)/2
    \frac{x}{2}+\frac12 ¦ \frac{1+x}{2}
    \sqrt[3]{2} ¦ 2^{1/3}
    \sqrt[3]{-8} ¦ -2
    \sqrt{12} ¦ 2\sqrt3
    5 million ¦ 5000000
    3.2 \text{ million} ¦ 3{,}200{,}000
    10^6 ¦ 1000000
    1.5\times 10^{6} ¦ 1.5e6
    2^{10} ¦ 1024
    17\cdot 2 ¦ 34
    5! ¦ 120
    1,234 ¦ 1234
    1\,234\,567 ¦ 1234567
    10,\!080 ¦ 10080
    (1,234) ¦ (1, 234)
    100,225 ¦ 100,225
    90 ¦ 90^\circ
    90^{\circ} ¦ 90°
    90 \text{ degrees} ¦ 90^\circ
    \sin 30^\circ ¦ \frac12
    \sin x\cos x ¦ \frac{1}{2}\sin 2x
    \sin^2 x ¦ 1-\cos^2 x
    \tan^{-1} 1 ¦ \frac{\pi}{4}
    \log_2 8 ¦ 3
    \frac{\log 2}{\log 3} ¦ \frac{\ln 2}{\ln 3}
    e^{i\pi} ¦ -1
    3+4i ¦ 4i+3
    \{1,2,3\} ¦ \{3,1,2\}
    3,1,2 ¦ \{1,2,3\}
    1 \text{ and } 2 ¦ 1, 2
    2, 3, and 5 ¦ 5,3,2
    \{5\} ¦ 5
    \emptyset ¦ \varnothing
    (1,2),(3,4) ¦ (3,4),(1,2)
    1,2 ¦ (1,2)
    (0,1] ¦ \left(0,1\right]
    (0,9)\cup(9,36) ¦ (9,36) \cup (0,9)
    x \in [-2,7] ¦ [-2,7]
    -2 \le x \le 7 ¦ [-2,7]
    x\le 2 ¦ (-\infty,2]
    2 < x ¦ (2,\infty)
    3 \ge x ¦ x \leqslant 3
    -x > -1 ¦ x < 1
    1 \pm \sqrt{2} ¦ 1-\sqrt2, 1+\sqrt2
    \pm 5 ¦ -5, 5
    \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix} ¦ \begin{bmatrix} 1 & 0 \\ 0 & 2/2 \end{bmatrix}
    \frac13\begin{pmatrix} 1 \\ 2 \end{pmatrix} ¦ \begin{pmatrix} 1/3 \\[4pt] 2/3 \end{pmatrix}
    x=5 ¦ 5
    x = 2+3 = 5 ¦ 5
    f(x)=x^2 ¦ x^2
    (p,q)=(3,2) ¦ (3,2)
    p=2, q=3 ¦ 2,3
    y=2x+3 ¦ 2x+3
    2x-y+3=0 ¦ y=2x+3
    x^2/4 + y^2/3 = 1 ¦ 3x^2+4y^2=12
    5 cm ¦ 5
    5 \text{ centimeters} ¦ 5\text{ cm}
    5 \text{ square cm} ¦ 5\mbox{ cm}^2
    12\text{ cookies} ¦ 12
    50\% ¦ 50
    50\% ¦ 0.5
    \$36 ¦ 36
    \$32,\!348 ¦ 32348 dollars
    -\$5 ¦ -5
    Evelyn ¦ \text{Evelyn}
    Yes ¦ \text{yes}
    odd ¦ \text{odd}
    (B) ¦ \text{(B)}
    \textbf{(B)} ¦ B
    10:30 ¦ 10{:}30
    10:30 \text{ a.m.} ¦ 10:30
    2:4 ¦ 1:2
    5^{\text{th}} ¦ 5
    21st ¦ 21
    y_1 ¦ y_{1}
    \alpha ¦ α
    x^2+x ¦ x(x+1)
    \frac{5x-1}{x^2-1} ¦ \frac{2}{x-1}+\frac{3}{x+1}
    k! ¦ k\cdot(k-1)!
    \left\lfloor\frac{2 n}{3}\right\rfloor+1 ¦ \lfloor (2n+3)/3 \rfloor
    |x-1| ¦ |1-x|
    \frac{dy}{dx} ¦ \frac{d y}{d x}
    \(5\) ¦ \boxed{5}
    ５ ¦ 5
"""

RIGHT = r"""
    \frac13 ¦ 0.333
    \sqrt{2} ¦ 1.414
    5 ¦ AB=5
    5 ¦ |z|=5
    7:32 ¦ S:T=7:32
"""

WRONG = r"""
    0.333 ¦ 1/3
    0.3333333333 ¦ 1/3
    2x=10 ¦ x=5
    ab=204 ¦ 204
    3, 2 ¦ p=2, q=3
    5\text{ or so} ¦ 5
    1:3 ¦ 10:30
    2:1 ¦ 10:05
    x-x+5 ¦ 5
"""

DIFFERENT = r"""
    0.334 ¦ 1/3
    1/6 ¦ 0.2
    1.601 ¦ 1.6
    4080.00000001 ¦ 4080
    1e-9 ¦ 0
    9007199254740993 ¦ 9007199254740992
    -1 \frac12 ¦ -\frac12
    2\frac12 ¦ 1
    12_3 ¦ 12_5
    12_3 ¦ 12_{10}
    12_3 ¦ 12
    12_3 ¦ 5
    \binom{9}{3} ¦ 93
    2^{x+1} ¦ 2^x+1
    1,234 ¦ (1,234)
    1,234 ¦ 1, 235
    109,200,0000 ¦ 109,200,000
    \frac{1+x}{2} ¦ 1+x/2
    \sqrt[3]{2} ¦ \sqrt{2}
    \frac{\pi}{2} ¦ 90^\circ
    \sin 30 ¦ \sin 30^\circ
    \log 2 ¦ \ln 2
    3+4i ¦ 3-4i
    1,2 ¦ 1,2,3
    1,1,2 ¦ 1,2,2
    (1,2) ¦ (2,1)
    2,1 ¦ (1,2)
    \{1,2\} ¦ (1,2)
    [1,2] ¦ (1,2)
    (0,1] ¦ [0,1)
    (-\infty,2] ¦ (-\infty,2)
    x < 5 ¦ x > 5
    x \le 5 ¦ x < 5
    \pm 5 ¦ 5
    \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix} ¦ \begin{pmatrix} 1 & 0 \\ 0 & 2 \end{pmatrix}
    \begin{pmatrix} 1 & 2 \end{pmatrix} ¦ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
    y=5 ¦ x=5
    x=5=6 ¦ 5
    x=6=5 ¦ 5
    x=x ¦ x
    p=3,q=2 ¦ p=2,q=3
    y=2x+3 ¦ y=2x-3
    5 \text{ m} ¦ 5\text{ cm}
    5 \text{ cm} ¦ 5\text{ cm}^2
    5\text{ million} ¦ 5
    5 ¦ 50\%
    0.5 ¦ 50
    \$5 ¦ 5 \text{ cents}
    \text{Evelyn} ¦ \text{Angela}
    yes ¦ no
    AB ¦ ab
    A ¦ \text{(B)}
    b ¦ \text{(B)}
    10:30 \text{ p.m.} ¦ 10:30 \text{ a.m.}
    1:2 ¦ 2:1
    \infty ¦ -\infty
    x+1 ¦ y+1
    |x| ¦ x
    \sqrt{x^2} ¦ x
    x^2+x ¦ x^2-x
    \frac{dy}{dx} ¦ \frac{y}{x}
    I(0) ¦ 0
    f(x) ¦ f(y)
    5 or 6 ¦ 5
    5, 6 ¦ 6
    5 6 ¦ 56
    5 6 ¦ 30
    5\text{6} ¦ 56
    \text{5 or 6} ¦ 5
    \neg 5 ¦ 5
    5 \approx 6 ¦ 5
    \boxed{5}6 ¦ 6
    1e400 ¦ 5
    \frac{1}{0} ¦ \infty
    0/0 ¦ 1
    0^0 ¦ 1
    9^{9^{9^9}} ¦ 9^{9^{9^8}}
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(map(str.strip, line.split("¦"))) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("first", "second"), pairs(EQUAL))
def test_equal_answers_are_equal_in_both_directions(first: str, second: str) -> None:
    assert same(first, second) and same(second, first)


@pytest.mark.parametrize(("answer", "truth"), pairs(RIGHT))
def test_a_reference_may_say_more_or_be_rounded(answer: str, truth: str) -> None:
    assert same(answer, truth)


@pytest.mark.parametrize(("answer", "truth"), pairs(WRONG))
def test_a_rounded_or_unfinished_answer_is_wrong(answer: str, truth: str) -> None:
    assert not same(answer, truth)


@pytest.mark.parametrize(("first", "second"), pairs(DIFFERENT))
def test_different_answers_differ_in_both_directions(first: str, second: str) -> None:
    assert not same(first, second) and not same(second, first)


def test_the_released_rules_are_wrong_on_many_of_these_pairs() -> None:
    def is_released(answer: str, truth: str) -> bool:
        return same_spelling(answer, truth) or released(answer, truth)

    refused = [pair for pair in pairs(EQUAL) if not is_released(*pair)]
    paid = [pair for pair in pairs(DIFFERENT) if is_released(*pair)]
    assert len(refused) > 50 and len(paid) > 5, (len(refused), paid)


@pytest.mark.parametrize("truth", ["", " ", "$$", r"\text{ cm}", "nan", "{}"])
def test_a_reference_that_states_nothing_pays_no_one(truth: str) -> None:
    assert not same(truth, truth) and not same("5", truth)
    assert corrected(f"\\boxed{{{truth}}}", truth) == -1.0


@pytest.mark.parametrize(
    "answer", ["np.arcsin(10/13)", r"\lim_{x\to 0} f", "#", r"\text{a}}{", "(1,2", r"\begin{p5} 1"]
)
def test_what_cannot_be_read_equals_its_own_text(answer: str) -> None:
    assert (
        same(answer, answer)
        and same(f" {answer} ", answer)
        and not same(answer, "5")
        and not same("5", answer)
    )


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**9))
def test_rational_numbers_are_equal_exactly(n: int, d: int) -> None:
    assert value(read(f"\\frac{{{n}}}{{{d}}}")) == Fraction(n, d)
    assert not same(f"{n}/{d}", f"{n + 1}/{d}")


@pytest.mark.parametrize(
    ("formula", "right"),
    [
        (r"\sqrt[5]{7}", math.pow(7, 1 / 5)),
        (r"\arctan 3", math.atan(3)),
        (r"\log_{10} 7", math.log10(7)),
        (r"e^{-2\pi}", math.exp(-2 * math.pi)),
        (r"\cos \frac{\pi}{7}", math.cos(math.pi / 7)),
        (r"\cot 20^\circ", 1 / math.tan(math.radians(20))),
        (r"2\sin 3 \cos 4", 2 * math.sin(3) * math.cos(4)),
        (r"\sqrt{2+\sqrt{3}}", math.sqrt(2 + math.sqrt(3))),
        (r"-2^2 + 7!! / 3", -4 + 105 / 3),
        (r"\lfloor \pi^3 \rfloor", 31),
    ],
)
def test_values_of_formulas_are_those_of_the_math_module(formula: str, right: float) -> None:
    assert math.isclose(float(mpmath.mpf(1) * value(read(formula))), right, rel_tol=1e-14)


PIECES = r"""
    \frac \sqrt { } ( ) [ ] , ; : = < | ! ^ _ + - * / . % $ \$ \pm \text{ \{ \} \begin{pmatrix} \begin{p \end & \\ \cup
    \in \overline{ \sin \log \lfloor \rfloor ' 0 12 3.5 1e9 x e i \pi cm and or million \% ^\circ \approx
    9^{9^9} d \dot \infty ٣
"""
ANSWERS = st.text(max_size=40) | st.lists(st.sampled_from(PIECES.split()), max_size=12).map("".join)


@settings(max_examples=400, deadline=None)
@given(ANSWERS, st.sampled_from(["5", "(1,2)", "x=5"]))
def test_any_text_is_decided(answer: str, truth: str) -> None:
    assert same(answer, truth) in (True, False)
    assert same(truth, answer) in (True, False)


@pytest.mark.parametrize(
    "answer",
    ["9" * 1000, "1+" * 499 + "1", "(" * 12 + "1" + ")" * 12, "x" * 1000, "1," * 499 + "1", "9" * 400 + "!"],
)
def test_long_answers_are_decided(answer: str) -> None:
    assert not same(answer, "5") and not same("5", answer)


def test_unreadable_text_is_an_error_of_the_grammar_alone() -> None:
    for text in ("", "5 6", "(1", r"\frac{1}", "1e99999", "5}"):
        with pytest.raises(Unreadable):
            read(text)


def test_the_verifier_takes_the_last_box_of_the_whole_response() -> None:
    assert corrected(r"\boxed{4} then \boxed{\frac{10}{2}}", "5") == 1.0
    assert corrected(r"<think>\boxed{5}</think> \boxed{6}", "5") == -1.0
    assert corrected(r"\boxed{5} \boxed{", "5") == -1.0 and corrected("5", "5") == -1.0
    assert corrected(r"\boxed{2^{10}}", r"\boxed{1024}") == 1.0
    assert extract(r"a \boxed{x=\frac{1}{2}}.") == r"x=\frac{1}{2}"


def test_the_sandbox_decides_by_these_rules() -> None:
    assert sandbox.compare("corrected", r"2^{10}", "1024") and not sandbox.compare(
        "released", r"2^{10}", "1024"
    )
    assert sandbox.compare("corrected", "5 or 6", "5") is False


def test_it_is_a_verifier_that_answers_can_win() -> None:
    assert VERIFIERS["corrected"] is corrected
    assert all(
        can_win("corrected", answer) for answer in ("34", r"\frac{1}{2}", "x=5", r"\text{(B)}", "(1,2)")
    )
    assert not can_win("corrected", r"\text{ cm}")
