"""The penalty on long answers, by hand: JustRL's ablation has 4,096 of 15,360 tokens in the buffer."""

import numpy as np
import pytest

from jaxrl import config
from jaxrl.grpo import group_advantages
from jaxrl.metrics import rollout_metrics
from jaxrl.prepare import verifier
from jaxrl.rewards.overlong import overlong_penalty
from jaxrl.types import Prompt, Rollout


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (11_264, 0), (11_265, -1 / 4096), (13_312, -0.5), (15_360, -1)]
)
def test_by_hand(length: int, penalty: float) -> None:
    assert overlong_penalty(length, 15_360, 4096, 1.0) == penalty
    assert overlong_penalty(length, 15_360, 4096, 0.5) == penalty / 2
    assert overlong_penalty(length, 15_360, 0, 1.0) == 0


def rollout(text: str, length: int) -> Rollout:
    tokens = np.full(length, ord(" "), np.int32)
    tokens[-len(text) :] = [ord(c) for c in text]
    return Rollout(
        Prompt("", np.array([ord("?")], np.int32), "4"), tokens, np.zeros(length, np.float32), "stop", 0
    )


def test_it_is_part_of_the_reward_and_not_of_what_is_right() -> None:
    recipe = config.from_dict({"rollout": {"max_tokens": 100}, "reward": {"overlong_tokens": 40}})
    verify = verifier(recipe, lambda ids: "".join(map(chr, ids)))
    group = [verify(rollout(*r)) for r in (("\\boxed{4}", 20), ("\\boxed{4}", 100), ("\\boxed{5}", 80))]
    assert [r.score for r in group] == [1, 1, -1]
    assert [r.reward for r in group] == [1, 0, -1.5]
    rewards = np.array([[r.reward for r in group]])
    found = rollout_metrics([group], rewards)
    assert found["reward/accuracy"] == pytest.approx(2 / 3) and found["reward/mean"] == pytest.approx(
        -0.5 / 3
    )
    assert group_advantages(rewards)[0, 1] != group_advantages(rewards)[0, 0]
    right = [verify(rollout("\\boxed{4}", n)) for n in (20, 90)]  # all right, and still something to learn
    assert rollout_metrics([right], np.array([[r.reward for r in right]]))["groups/all_correct_fraction"] == 1
    assert group_advantages(np.array([[r.reward for r in right]])).any()


def test_a_verifier_may_be_given_the_prompt() -> None:
    """R1's chat template ends the prompt with <think>, which DeepScaleR's verifier wants to see."""
    for with_prompt, score in ((False, -1), (True, 1)):
        recipe = config.from_dict({"reward": {"verifier": "equivalent", "with_prompt": with_prompt}})
        verify = verifier(recipe, lambda ids: "".join(map(chr, ids)))
        asked = Prompt("", np.array([ord(c) for c in "2+2=?<think>"], np.int32), "4")
        answer = np.array([ord(c) for c in "so</think>\\boxed{4.0}"], np.int32)
        found = verify(Rollout(asked, answer, np.zeros(len(answer), np.float32), "stop", 0))
        assert found.score == score, with_prompt
