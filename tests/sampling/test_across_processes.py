"""Rollouts that travel between processes arrive as they were."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl.sampling.across_processes import from_bytes, share, to_bytes
from jaxrl.types import Prompt, Rollout


@pytest.mark.parametrize("count", [0, 1, 7, 256])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_cover_all_prompts_evenly(count: int, processes: int) -> None:
    parts = [share(count, i, processes) for i in range(processes)]
    assert [p for part in parts for p in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("called", [False, True], ids=["", "with rewards of functions"])
def test_what_is_sent_arrives(called: bool) -> None:
    rng = np.random.default_rng(0)
    prompts = [Prompt(str(i), np.arange(i + 1, dtype=np.int32), str(i)) for i in range(5)]

    def rollout(prompt: Prompt, length: int) -> Rollout:
        tokens = rng.integers(9, size=length).astype(np.int32)
        logprobs = rng.random(length).astype(np.float32)
        finish = "stop" if length % 2 else "length"
        score, reward, parts = float(-length), length / 8, {"é": length / 3, "b": float("nan")}
        rewards = {name: parts[name] for name in [*parts][length % 2 :]} if called else None
        return Rollout(
            prompt, tokens, logprobs, finish, length, score, reward, undecided=length > 4, rewards=rewards
        )

    lengths = [(3, 1), (2, 5), (), (4, 7), (1, 1)]
    groups = [[rollout(prompts[p], n) for n in row] for p, row in enumerate(lengths)]
    # three processes, one of them without prompts
    parts = [to_bytes(groups[:2]), to_bytes([]), to_bytes(groups[2:])]
    found = from_bytes(parts, prompts)
    assert [len(group) for group in found] == [2, 2, 0, 2, 2]
    for a, b in zip((r for g in found for r in g), (r for g in groups for r in g), strict=True):
        assert a.prompt is b.prompt
        assert (a.finish_reason, a.version) == (b.finish_reason, b.version)
        assert (a.score, a.reward, a.undecided) == (b.score, b.reward, b.undecided)
        assert repr(a.rewards and sorted(a.rewards.items())) == repr(b.rewards and sorted(b.rewards.items()))
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.tokens.dtype, a.logprobs.dtype) == (np.int32, np.float32)
