"""DAPO's soft penalty on long answers (arXiv 2503.14476, eq. 13), which JustRL tried and left out."""


def overlong_penalty(length: int, max_tokens: int, buffer: int, factor: float) -> float:
    """0 up to max_tokens - buffer, then down linearly to -factor at max_tokens; 0 where the buffer is 0.

    Args:
      length: tokens of the answer, its end-of-sequence token included.
      max_tokens: that an answer may have.
      buffer: the last tokens of that, which are penalized.
    """
    return -factor * max(0, length - (max_tokens - buffer)) / buffer if buffer else 0.0
