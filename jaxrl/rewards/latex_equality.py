r"""Equality of two answers for the lenient graders: one spelling after normalization, or one value to sympy.

The rules are those of the grader that DeepScaleR trained with and JustRL's benchmarks use, oddities included. It joins
two older ones: the spelling of the MATH data set (arXiv 2103.03874) and the sympy comparison of PRM800K (arXiv
2305.20050). docs/grading.md describes the rules.

`same_spelling` is quick on any text. `same_value` is not: LaTeX and algebra can run without end, so call it through
`jaxrl.rewards.sandbox`, which limits it.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from typing import TYPE_CHECKING

from jaxrl.rewards.nothing import NOTHING, UNITS, states_nothing
from jaxrl.rewards.strict_boxed import BOX, group_from

if TYPE_CHECKING:
    import sympy
    from mpmath import mpc, mpf

LONGEST = 1000  # characters; the longest reference answer of nine benchmarks has 210
DEEPEST = 12  # brackets; pylatexenc takes twice as long for each one that nothing closes
MOST_LETTERS = 2  # the reference's
LARGEST_EXPONENT = 300
LARGEST = 1e308
LARGEST_FACTORIAL = 170
INTEGRAL = 1e-7  # a number as close as this to an integer is one; the reference's
ROUNDING = 1e-12  # relative to a value; a smaller imaginary part is a rounding error
DIGITS = 60  # so that terms that cancel leave enough of a small value
ZERO = 1e-9  # relative to the reference's value; sympy gets smaller differences
CANCELED = 1e-40  # relative to the largest value on the way to the reference's: what cancellation leaves
POINTS = (0.61803, 2.71043)  # where differences are evaluated: on both sides of 1, so that high powers show

BOX_COMMAND = r"\boxed"
_TEXT = re.compile(r"^\\text\{(.+?)\}$")
_RESPELLED = (
    ("\n", ""),
    (r"\!", ""),
    (r"\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
)


def last_box(text: str) -> str | None:
    r"""The content of the last box; None if there is none, or `\boxed` is not followed by braces that balance."""
    start = text.rfind(BOX_COMMAND)
    return group_from(text, start + len(BOX)) if start >= 0 and text.startswith(BOX, start) else None


def reference(ground_truth: str) -> str | None:
    """The reference answer, which may come in a box."""
    return last_box(ground_truth) if BOX_COMMAND in ground_truth else ground_truth


def same_spelling(given: str, truth: str) -> bool:
    """Whether the answers have one spelling, and it states something."""
    return spelling(given) == spelling(truth) and not states_nothing(truth)


def spelling(answer: str) -> str:
    """The answer without TeX's choices of size, spacing and shorthand, units or a short left side as in `x=5`."""
    answer = answer.strip()
    if enclosed := _TEXT.search(answer):
        answer = enclosed[1].strip()
    try:
        return _respell(answer)
    except ValueError:
        return answer


def _respell(text: str) -> str:
    for old, new in _RESPELLED:
        text = text.replace(old, new)
    text, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError("not a single unit")
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _brace_fractions(_brace_roots(text).replace(" ", ""))
    if text == "0.5":
        return r"\frac{1}{2}"
    return re.sub(r"\A(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z", r"\\frac{\1}{\2}", text)


def _brace_roots(text: str) -> str:
    r"""\sqrt2 -> \sqrt{2}"""
    head, *tails = text.split(r"\sqrt")
    if not all(tails):
        raise ValueError("a root of nothing")
    return head + "".join(r"\sqrt" + (t if t[0] == "{" else "{" + t[0] + "}" + t[1:]) for t in tails)


def _brace_fractions(text: str) -> str:
    r"""\frac12 -> \frac{1}{2}, and \frac1{23} -> \frac{1}{23}; no change at all if one of them lacks an argument."""
    out, *tails = text.split(r"\frac")
    for tail in tails:
        if not tail:
            raise ValueError("a fraction of nothing")
        if tail[0] != "{":
            if len(tail) == 1:
                return text
            tail = "{" + tail[0] + "}" + (tail[1:] if tail[1] == "{" else "{" + tail[1] + "}" + tail[2:])
        out += r"\frac" + tail
    return out


# Removed one after the other, also within words.
_UNITS = tuple(re.compile(unit + r"(es)?(s)? *(\^[0-9]+)?") for unit in UNITS)
_WORDS = (
    (r"\%", "%"),
    (r"\$", "$"),
    ("$", ""),
    ("%", ""),
    (" or ", " , "),
    (" and ", " , "),
    ("million", "*10^6"),
    ("billion", "*10^9"),
    ("trillion", "*10^12"),
)
# Symbols as latex2text writes them, and as sympy's parser reads them.
_SYMBOLS = str.maketrans({"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"})


