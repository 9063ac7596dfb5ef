r"""DAPO's own reward: the last `Answer: ...` line, compared after normalizing both sides.

The window, the `Answer:` pattern and the scores are DAPO's (arXiv 2503.14476); the normalization is Minerva's (arXiv
2206.14858, appendix D) with DAPO's changes. Scores equal the reference's for every reference answer that states
something (others pay no one, here), oddities included: words are
removed wherever they occur ("issue" becomes "is"), `**Answer:** 5` keeps two asterisks and fails, and `\frac12` equals
`\frac{1}{2}` while `\dfrac{1}{2}` equals neither.
"""

from __future__ import annotations

import re

from jaxrl.rewards.nothing import states_nothing

WINDOW = 300  # characters
NO_ANSWER = "[INVALID]"  # stands for the answer where there is no answer line, as in the reference

# `\s*` may cross lines: the answer can follow on the line after "Answer:".
_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

# Each table is applied from top to bottom, and order matters: articles are recognized by the space that the sixth entry
# removes, and a unit must be gone before the emptied \text{}^2 around it can match.
_SUBSTITUTIONS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)

_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue"),
    *("points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals"),
    *("edges", "students", "childrentickets", "multiples"),
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}"),
    *(r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)

_TEX_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?m)^.*?\$(.*?)\$.*", r"$\1$"),  # a line with inline math is its first formula
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),  # greedy, so that nested braces survive
        (r"frac([^{])(.)", r"frac{\1}{\2}"),  # \frac12 -> \frac{1}{2}
        (r"sqrt([^{])", r"sqrt{\1}"),  # \sqrt2 -> \sqrt{2}
    )
)


def minerva(response: str, ground_truth: str) -> float:
    """+1.0 if the extracted answer equals the normalized `ground_truth`, else -1.0."""
    truth = normalize(ground_truth)
    # The reference pays any response without an answer line for the first, and an empty answer for the second.
    if truth == NO_ANSWER or states_nothing(ground_truth):
        return -1.0
    if not truth:
        return 1.0 if _whole(_answer(response)) == _whole(ground_truth) != "" else -1.0
    return 1.0 if extract(response) == truth else -1.0


def extract(response: str) -> str:
    """The last answer in the window, normalized; `NO_ANSWER` if no line gives one."""
    return normalize(_answer(response))


def _answer(response: str) -> str:
    answers = _ANSWER_LINE.findall(response[-WINDOW:])
    return answers[-1] if answers else NO_ANSWER


def _whole(answer: str) -> str:
    r"""The answer for references such as `x$ $y`, of which `normalize` keeps the empty formula `$ $`."""
    text = re.sub(r"\\left|\\right|\$|\.$", "", _remove_words(answer.rpartition("=")[2]))
    return re.sub(r"\\boxed\{(.*)\}", r"\1", text)


def normalize(answer: str) -> str:
    """One spelling for answers that differ in units, spacing, TeX shorthand or thousands separators."""
    return _join_thousands(_rewrite_tex(_remove_words(answer.rpartition("=")[2]))).strip()


def _remove_words(text: str) -> str:
    for old, new in _SUBSTITUTIONS:
        text = text.replace(old, new)
    for expression in _REMOVED:
        text = text.replace(expression, "")
    return text


def _rewrite_tex(text: str) -> str:
    for pattern, replacement in _TEX_REWRITES:
        text = pattern.sub(replacement, text)
    return text.replace("$", "")


def _join_thousands(text: str) -> str:
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text
