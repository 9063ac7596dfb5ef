"""Marking rollouts: the recipe's verifier on the text, and the penalty for length."""

from __future__ import annotations

import dataclasses

from jaxrl import config
from jaxrl.rewards import VERIFIERS, sandbox
from jaxrl.rewards.length import overlong_penalty
from jaxrl.types import Detokenize, OnRollout, Rollout


def make_marker(recipe: config.Recipe, detokenize: Detokenize) -> OnRollout:
    """Returns a function that gives a rollout its score and its penalty. Threads may call it in parallel.

    Args:
      recipe: with [reward] and the longest response.
      detokenize: token ids to text without special tokens.
    """
    reward, verify = recipe.reward, VERIFIERS[recipe.reward.verifier]

    def mark(rollout: Rollout) -> Rollout:
        before = detokenize(rollout.prompt.tokens) if reward.with_prompt else ""
        undecided = sandbox.undecided()  # comparisons so far
        score = verify(before + detokenize(rollout.tokens), rollout.prompt.answer)
        penalty = overlong_penalty(
            len(rollout.tokens), recipe.rollout.max_tokens, reward.overlong_tokens, reward.overlong_penalty
        )
        more = sandbox.undecided() > undecided
        return dataclasses.replace(rollout, score=score, penalty=penalty, undecided=score < 0 and more)

    return mark
