"""Advantages relative to a group or a batch, and the weights that make a mean of token losses."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import numpy as np
from jaxtyping import Float, Float32, Float64, Int
from numpy.typing import ArrayLike

from jaxrl.types import Center, Normalization, Scale, Values

# B: sequences of a step; G: those of a group; T: response tokens of a sequence.


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
    groups = np.repeat(np.arange(len(rewards)), rewards.shape[1])
    scale: Scale = "group" if normalize_std else "none"
    # neither choice looks at lengths
    lengths = np.ones(rewards.size, int)
    flat = relative_advantages(rewards.reshape(-1), groups, lengths, scale=scale, epsilon=epsilon)
    return np.asarray(flat, np.float32).reshape(rewards.shape)


def relative_advantages(
    rewards: ArrayLike,
    groups: Int[np.ndarray, " B"],
    lengths: Int[np.ndarray, " B"],
    *,
    center: Center = "group",
    scale: Scale = "group",
    epsilon: float = 1e-6,
    costs: Sequence[Float[np.ndarray, " _"]] | None = None,
    ddof: int = 0,
) -> Values:
    """Rewards less a baseline, over a spread: GRPO, RLOO, OPO, pass@k training and REINFORCE++ are choices of the two.

    `center` takes off each reward r_i

        none:            0
        group:           mean(r) of the group (arXiv 2402.03300, section 4.1)
        leave_one_out:   the mean of the group's other rewards (RLOO, arXiv 2402.14740)
        length_weighted: sum(n_i r_i) / sum(n_i) over the group, n_i tokens (OPO, arXiv 2505.23585)
        second_best:     the second best of the group, off the best alone; the others get 0 (pass@k training as in verl)
        batch:           the mean over all tokens of the step, that is sum(n_i r_i) / sum(n_i)

    and `scale` divides

        none:            by 1
        group:           by the standard deviation (ddof 1) of the group's rewards, plus epsilon
        batch:           less the mean over all tokens of the step, by their standard deviation plus epsilon
                         (REINFORCE++, arXiv 2501.03262; ProRL v2 and BroRL center by group first)

    Args:
      rewards: [B].
      groups: [B], equal for the responses to one prompt, of any number and in any order.
      lengths: [B], response tokens.
      epsilon: added to standard deviations. A factor on all rewards is the same as its inverse on epsilon.
      costs: of each sequence the costs [T_i] of its tokens in units of reward, such as beta times an estimate of the
        KL divergence. Each token loses its own and all later costs, after the group and before the batch.
      ddof: of the batch's standard deviation, 1 in verl.

    Returns:
      [B] float64, or with costs a list of [T_i]. A group of one keeps its reward, as in verl. A group of equal rewards
      is not divided, and centered by group it gets exact zeros, which the batch's mean then moves.
    """
    rewards = np.asarray(rewards, np.float64)
    chex.assert_equal_shape([rewards, groups, lengths])
    values = _centered(rewards, lengths, "length_weighted") if center == "batch" else np.zeros_like(rewards)
    for group in np.unique(groups):
        own = groups == group
        if center != "batch":
            values[own] = _centered(rewards[own], lengths[own], center)
        if scale == "group":
            # what is equal spreads by a rounding; std 1 is verl's for a group of one
            values[own] /= (rewards[own].std(ddof=1) if np.ptp(rewards[own]) else 1) + epsilon
    parts = [values]
    if costs is not None:
        parts = [value - np.cumsum(cost[::-1])[::-1] for value, cost in zip(values, costs, strict=True)]
    if scale == "batch":
        each = np.concatenate(parts)
        # without costs a sequence's tokens are all alike, and counted, as there may be hundreds of millions
        counts = lengths if costs is None else np.ones(len(each))
        mean, tokens = np.average(each, weights=counts), counts.sum()
        spread = np.sqrt(np.average((each - mean) ** 2, weights=counts) * tokens / (tokens - ddof)) + epsilon
        parts = [(part - mean) / (spread if np.ptp(each) else np.inf) for part in parts]
    return parts[0] if costs is None else parts


def _centered(
    rewards: Float64[np.ndarray, " G"], lengths: Int[np.ndarray, " G"], center: Center
) -> Float64[np.ndarray, " G"]:
    """The rewards of one group less their baseline."""
    if center == "none" or len(rewards) == 1:
        return rewards
    # the mean of equal numbers may be off by a rounding
    if not np.ptp(rewards):
        return np.zeros_like(rewards)
    if center == "length_weighted":
        return rewards - np.average(rewards, weights=lengths)
    if center == "second_best":
        second, best = np.sort(rewards)[-2:]
        return np.where(rewards == best, best - second, 0)
    centered = rewards - rewards.mean()
    return centered * (len(rewards) / (len(rewards) - 1) if center == "leave_one_out" else 1)


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
