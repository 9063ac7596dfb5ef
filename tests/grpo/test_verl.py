"""verl's division of a step, and that its weights are its objective, written out once more in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl import config
from jaxrl.grpo import verl
from jaxrl.grpo.advantages import sequence_weights
from jaxrl.prepare import divide
from jaxrl.types import Normalization, Prompt, Rollout

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def test_the_textbook_example_of_differencing() -> None:
    """8, 7, 6, 5, 4: differencing ends with sums of 14 and 16, where the best are 15 and 15."""
    found = verl.partition([8, 7, 6, 5, 4], 2)
    assert sorted(sum((8, 7, 6, 5, 4)[i] for i in part) for part in found) == [14, 16]
    assert sorted(itertools.chain(*found)) == [0, 1, 2, 3, 4]


@given(LENGTHS, st.integers(1, 6))
def test_a_partition_has_everything_once_and_is_about_balanced(lengths: list[int], parts: int) -> None:
    found = verl.partition(lengths, parts)
    assert len(found) == parts and sorted(itertools.chain(*found)) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in part) for part in found]
    assert max(sums) - min(sums) <= max(lengths)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 4), st.integers(20, 200))
def test_all_sequences_are_divided_and_micro_batches_about_hold_them(
    lengths: list[int], ranks: int, minibatches: int, tokens: int
) -> None:
    found = verl.divide(lengths, ranks, minibatches, tokens)
    assert len(found) == minibatches and all(len(mini) == ranks for mini in found)
    everything = [int(i) for mini in found for rank in mini for part in rank for i in part]
    assert sorted(everything) == list(range(len(lengths)))
    sizes = [sum(map(len, rank)) for mini in found for rank in mini]
    assert max(sizes) - min(sizes) <= -(-len(lengths) // (ranks * minibatches))
    for mini in found:
        assert len({len(rank) for rank in mini}) == 1  # as many micro-batches on each rank


@given(st.integers(0, 1000), st.sampled_from([(1, 1), (2, 2), (4, 3)]), st.sampled_from([60, 120, 10_000]))
def test_the_weights_are_the_objective(seed: int, shape: tuple[int, int], tokens: int) -> None:
    """L = mean over ranks of sum over micro-batches of n_m / B times the micro-batch's token mean."""
    rng, (ranks, minibatches) = np.random.default_rng(seed), shape
    response = rng.integers(1, 50, ranks * minibatches * 5)
    lengths, losses = response + 7, [rng.normal(size=n) for n in response]
    for mini in verl.divide(lengths.tolist(), ranks, minibatches, tokens):
        expected = 0.0
        for rank in mini:
            of_rank = sum(len(part) for part in rank)
            for part in rank:
                every_token = np.concatenate([losses[i] for i in part])
                expected += len(part) / of_rank * every_token.mean() / ranks
        chosen, weights = verl.weights(mini, response)
        found = sum(w * losses[i].sum() for i, w in zip(chosen, weights, strict=True))
        assert found == pytest.approx(expected, rel=1e-12)
        assert (weights > 0).all() and (weights * response[chosen]).sum() == pytest.approx(1)


def test_its_extremes_are_the_token_mean_and_the_sequence_mean() -> None:
    response = np.array([3, 30, 11, 24, 8, 2])
    extremes: tuple[tuple[int, Normalization], ...] = ((10**6, "token_mean"), (1, "sequence_mean"))
    for tokens, name in extremes:
        (micro_batches,) = verl.divide(response.tolist(), 1, 1, tokens)
        chosen, weights = verl.weights(micro_batches, response)
        expected = sequence_weights(response, name, 0)
        np.testing.assert_allclose(weights, expected[chosen], rtol=1e-12)


@pytest.mark.parametrize(("mean", "micro_batches", "spread"), [(4500, 2.8, 1.25), (8000, 4.3, 1.4)])
def test_what_justrl_made_of_it(mean: float, micro_batches: float, spread: float) -> None:
    """Micro-batches a rank, and the largest weight over the smallest in a rank's mini-batch, as measured with verl's
    own code on log-normal lengths."""
    rng = np.random.default_rng(0)
    sigma = np.sqrt(np.log1p(0.5))
    response = np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, 2048), 1, 15_360).astype(int)
    counts, ratios = [], []
    for mini in verl.divide((response + 150).tolist(), 32, 4, 32_768):
        counts.append(len(mini[0]))
        for rank in mini:
            scale = [len(part) / response[part].sum() for part in rank]
            ratios.append(max(scale) / min(scale))
    assert np.mean(counts) == pytest.approx(micro_batches, abs=0.75)
    assert np.median(ratios) == pytest.approx(spread, abs=0.05)


@pytest.mark.parametrize("normalization", ["token_mean", "verl_dynamic"])
def test_a_recipe_divides_a_step(normalization: str) -> None:
    rollout, optimizer = {"prompts": 8, "samples": 4}, {"minibatch_prompts": 4}
    loss = {"normalization": normalization, "verl_ranks": 2, "verl_tokens": 64}
    recipe = config.from_dict({"rollout": rollout, "optimizer": optimizer, "loss": loss})
    rng, ids = np.random.default_rng(1), np.zeros(30, np.int32)
    lengths = rng.integers(1, 30, 31)  # one prompt's last sample was refused
    rollouts = [
        Rollout(Prompt("", ids[:3], ""), ids[:n], np.zeros(n, np.float32), "stop", 0) for n in lengths
    ]
    found = list(divide(recipe, rollouts, lengths))
    assert len(found) == 2 and sorted(np.concatenate([chosen for chosen, _ in found])) == list(range(31))
    for chosen, weights in found:
        tokens = np.array([len(rollouts[i].tokens) for i in chosen])
        assert (weights * tokens).sum() == pytest.approx(1, abs=0.07)  # verl takes B as it should have been
    if normalization == "token_mean":
        np.testing.assert_array_equal(found[0][0], np.arange(16))
