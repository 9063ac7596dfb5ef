r"""The corrected rules: whether two answers mean the same, and the verifier that trains with them.

The released rules (`latex_equality`) repeat a reference grader, faults included; these are for the truth. An answer is
read as a whole by a grammar of its own (`grammar`): formulas, lists, sets, tuples, intervals, matrices, relations,
quantities, words. What that cannot read equals only the same tokens. Nothing is picked out of a text, so a hedge stays
what it is. Formulas are equal if their values are (`numeric`). docs/grading.md has the choices.

`same` can be much work, so call it through `jaxrl.rewards.sandbox`, which limits it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

from jaxrl.rewards import sandbox
from jaxrl.rewards.grammar import Node, Unreadable, may_be_unit, read, tokens
from jaxrl.rewards.latex_equality import last_box, reference
from jaxrl.rewards.nothing import states_nothing
from jaxrl.rewards.numeric import as_float, factor, same_value, symbols, value
from jaxrl.rewards.strict_boxed import group_from

Rows: TypeAlias = tuple[tuple[Node, ...], ...]

MOST_ITEMS = 100  # of a list
_STYLE = re.compile(
    r"\\(?:boxed|text|textbf|textit|textrm|mathrm|mathbf|boldsymbol|underline|(?:text)?color\s*\{[a-z]+\})\s*\{"
)
ROUNDED = 3  # significant digits from which on a decimal reference may be a rounded value


def corrected(response: str, ground_truth: str) -> float:
    """+1.0 if the last box of the response, thoughts included, means the same as `ground_truth`, else -1.0."""
    answer, truth = extract(response), reference(ground_truth)
    if answer is None or truth is None:
        return -1.0
    spelled = answer == truth and not states_nothing(truth)  # most right answers, without a worker
    return 1.0 if spelled or sandbox.compare("corrected", answer, truth) else -1.0


def extract(response: str) -> str | None:
    """The content of the last box; None if there is none or its braces do not balance."""
    return last_box(response)


def same(given: str, truth: str) -> bool:
    """Whether the answer means what the reference does. It is not symmetric: the reference sets the form."""
    if states_nothing(truth) or not given.strip():
        return False
    given, truth = _unstyled(given), _unstyled(truth)
    try:
        if tokens(given) == tokens(truth) or _same_words(given, truth) or _decimal_comma(given, truth):
            return True
        if _same(_read(given), _read(truth)):
            return True
        # A reference such as 100,225 is a number, and may also be a list.
        return not re.search(r",0\d", truth) and _both_lists(_read(given, False), _read(truth, False))
    except (Unreadable, RecursionError):
        return given.replace("$", " ").split() == truth.replace("$", " ").split() != []


def _unstyled(answer: str) -> str:
    """The answer without a box, a font, a color or a line below around the whole of it."""
    answer = answer.strip()
    while (match := _STYLE.match(answer)) and group_from(answer, match.end()) == answer[match.end() : -1]:
        answer = answer[match.end() : -1].strip()
    return answer


def _same_words(given: str, truth: str) -> bool:
    """Whether both are the same words, in `\\text` or not, capitalized or not."""
    ours, theirs = _words(given), _words(truth)
    if not ours or not theirs or ours.lower() != theirs.lower():
        return False
    return ours == theirs or "\\text" in given + truth or not {ours, theirs} & {ours.upper()}


def _words(answer: str) -> str:
    plain = re.sub(
        r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer.strip().strip("$")
    )
    plain = " ".join(plain.split()).rstrip(".")
    return plain if re.fullmatch(r"[A-Za-z][A-Za-z' -]+", plain) else ""


def _decimal_comma(given: str, truth: str) -> bool:
    """Whether one is 1,5 and the other 1.5."""
    return any(
        re.fullmatch(r"-?\d+,\d+", a) and a.replace(",", ".") == b
        for a, b in ((given, truth), (truth, given))
    )


def _read(answer: str, thousands: bool = True) -> Node:
    return _plain(read(answer, thousands))


def _both_lists(given: Node, truth: Node) -> bool:
    return truth[0] == "list" and given[0] in ("list", "set") and _same(given, truth)


def _plain(tree: Node) -> Node:
    r"""The tree with one list for nested ones and for `\pm`, and without `x \in`."""
    match tree:
        case ("list", items, only_commas):
            return ("list", _flat(items), only_commas)
        case ("set", items):
            return ("set", _flat(items))
        case ("tuple", opening, closing, items):
            return ("tuple", opening, closing, tuple(map(_plain, items)))
        case ("union", parts):
            return ("union", tuple(map(_plain, parts)))
        case ("relation", ("\\in",), (_, right)):
            return _plain(right)
    if rows := _matrix(tree):
        return ("matrix", rows)
    if _has_sign(tree):
        return ("list", tuple(_plain(_with_sign(tree, sign)) for sign in (1, -1)), True)
    if tree[0] == "relation":
        return ("relation", tree[1], tuple(map(_plain, tree[2])))
    return tree


def _flat(items: Sequence[Node]) -> tuple[Node, ...]:
    plain = map(_plain, items)
    return tuple(part for item in plain for part in (item[1] if item[0] == "list" else (item,)))


def _matrix(tree: Node) -> Rows | None:
    """The rows of a matrix, of a multiple of one, of a sum or a product of two; None for anything else."""
    if tree[0] == "matrix":
        return tree[1]
    if tree[0] == "neg":
        return _each(_matrix(tree[1]), lambda x: ("neg", x))
    if tree[0] not in ("add", "mul", "div"):
        return None
    (kind, a, b), left, right = tree, _matrix(tree[1]), _matrix(tree[2])
    if not left or not right:
        if kind == "mul" and right:
            return _each(right, lambda x: ("mul", a, x))
        return _each(left, lambda x: (kind, x, b)) if kind != "add" else None
    if kind == "add" and [*map(len, left)] == [*map(len, right)]:
        return tuple(tuple(map(_sum, *rows)) for rows in zip(left, right, strict=True))
    if kind == "mul" and {*map(len, left)} == {len(right)}:
        columns = tuple(zip(*right, strict=False))
        return tuple(tuple(_dot(row, column) for column in columns) for row in left)
    return None


def _each(rows: Rows | None, change: Callable[[Node], Node]) -> Rows | None:
    return rows and tuple(tuple(map(change, row)) for row in rows)


def _sum(a: Node, b: Node) -> Node:
    return ("add", a, b)


def _dot(row: Sequence[Node], column: Sequence[Node]) -> Node:
    return functools.reduce(_sum, (("mul", a, b) for a, b in zip(row, column, strict=True)))


def _has_sign(tree: Node) -> bool:
    return tree[:1] == ("pm",) or any(_has_sign(part) for part in tree if isinstance(part, tuple))


def _with_sign(tree: Node, sign: int) -> Node:
    if tree[:1] == ("pm",):
        inner = _with_sign(tree[2], sign)
        return inner if tree[1] == sign else ("neg", inner)
    return tuple(_with_sign(part, sign) if isinstance(part, tuple) else part for part in tree)


def _same(given: Node, truth: Node) -> bool:
    if "relation" in (given[0], truth[0]):
        return _same_relation(given, truth)
    if "quantity" in (given[0], truth[0]):
        return _same_quantity(given, truth)
    match given, truth:
        case ("tuple", opening, closing, ours), ("tuple", opens, closes, theirs):
            return (opening, closing) == (opens, closes) and _in_order(ours, theirs)
        case ("list", ours, True), ("tuple", "(", ")", theirs):
            return _in_order(ours, theirs)
        case ("tuple", "(", ")", ours), ("list", theirs, True):
            return _in_order(ours, theirs)
        case ("list" | "set", ours, *_), ("list" | "set", theirs, *_):
            return _in_any_order(ours, theirs)
        case ("union", ours), ("union", theirs):
            return _in_any_order(ours, theirs)
        case ("set", (one,)), _:
            return _same(one, truth)
        case _, ("set", (one,)):
            return _same(given, one)
        case ("matrix", ours), ("matrix", theirs):
            return len(ours) == len(theirs) and all(map(_in_order, ours, theirs))
        case ("time" | "ratio", ours), ("time", theirs):
            return _in_order(ours, theirs)
        case ("time" | "ratio", ours), ("ratio", theirs):
            return len(ours) == len(theirs) and all(
                _same_number(("mul", a, theirs[0]), ("mul", b, ours[0]))
                for a, b in zip(ours, theirs, strict=True)
            )
        case _, ("ratio", (above, below)):
            return _same_number(given, ("div", above, below))
        case ("ratio", (above, below)), _:
            return _same_number(("div", above, below), truth)
    return _same_number(given, truth)


def _in_order(ours: Sequence[Node], theirs: Sequence[Node]) -> bool:
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _in_any_order(ours: Sequence[Node], theirs: Sequence[Node]) -> bool:
    """Whether each of theirs has one of ours, and none of ours is left, unless it repeats another."""
    if max(len(ours), len(theirs)) > MOST_ITEMS:
        return False
    if len({name for item in theirs if (name := _name(item))}) > 1 and not any(map(_name, ours)):
        return _in_order(ours, theirs)  # x=5, y=2 is not 2, 5
    left = list(ours)
    for truth in theirs:
        match = next((i for i, item in enumerate(left) if _same(item, truth)), None)
        if match is None:
            return False
        del left[match]
    return all(any(_same(item, truth) for truth in theirs) for item in left)


def _name(item: Node) -> Node | None:
    """The left side of `x=5`."""
    return item[2][0] if item[0] == "relation" else None


def _same_relation(given: Node, truth: Node) -> bool:
    ours, theirs = _assignment(given, _is_name), _assignment(truth, _may_be_left_out)
    if ours and theirs and (ours[0] == theirs[0] or None in (ours[0], theirs[0])):
        return _same(ours[1], theirs[1])
    if truth[0] != "relation":
        return _same(ours[1], truth) if ours else _same_interval(_interval(given), truth)
    if given[0] != "relation":
        return _same(given, theirs[1]) if theirs else _same_interval(given, _interval(truth))
    if theirs and theirs[0] and _is_name(theirs[0]) and not symbols(theirs[1]):
        return False  # 2x=10 is not x=5
    return _same_relations(_differences(given), _differences(truth))


def _assignment(tree: Node, is_left: Callable[[Node], bool]) -> tuple[Node | None, Node] | None:
    """The left side and the value of `x=5`, `x=2+3=5`, `2+3=5` (no left side) and of what is no relation.

    None for other relations, such as `x=5=6` and `x=x`.
    """
    if tree[0] != "relation":
        return None, tree
    operators, sides = tree[1], tree[2]
    if len(sides) > 2 and operators[-1] == "\\approx" and _is_rounded(sides[-1], sides[-2]):
        operators, sides = operators[:-1], sides[:-1]
    if set(operators) - {"="} and (operators != ("\\approx",) or not is_left(sides[0])):
        return None
    if len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):
        sides = sides[::-1]
    left, values = (sides[0], sides[1:]) if is_left(sides[0]) else (None, sides)
    consistent = all(_same(a, b) for a, b in itertools.pairwise(values))
    if not consistent or (left and symbols(left) & symbols(values[-1])):
        return None
    return left, values[-1]


def _is_rounded(decimal: Node, exact: Node) -> bool:
    return decimal[0] == "number" and bool(decimal[2]) and _rounds_to(exact, decimal)


def _is_name(side: Node) -> bool:
    """Whether it is a symbol, or a tuple of them."""
    return side[0] == "symbol" or (side[0] == "tuple" and all(map(_is_name, side[3])))


def _may_be_left_out(side: Node) -> bool:
    """Whether a reference's left side only names what is asked: `AB`, `|z|`, `S:T`, but not `2x+y`."""
    return bool(symbols(side)) and not _kinds(side) & {"number", "add", "neg", "constant"}


