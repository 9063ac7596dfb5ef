"""What a sampler is: prompts in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from jaxrl.types import OnGroup, OnRollout, Prompt, Rollout, SamplingParams

if TYPE_CHECKING:
    from jaxrl.models.decoder import Params


def unchanged(rollout: Rollout) -> Rollout:
    """The `OnRollout` that does nothing."""
    return rollout


def no_more(place: int, group: Sequence[Rollout]) -> Sequence[Prompt]:
    """The `OnGroup` that asks for nothing more."""
    return ()


class Sampler(Protocol):
    """Anything that can be given weights and asked for completions."""

    def publish(self, params: Params, version: int) -> None:
        """Makes `params` (the trainer's pytree) the weights of every later completion."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: OnRollout = unchanged,
        first: int = 0,
        on_group: OnGroup = no_more,
    ) -> list[list[Rollout]]:
        """Samples `samples` completions of each prompt.

        Args:
          prompts: P of them.
          samples: G, completions of each.
          params: temperature, limits and stop tokens.
          seed: with (first + p, g) all that the randomness of sample g of prompt p depends on.
          on_rollout: called with each rollout as it finishes, in any order; what it returns takes its place.
          first: position of the first prompt among all that share the seed.
          on_group: called with each group as it becomes complete, in any order; see `OnGroup`.

        Returns:
          rollouts [P][G], those of prompts that `on_group` returned after the others.
        """
