"""Importance weights and histograms of ratios against NumPy in float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config
from jaxrl.grpo import packing
from jaxrl.grpo.mismatch import EDGES, importance_weights, ratio_histogram, ratio_quantiles
from jaxrl.models import decoder
from jaxrl.parallel.mesh import make_mesh
from jaxrl.prepare import with_old_logprobs
from jaxrl.programs import build_programs
from jaxrl.types import Correction, Level, Prompt, Rollout, Truncation

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


def make_batch(on_policy: bool) -> packing.PackedBatch:
    rng = np.random.default_rng(2)
    ids = np.arange(9, dtype=np.int32)
    logprobs = [-rng.random(n).astype(np.float32) for n in (5, 9, 2)]
    rollouts = [Rollout(Prompt("", ids[:3], ""), ids[: len(x)], x, "stop", 0) for x in logprobs]
    advantages, layout = np.array([1, -1, 1], np.float32), packing.Layout((32,), (16,))
    return packing.pack(rollouts, advantages, jax.device_count(), layout, on_policy=on_policy)


@pytest.mark.parametrize("correction", ["none", "truncated", "masked"])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
def test_what_ratios_are_relative_to(correction: Correction, stale: bool, on_policy: bool) -> None:
    sections = {"sampler": {"correction": correction, "correction_cap": 1.5}, "model": {"remat": "full"}}
    recipe = config.from_dict(sections)
    packed = make_batch(on_policy and correction == "none" and not stale)
    apart = np.random.default_rng(3).normal(0, 0.5, packed.tokens.shape).astype(np.float32)
    scored = []

    def logprobs(params: decoder.Params, batch: packing.PackedBatch) -> jax.Array:
        scored.append(batch)
        return batch.sampler_logprobs + apart

    programs = dataclasses.replace(build_programs(recipe, TINY, make_mesh()), logprobs=logprobs)
    batch = jax.device_get(with_old_logprobs(recipe, programs, packed, {}, stale))
    ratio = np.exp(np.float64(apart))
    weights, old = packed.weights, packed.sampler_logprobs + apart
    if correction == "none" and stale:
        assert not scored
        old = packed.sampler_logprobs
    elif correction == "none" and on_policy:
        assert not scored and batch.on_policy.all()
        old = packed.old_logprobs
    elif correction == "truncated":
        weights = weights * np.minimum(ratio, 1.5)
    elif correction == "masked":
        weights = weights * np.where((ratio > 1.5) | (ratio < 1 / 1.5), 0, ratio)
    np.testing.assert_allclose(batch.old_logprobs, old, rtol=1e-6)
    np.testing.assert_allclose(batch.weights, weights, rtol=1e-5)
    assert np.count_nonzero(packed.weights) == 16
