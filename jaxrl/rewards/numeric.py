"""Values of the formulas of jaxrl.rewards.grammar: exact where they are rational, else of `DIGITS` digits."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias, Union

from jaxrl.rewards.grammar import BASE_OF_LOG, Node, Unreadable

if TYPE_CHECKING:
    from mpmath import mpc, mpf

Value: TypeAlias = Union[Fraction, "mpf", "mpc"]
Point: TypeAlias = dict[str, Fraction]

DIGITS = 60
CLOSE = 1e-30  # relative difference of values that are equal, unless both are exact
CANCELED = 1e-50  # relative to the largest value on the way: what is left of terms that cancel
MOST_BITS = 200_000  # of an exact value; 2024^{4046} has 45,000
LARGEST_EXPONENT = 1_000_000  # in bits of the power, where that is not exact
LARGEST_ARGUMENT = 10_000  # of a factorial
LARGEST_DEGREE = 1_000  # of a root
# Values of the first symbol, on both sides of 1, and the ratio of each symbol's to the one before.
POINTS = (("0.61803", "0.71"), ("2.71043", "1.31"), ("1.37129", "2.13"))
NEGATIVE = ("-1.83179", "1.17")  # counts where both formulas are real there: |x| is not x
WHOLE = (2, 3, 4, 5, 6, 7, 11)  # where there are floors


def same_value(given: Node, truth: Node) -> bool:
    """Whether two formulas have the same value wherever it is looked at.

    Raises:
      Unreadable: if one has no value of manageable size.
    """
    names = sorted(symbols(truth) | symbols(given))
    if symbols(given) - symbols(truth) - {BASE_OF_LOG}:
        return False
    if not names:
        return _agree(given, truth, {}, False)
    if _rounds(given) or _rounds(truth):
        found = [_agree_there(given, truth, point) for point in _whole_points(names)]
    else:
        found = [_agree_there(given, truth, _point(names, *at)) for at in POINTS]
        found.append(_agree_there(given, truth, _point(names, *NEGATIVE), real=True))
    return False not in found and found.count(True) >= 2


def factor(given: Node, truth: Node) -> Value | None:
    """The constant by which `truth` is multiplied in `given`; None if there is none or it is 0.

    Raises:
      Unreadable: if one has no value of manageable size.
    """
    names = sorted(symbols(truth))
    if symbols(given) != set(names) or not names:
        return None
    point = _point(names, *POINTS[0])
    above, below = value(given, point), value(truth, point)
    if not above or not below:
        return None
    ratio = _quotient(above, below)
    return ratio if same_value(given, ("mul", ("value", ratio), truth)) else None


def value(tree: Node, point: Point | None = None) -> Value:
    """The value of a formula; `point` has those of its symbols.

    Raises:
      Unreadable: if it has none of manageable size.
    """
    import mpmath

    with mpmath.workdps(DIGITS):
        return _Evaluation(point or {}, False).of(tree)


def as_float(number: Value) -> mpf | mpc:
    """The value in mpmath's numbers."""
    import mpmath

    return mpmath.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


def symbols(tree: Node) -> set[str]:
    """The names of a formula's symbols."""
    if tree[:1] == ("symbol",):
        return {tree[1]}
    return {name for part in tree if isinstance(part, tuple) for name in symbols(part)}


def _rounds(tree: Node) -> bool:
    return tree[1:2] in (("floor",), ("ceil",)) or any(
        _rounds(part) for part in tree if isinstance(part, tuple)
    )


def _point(names: list[str], first: str, step: str) -> Point:
    return {name: Fraction(first) * Fraction(step) ** i for i, name in enumerate(names)}


def _whole_points(names: list[str]) -> list[Point]:
    return [{name: Fraction(n + i * step) for i, name in enumerate(names)} for n in WHOLE for step in (1, 2)]


def _agree_there(given: Node, truth: Node, point: Point, real: bool = False) -> bool | None:
    """Whether two formulas agree at a point; None where one has no value, or with `real` none that is real."""
    try:
        return _agree(given, truth, point, real)
    except Unreadable:
        return None


def _agree(given: Node, truth: Node, point: Point, real: bool) -> bool:
    import mpmath

    with mpmath.workdps(DIGITS):
        theirs, ours = _Evaluation(point, real), _Evaluation(point, real)
        right, found = theirs.of(truth), ours.of(given)
        if isinstance(right, Fraction) and isinstance(found, Fraction):
            return right == found
        error = CLOSE * abs(as_float(right)) + CANCELED * max(ours.largest, theirs.largest)
        return bool(abs(as_float(right) - as_float(found)) <= error)


