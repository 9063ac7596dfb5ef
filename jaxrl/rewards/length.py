"""What an answer's length adds to its reward, and what becomes of an answer that was cut off at the limit."""

from __future__ import annotations

import math

from jaxrl.types import OnTruncated


def overlong_penalty(length: int, max_tokens: int, buffer: int, factor: float) -> float:
    """0 up to max_tokens - buffer, then down linearly to -factor at max_tokens; 0 where the buffer is 0.

    It is DAPO's soft penalty (arXiv 2503.14476, eq. 13), which JustRL tried and left out.

    Args:
      length: tokens of the answer, its end-of-sequence token included.
      max_tokens: the most tokens that an answer may have.
      buffer: how many of those, the last ones, are penalized.
      factor: the penalty at max_tokens.
    """
    return -factor * max(0, length - (max_tokens - buffer)) / buffer if buffer else 0.0


def cosine_bonus(length: int, max_tokens: int, weight: float) -> float:
    """weight (1 + cos(pi length / max_tokens)) / 2: what an answer gets for being short, right or wrong (ProRL v2).

    Args:
      length: tokens of the answer, its end-of-sequence token included.
      max_tokens: the most tokens that an answer may have.
      weight: the reward of an empty answer over that of one of max_tokens, ProRL v2's lambda (eta_max - eta_min).
    """
    return weight * (1 + math.cos(math.pi * length / max_tokens)) / 2


def cosine_active(step: int, on: int, off: int) -> bool:
    """True at steps with the bonus: `on` with it, then `off` without, from step 0 on (ProRL v2: 100, 500).

    With both 0 every step has it.
    """
    return on + off == 0 or step % (on + off) < on


def truncated_reward(reward: float, factor: float = 1.0, penalty: float = 0.0) -> float:
    """reward * factor - penalty: the reward of an answer that was cut off (OpenRLHF's and NeMo RL's stop_properly).

    A factor below 1 raises a negative reward: it is meant for rewards of 0 and 1, as in ProRL v2, whose factor is 0.

    Args:
      reward: with other terms of its length, which OpenRLHF multiplies too.
      factor: at least 0.
      penalty: taken off.
    """
    return reward * factor - penalty


def dropped(rule: OnTruncated, truncated: bool, right: bool) -> bool:
    """True for a response that is not learned from; its reward stays in its group's mean and standard deviation.

    Args:
      rule: "train" drops none. "drop" drops truncated ones: their tokens leave the loss and its denominators (DAPO's
        overlong filtering, arXiv 2503.14476, section 3.4). "drop_wrong" drops those that are wrong too: their advantage
        is 0, and the denominators keep their tokens (DeepCoder's mask_truncated_samples in rllm).
      truncated: whether it was cut off at the longest response.
      right: whether its answer is.
    """
    return truncated and (rule == "drop" or (rule == "drop_wrong" and not right))
