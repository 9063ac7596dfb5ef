"""The clipped objective against verl's numbers, and against NumPy in float64 with finite differences."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.typing import ArrayLike

from jaxrl.grpo import policy_objective, token_weights
from jaxrl.types import JsonObject

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "grpo_objective.json").read_text())
MODES = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
}
Ranges = dict[str, float]  # clip_low, clip_high, dual_clip
RANGE = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
SIZE = 1024


@functools.partial(jax.jit, static_argnames=RANGE)
def compiled(
    *arrays: np.ndarray, **ranges: float
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], jax.Array]:
    return jax.value_and_grad(functools.partial(policy_objective, **ranges), has_aux=True)(*arrays)


def value_and_grad(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    weights: ArrayLike,
    *,
    padding: bool = True,
    **ranges: float,
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, gradient with respect to `logprobs` and metrics; as one row of SIZE tokens, so as to compile once."""
    arrays = [np.asarray(x, np.float32) for x in (logprobs, old_logprobs, advantages, weights)]
    shape, size = arrays[0].shape, arrays[0].size
    if padding:
        arrays = [np.pad(x.reshape(-1), (0, SIZE - size)) for x in arrays]
    (loss, metrics), grad = compiled(*arrays, **(RANGE | ranges))
    grad = np.asarray(grad).reshape(-1)
    assert not grad[size:].any()
    return float(loss), grad[:size].reshape(shape), {name: float(x) for name, x in metrics.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"seed{case['seed']}")
def test_loss_gradient_and_metrics_are_verls(case: JsonObject, mode: str) -> None:
    mask, expected = np.array(case["mask"]), case["objective"][mode]
    advantages = np.broadcast_to(np.array(case["advantage"])[:, None], mask.shape)
    arrays = case["logprob"], case["old_logprob"], advantages, token_weights(mask, MODES[mode])
    ranges = {"clip_low": case["clip_low"], "clip_high": case["clip_high"], "dual_clip": case["clip_c"]}
    loss, grad, metrics = value_and_grad(*arrays, **ranges)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    near(loss, expected["loss"])
    near(grad, expected["grad_logprob"])
    near(metrics["clip_fraction"], expected["clipfrac"])
    near(metrics["clip_fraction_lower"], expected["clipfrac_lower"])
    near(metrics["approx_kl"], expected["ppo_kl"])
    ratio = np.exp(np.array(case["logprob"]) - np.array(case["old_logprob"]))
    near(metrics["ratio_max"], ratio[mask == 1].max())


def test_golden_reaches_every_branch() -> None:
    modes = [case["objective"]["token-mean"] for case in GOLDEN]
    assert sum(m["clipfrac"] > 0 for m in modes) > 3 and sum(m["clipfrac_lower"] > 0 for m in modes) > 3


def token_loss(
    logprob: float, old: float, advantage: float, clip_low: float, clip_high: float, dual_clip: float
) -> float:
    """One token, in words: by the sign of the advantage, where does the ratio stop counting?"""
    ratio = np.exp(logprob - old)
    if advantage >= 0:
        return -advantage * min(ratio, 1 + clip_high)
    return -advantage * min(max(ratio, 1 - clip_low), dual_clip)


def tokens(seed: int = 0, size: int = 400) -> tuple[np.ndarray, ...]:
    """Ratios on both sides of every limit, none within 1e-3 of a kink."""
    rng = np.random.default_rng(seed)
    old, advantages = -rng.exponential(size=size), rng.normal(size=size)
    log_ratio = rng.uniform(-1, 3, size)
    for limit in (0.8, 1.28, 10.0):
        log_ratio[abs(log_ratio - np.log(limit)) < 1e-3] = 0.1
    weights = rng.uniform(0.1, 1, size) * (rng.uniform(size=size) < 0.8)
    return old + log_ratio, old, advantages, weights


@pytest.mark.parametrize(
    "ranges",
    [RANGE, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}, {"clip_low": 0.9, "clip_high": 4.0}],
    ids=["justrl", "symmetric", "wide"],
)
def test_values_are_those_in_float64_and_gradients_finite_differences(ranges: Ranges) -> None:
    ranges = RANGE | ranges
    logprobs, old, advantages, weights = tokens()

    def losses(shift: float = 0.0) -> np.ndarray:
        rows = zip(logprobs + shift, old, advantages, strict=True)
        return weights * [token_loss(*row, **ranges) for row in rows]

    loss, grad, metrics = value_and_grad(logprobs, old, advantages, weights, **ranges)
    step = 1e-5
    np.testing.assert_allclose(loss, losses().sum(), rtol=1e-5)
    np.testing.assert_allclose(grad, (losses(step) - losses(-step)) / (2 * step), rtol=2e-4, atol=1e-5)
    ratio, live = np.exp(logprobs - old), weights > 0
    up, down = advantages > 0, advantages < 0
    binds = (up & (ratio > 1 + ranges["clip_high"])) | (down & (ratio < 1 - ranges["clip_low"]))
    assert metrics["clip_fraction"] == pytest.approx(binds[live].mean(), rel=1e-5) and binds[live].any()
    low, high = binds & down, binds & up
    assert metrics["clip_fraction_low"] == pytest.approx(low[live].mean(), rel=1e-5)
    assert metrics["clip_fraction_high"] == pytest.approx(high[live].mean(), rel=1e-5) and high[live].any()
    dual = down & (ratio > ranges["dual_clip"])
    assert metrics["clip_fraction_lower"] == pytest.approx(dual[live].mean(), rel=1e-5) and dual[live].any()
    assert metrics["approx_kl"] == pytest.approx((old - logprobs)[live].mean(), rel=1e-5)
    assert metrics["ratio_max"] == pytest.approx(ratio[live].max(), rel=1e-5)