def _kinds(tree: Node) -> set[str]:
    return set(tree[:1]).union(*(_kinds(part) for part in tree if isinstance(part, tuple)))


Difference = tuple[str, Node]


def _differences(relation: Node) -> list[Difference]:
    """Each `a < b` of a chain as ("<", a - b), and `a > b` as ("<", b - a)."""
    found, turned = list[Difference](), {">": "<", "\\ge": "\\le"}
    for operator, (a, b) in zip(relation[1], itertools.pairwise(relation[2]), strict=True):
        left, right = (b, a) if operator in turned else (a, b)
        found.append((turned.get(operator, operator), ("add", left, ("neg", right))))
    return found


def _same_relations(ours: list[Difference], theirs: list[Difference]) -> bool:
    """Whether each of theirs is one of ours, times a constant that is positive or does not matter."""
    if len(ours) != len(theirs):
        return False
    return all(any(_same_difference(a, b) for a in ours) for b in theirs)


def _same_difference(given: Difference, truth: Difference) -> bool:
    if given[0] != truth[0] or given[0] == "\\approx":
        return False
    ratio = as_float(times) if (times := factor(given[1], truth[1])) is not None else None
    return ratio is not None and (given[0] in ("=", "\\ne") or (ratio.imag == 0 and ratio.real > 0))


