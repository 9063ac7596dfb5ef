r"""No constant and no hedge is right for references that a reader would call wrong.

The tables name what the released graders pay although a reader would not; docs/grading.md describes the rules behind
them. Where BENCHMARKS names a folder of references, as `jaxrl eval --data` takes it, every constant meets all of them.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from adversarial import CONSTANTS, HEDGES, NOTHING, REFERENCES, RIGHT, plain

from evals import grade
from evals.benchmarks import load, select
from jaxrl.rewards import VERIFIERS, equivalent, latex_equality, minerva, strict_boxed, winning
from jaxrl.rewards.latex_equality import DEEPEST, LONGEST, last_box, same_spelling, same_value
from jaxrl.rewards.sandbox import _depth
from jaxrl.types import Verifier

SHAPES = (
    *(
        "0",
        "1",
        "5",
        "6",
        "56",
        "204",
        "1,2",
        "1e-15",
        "3/8",
        "1.6",
        r"2\sqrt{3}",
        r"\pi",
        "x",
        "x^2+x",
        "I(0)",
    ),
    *(
        "(1,2)",
        r"\left( 3, \frac{\pi}{2} \right)",
        "[0,1)",
        "x=5",
        r"\text{(B)}",
        r"\{5\}",
        r"0.\overline{3}",
    ),
)
Paid = Callable[[str, str], bool]
CORRECTED = importlib.import_module("jaxrl.rewards.corrected")  # the package has the verifier by that name

NEAR_ZERO = ("1e-400", "1e-308", "5e-324", "1e-7", "-1e-8", "0.0000000001", "0.00000001", "०")
# By rule: the constants, and what they are paid for in the spelling of `plain`.
LENIENT: dict[str, dict[str, str]] = {
    "a left side of two characters is dropped": {"5=6": "6", "6=5": "5", "1=2": "2", ">=0": "0", "x!=x": "x"},
    "the text ends at a unit": dict.fromkeys((r"5\text{ or }6", r"5\text{ and }6"), "5"),
    "commands without a plain text are dropped": dict.fromkeys(
        (r"\phantom{5}", r"\neg 5", r"\mbox{6}5", r"\boxed{5}6"), "5"
    )
    | {r"\verb|5|6": "6"},
    "spaces, dollars, percent signs, braces and commands are dropped": dict.fromkeys(
        (
            *(
                "5 6",
                "5%6",
                "5%%6",
                "%5%6",
                "$5$6",
                r"\$5\$6",
                "5_{6}",
                r"\text{5}\text{6}",
                r"\text{5}6",
                "5\n6",
            ),
            *(r"5\text{6}", r"\overline{5}6", r"\underline{5}\overline{6}", r"\rlap{5}6", r"\cancel{5}6"),
            *(r"\sout{5}6", r"5\phantom{}6", r"5\def\x{6}", r"5%\n6", r"\tag{5}6", r"\textcolor{red}{5}6"),
            *(r"\underset{5}{6}", r"\overset{5}{6}", r"\stackrel{5}{6}", "{5}_6", "5\\\n6"),
        ),
        "56",
    )
    | {"5_{7}": "57"},
    "units are removed within words": {"mcmeterm": "m"},
    "a name before a bracket is a factor": dict.fromkeys(
        ("1.e30-1.e30", "0*1.e300", "0 million", "0*(x+1)", "x*0.", "0.[3]*0", "sqrt(0*x)"), "I(0)"
    ),
    "unknown functions are dropped": dict.fromkeys((r"\mathrm{x}", "1.e30+x-1.e30"), "cotx"),
}
MINERVA: dict[str, dict[str, str]] = {
    "what is before the last = is dropped": {"5=6": "6", "6=5": "5", "1=2": "2", ">=0": "0", "x!=x": "x"}
    | {
        "x==x": "x",
        "x=5=6": "6",
        "x=5=7": "7",
        "x=5, x=6": "6",
        "x=6=5": "5",
        "x=5 or x=6": "6",
        "=>5": ">5",
    },
    "spaces, commas and words are dropped": dict.fromkeys(
        (
            *("5, 6", "5 6", r"5\ 6", r"5\text{ and }6", "5 cm 6", "5 cm 6 cm", r"\text{5}\text{6}"),
            *(
                r"\text{5}6",
                r"5\text{6}",
                r"\text{ 5}\text{ 6}",
                r"\text{}5 6",
                r"\overline{5}6",
                r"\boxed{5}6",
            ),
            r"\$5\$6",
        ),
        "56",
    )
    | {r"\mbox{6}5": "65", "5,6,7": "567", "5\n6": "5", "1,2": "12"},
    "a line is its first formula": {"$5$6": "5"}
    | dict.fromkeys(("1==1", '"1"'), r"1,frac3+sqrt212,frac3-sqrt212"),
}
STRICT = {"the last box counts": {r"\boxed{5}6": "5"}}
# Paid for every reference; with one answer each, the first or the last.
LENIENT_HEDGES = (r"TRUTH\text{ or }77", r"\neg TRUTH")
MINERVA_HEDGES = ("x=77, x=TRUTH", "abc77=TRUTH")


@pytest.fixture(scope="module")
def lenient() -> Iterable[Paid]:
    """What `grade` and `equivalent` ask, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latex_equality, "canonical", functools.cache(latex_equality.canonical))
        yield is_equivalent