class _Evaluation:
    """Computes the value of a formula at a point."""

    def __init__(self, point: Point, real: bool) -> None:
        """Takes the symbols' values; with `real`, a value on the way that is not real is an error."""
        self.point, self.real = point, real
        self.largest: float | mpf = 0.0  # on the way

    def of(self, tree: Node) -> Value:
        try:
            found = self._value(tree)
            if isinstance(found, Fraction):
                _require_size(max(found.numerator.bit_length(), found.denominator.bit_length()))
                return found
            return self._checked(found)
        except (ArithmeticError, ValueError, TypeError, KeyError) as error:
            raise Unreadable(str(error)) from error

    def _checked(self, found: mpf | mpc) -> mpf | mpc:
        import mpmath

        if not mpmath.isfinite(found):
            raise Unreadable("not a number")
        self.largest = max(self.largest, abs(found))
        if abs(found.imag) <= CLOSE * abs(found):  # a rounding error must not choose the branch of a root
            return found.real
        if self.real:
            raise Unreadable("not real")
        return found

    def _value(self, tree: Node) -> Value:
        import mpmath

        match tree:
            case ("number", number, _) | ("value", number):
                return number
            case ("symbol", name):
                return self.point[name]
            case ("constant", name):
                return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[name]
            case ("neg", a):
                return -self.of(a)
            case ("add", a, b):
                left, right = _alike(self.of(a), self.of(b))
                return left + right
            case ("mul", a, b):
                left, right = _alike(self.of(a), self.of(b))
                return left * right
            case ("div", a, b):
                return _quotient(self.of(a), self.of(b))
            case ("pow", a, b):
                return _power(self.of(a), self.of(b))
            case ("root", a, n):
                return _root(self.of(a), self.of(n))
            case ("degrees", a):
                return as_float(self.of(a)) * mpmath.pi / 180
            case ("factorial", a, step):
                return _factorial(self.of(a), step)
            case ("binomial", n, k):
                return _binomial(self.of(n), self.of(k))
            case ("log", a, base):
                return mpmath.log(as_float(self.of(a))) / mpmath.log(as_float(self.of(base)))
            case ("call", "abs", a):
                return abs(self.of(a))
            case ("call", "floor", a):
                return Fraction(math.floor(_nearly_whole(self.of(a))))
            case ("call", "ceil", a):
                return Fraction(math.ceil(_nearly_whole(self.of(a))))
            case ("call", name, a):
                return getattr(mpmath, _MPMATH.get(str(name), str(name)))(_modest(as_float(self.of(a))))
        raise Unreadable(str(tree[0]))


_MPMATH = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}  # where mpmath has another name


def _alike(a: Value, b: Value) -> tuple[Value, Value]:
    """Both exact, or none."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a, b
    return as_float(a), as_float(b)


def _quotient(a: Value, b: Value) -> Value:
    above, below = _alike(a, b)
    return above / below


def _modest(number: mpf | mpc) -> mpf | mpc:
    """A function's argument; the value at a huge one would take huge numbers to compute."""
    if abs(number) > LARGEST_EXPONENT:
        raise Unreadable("too large")
    return number


def _require_size(bits: Fraction | int) -> None:
    if bits > MOST_BITS:
        raise Unreadable("too large")


def _power(base: Value, exponent: Value) -> Value:
    import mpmath

    if not base and (exponent.real <= 0 or exponent.imag):
        raise Unreadable("0^0")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if 1 < exponent.denominator <= LARGEST_DEGREE:
            return _root(_power(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
        if exponent.denominator == 1:
            if abs(base) == 1:
                return base ** (int(exponent) % 2)
            _require_size(
                max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) * (base != 0)
            )
            return base ** int(exponent)
    number, power = as_float(base), as_float(exponent)
    if number and abs(power) * (1 + abs(mpmath.log(number))) > LARGEST_EXPONENT:
        raise Unreadable("too large")
    return number**power


def _root(base: Value, degree: Value) -> Value:
    """The real root of a real number where there is one, exact if it is rational; else the principal one."""
    import mpmath

    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 0 < degree <= LARGEST_DEGREE:
        raise Unreadable("a root of no whole degree")
    n = int(degree)
    if isinstance(base, Fraction):
        if base < 0 and n % 2:
            return -_root(-base, degree)
        if base >= 0:
            above, below = _whole_root(base.numerator, n), _whole_root(base.denominator, n)
            if above is not None and below is not None:
                return Fraction(above, below)
    number = as_float(base)
    if n % 2 and number.imag == 0 and number.real < 0:
        return -mpmath.root(-number, n)
    return mpmath.root(number, n)


def _whole_root(number: int, n: int) -> int | None:
    """The integer whose n-th power the number is."""
    import mpmath

    with mpmath.workprec(number.bit_length() // n + 64):
        guess = int(mpmath.nint(mpmath.root(number, n)))
    return guess if guess**n == number else None


def _nearly_whole(number: Value) -> Fraction:
    """A real number, as the integer that it is but for a rounding error."""
    import mpmath

    if isinstance(number, Fraction):
        return number
    if number.imag or abs(number) > 10**DIGITS:
        raise Unreadable("a floor of no real number")
    nearest = mpmath.nint(number.real)
    if abs(nearest - number.real) <= CLOSE * max(1, abs(nearest)):
        return Fraction(int(nearest))
    return Fraction(int(mpmath.floor(number.real * 2**64)), 2**64)


def _factorial(number: Value, step: int) -> Value:
    import mpmath

    if abs(number) > LARGEST_ARGUMENT:
        raise Unreadable("too large")
    if isinstance(number, Fraction) and number.denominator == 1 and number >= 0:
        n = int(number)
        return Fraction(math.factorial(n) if step == 1 else math.prod(range(n, 0, -2)))
    return mpmath.factorial(as_float(number)) if step == 1 else mpmath.fac2(as_float(number))


def _binomial(n: Value, k: Value) -> Value:
    import mpmath

    if abs(n) > LARGEST_ARGUMENT or abs(k) > LARGEST_ARGUMENT:
        raise Unreadable("too large")
    if (
        isinstance(n, Fraction)
        and isinstance(k, Fraction)
        and n.denominator == k.denominator == 1
        and n >= 0 <= k
    ):
        return Fraction(math.comb(int(n), int(k)))
    return mpmath.binomial(as_float(n), as_float(k))
