"""Importance weights and histograms of ratios against NumPy in float64."""

from __future__ import annotations

import itertools
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.grpo.mismatch import (
    EDGES,
    importance_weights,
    mismatch,
    mismatch_sums,
    ratio_histogram,
    ratio_quantiles,
)
from jaxrl.models import decoder
from jaxrl.types import Level, Truncation

TINY = decoder.Config("qwen2", 16, 8, 1, 2, 1, 4, 16, 1e4, 1e-6, True, 64)


LENGTHS = (50, 7, 1, 0)


def logprobs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of the sampler's in float32, and of a trainer that is far from it."""
    rng = np.random.default_rng(0)
    sampler = [rng.normal(-2, 1, n).astype(np.float32) for n in LENGTHS]
    return [x + rng.normal(0, 1, len(x)) for x in sampler], sampler


@pytest.mark.parametrize("cap", [1.0, 1.5, 4.0])
def test_importance_weights(cap: float) -> None:
    trainer, sampler = logprobs()
    truncated = importance_weights(trainer, sampler, "truncated", cap)
    masked = importance_weights(trainer, sampler, "masked", cap)
    for i, (new, old) in enumerate(zip(trainer, sampler, strict=True)):
        ratio = np.exp(new - np.float64(old))
        np.testing.assert_allclose(truncated[i], np.minimum(ratio, cap), rtol=1e-12)
        np.testing.assert_allclose(
            masked[i], np.where((ratio > cap) | (ratio < 1 / cap), 0, ratio), rtol=1e-12
        )
        assert truncated[i].dtype == masked[i].dtype == np.float64


def test_a_policy_that_is_the_sampler_needs_no_weights() -> None:
    same = [np.linspace(-9, 0, n) for n in LENGTHS]
    for correction, level in itertools.product(get_args(Truncation), get_args(Level)):
        for weights in importance_weights(same, same, correction, 1.0, level=level):
            np.testing.assert_array_equal(weights, np.ones(len(weights)))


def test_importance_weights_need_a_log_prob_of_both() -> None:
    with pytest.raises(AssertionError):
        importance_weights([np.zeros(3)], [np.zeros(2)], "truncated", 2.0)
    with pytest.raises(ValueError):
        importance_weights([np.zeros(3)], [], "truncated", 2.0)


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_divergence_and_effective_sample_size(spread: float) -> None:
    """Sums of parts add up; k3 is unbiased for the exact divergence of two policies."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1, (2, 50)) * [[1], [spread]]
    sampler, trainer = (x - np.log(np.exp(x).sum()) for x in (logits[0], logits.sum(axis=0)))
    ids, live = rng.choice(50, 20_000, p=np.exp(sampler)), rng.random(20_000) < 0.7
    parts = [
        mismatch_sums(jnp.asarray(trainer[ids[own]]), jnp.asarray(sampler[ids[own]]), jnp.asarray(live[own]))
        for own in np.split(np.arange(20_000), 4)
    ]
    names = ("mismatch_k3", "mismatch_ratio", "mismatch_square")
    k3, ess = mismatch(*(float(sum(part[name] for part in parts)) for name in names), live.sum())
    ratio = np.exp(trainer - sampler)[ids][live]
    np.testing.assert_allclose(k3, np.mean(ratio - 1 - np.log(ratio)), rtol=2e-2 if spread < 1 else 1e-4)
    np.testing.assert_allclose(ess, ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()), rtol=1e-5)
    exact = np.sum(np.exp(sampler) * (sampler - trainer))
    assert k3 == pytest.approx(exact, rel=0.1)


def test_no_tokens_have_no_divergence() -> None:
    nothing = mismatch_sums(jnp.array([jnp.nan]), jnp.zeros(1), jnp.array([False]))
    assert all(float(value) == 0 for value in nothing.values()) and np.isnan(mismatch(0, 0, 0, 0)).all()


@pytest.mark.parametrize("spread", [1e-5, 1e-2, 1.0])
def test_quantiles_are_those_of_the_tokens(spread: float) -> None:
    rng = np.random.default_rng(1)
    log_ratio, live = rng.normal(0, spread, 4000), rng.random(4000) < 0.7

    def count(part: slice) -> np.ndarray:
        trainer = jnp.float32(log_ratio[part])
        return np.asarray(ratio_histogram(trainer, jnp.zeros_like(trainer), jnp.asarray(live[part])))

    counts = count(slice(0, 1000)) + count(slice(1000, 4000))  # devices add up their counts
    assert counts.sum() == live.sum() and len(counts) == len(EDGES) + 1
    shares = (0.01, 0.1, 0.9, 0.99)
    expected = np.quantile(log_ratio[live], shares)
    np.testing.assert_allclose(np.log(ratio_quantiles(counts, shares)), expected, rtol=0.3)


def test_quantiles_of_agreement_and_of_nothing() -> None:
    counts = ratio_histogram(jnp.zeros(9), jnp.zeros(9), jnp.ones(9, bool))
    assert ratio_quantiles(np.asarray(counts), (0.01, 0.5, 0.99)) == [1.0, 1.0, 1.0]
    assert np.isnan(ratio_quantiles(np.zeros(len(EDGES) + 1), (0.5,))[0])
