"""The penalty on long answers, by hand: JustRL's ablation has 4,096 of 15,360 tokens in the buffer."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl import config
from jaxrl.grpo import group_advantages
from jaxrl.marking import make_marker
from jaxrl.metrics import rollout_metrics
from jaxrl.rewards.length import overlong_penalty
from jaxrl.types import Prompt, Rollout


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (11_264, 0), (11_265, -1 / 4096), (13_312, -0.5), (15_360, -1)]
)
def test_by_hand(length: int, penalty: float) -> None:
    assert overlong_penalty(length, 15_360, 4096, 1.0) == penalty
    assert overlong_penalty(length, 15_360, 4096, 0.5) == penalty / 2
    assert overlong_penalty(length, 15_360, 0, 1.0) == 0


def encode(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.int32)


def detokenize(ids: np.ndarray) -> str:
    return "".join(map(chr, ids))


def rollout(text: str, length: int, prompt: str = "?") -> Rollout:
    """A response of `length` tokens that ends in `text`."""
    tokens = encode(text.rjust(length))
    return Rollout(Prompt("", encode(prompt), "4"), tokens, np.zeros(length, np.float32), "stop", 0)


def test_it_is_part_of_the_reward_and_not_of_what_is_right() -> None:
    recipe = config.from_dict({"rollout": {"max_tokens": 100}, "reward": {"overlong_tokens": 40}})
    mark = make_marker(recipe, detokenize)
    group = [mark(rollout(*r)) for r in (("\\boxed{4}", 20), ("\\boxed{4}", 100), ("\\boxed{5}", 80))]
    assert [r.score for r in group] == [1, 1, -1]
    assert [r.reward for r in group] == [1, 0, -1.5]
    rewards = np.array([[r.reward for r in group]])
    found = rollout_metrics([group])
    assert found["reward/accuracy"] == pytest.approx(2 / 3)
    assert found["reward/mean"] == pytest.approx(-0.5 / 3)
    assert group_advantages(rewards)[0, 1] != group_advantages(rewards)[0, 0]
    right = [mark(rollout("\\boxed{4}", n)) for n in (20, 90)]  # all right, and still something to learn
    rewards = np.array([[r.reward for r in right]])
    assert rollout_metrics([right])["groups/all_correct_fraction"] == 1
    assert group_advantages(rewards).any()


def test_a_verifier_may_be_given_the_prompt_or_ask_for_less() -> None:
    """R1's chat template ends the prompt with <think>, which DeepScaleR's verifier wants to see."""
    found = {
        ("required", False): -1,
        ("required", True): 1,
        ("closed", False): 1,
        ("optional", False): 1,
    }
    for (thoughts, with_prompt), score in found.items():
        values = {"verifier": "equivalent", "with_prompt": with_prompt, "thoughts": thoughts}
        answer = "so</think>\\boxed{4.0}"
        mark = make_marker(config.from_dict({"reward": values}), detokenize)
        assert mark(rollout(answer, len(answer), "2+2=?<think>")).score == score, values
