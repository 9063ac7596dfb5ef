"""A format reward, beside a verifier: one block of thoughts, then one box."""

import re

FORM = re.compile(
    r"<think>(?:(?!</?think>).)+</think>(?:(?!</?think>).)*\\boxed\{(?:(?!</?think>).)*", re.DOTALL
)


def thoughts_then_box(response: str) -> float:
    """1 for <think>...</think> and one \\boxed{} after it, else 0."""
    text = response.strip()
    return float(bool(FORM.fullmatch(text)) and text.count("\\boxed{") == 1)
