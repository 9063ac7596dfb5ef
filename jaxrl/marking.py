"""Marking rollouts: the recipe's verifier on the text, and the reward with the terms of its length."""

from __future__ import annotations

import dataclasses

from jaxrl import config
from jaxrl.rewards import sandbox, verifier_of
from jaxrl.rewards.length import cosine_active, cosine_bonus, overlong_penalty, truncated_reward
from jaxrl.types import Detokenize, Marker, Rollout


def make_marker(recipe: config.Recipe, detokenize: Detokenize) -> Marker:
    """Returns a function that gives a rollout of a step its score and its reward. Threads may call it in parallel.

    Args:
      recipe: with [reward], [length] and the longest response.
      detokenize: token ids to text without special tokens.
    """
    reward, length = recipe.reward, recipe.length
    verify = verifier_of(reward.verifier, reward.thoughts)

    def mark(rollout: Rollout, step: int = 0) -> Rollout:
        before = detokenize(rollout.prompt.tokens) if reward.with_prompt else ""
        undecided = sandbox.undecided()  # comparisons so far
        score = verify(before + detokenize(rollout.tokens), rollout.prompt.answer)
        more = sandbox.undecided() > undecided
        tokens, longest = len(rollout.tokens), recipe.rollout.max_tokens
        earned = 1.0 if score > 0 else reward.wrong
        earned += overlong_penalty(tokens, longest, reward.overlong_tokens, reward.overlong_penalty)
        if cosine_active(step, length.cosine_on, length.cosine_off):
            earned += cosine_bonus(tokens, longest, length.cosine)
        if rollout.finish_reason == "length":
            earned = truncated_reward(earned, length.truncated_factor, length.truncated_penalty)
        return dataclasses.replace(rollout, score=score, reward=earned, undecided=score < 0 and more)

    return mark
