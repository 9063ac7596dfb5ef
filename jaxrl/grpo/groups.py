"""Which groups of rollouts are trained on, and what replaces the others: host code over marks, before advantages."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Shaped
from numpy.typing import ArrayLike

from jaxrl.types import Filter

# P: groups of a batch, one a prompt; G: rollouts of a group.


def in_band(right: Bool[np.ndarray, "P G"], keep: tuple[float, float] = (0.0, 1.0)) -> Bool[np.ndarray, " P"]:
    """True for groups whose share of right answers lies strictly between two bounds.

    (0, 1) keeps the groups that are neither all right nor all wrong, those that a group's advantage learns from (DAPO,
    arXiv 2503.14476, section 3.2). QuestA keeps 0.05 to 0.95, bounds included; no share of 16 answers is one of them.

    Args:
      right: by the verifier alone: a penalty that differs would make a group of wrong answers pass.
      keep: the bounds.
    """
    share = right.mean(axis=1)
    return (keep[0] < share) & (share < keep[1])


def refill(missing: int, good: Bool[np.ndarray, " P"]) -> tuple[Int[np.ndarray, " K"], int]:
    """Takes the groups of a new round that a batch still lacks; a fold over rounds of sampling (DAPO, NeMo RL).

    Args:
      missing: groups that the batch lacks; all of them before the first round.
      good: which groups of the new round may be trained on.

    Returns:
      [K], the groups taken, the first good ones in order, and how many are missing still. The surplus is dropped: kept
      for the next step it would be of an older policy.
    """
    taken = np.flatnonzero(good)[:missing]
    return taken, missing - len(taken)


def asked(rule: Filter, prompts: int, bad: Bool[np.ndarray, " N"], rounds: int = 0) -> int:
    """How many prompts of a step may be sampled by now; a fold over what is known of those that were.

    `refill` asks for one more prompt for every group that is out of the band, as soon as that is known; which groups
    are then the first good ones does not depend on the order in which they end. `substitute` asks for a whole round
    more where the last one has too few good groups, see `substitutes`.

    Args:
      rule: the filter.
      prompts: P, that a step trains on; a round of sampling has at most so many.
      bad: of the prompts so far, in order; False where it is not known yet.
      rounds: of sampling, at most; 0 is no limit.

    Returns:
      N: the first N prompts of the step.
    """
    count, most = prompts, rounds or len(bad) + 2  # every round but the last has a bad group
    for _ in range(most - 1 if rule in ("refill", "substitute") else 0):
        if rule == "substitute":
            enough = bad[count - prompts : count].sum() < prompts - prompts // 3
            more = 0 if enough else prompts
        else:
            more = prompts + int(bad[:count].sum()) - count
        if not more:
            break
        count += more
    return count


def trained(
    rule: Filter, prompts: int, good: Bool[np.ndarray, " N"], seed: tuple[int, ...]
) -> Int[np.ndarray, " K"]:
    """Indices of a step's groups in the order in which they are trained on, [K], K at most P.

    Args:
      rule: the filter.
      prompts: P.
      good: of all groups that were sampled, in the order of their prompts; see `asked`.
      seed: of the draw of substitutes.
    """
    if rule == "refill":
        return refill(prompts, good)[0]
    if rule == "substitute":
        last = np.arange(max(len(good) - prompts, 0), len(good))
        places = substitutes(good[last], seed)
        return last[good[last]] if places is None else last[places]
    return np.flatnonzero(good)


def substitutes(good: Bool[np.ndarray, " P"], seed: int | tuple[int, ...]) -> Int[np.ndarray, " P"] | None:
    """For each group the one that takes its place: itself if it is good, else a good one at random (Polaris).

    The good ones are drawn without replacement if there are enough. What is copied is a group with its prompt, answer
    and rewards: the released code marks copies against the answer of the group that was replaced.

    Args:
      good: which groups may be trained on.
      seed: of the draw.

    Returns:
      indices [P], or None where no more than floor(P / 3) groups are good: the batch is skipped.
    """
    wanted, bad = np.flatnonzero(good), np.flatnonzero(~good)
    if len(wanted) <= len(good) // 3:
        return None
    places = np.arange(len(good))
    places[bad] = np.random.default_rng(seed).choice(wanted, len(bad), replace=len(wanted) < len(bad))
    return places


def rescuable(right: Bool[np.ndarray, "P G"], stored: Bool[np.ndarray, " P"]) -> Bool[np.ndarray, " P"]:
    """True for groups in which a right answer of an earlier step may replace one: all are wrong, and there is one.

    It is Polaris' rollout rescue, as its authors describe it. Of a stored answer the sampler has no log-probs.

    Args:
      right: which answers are.
      stored: whether a right answer to the prompt is kept from an earlier step.
    """
    return ~right.any(axis=1) & stored


def too_easy(
    prompts: Shaped[np.ndarray, " N"], shares: Float[np.ndarray, " N"], threshold: float
) -> Shaped[np.ndarray, " K"]:
    """The prompts whose mean share of right answers over a stage is above a threshold (Polaris: 0.9).

    Args:
      prompts: [N], whose group it was, one entry for each group of the stage, in any order.
      shares: [N], of its right answers.
      threshold: of the mean over a prompt's groups.

    Returns:
      [K] prompts, sorted, to be left out of the next stage.
    """
    found, which = np.unique(prompts, return_inverse=True)
    return found[np.bincount(which, shares) / np.bincount(which) > threshold]


def mixed_probability(accuracy: ArrayLike, samples: int) -> Float64[np.ndarray, "*_"]:
    """1 - p^N - (1 - p)^N: how likely N independent answers, right with probability p, are not all alike.

    Args:
      accuracy: p of each prompt, any shape.
      samples: N. BroRL (arXiv 2510.01180) has 512, so that almost every prompt is learned from.
    """
    p = np.asarray(accuracy, np.float64)
    return 1 - p**samples - (1 - p) ** samples
