r"""JustRL's training reward: the last `\boxed{...}` near the end must be the answer, character for character.

This is the strict path of DAPO's verifier (arXiv 2503.14476; `strict_box_verify` in verl). Nothing is normalized:
`\boxed{ 34 }`, `\boxed{34.0}` and `\boxed{3,400}` for 3400 all fail, which is what teaches a policy to end with one
plain box.
"""

from __future__ import annotations

from jaxrl.rewards.nothing import NOTHING

# Characters. The reference cuts to 300 and then, on this path, to 100; only the second cut has an effect.
WINDOW = 100
BOX = "\\boxed{"


def strict_boxed(response: str, ground_truth: str) -> float:
    """+1.0 if the extracted answer equals `ground_truth` exactly, and that is neither blank nor NaN; else -1.0."""
    right = extract(response) == ground_truth and ground_truth.strip(" $").lower() not in NOTHING
    return 1.0 if right else -1.0


def extract(response: str) -> str | None:
    """The content of the last box in the window; None if there is no box or its braces do not balance.

    An unclosed last box hides any good one before it, and escaped braces count as braces, as in the reference.
    """
    window = response[-WINDOW:]
    start = window.rfind(BOX)
    return None if start < 0 else group_from(window, start + len(BOX))


def group_from(text: str, start: int) -> str | None:
    """The text from `start`, just inside a brace, up to the brace that closes it; None if none does."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return None
