r"""DeepScaleR's lenient verifier: the last box after the thoughts, equal to the answer in spelling or in value.

JustRL calls it the robust verifier and finds that training with it does worse than with `strict_boxed`. As in the
reference the response must hold `<think>` and `</think>`: where the chat template opens the thought inside the prompt,
no response passes, unless `reward.with_prompt` adds the prompt or `reward.thoughts` asks for less.
"""

from __future__ import annotations

from jaxrl.rewards import sandbox
from jaxrl.rewards.latex_equality import last_box, reference, same_spelling
from jaxrl.types import Thoughts


def equivalent(
    response: str, ground_truth: str | float | list[str], thoughts: Thoughts = "required"
) -> float:
    """+1.0 if the extracted answer is equivalent to `ground_truth`, or to one of several, else -1.0."""
    answer = extract(response, thoughts)
    truths = map(reference, map(str, ground_truth if isinstance(ground_truth, list) else [ground_truth]))
    return 1.0 if answer is not None and any(_same(answer, truth) for truth in truths) else -1.0


def _same(answer: str, truth: str | None) -> bool:
    return truth is not None and (
        same_spelling(answer, truth) or sandbox.compare("released", answer, truth) is True
    )


def extract(response: str, thoughts: Thoughts = "required") -> str | None:
    """The content of the last box of `after_thoughts`, if any; None without such a box."""
    answer = after_thoughts(response, thoughts)
    return None if answer is None else last_box(answer)


def after_thoughts(response: str, thoughts: Thoughts) -> str | None:
    """What lies between the first `</think>` and the next one, if any; None where the rule fails.

    Args:
      response: decoded.
      thoughts: "required" needs `<think>` and `</think>` (DeepScaleR), "closed" the latter alone (Polaris), and with
        "optional" a response without `</think>` is all answer (Archer).
    """
    if thoughts == "optional" and "</think>" not in response:
        return response
    if "</think>" not in response or (thoughts == "required" and "<think>" not in response):
        return None
    return response.split("</think>", 2)[1]