def same_value(given: str, truth: str) -> bool:
    """Whether the answers are one text once LaTeX is read, or element by element the same number or formula."""
    if states_nothing(truth):
        return False
    given, truth = canonical(given), canonical(truth)
    if truth in NOTHING or not given:
        return False
    if given == truth:
        return True
    ours, theirs = elements(given), elements(truth)
    if len(ours) != len(theirs) or (len(theirs) > 1 and (given[0], given[-1]) != (truth[0], truth[-1])):
        return False
    return all(map(_same_element, ours, theirs))


def canonical(answer: str) -> str:
    """Plain text in lower case: without units, dollars, percent signs, spaces or braces, integers as digits."""
    if enclosed := _TEXT.search(answer):
        answer = enclosed[1]
    for old, new in _WORDS:
        answer = answer.replace(old, new)
    for unit in _UNITS:
        answer = unit.sub("", answer)
    answer = re.sub(r"\^ *\\circ", "", answer)
    if answer.startswith("{") and answer.endswith("}"):
        answer = answer[1:-1]
    answer = re.sub(r",\\! *", "", answer)
    if (number := _float(answer)) is not None and _is_integral(number):
        answer = str(round(number))
    if "\\" in answer:
        answer = _plain_text(answer)
    answer = re.sub("- *", "-", answer)
    answer = re.sub("([0-9]) +([0-9])", r"\1+\2", answer)  # mixed numbers: 7 3/4 is 7+3/4
    answer = answer.replace(" ", "").replace("{", "").replace("}", "").lower()
    return str(int(float(answer.replace(",", "")))) if _is_integer(answer) else answer


def _plain_text(latex: str) -> str:
    from pylatexenc.latex2text import LatexNodes2Text

    text = latex.replace(r"\tfrac", r"\frac").replace(r"\dfrac", r"\frac")
    text = text.replace(r"\frac", r" \frac")  # keeps the whole part of a mixed number apart
    try:
        return LatexNodes2Text().latex_to_text(text).translate(_SYMBOLS).strip()
    except MemoryError:  # undecided
        raise
    except Exception:  # LaTeX that it cannot read stays as it is, whatever it raises
        return latex


def elements(text: str) -> list[str]:
    """The parts between the commas of `(1,2)`, `[0,1)` and the like; anything else is one element."""
    text = _join_thousands(text)
    if len(text) > 2 and text[0] in "()[]" and text[-1] in "()[]" and not set("()[]") & set(text[1:-1]):
        return [element.strip() for element in text[1:-1].split(",")]
    return [text] if text else []


def _same_element(given: str, truth: str) -> bool:
    fraction = r"^-?[0-9]+.?/0*[1-9][0-9]*.?$"
    if re.search(fraction, given) and re.search(fraction, truth):
        return given == truth  # 2/4 is not reduced, so it is not 1/2
    if _is_integer(given) != _is_integer(truth):
        return False  # an integer has to be worked out, not left as 2+3
    plain = r"0|-?[1-9][0-9]*"
    if re.fullmatch(plain, given) and re.fullmatch(plain, truth):
        return given == truth
    return _may_be_parsed(f"({truth})-({given})") and _same_formula(
        given.replace("^", "**"), truth.replace("^", "**")
    )


def _may_be_parsed(expression: str) -> bool:
    """Whether it passes the reference's guard: few letters, as words are no formulas; exponents of one digit."""
    letters = {c for c in expression.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    return len(letters) <= MOST_LETTERS and not re.search(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]", expression)


def _join_thousands(text: str) -> str:
    while (joined := re.sub(r"(\d),(\d\d\d)($|\D)", r"\1\2\3", text)) != text:
        text = joined
    return text


def _is_integer(text: str) -> bool:
    number = _float(_join_thousands(text))
    return number is not None and _is_integral(number)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_integral(number: float) -> bool:
    return math.isfinite(number) and abs(number - round(number)) <= INTEGRAL


class Refused(Exception):
    """The expression is not plain arithmetic of a size that a float can hold."""


def _same_formula(given: str, truth: str) -> bool:
    """Whether sympy simplifies the difference of the two to zero.

    The parser turns them into Python; only the arithmetic that `_Numeric` implements is ever evaluated. Formulas that
    differ at a point never reach sympy: nearly all wrong answers end here, harmlessly.

    Each side is read alone, which is a deviation: inside the reference's one text `(truth)-(given)`, the answer
    `1.e30)+(1.e30` closes the bracket, and floats as large as that absorb every truth.
    """
    import mpmath
    import sympy

    try:
        theirs, ours = _parsed(truth), _parsed(given)
        with mpmath.workdps(DIGITS):
            if not all(_agree_at(point, ours, theirs) for point in POINTS):
                return False
        return sympy.simplify(_evaluated(theirs) - _evaluated(ours)) == 0
    except MemoryError:  # undecided
        raise
    except Exception:  # an expression on which sympy fails is not equal, as in the reference
        return False


def _parsed(text: str) -> ast.Expression:
    """The text as Python.

    Raises:
      Refused: if a bracket closes what the text has not opened, or stays open.
    """
    from sympy.parsing import sympy_parser

    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0 or char == "#":  # a comment hides what follows
            raise Refused
    if depth:
        raise Refused
    rules = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)
    code = sympy_parser.stringify_expr(f"({text})", {}, _names(), rules)
    return ast.parse(code.strip(), mode="eval")


