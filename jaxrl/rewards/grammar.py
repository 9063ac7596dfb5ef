r"""The grammar of answers for the corrected rules: from the text of a box to a tree.

A tree is a tuple of a kind and its parts:

    ("number", Fraction, decimals or None)   ("based", digits, base)      ("symbol", name)     ("inf",)
    ("neg", a) ("add", a, b) ("mul", a, b) ("div", a, b) ("pow", a, b)    ("pm", sign, a)      ("degrees", a)
    ("call", function, a)   ("log", a, base)   ("root", a, n)             ("factorial", a, 1 or 2)   ("binomial", n, k)
    ("list", items, only commas) ("set", items) ("tuple", open, close, items) ("union", parts) ("matrix", rows)
    ("relation", operators, sides)   ("ratio", parts)   ("time", parts)   ("quantity", a, unit)   ("words", text)
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any, TypeAlias  # noqa: TID251  # kinds have parts of many types

Node: TypeAlias = tuple[Any, ...]

LARGEST_SCALE = 3000  # of 1e3000
BASE_OF_LOG = "the base of log"  # the symbol for that of a mere \\log: e to some, 10 to others
MOST_WORDS = 4  # of a unit
FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"),
    *("ln", "exp", "log"),
)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CURRENCIES = {"\\$": "dollar", "€": "euro", "£": "pound", "\\pounds": "pound", "¥": "yuan", "₹": "rupee"}
_SIGNS = {"%": "percent", "\\%": "percent", "\\degrees": "degree"} | CURRENCIES
# The name of a unit and its other spellings; plurals are removed before.
_UNITS = """
    meter metre m; centimeter cm; millimeter mm; kilometer km; mile mi; foot feet ft; inch in; yard yd; second sec s;
    minute min; hour hr h; day; week; month; year yr; mile/hour mph; gram g; kilogram kg; milligram mg; pound lb;
    ounce oz; liter litre l; milliliter ml; degree deg; radian rad; percent pct percentage; dollar; cent; unit; way
"""
_NAME = {word: line.split()[0] for line in _UNITS.split(";") for word in line.split()}
_WRITTEN_OUT = {  # what is a unit outside of \text too, and no product of symbols
    word + end for word in _NAME if len(word) > 1 and word not in ("in", "rad") for end in ("", "s", "es")
}
_NO_UNITS = re.compile(  # words that change what an amount means
    r"\b(about|above|all|almost|and|any|approximately|at|below|but|dozen|double|each|either|except|half|i|if|incorrect|"
    r"instead|is|least|less?|more|most|never|no|none|nor|not|one|or|other|over|quarter|roughly|several|short|so|some|"
    r"than|then|to|too|twice|two|under|unless?|until|up|was|we|wrong|you|zero|three|four|five|six|seven|eight|nine|"
    r"ten)\b"
)
# A spelling, and the characters that it replaces.
_SAME = r"""
    - −–—﹣－; * ×·⋅∗; / ÷⁄∕; ' ′; ^{2} ²; ^{3} ³; % ％; \$ ＄; ( ⟨〈; ) ⟩〉; \sqrt √; \infty ∞; \le ≤⩽; \ge ≥⩾; \ne ≠;
    \approx ≈; \cup ∪; \in ∈; \pm ±; \mp ∓; \degrees °; \emptyset ∅Ø
