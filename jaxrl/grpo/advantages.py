"""Group-relative advantages and the weights that make a mean of token losses."""

from __future__ import annotations

import chex
import numpy as np
from jaxtyping import Float32, Float64
from numpy.typing import ArrayLike

from jaxrl.types import Normalization


def group_advantages(
    rewards: ArrayLike, epsilon: float = 1e-6, normalize_std: bool = True
) -> Float32[np.ndarray, "P G"]:
    """A_i = (r_i - mean(r)) / (std(r) + epsilon) within each group (DeepSeekMath, arXiv 2402.03300, section 4.1).

    Args:
      rewards: [P, G], one row for each prompt.
      epsilon: added to the standard deviation.
      normalize_std: False gives r_i - mean(r) (Dr. GRPO, arXiv 2503.20783, eq. 3).

    Returns:
      [P, G] float32. The standard deviation has ddof = 1, as in verl; a group of equal rewards gets exact zeros,
      and a group of one keeps its reward (mean 0, std 1, again as in verl).
    """
    rewards = np.asarray(rewards, np.float64)
    chex.assert_rank(rewards, 2)
    if rewards.shape[1] == 1:
        return (rewards / (1 + epsilon if normalize_std else 1)).astype(np.float32)
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    # the mean of equal numbers may be off by a rounding
    centered[np.ptp(rewards, axis=1) == 0] = 0
    if normalize_std:
        centered /= rewards.std(axis=1, ddof=1, keepdims=True) + epsilon
    return centered.astype(np.float32)


def token_weights(mask: ArrayLike, normalization: Normalization = "token_mean") -> Float32[np.ndarray, "B T"]:
    """Weights w such that the loss is sum(w * token_loss).

    Args:
      mask: [B, T], 1 on the response tokens of a mini-batch.
      normalization: token_mean divides by all response tokens of the mini-batch (DAPO, arXiv 2503.14476, eq. 8);
        sequence_mean averages token means over sequences (GRPO); sequence_sum averages token sums over sequences;
        dr_grpo divides token sums by the constant length T and averages over sequences (arXiv 2503.20783, eq. 3).

    Returns:
      [B, T] float32, zero outside the mask.

    Raises:
      ValueError: for an unknown normalization.
    """
    mask = np.asarray(mask, np.float64)
    chex.assert_rank(mask, 2)
    scale = sequence_weights(mask.sum(axis=1), normalization, mask.shape[1])
    return (mask * scale[:, None]).astype(np.float32)


def sequence_weights(
    lengths: ArrayLike, normalization: Normalization, max_length: int
) -> Float64[np.ndarray, " B"]:
    """The weight of each token of a sequence, from response lengths [B]; see `token_weights`.

    Raises:
      ValueError: for an unknown normalization.
    """
    lengths = np.asarray(lengths, np.float64)
    count = len(lengths)
    if normalization == "token_mean":
        return np.full(count, 1 / max(lengths.sum(), 1))
    if normalization == "sequence_mean":
        return 1 / (count * np.maximum(lengths, 1))
    if normalization == "sequence_sum":
        return np.full(count, 1 / count)
    if normalization == "dr_grpo":
        return np.full(count, 1 / (count * max_length))
    raise ValueError(f"unknown normalization {normalization!r}")
