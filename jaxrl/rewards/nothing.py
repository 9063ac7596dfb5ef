r"""References that state nothing, for which no verifier may pay: empty text, dollars or units alone, and `nan`.

A column that was lost on the way has such references. An answer that equals one of them is no achievement, and an
empty one would be right for all.
"""

from __future__ import annotations

import re

UNITS = (
    *("degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour"),
    *("day", "week", "month", "year", "foot", "feet", "inch", "yard"),
)
NOTHING = ("", "nan")
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_NO_CONTENT = re.compile(
    r"\\text|\\mbox|\\mathrm|\\q?quad|\\[,;:!%$ ]|\^?\{?\\circ\}?"
    + rf"|(?:{'|'.join(UNITS)})(?:es)?s?(?:\^\{{?[0-9]\}}?)?|[\s$%{{}}~.,\\{_INVISIBLE}]"
)


def states_nothing(reference: str) -> bool:
    r"""Whether the reference holds no answer: `""`, `$$`, `\text{ cm}`, `NaN`.

    Args:
      reference: the ground truth, as the data has it.

    Returns:
      True if nothing or `nan` is left without spaces, dollars, percent signs, braces and units.
    """
    if reference[:1].isdigit():  # nearly all references of reinforcement learning
        return False
    return _NO_CONTENT.sub("", reference).lower() in NOTHING