def _agree_at(point: float, ours: ast.Expression, theirs: ast.Expression) -> bool:
    """Whether the values differ by no more than a rounding error of the reference's, which has to be a number."""
    number = _Numeric(point)
    truth = number.of(theirs.body)
    error = ZERO * abs(truth) + CANCELED * number.largest
    return bool(abs(truth - number.of(ours.body)) <= error)


def _evaluated(tree: ast.Expression) -> sympy.Expr:
    return eval(compile(tree, "<answer>", "eval"), _names())


@functools.cache
def _names() -> dict[str, object]:
    """The meaning of each word in an expression that is not a symbol."""
    import sympy

    return {"__builtins__": {}} | {name: getattr(sympy, name) for name in sympy.__all__}


class _Numeric:
    """Evaluates parsed text in numbers of `DIGITS` digits, with some value for each symbol."""

    def __init__(self, point: float) -> None:
        self.point, self.largest = point, 0.0
        self.symbols: dict[str, mpf] = {}

    def of(self, node: ast.expr) -> mpc:
        try:
            value = self._value(node)
        except (ArithmeticError, ValueError) as error:
            raise Refused from error
        if not abs(value) <= LARGEST:  # NaN is not
            raise Refused
        self.largest = max(self.largest, abs(value))
        # A rounding error must not choose the branch of a root.
        return value.real if abs(value.imag) <= ROUNDING * abs(value) else value

    def _value(self, node: ast.expr) -> mpc:
        import mpmath

        match node:
            case ast.UnaryOp(ast.USub(), operand):
                return -self.of(operand)
            case ast.UnaryOp(ast.UAdd(), operand):
                return self.of(operand)
            case ast.BinOp(left, ast.Add(), right):
                return self.of(left) + self.of(right)
            case ast.BinOp(left, ast.Sub(), right):
                return self.of(left) - self.of(right)
            case ast.BinOp(left, ast.Mult(), right):
                return self.of(left) * self.of(right)
            case ast.BinOp(left, ast.Div(), right):
                return self.of(left) / self.of(right)
            case ast.BinOp(left, ast.Pow(), right):
                return _power(self.of(left), self.of(right))
            case ast.Name("pi"):
                return +mpmath.pi
            case ast.Name("I"):
                return mpmath.mpc(0, 1)
            case ast.Call(ast.Name("Symbol"), [ast.Constant(str(name))], []):
                return self.symbols.setdefault(name, mpmath.mpf(self.point) * (1 + len(self.symbols) / 3))
            case ast.Call(
                ast.Name("Integer" | "Float" | "Number"), [ast.Constant(str(number) | int(number))], []
            ):
                return mpmath.mpf(number)
            # An integer in an integer comes from repeating decimals.
            case ast.Call(ast.Name("Integer"), [number], []):
                return self.of(number)
            case ast.Call(ast.Name("Rational"), [above, below], []):
                return self.of(above) / self.of(below)
            case ast.Call(ast.Name("sqrt"), [argument], []):
                return mpmath.sqrt(self.of(argument))
            case ast.Call(ast.Name("ln"), [argument], []):
                return mpmath.log(self.of(argument))
            case ast.Call(ast.Name("factorial"), [argument], []):
                return mpmath.gamma(_factor(self.of(argument)) + 1)
            case ast.Call(ast.Name("factorial2"), [argument], []):
                n = _factor(self.of(argument))
                return mpmath.mpf(math.prod(range(int(n), 0, -2))) if n in range(301) else _refuse()
        return _refuse()


def _power(base: mpc, exponent: mpc) -> mpc:
    return base**exponent if abs(exponent) <= LARGEST_EXPONENT else _refuse()


def _factor(value: mpc) -> mpf:
    """The argument of a factorial."""
    return value.real if value.imag == 0 and abs(value) <= LARGEST_FACTORIAL else _refuse()


def _refuse() -> mpc:
    raise Refused
