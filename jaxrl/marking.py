"""Marking rollouts: by the recipe's verifier and functions on the text; the reward, with the terms of its length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from jaxrl import config
from jaxrl.rewards import sandbox, verifier_of
from jaxrl.rewards.functions import Functions, columns_of
from jaxrl.rewards.length import cosine_active, cosine_bonus, overlong_penalty, truncated_reward
from jaxrl.types import Detokenize, Groups, Marker, Rollout


@dataclasses.dataclass(frozen=True)
class Pending(Rollout):
    """A rollout whose reward functions are under way; without a verifier it has no score yet."""

    complete: Callable[[], Rollout] | None = None  # waits for them


def make_marker(recipe: config.Recipe, detokenize: Detokenize, functions: Functions | None = None) -> Marker:
    """Returns a function that gives a rollout of a step its score and its reward. Threads may call it in parallel.

    With functions, it returns at once what `finished` takes.

    Args:
      recipe: with [reward], [length] and the longest response.
      detokenize: token ids to text without special tokens.
      functions: the recipe's; without them, what they would add is left out.
    """
    reward, length = recipe.reward, recipe.length
    verify = verifier_of(reward.marked_by, reward.thoughts) if reward.marked_by else None

    def shaped(earned: float, rollout: Rollout, step: int) -> float:
        """A reward with the terms of the rollout's length."""
        tokens, longest = len(rollout.tokens), recipe.rollout.max_tokens
        earned += overlong_penalty(tokens, longest, reward.overlong_tokens, reward.overlong_penalty)
        if cosine_active(step, length.cosine_on, length.cosine_off):
            earned += cosine_bonus(tokens, longest, length.cosine)
        if rollout.finish_reason == "length":
            earned = truncated_reward(earned, length.truncated_factor, length.truncated_penalty)
        return earned

    def mark(rollout: Rollout, step: int = 0) -> Rollout:
        response, score, undecided = detokenize(rollout.tokens), float("nan"), False
        if verify:
            before = detokenize(rollout.prompt.tokens) if reward.with_prompt else ""
            compared = sandbox.undecided()  # comparisons so far
            score = verify(before + response, rollout.prompt.answer)
            undecided = score < 0 and sandbox.undecided() > compared
        earned = 1.0 if score > 0 else reward.wrong
        if functions is None:
            earned = shaped(earned, rollout, step)
            return dataclasses.replace(rollout, score=score, reward=earned, undecided=undecided)
        wait = functions.start(rollout, response, detokenize)

        def complete() -> Rollout:
            total, parts = wait()
            right = score if verify else 1.0 if total > reward.threshold else -1.0
            both = shaped(reward.verifier_weight * earned + total if verify else total, rollout, step)
            return dataclasses.replace(rollout, score=right, reward=both, undecided=undecided, rewards=parts)

        values = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(Rollout)}
        return Pending(**values | {"score": score, "undecided": undecided}, complete=complete)

    return mark


def finished(groups: Groups) -> list[list[Rollout]]:
    """Marked groups [P][G] with their rewards whole; waits for the functions that are under way.

    Raises:
      InputError, RunError: where a function failed, and the recipe does not go on.
    """
    return [[r.complete() if isinstance(r, Pending) and r.complete else r for r in group] for group in groups]


def columns_for(section: config.Reward) -> dict[str, str]:
    """The columns that evaluations take, see `columns_of`: none where a verifier says which answers are right."""
    return {} if section.marked_by else columns_of(section)


def functions_of(recipe: config.Recipe) -> Functions | None:
    """The functions that say which answers are right, where the recipe has no verifier; for evaluations."""
    return None if recipe.reward.marked_by else _functions(recipe.reward)


_functions = functools.lru_cache(Functions)
