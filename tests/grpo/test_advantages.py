"""Advantages and weights against verl's numbers and against the formulas, written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl.grpo import group_advantages, sequence_weights, token_weights
from jaxrl.types import JsonObject, Normalization

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "grpo_objective.json").read_text())
MASK = np.array([5, 1, 3, 6])[:, None] > np.arange(8)[None]  # nothing is as long as may be


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"seed{case['seed']}")
def test_advantages_are_verls(case: JsonObject) -> None:
    rewards = np.array(case["rewards"]).reshape(case["groups"], case["group_size"])
    for name, normalize_std in (("advantage", True), ("advantage_no_std", False)):
        ours = group_advantages(rewards, case["epsilon"], normalize_std)
        np.testing.assert_allclose(ours.reshape(-1), case[name], rtol=1e-5, atol=1e-6)


def test_advantages_are_the_formula() -> None:
    rewards = np.random.default_rng(0).normal(size=(7, 5))
    for row, ours in zip(rewards, group_advantages(rewards, epsilon=0.125), strict=True):
        mean = sum(row) / 5
        std = (sum((r - mean) ** 2 for r in row) / (5 - 1)) ** 0.5
        np.testing.assert_allclose(ours, [(r - mean) / (std + 0.125) for r in row], rtol=1e-6)
    centered = group_advantages(rewards, normalize_std=False)
    np.testing.assert_allclose(centered, rewards - rewards.mean(axis=1, keepdims=True), rtol=1e-6)
    assert ours.dtype == centered.dtype == np.float32


@given(
    st.one_of(st.sampled_from([0.1, 0.3, -1.0, 1 / 3, 1e-30]), st.floats(-1e6, 1e6)),
    st.integers(2, 33),
    st.booleans(),
)
def test_equal_rewards_give_exact_zeros(reward: float, size: int, normalize_std: bool) -> None:
    """Also where the mean of equal numbers is off by a rounding: the zeros decide what is trained on."""
    assert not group_advantages(np.full((2, size), reward), normalize_std=normalize_std).any()


@given(hnp.arrays(np.float64, (3, 4), elements=st.sampled_from([-1.0, 1.0])))
def test_a_group_depends_on_itself_alone(rewards: np.ndarray) -> None:
    together = group_advantages(rewards)
    for row, group in zip(rewards, together, strict=True):
        np.testing.assert_array_equal(group, group_advantages(row[None])[0])
        assert group.any() == (len(set(row)) > 1)


def test_group_of_one_keeps_its_reward() -> None:
    rewards = np.array([[2.0], [-1.0], [0.0]])
    np.testing.assert_allclose(group_advantages(rewards, epsilon=0.5), rewards / 1.5)
    np.testing.assert_array_equal(group_advantages(rewards, normalize_std=False), rewards)


def test_rewards_need_two_axes() -> None:
    with pytest.raises(AssertionError):
        group_advantages(np.ones(4))


def mean_loss(losses: np.ndarray, mask: np.ndarray, normalization: Normalization) -> float:
    """The definitions, a token at a time."""
    kept = [[loss for loss, m in zip(*row, strict=True) if m] for row in zip(losses, mask, strict=True)]
    sequences, longest = len(kept), len(mask[0])
    return {
        "token_mean": lambda: sum(sum(row) for row in kept) / sum(len(row) for row in kept),
        "sequence_mean": lambda: sum(sum(row) / len(row) for row in kept) / sequences,
        "sequence_sum": lambda: sum(sum(row) for row in kept) / sequences,
        "dr_grpo": lambda: sum(sum(row) / longest for row in kept) / sequences,
    }[normalization]()


@pytest.mark.parametrize("normalization", get_args(Normalization))
def test_weights_make_the_mean(normalization: Normalization) -> None:
    losses = np.random.default_rng(0).normal(size=MASK.shape)
    weights = token_weights(MASK, normalization)
    assert weights.dtype == np.float32 and not weights[MASK == 0].any() and (weights[MASK == 1] > 0).all()
    np.testing.assert_allclose((weights * losses).sum(), mean_loss(losses, MASK, normalization), rtol=1e-5)
    total = {"token_mean": 1, "sequence_mean": 1, "sequence_sum": 15 / 4, "dr_grpo": 15 / 32}[normalization]
    np.testing.assert_allclose(weights.sum(), total, rtol=1e-6)


def test_token_mean_is_the_default() -> None:
    np.testing.assert_array_equal(token_weights(MASK), token_weights(MASK, "token_mean"))


@pytest.mark.parametrize("normalization", get_args(Normalization))
def test_an_empty_sequence_counts_and_breaks_nothing(normalization: Normalization) -> None:
    mask = np.vstack([MASK, np.zeros(8)])
    weights = token_weights(mask, normalization)
    assert np.isfinite(weights).all() and not weights[-1].any()
    per_sequence = {"token_mean": 1.0}.get(normalization, 4 / 5)  # four of five sequences have tokens
    np.testing.assert_allclose(weights[:4], token_weights(MASK, normalization) * per_sequence, rtol=1e-6)


def test_sequence_weights_are_the_rows_of_token_weights() -> None:
    for normalization in get_args(Normalization):
        by_sequence = sequence_weights(MASK.sum(axis=1), normalization, max_length=8)
        np.testing.assert_allclose(by_sequence[:, None] * MASK, token_weights(MASK, normalization), rtol=1e-6)


def test_unknown_normalization() -> None:
    with pytest.raises(ValueError, match="unknown normalization 'token-mean'"):
        token_weights(MASK, "token-mean")  # type: ignore[arg-type]
