"""Importance weights and histograms of ratios against NumPy in float64."""

from __future__ import annotations

import dataclasses

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
from jaxrl.types import Correction, Prompt, Rollout

TINY = decoder.Config("qwen2", 16, 8, 1, 2, 1, 4, 16, 1e4, 1e-6, True, 64)


@pytest.mark.parametrize("cap", [1.0, 1.5, 4.0])
def test_importance_weights(cap: float) -> None:
    rng = np.random.default_rng(0)
    sampler = rng.normal(-2, 1, (3, 50))
    trainer = sampler + rng.normal(0, 1, (3, 50))
    ratio = np.exp(trainer - sampler)
    arrays = jnp.float32(trainer), jnp.float32(sampler)
    truncated = np.minimum(ratio, cap)
    np.testing.assert_allclose(importance_weights(*arrays, "truncated", cap), truncated, rtol=1e-5)
    masked = np.where((ratio > cap) | (ratio < 1 / cap), 0, ratio)
    np.testing.assert_allclose(importance_weights(*arrays, "masked", cap), masked, rtol=1e-5)


def test_a_policy_that_is_the_sampler_needs_no_weights() -> None:
    same = jnp.linspace(-9, 0, 20)
    for correction in ("truncated", "masked"):
        np.testing.assert_array_equal(importance_weights(same, same, correction, 1.0), np.ones(20))


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
