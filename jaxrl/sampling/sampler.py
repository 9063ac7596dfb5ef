"""What a sampler is: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem, ready to be continued."""

    id: str  # stable over a run; names the problem in rollout files
    tokens: np.ndarray  # [T] int32: chat-templated prompt, generation prompt included
    answer: str  # ground truth, as the verifier wants it


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled completion of a prompt."""

    prompt: Prompt
    tokens: np.ndarray  # [T] int32: completion ids; the end-of-sequence token, where sampled, is included
    logprobs: np.ndarray  # [T] float32: log-probability (nats) of each id at the sampling temperature
    finish_reason: Literal["stop", "length"]
    version: int  # of the weights that sampled it; the oldest, where they changed on the way
    score: float = float("nan")  # the verifier's, once scored
    penalty: float = 0.0  # what the reward has beside the score, at most 0
    server: str = ""  # that sampled it, where there are several

    @property
    def reward(self) -> float:
        return self.score + self.penalty


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: the whole vocabulary
    max_tokens: int = 15_360
    stop_ids: tuple[int, ...] = ()


class Sampler(Protocol):
    """Anything that can be given weights and asked for completions."""

    def publish(self, params: Any, version: int) -> None:
        """Make `params` (the trainer's pytree) the weights of every later completion."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        each: Callable[[Rollout], Rollout] = lambda rollout: rollout,
        first: int = 0,
    ) -> list[list[Rollout]]:
        """Returns `samples` rollouts for each prompt, `[P][G]`.

        The randomness of sample g of prompt p depends on (*seed, first + p, g) alone. `each` is called with each one
        as it finishes, in any order; what it returns takes its place.
        """