def _interval(relation: Node) -> Node | None:
    """The interval of `0 < x \\le 1`, `x > 3` and the like, for one symbol."""
    operators, sides = relation[1], relation[2]
    if set(operators) <= {">", "\\ge"}:
        opposite = {">": "<", "\\ge": "\\le"}
        operators, sides = tuple(opposite[o] for o in reversed(operators)), sides[::-1]
    infinity: Node = ("inf",)
    match operators, sides:
        case (("<" | "\\le") as a, ("<" | "\\le") as b), (low, ("symbol", _), high):
            ends = "[" if a == "\\le" else "(", "]" if b == "\\le" else ")"
        case (("<" | "\\le") as a,), (low, ("symbol", _)):
            ends, high = ("[" if a == "\\le" else "(", ")"), infinity
        case (("<" | "\\le") as a,), (("symbol", _), high):
            ends, low = ("(", "]" if a == "\\le" else ")"), ("neg", infinity)
        case _:
            return None
    return ("tuple", *ends, (low, high))


def _same_interval(given: Node | None, truth: Node | None) -> bool:
    return bool(given and truth and given[0] == truth[0] == "tuple" and _same(given, truth))


def _same_quantity(given: Node, truth: Node) -> bool:
    """Equal amounts, in one unit or with none on one side; 50% is also 0.5 on the other."""
    (ours, unit), (theirs, wanted) = _amount(given), _amount(truth)
    if unit and wanted:
        return unit == wanted and _same(ours, theirs)
    if unit and not may_be_unit(unit):
        return False
    if _same(ours, theirs):
        return True
    if unit == "percent":
        return _same(("div", ours, ("number", Fraction(100), None)), theirs)
    return wanted == "percent" and _same(ours, ("div", theirs, ("number", Fraction(100), None)))


def _amount(tree: Node) -> tuple[Node, str]:
    return (tree[1], tree[2]) if tree[0] == "quantity" else (tree, "")


def _same_number(given: Node, truth: Node) -> bool:
    """Equal words, digits of a base, infinities or values."""
    if given == truth:
        return True
    try:
        return same_value(given, truth) or (_is_exact(given) and _rounds_to(given, truth))
    except Unreadable:
        return False


def _is_exact(tree: Node) -> bool:
    """Whether there is no decimal in the formula."""
    if tree[:1] == ("number",):
        return tree[2] is None
    return all(_is_exact(part) for part in tree if isinstance(part, tuple))


def _rounds_to(exact: Node, decimal: Node) -> bool:
    """Whether the decimal, of enough digits, is the value of the formula, rounded."""
    inner = decimal[1] if decimal[0] == "neg" else decimal
    if inner[0] != "number" or not inner[2] or symbols(exact):
        return False
    if abs(inner[1]) * 10 ** inner[2] < 10 ** (ROUNDED - 1):
        return False
    difference = as_float(value(exact)) - as_float(value(decimal))
    return bool(abs(difference) <= as_float(Fraction(1, 2 * 10 ** inner[2])))
