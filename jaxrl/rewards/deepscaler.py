r"""DeepScaleR's lenient verifier: the last box after the thoughts, equal to the answer in spelling or in value.

JustRL calls it the robust verifier and finds that training with it does worse than with `strict_boxed`. The response
must hold `<think>` and `</think>`, as in the reference: where the chat template opens the thought inside the prompt, no
response passes (unless `reward.with_prompt` adds the prompt).
"""

from __future__ import annotations

from jaxrl.rewards import sandbox
from jaxrl.rewards.latex_equality import last_box, reference, same_spelling


def equivalent(response: str, ground_truth: str | float | list[str]) -> float:
    """+1.0 if the extracted answer is equivalent to `ground_truth`, or to one of several, else -1.0."""
    answer = extract(response)
    truths = map(reference, map(str, ground_truth if isinstance(ground_truth, list) else [ground_truth]))
    return 1.0 if answer is not None and any(_same(answer, truth) for truth in truths) else -1.0


def _same(answer: str, truth: str | None) -> bool:
    return truth is not None and (
        same_spelling(answer, truth) or sandbox.compare("released", answer, truth) is True
    )


def extract(response: str) -> str | None:
    """The content of the last box between the first `</think>` and the next one, if any; None without such a box."""
    if "<think>" not in response or "</think>" not in response:
        return None
    return last_box(response.split("</think>", 2)[1])