"""
_UNICODE = str.maketrans(
    {
        char: new + " " * (new[:1] == "\\" != new[-1])
        for new, old in map(str.split, _SAME.split(";"))
        for char in old
    }
    | dict.fromkeys("\xa0\u2002\u2003\u2009\u202f", " ")
    | {chr(0xFEE0 + ord(char)): char for char in "0123456789(),.:+="}  # of full width
    | {char: f"\\{unicodedata.name(char).split()[-1].lower()} " for char in "αβγδεζηθικλμνξπρστυφχψω"}
)
_RESPELLED = tuple(
    (re.compile(pattern.replace("~~", "(?![A-Za-z])")), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)~~\.?", ""),
        (r"(?<!\\)\\(?:[()\[\]]|$)", " "),
        (r"\\\\\s*\[\d+(?:pt|ex|em|mm|cm)\]", r"\\\\"),
        (r"^\s*=(?![=>])", ""),
        (r"\\[dtc]frac~~", r"\\frac"),
        (r"\\[dt]binom~~", r"\\binom"),
        (r"(?<=\d)\s*(?:\{,\s*\}|,\\[!,]|\\,|~)\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<![\d.,])(\d{1,3}) (?=\d{3}(?!\d))", r"\1"),
        (r"\{:\}|\\colon~~", ":"),
        (r"(?<!\\)\\(?:q?quad|[,;:!> ])|~", " "),
        (r"\\lbrace~~", r"\\{"),
        (r"\\rbrace~~", r"\\}"),
        (r"\\[lr]vert~~|\\mid~~", "|"),
        (r"\\langle~~", "("),
        (r"\\rangle~~", ")"),
        (r"\\leq(?:slant)?~~|<=", r"\\le "),
        (r"\\geq(?:slant)?~~|>=", r"\\ge "),
        (r"\\neq~~|!=", r"\\ne "),
        (r"\\lt~~", "<"),
        (r"\\gt~~", ">"),
        (r":=|==", "="),
        (r"\*\*", "^"),
        (r"\\(?:text)?degree~~|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ~~", r"\\degrees "),
        (r"\^\s*\{?\s*\\prime~~\s*\}?", "'"),
        (r"(?<=\d)\s*\^?\s*\{?(?:\\(?:text|mathrm|mbox)\s*\{)?(?<!\d )(?:st|nd|rd|th)~~\}?\}?", ""),  # 5th
        (r"\\(?:mathrm|mathit|mathbf|mathsf|boldsymbol|operatorname)\s*\{\s*([A-Za-z])\s*\}", r" \1 "),
        (r"\\operatorname\*?\s*\{([a-z]+)\}", r"\\\1 "),
        (r"\\(?:text(?:bf|it|rm|normal)|mbox|hbox|mathrm|mathbf)~~", r"\\text"),
    )
)
_TOKEN = re.compile(
    r"\s+|(?P<number>(?:\d+(?:\.\d+|\.(?=\s*(?:[-+*/eE]|\\overline|\\bar|$)))?|\.\d+)"
    r"(?:[eE][+-]?\d+(?![\d.A-Za-z]))?)|(?P<text>\\text\s*\{[^{}]*\})"
    r"|(?P<environment>\\(?:begin|end)\s*\{[a-z]+\*?\})|(?P<command>\\[A-Za-z]+)|(?P<escaped>\\[\\{}$%&#_|])"
    r"|(?P<word>[A-Za-z]+)|(?P<other>[-+*/^_!|'=<>(),;:\[\]{}%€£¥₹&])"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_WORDS = {"pi": "\\pi", "sqrt": "\\sqrt", **dict.fromkeys(("infty", "inf", "infinity", "oo"), "\\infty")}
_LISTED = ("and", "or", ",", ";")
_RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx", "\\in")
_MATRICES = ("pmatrix", "bmatrix", "matrix", "Bmatrix", "array")
_ACCENT = re.compile(r"\\(dot|ddot|hat|vec|tilde|bar|overline|angle|triangle)")
_SYMBOL = re.compile(
    r"[A-Za-z]|\\(alpha|beta|gamma|delta|(var)?epsilon|zeta|eta|(var)?theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|"
    r"upsilon|(var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|hbar|ell|odot)"
)
_BEFORE_FACTOR = re.compile(r"[(\[]|\\(pi|frac|sqrt|binom|lfloor|lceil|begin.*)")


class Unreadable(ValueError):
    """The text is not in the grammar, or has no value of manageable size."""


def tokens(text: str, thousands: bool = True) -> list[str]:
    """The answer's tokens, without TeX's choices of size and spacing, in one spelling.

    Args:
      text: the answer, as in the box.
      thousands: whether `1,234` outside of brackets is one number.

    Raises:
      Unreadable: at a character that no answer has.
    """
    text = text.strip().translate(_UNICODE)
    if "\\begin" not in text:  # whose rows end with two backslashes
        text = re.sub(r"\\{2}(?=[A-Za-z])", r"\\", text)
    for pattern, replacement in _RESPELLED:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<!\\)\$", " ", text).strip().rstrip(".,;").strip()
    if thousands:
        text = _join_thousands(text)
    found, at = list[str](), 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise Unreadable(text[at])
        at = match.end()
        if match["word"]:
            found += _words(match["word"])
        elif match["text"]:
            found += _in_text(match["text"][match["text"].index("{") + 1 : -1])
        elif match.lastgroup:
            found.append(re.sub(r"\s", "", match[0]))
    return found


def _join_thousands(text: str) -> str:
    depth, parts = 0, list[str]()
    for part in re.split(r"(\\?[()\[\]{}])", text):
        depth += (part[-1:] in ("(", "[", "{")) - (part[-1:] in (")", "]", "}"))
        parts.append(part if depth else _THOUSANDS.sub(lambda match: match[0].replace(",", ""), part))
    return "".join(parts)


def _words(run: str) -> list[str]:
    """A run of letters: a function, a connective, a unit, or symbols of one letter."""
    if run in FUNCTIONS:
        return ["\\" + run]
    if run in _LISTED:
        return [run]
    if run in SCALES or run.lower() in _WRITTEN_OUT:
        return [f"\\text{{{run}}}"]
    word = run if run.isupper() else run.lower()
    return [_WORDS[word]] if word in _WORDS else list(run)


def _in_text(inner: str) -> list[str]:
    r"""`\text{ and }` is a connective, `\text{\$}` a sign, `\text{5}` a number; any other text is one token."""
    inner = " ".join(inner.split()).strip(", ")
    if inner.lower() in _LISTED:
        return [inner.lower()]
    if inner in (*CURRENCIES, "%", "\\%") or re.fullmatch(r"\d+(\.\d+)?", inner):
        return [inner]
    return [f"\\text{{{inner}}}"] if inner else []


def unit(words: str) -> str:
    """One name for a unit: `cm`, `centimeters` and `centimeter` are the same, as are `square cm` and `cm^2`."""
    words = re.sub(r"[.{}]", "", words.lower()).strip()
    for power, prefix in (("2", "square|sq"), ("3", "cubic|cu")):
        words = re.sub(rf"^(?:{prefix}) ([a-z]+)$", rf"\1^{power}", words)
    return "".join(map(_singular, re.split(r"( per |\s*/\s*| |\^)", words)))


def _singular(word: str) -> str:
    for candidate in (word, word.removesuffix("s"), word.removesuffix("es")):
        if candidate in _NAME:
            return _NAME[candidate]
    return "/" if word == " per " else word.strip().removesuffix("s") if word != " " else word


def may_be_unit(name: str) -> bool:
    """Whether words behind an amount only name what is counted: `meals`, but not `or so`."""
    return len(re.split("[ /]", name)) <= MOST_WORDS and not _NO_UNITS.search(name)


def read(text: str, thousands: bool = True) -> Node:
    """The tree of an answer.

    Raises:
      Unreadable: if it is not in the grammar.
    """
    found = tokens(text, thousands)
    parser = _Parser(found)
    tree = parser.answer()
    if parser.at < len(found):
        raise Unreadable(found[parser.at])
    return tree


class _Parser:
    """Recursive descent; each method reads one construct from `at` on."""

    def __init__(self, found: list[str]) -> None:
        self.tokens, self.at = found, 0
        self.bars = 0  # of absolute values that are open
        self.in_function = 0  # functions around: degrees are a factor in them, elsewhere a unit

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.peek()
        if not token or (wanted and token not in wanted):
            raise Unreadable(token)
        self.at += 1
        return token

    def skip(self, *wanted: str) -> str:
        """Takes one of these tokens if it is next."""
        return self.take() if self.peek() in wanted and self.peek() else ""

    def answer(self) -> Node:
        """A list, or what stands alone."""
        groups, separators = [[self.item()]], set[str]()
        while self.peek() in _LISTED:
            separators.add(separator := self.take())
            while self.peek() in ("and", "or", ","):  # an Oxford comma
                self.take()
            if separator == ";":
                groups.append([])
            groups[-1].append(self.item())
        if separators == {",", ";"}:  # p=5, q=2; p=7, q=2
            return ("list", tuple(("tuple", "(", ")", tuple(group)) for group in groups), True)
        items = tuple(item for group in groups for item in group)
        return ("list", items, separators <= {",", ";"}) if separators else items[0]

    def item(self) -> Node:
        """A chain of relations, or what stands on one side."""
        sides, operators = [self.side()], list[str]()
        while self.peek() in _RELATIONS:
            operators.append(self.take())
            sides.append(self.side())
        return ("relation", tuple(operators), tuple(sides)) if operators else sides[0]

    def side(self) -> Node:
        """A union, a ratio, a quantity or a formula."""
        start, parts = self.at, [self.quantity()]
        if separator := self.peek() if self.peek() in ("\\cup", ":") else "":
            while self.skip(separator):
                parts.append(self.quantity())
        if not separator:
            return parts[0]
        if separator == "\\cup":
            return ("union", tuple(parts))
        kind = "time" if re.match(r"\d+:\d\d(?!\d)", "".join(self.tokens[start : self.at])) else "ratio"
        if parts[-1][0] == "quantity":  # 10:30 am
            return ("quantity", (kind, (*parts[:-1], parts[-1][1])), parts[-1][2])
        return (kind, tuple(parts))

    def quantity(self) -> Node:
        """A formula and its unit, before it (money) or after it."""
        sign = self.skip("-")
        if money := self.skip(*CURRENCIES):
            amount: Node = self.scaled(self.sum())
            return ("quantity", ("neg", amount) if sign else amount, CURRENCIES[money])
        if sign:
            self.at -= 1
        if self.peek().startswith("\\text"):
            return _said(self.take()[6:-1])
        amount = self.scaled(self.sum())
        return ("quantity", amount, name) if (name := self.unit()) else amount

    def scaled(self, amount: Node) -> Node:
        """The amount in `5 million`."""
        word = self.peek()[6:-1]
        if word not in SCALES:
            return amount
        self.take()
        return ("mul", amount, ("number", Fraction(10 ** SCALES[word]), None))

    def unit(self) -> str:
        name = ""
        while (token := self.peek()).startswith("\\text") or token in _SIGNS:
            word = _SIGNS.get(self.take()) or token[6:-1]
            if not re.fullmatch(r"[A-Za-z][A-Za-z ./^{}0-9-]*", word):
                raise Unreadable(word)
            if word == "degree" and self.peek() in ("C", "F"):
                word += " " + self.take()
            name += " " + word
            if self.skip("^"):
                name += "^" + "".join(self.take_group())
        return unit(name)

    def sum(self) -> Node:
        left = self.product()
        while (sign := self.peek()) in ("+", "-", "\\pm", "\\mp"):
            self.take()
            right = self.product()
            if sign in ("\\pm", "\\mp"):
                right = ("pm", 1 if sign == "\\pm" else -1, right)
            left = ("add", left, ("neg", right) if sign == "-" else right)
        return left

    def product(self) -> Node:
        left = self.factor()
        while True:
            if self.skip("*", "\\cdot", "\\times"):
                left = ("mul", left, self.factor())
            elif self.skip("/", "\\div"):
                left = ("div", left, self.factor())
            elif self.peek() != "" and self.starts_factor():
                left = ("mul", left, self.power())
            else:
                return left

    def starts_factor(self) -> bool:
        r"""Whether a factor follows without a sign; a number only in `(n-2) 2^{n}`, as `5 6` is not 30."""
        token = self.peek()
        if token.isdigit():
            return self.peek(1) == "^" and not self.tokens[self.at - 1][-1].isdigit()
        if token == "|":
            return not self.bars
        return token[1:] in FUNCTIONS or any(p.fullmatch(token) for p in (_SYMBOL, _ACCENT, _BEFORE_FACTOR))

    def factor(self) -> Node:
        if self.skip("-"):
            return ("neg", self.factor())
        if self.skip("+"):
            return self.factor()
        if sign := self.skip("\\pm", "\\mp"):
            return ("pm", 1 if sign == "\\pm" else -1, self.factor())
        return self.power()

    def power(self) -> Node:
        base = self.postfixed(self.atom())
        if self.skip("^"):
            base = ("pow", base, self.exponent())
            if self.peek() == "^":
                raise Unreadable("^")
            base = self.postfixed(base)
        return base

    def exponent(self) -> Node:
        if self.skip("-"):
            return ("neg", self.exponent())
        base = self.atom()
        return ("pow", base, self.exponent()) if self.skip("^") else base

    def postfixed(self, base: Node) -> Node:
        while True:
            if self.skip("!"):
                base = ("factorial", base, 2 if self.skip("!") else 1)
            elif self.peek() == "\\degrees" and self.in_function:
                self.take()
                base = ("degrees", base)
            else:
                return base

    def atom(self) -> Node:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token == "\\frac":
            return self.fraction()
        if token == "\\sqrt":
            index: Node = ("number", Fraction(2), None)
            if self.skip("["):
                index = self.sum()
                self.take("]")
            return ("root", self.argument(), index)
        if token == "\\binom":
            return ("binomial", self.argument(), self.argument())
        if token in ("(", "[", "\\{", "{"):
            return self.bracketed(token)
        if token == "|":
            self.bars += 1
            inner = self.sum()
            self.bars -= 1
            self.take("|")
            return ("call", "abs", inner)
        if token in ("\\lfloor", "\\lceil"):
            inner = self.sum()
            self.take("\\rfloor" if token == "\\lfloor" else "\\rceil")
            return ("call", token[2:], inner)
        if token == "\\infty":
            return ("inf",)
        if token in ("\\emptyset", "\\varnothing"):
            return ("set", ())
        if token == "\\pi":
            return ("constant", "pi")
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token.startswith("\\begin"):
            return self.matrix(token)
        return self.symbol(token)

    def number(self, token: str) -> Node:
        mantissa, _, scale = token.lower().partition("e")
        if abs(int(scale or 0)) > LARGEST_SCALE:
            raise Unreadable(token)
        whole, _, decimals = mantissa.partition(".")
        if self.peek() == "_" and not decimals and not scale:
            self.take()
            base = "".join(self.take_group())
            if not re.fullmatch("[2-9]|10", base) or any(int(digit) >= int(base) for digit in token):
                raise Unreadable(base)
            return ("based", token, int(base)) if base != "10" else _integer(token)
        if self.peek() in ("\\overline", "\\bar") and not scale and "." in token:
            self.take()
            period = "".join(self.take_group())
            if not period.isdigit():
                raise Unreadable(period)
            nines = (10 ** len(period) - 1) * 10 ** len(decimals)
            return ("number", Fraction(mantissa.rstrip(".") or 0) + Fraction(int(period), nines), None)
        value = Fraction(mantissa if mantissa[-1] != "." else mantissa[:-1]) * Fraction(10) ** int(scale or 0)
        if whole == mantissa and not scale and (part := self.mixed()):
            return ("add", ("number", value, None), part)
        return ("number", value, len(decimals) if decimals or scale else None)

    def mixed(self) -> Node | None:
        r"""The fraction of a mixed number, which is smaller than 1: `\frac{3}{4}` or `3/4` behind `1`."""
        start = self.at
        if self.peek().isdigit() and self.peek(1) == "/" and self.peek(2).isdigit():
            part: Node = ("div", _integer(self.take()), _integer(self.tokens[self.at + 1]))
            self.at += 2
        elif self.skip("\\frac"):
            part = self.fraction()
        else:
            return None
        match part:
            case ("div", ("number", above, None), ("number", below, None)) if 0 < above < below:
                return part
        self.at = start
        return None

    def fraction(self) -> Node:
        start = self.at
        try:
            above, below = self.take_group(), self.take_group()
            # A derivative is no quotient.
            if above[:1] == below[:1] == ["d"] and len(below) > 1:
                return ("symbol", f"d/d({''.join(above)};{''.join(below)})")
        except Unreadable:
            pass
        self.at = start
        return ("div", self.argument(), self.argument())

    def argument(self) -> Node:
        r"""The argument of a TeX command: a group or one character, as in `\frac12`."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        if token == "{":
            return self.atom()
        if token.isdigit():
            return _integer(self.take())
        return self.atom()

    def take_group(self) -> list[str]:
        """The tokens of a group in braces, or the single token that stands for one."""
        if self.peek() != "{":
            return [self.take()]
        start, depth = self.at, 0
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if not depth:
                return self.tokens[start + 1 : self.at - 1]

    def bracketed(self, opening: str) -> Node:
        """A group, a tuple, an interval or a set."""
        closing = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",)}[opening]
        bars, self.bars = self.bars, 0
        inner: Node | None = None if self.peek() in closing else self.answer()
        closed, self.bars = self.take(*closing), bars
        items = () if inner is None else inner[1] if inner[0] == "list" else (inner,)
        if inner is not None and inner[0] == "list" and not inner[2]:
            raise Unreadable("or")
        if opening == "\\{":
            return ("set", items)
        if inner is None:
            raise Unreadable(opening)
        if len(items) > 1:
            return ("list", items, True) if opening == "{" else ("tuple", opening, closed, items)
        if (opening, closed) not in (("(", ")"), ("[", "]"), ("{", "}")):
            raise Unreadable(opening)
        return inner

    def function(self, name: str) -> Node:
        base: Node | None = None
        if name == "log":
            base = ("symbol", BASE_OF_LOG)
            if self.skip("_"):
                base = self.argument() if self.peek() == "{" else self.atom_of_base()
        power = self.exponent() if self.skip("^") else None
        self.in_function += 1
        argument = self.function_argument()
        self.in_function -= 1
        if power == ("neg", ("number", Fraction(1), None)) and name in ("sin", "cos", "tan"):
            return ("call", "arc" + name, argument)
        call: Node = ("log", argument, base) if base else ("call", name, argument)
        return ("pow", call, power) if power else call

    def atom_of_base(self) -> Node:
        token = self.take()
        return _integer(token) if token.isdigit() else ("symbol", token)

    def function_argument(self) -> Node:
        r"""`\sin 2x` is the sine of 2x, `\sin(a) b` that of a alone, and `\sin a \cos b` two factors."""
        if self.peek() in ("(", "{", "["):
            return self.power()
        argument = self.factor()
        while self.starts_factor() and self.peek()[1:] not in FUNCTIONS and self.peek() != "(":
            argument = ("mul", argument, self.power())
        if self.peek() == "/" and argument[0] in ("constant", "mul", "symbol") and self.peek(1).isdigit():
            self.take()
            argument = ("div", argument, self.factor())
        return argument

    def symbol(self, token: str) -> Node:
        if _ACCENT.fullmatch(token):
            return self.marked(f"{token}({''.join(self.take_group())})")
        if _SYMBOL.fullmatch(token):
            return self.marked(token)
        raise Unreadable(token)

    def marked(self, name: str) -> Node:
        """A symbol with its subscript, primes and argument: `f'(x)` is one symbol, `x(x+1)` a product."""
        if self.skip("_"):
            name += "_" + "".join(self.take_group())
        while self.skip("'"):
            name += "'"
        if name in ("e", "i"):
            return ("constant", name)
        if self.peek() == "(" and self.peek(2) in (")", ","):
            start = self.at
            inner = self.bracketed(self.take())
            if inner[0] in ("tuple", "symbol") or name[0] in "fghFGHPQpqI":
                return ("symbol", f"{name}({''.join(self.tokens[start + 1 : self.at - 1])})")
            self.at = start
        return ("symbol", name)

    def matrix(self, token: str) -> Node:
        kind = token.removeprefix("\\begin{").removesuffix("}")
        if kind not in _MATRICES:
            raise Unreadable(token)
        if kind == "array":
            self.take_group()
        rows: list[tuple[Node, ...]] = []
        while not self.peek().startswith("\\end"):
            row = [self.sum()]
            while self.skip("&"):
                row.append(self.sum())
            rows.append(tuple(row))
            if not self.skip("\\\\"):
                break
        self.take(f"\\end{{{kind}}}")
        return ("matrix", tuple(rows))


def _integer(digits: str) -> Node:
    return ("number", Fraction(int(digits)), None)


def _said(text: str) -> Node:
    """Words, or a letter: `(B)` in text is the symbol B."""
    if letter := re.fullmatch(r"\(?([A-Za-z])\)?\.?", text.strip()):
        return ("constant" if letter[1] in "ei" else "symbol", letter[1])
    return ("words", " ".join(text.split()).rstrip(".").lower())