@pytest.fixture(scope="module")
def truthful() -> Iterable[Paid]:
    """What the corrected rules decide, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tokens", "_read"):
            patch.setattr(CORRECTED, name, functools.cache(getattr(CORRECTED, name)))
        yield is_same


def is_same(given: str, truth: str) -> bool:
    return is_small(given, truth) and CORRECTED.same(given, truth)


def is_small(given: str, truth: str) -> bool:
    boxed = last_box(f"\\boxed{{{given}}}") == given
    return boxed and max(len(given), len(truth)) <= LONGEST and max(_depth(given), _depth(truth)) <= DEEPEST


def is_equivalent(given: str, truth: str) -> bool:
    boxed = last_box(f"\\boxed{{{given}}}") == given
    return boxed and (same_spelling(given, truth) or (is_small(given, truth) and same_value(given, truth)))


def unexpected(paid: Paid, rules: dict[str, dict[str, str]], references: Iterable[str]) -> list[str]:
    known = {(constant, truth) for rule in rules.values() for constant, truth in rule.items()}
    return [
        f"{family}: {constant!r} for {truth!r}"
        for truth in references
        for family, constant in CONSTANTS
        if plain(truth) not in RIGHT.get(constant, ())
        and (constant, plain(truth)) not in known
        and not (constant in NEAR_ZERO and is_near_zero(truth))
        and paid(constant, truth)
    ]


def is_near_zero(truth: str) -> bool:
    try:
        return abs(float(plain(truth))) <= 1e-7
    except ValueError:
        return False


def paid_by_minerva(given: str, truth: str) -> bool:
    return minerva(f"Answer: {given}", truth) > 0


def paid_by_strict_boxed(given: str, truth: str) -> bool:
    return strict_boxed(f"\\boxed{{{given}}}", truth) > 0


def test_there_are_hundreds_of_answers_and_all_differ() -> None:
    assert len(set(CONSTANTS)) == len(CONSTANTS) > 500
    assert len(set(REFERENCES)) == len(REFERENCES) > 60


def test_no_constant_is_right_for_a_reference_that_it_does_not_equal(lenient: Paid) -> None:
    assert unexpected(lenient, LENIENT, SHAPES) == []


def test_minerva_and_strict_boxed_pay_no_constant_either() -> None:
    assert unexpected(paid_by_minerva, MINERVA, (*SHAPES, *REFERENCES)) == []
    assert unexpected(paid_by_strict_boxed, STRICT, (*SHAPES, *REFERENCES)) == []


def test_the_corrected_rules_pay_no_constant_and_need_no_table(truthful: Paid) -> None:
    assert unexpected(truthful, {}, (*SHAPES, *REFERENCES)) == []


def test_no_hedge_is_right(lenient: Paid, truthful: Paid) -> None:
    truths = ("5", "204", "1.6", r"\frac{1}{2}", r"2\sqrt{3}", "x^2+x", "(1,2)")
    for paid, known in (
        (lenient, LENIENT_HEDGES),
        (truthful, ()),
        (paid_by_minerva, MINERVA_HEDGES),
        (paid_by_strict_boxed, ()),
    ):
        hedges = {(h, t) for _, h in HEDGES for t in truths if paid(h.replace("TRUTH", t), t)}
        assert {h for h, _ in hedges} <= set(known), hedges


@pytest.mark.parametrize(
    "answer", ["1.e30)+(1.e30", "(1.e30)+(1.e30", "1.e22)+(1.e22", "1.e300)-(1.e300", "5)*0*(1.e30"]
)
@pytest.mark.parametrize("truth", ["3/8", "1.6", r"2\sqrt{3}", r"\frac{\pi}{2}", "x+1", "(0.5, 1.5)", "2n-2"])
def test_no_answer_closes_the_bracket_around_it(answer: str, truth: str) -> None:
    for given in (answer, f"({answer})", f"({answer},{answer})"):
        assert not grade(f"\\boxed{{{given}}}", truth)
        assert equivalent(f"<think></think>\\boxed{{{given}}}", truth) == -1.0


@pytest.mark.parametrize("truth", NOTHING)
def test_a_reference_that_states_nothing_pays_no_one(truth: str) -> None:
    for answer in (truth, *NOTHING, "5"):
        for name in ("minerva", "equivalent", "corrected"):
            assert VERIFIERS[name](winning(name, answer), truth) == -1.0, (name, answer)
        blank = truth.strip(" $").lower() in ("", "nan")  # strict_boxed pays "cm" for "cm"
        assert strict_boxed(winning("strict_boxed", answer), truth) == (
            1.0 if answer == truth and not blank else -1.0
        )
        assert not grade(f"\\boxed{{{answer}}}", truth)
        assert minerva("no answer line", truth) == -1.0
    assert equivalent(winning("equivalent", truth), float("nan")) == -1.0


@pytest.mark.parametrize(
    "truth", ["cm^2 \\cdot x", "5 cm", "N", "an", "none", "0", "second law", r"\infty", "A"]
)
def test_a_reference_that_states_something_pays_its_own_text(truth: str) -> None:
    assert all(verify(winning(name, truth), truth) == 1.0 for name, verify in VERIFIERS.items())


@pytest.mark.parametrize("name", list(VERIFIERS))
def test_every_verifier_is_quick_on_every_constant(name: Verifier) -> None:
    start = time.perf_counter()
    for _, answer in CONSTANTS:
        assert VERIFIERS[name](winning(name, answer), "7.5") == -1.0, answer
    # the library parses every one, and some of them make a worker start anew
    assert time.perf_counter() - start < (90.0 if name == "math_verify" else 30.0)


@pytest.mark.golden
@pytest.mark.skipif(
    "BENCHMARKS" not in os.environ, reason="BENCHMARKS is not set; it names a folder of benchmarks"
)
def test_no_constant_is_right_for_references_of_the_benchmarks(lenient: Paid, truthful: Paid) -> None:
    folder = Path(os.environ["BENCHMARKS"])
    truths = {problem.answer for name, b in select("all").items() for problem in load(name, b, folder)}
    found = unexpected(lenient, LENIENT, sorted(truths | set(REFERENCES)))
    found += unexpected(truthful, {}, sorted(truths))
    found += unexpected(paid_by_minerva, MINERVA, sorted(truths))
    found += unexpected(paid_by_strict_boxed, STRICT, sorted(truths))
    assert found == []
