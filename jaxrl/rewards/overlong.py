"""DAPO's soft penalty on long answers (arXiv 2503.14476, eq. 13), which JustRL tried and left out."""

from __future__ import annotations


def overlong_penalty(length: int, max_tokens: int, buffer: int, factor: float) -> float:
    """0 up to max_tokens - buffer, then down linearly to -factor at max_tokens; 0 where the buffer is 0.

    Args:
      length: tokens of the answer, its end-of-sequence token included.
      max_tokens: the most tokens that an answer may have.
      buffer: how many of those, the last ones, are penalized.
      factor: the penalty at max_tokens.
    """
    return -factor * max(0, length - (max_tokens - buffer)) / buffer if buffer else 0.0