@pytest.mark.parametrize(
    ("advantage", "ratio", "gradient"),
    [
        (1.0, 1.27, -1.27),  # the high side is clip_high's ...
        (1.0, 1.29, 0.0),
        (1.0, 0.5, -0.5),  # ... and good tokens are never held down
        (-1.0, 0.81, 0.81),  # the low side is clip_low's ...
        (-1.0, 0.79, 0.0),
        (-1.0, 5.0, 5.0),  # ... and bad tokens are pushed down from far above
        (-1.0, 9.9, 9.9),
        (-1.0, 10.1, 0.0),  # up to the dual clip
        (0.0, 20.0, 0.0),
    ],
)
def test_each_side_of_each_limit(advantage: float, ratio: float, gradient: float) -> None:
    _, grad, _ = value_and_grad([np.log(ratio)], [0.0], [advantage], [1.0])
    np.testing.assert_allclose(grad, [gradient], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e4])
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages"])
def test_weight_zero_leaves_a_token_out(bad: float, where: str) -> None:
    names = ["logprobs", "old_logprobs", "advantages", "weights"]
    clean = dict(zip(names, tokens(size=20), strict=True))
    clean["weights"][5:10] = 0
    dirty = {name: x.copy() for name, x in clean.items()}
    dirty[where][5:10] = bad
    for a, b in zip(value_and_grad(**clean), value_and_grad(**dirty), strict=True):
        np.testing.assert_equal(a, b)
    assert not value_and_grad(**dirty)[1][5:10].any()


def test_nothing_but_zero_weights_gives_zero() -> None:
    loss, grad, metrics = value_and_grad(*np.full((3, 4), np.nan), np.zeros(4))
    assert loss == 0 and not grad.any() and not any(metrics.values())


def test_ratio_one_is_the_policy_gradient() -> None:
    logprobs, _, advantages, weights = tokens()
    loss, grad, metrics = value_and_grad(logprobs, logprobs, advantages, weights)
    np.testing.assert_allclose(grad, -advantages * weights, rtol=1e-6)
    assert loss == pytest.approx(-(advantages * weights).sum(), rel=1e-5)
    clipped = dict.fromkeys([f"clip_fraction{side}" for side in ("", "_low", "_high", "_lower")], 0)
    assert metrics == clipped | {"approx_kl": 0, "ratio_max": 1}


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4)])
def test_leading_axes_change_nothing(shape: tuple[int, ...]) -> None:
    flat = tokens(size=24)
    loss, grad, metrics = value_and_grad(*(x.reshape(shape) for x in flat), padding=False)
    expected_loss, expected_grad, expected_metrics = value_and_grad(*flat)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    assert grad.shape == shape
    np.testing.assert_allclose(grad.reshape(-1), expected_grad, rtol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_shapes_must_be_equal(index: int) -> None:
    arrays = [np.zeros((2, 3), np.float32)] * 4
    arrays[index] = np.zeros((2, 1), np.float32)
    with pytest.raises(AssertionError):
        policy_objective(*arrays, **RANGE)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_technique_the_geometric_ratio_counts_the_tokens_that_it_cuts(advantage: float) -> None:
    """Half of the log-ratios are beyond the bound on their side; a good token is cut above, a bad one below."""
    log_ratio = np.float32(advantage * np.array([1.0, 0.0, 2.0, -1.0]))
    arrays = (
        log_ratio,
        np.zeros(4, np.float32),
        np.full(4, advantage, np.float32),
        np.full(4, 0.25, np.float32),
    )
    _, metrics = policy_objective(*arrays, **RANGE, ratio="geometric", sequences=np.zeros(4, np.int32))
    assert float(metrics["clip_fraction"]) == 0.5
    sides = [float(metrics[f"clip_fraction_{side}"]) for side in ("low", "high")]
    assert sides == ([0, 0.5] if advantage > 0 else [0.5, 0])
