"""Techniques of the loss against the released code of others: KL terms, entropy bonus, surrogates.

The vectors are [B, T] arrays; here a batch is one stream of B * T tokens, as `update` has it.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike

from jaxrl.grpo.advantages import sequence_weights
from jaxrl.grpo.gate import high_entropy
from jaxrl.grpo.kl import kl_penalty
from jaxrl.grpo.logprobs import token_logprobs
from jaxrl.grpo.mismatch import importance_weights
from jaxrl.grpo.objective import Sigmoid, policy_objective, score
from jaxrl.types import Correction, Estimator, JsonObject, Level, Normalization, Truncation
from vectors import cases, covered, near

MODES: dict[str, Normalization] = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "dr_grpo",
}
EVERYTHING = {"clip_low": 1.0, "clip_high": math.inf, "dual_clip": math.inf}


@pytest.fixture(autouse=True)
def float64() -> None:
    """The vectors are of float64; in float32 the same code is within 1e-5, as tests/grpo/test_objective.py has it."""
    with jax.enable_x64(True):
        yield


def array(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, np.float64)


def weights_of(mask: np.ndarray, mode: str, scale: float | None = None) -> np.ndarray:
    """Weights of a [B, T] mask, whose rows without a token do not count."""
    lengths = array(mask).sum(axis=1)
    longest = mask.shape[1] if scale is None else scale
    own = sequence_weights(lengths[lengths > 0], MODES[mode], longest)
    found = np.zeros(len(mask))
    found[lengths > 0] = own
    if mode == "seq-mean-token-sum-norm":  # verl's does not average over sequences
        found *= len(own)
    return found[:, None] * mask


def loss_and_gradient(
    case: JsonObject, weights: np.ndarray, advantages: ArrayLike, **options: object
) -> tuple:
    """(loss, its gradient to the log-probabilities [B, T], metrics)."""
    shape = weights.shape
    per_token = np.broadcast_to(array(advantages).reshape(shape[0], -1), shape)
    sequences = jnp.repeat(jnp.arange(shape[0]), shape[1])

    def of(logprobs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat = (x.reshape(-1) for x in (array(case["old_logprob"]), per_token, weights))
        return policy_objective(logprobs, *flat, **({"sequences": sequences} | options))

    (loss, metrics), grad = jax.value_and_grad(of, has_aux=True)(
        jnp.asarray(array(case["logprob"]).reshape(-1))
    )
    return float(loss), np.asarray(grad).reshape(shape), metrics


# KL


ESTIMATORS: dict[
    str, tuple[Estimator, float, float]
] = {  # estimator, bound of the value, bound of the log-ratio
    "verl_k1": ("k1", math.inf, math.inf),
    "verl_abs": ("abs", math.inf, math.inf),
    "verl_k2": ("k2", math.inf, math.inf),
    "verl_k3": ("k3", 10, 20),
    "verl040_low_var_kl": ("k3", 10, math.inf),
    "archer_low_var_kl": ("k3", 10, 20),
    "openrlhf_float32_k1": ("k1", 10, math.inf),
    "openrlhf_float32_k2": ("k2", 10, math.inf),
    "nemo_k1": ("k1", 10, 20),
    "nemo_k2": ("k2", 10, 20),
    "openrlhf_float32_k3": ("k3", 10, math.inf),
    "nemo_k3": ("k3", 10, 20),
    "trl_k3": ("k3", math.inf, math.inf),
}


@pytest.mark.parametrize("case", cases("kl"))
def test_technique_kl_estimators(case: JsonObject) -> None:
    logprobs, reference = jnp.asarray(array(case["logprob"])), jnp.asarray(array(case["ref_logprob"]))
    for name in covered("kl", case["estimators"]):
        expected = case["estimators"][name]
        if expected.get("overflow"):
            continue
        kind, *bounds = ESTIMATORS[name]
        estimator = functools.partial(kl_penalty, reference=reference, estimator=kind, bounds=tuple(bounds))
        tolerance = 3e-6 if "float32" in name else 1e-9
        near(estimator(logprobs), expected["value"], tolerance, name)
        near(jax.grad(lambda x: estimator(x).sum())(logprobs), expected["grad"], tolerance, name)  # noqa: B023
        host = kl_penalty(array(case["logprob"]), array(case["ref_logprob"]), kind, tuple(bounds))
        near(host, expected["value"], tolerance, name)


def token_arrays(case: JsonObject, *names: str) -> list[np.ndarray]:
    return [array(case[name]) for name in names]


def with_kl(
    case: JsonObject, weights: np.ndarray, estimator: Estimator, bound: float = 10
) -> tuple[float, np.ndarray]:
    """The KL term and its gradient to the log-probabilities; `weights` have the coefficient."""
    logprobs, reference = token_arrays(case, "logprob", "ref_logprob")

    def of(x: jax.Array) -> jax.Array:
        return jnp.sum(
            weights
            * jnp.where(weights != 0, kl_penalty(x, jnp.asarray(reference), estimator, (bound, 20)), 0.0)
        )

    value, grad = jax.value_and_grad(of)(jnp.asarray(logprobs))
    return float(value), np.asarray(grad)


@pytest.mark.parametrize("case", cases("kl_terms"))
def test_technique_kl_in_the_loss(case: JsonObject) -> None:
    mask = array(case["mask"])
    verl = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
    for mode, expected in case["in_loss"].items():
        weights = weights_of(mask, mode)
        loss, grad, _ = loss_and_gradient(case, weights, case["advantages"], **verl)
        kl, kl_grad = with_kl(case, weights, case["estimator"], 10 if case["estimator"] == "k3" else math.inf)
        near(kl, expected["kl_loss"], 1e-7, mode)
        near(loss + case["coef"] * kl, expected["loss"], 3e-6, mode)
        near(grad + case["coef"] * kl_grad, expected["grad"], 1e-7, mode)
    others = {"openrlhf_k2_float32": ("k2", 10, 0.27), "trl_k3": ("k3", math.inf, 0.28)}
    for name, (estimator, bound, high) in others.items():
        weights, expected = weights_of(mask, "token-mean"), case[f"in_loss_{name}"]
        ranges = {"clip_low": 0.2, "clip_high": high, "dual_clip": math.inf}
        loss, grad, _ = loss_and_gradient(case, weights, case["advantages"], **ranges)
        kl, kl_grad = with_kl(case, case["coef"] * weights, estimator, bound)
        near(loss + kl, expected["loss"], 3e-6, name)
        near(grad + kl_grad, expected["grad"], 3e-6, name)


# Entropy


def of_logits(logits: jax.Array, targets: np.ndarray, entropy_gradient: bool) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [B, T] as the trainer has them; its hidden states are the logits here."""
    unit = jnp.eye(logits.shape[-1], dtype=jnp.float32)
    flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
    options = {"temperature": 1.0, "chunk": len(flat), "entropy_gradient": entropy_gradient}
    found = token_logprobs(flat, unit, jnp.asarray(targets.reshape(-1)), **options)
    return found[0].reshape(targets.shape), found[1].reshape(targets.shape)


@pytest.mark.parametrize("case", cases("entropy"))
def test_technique_entropy_bonus(case: JsonObject) -> None:
    logits, targets = jnp.asarray(array(case["logits"])), np.array(case["targets"])
    mask = array(case["mask"])
    logprobs, entropies = of_logits(logits, targets, False)
    near(entropies * mask, array(case["token_entropy"]) * mask, 1e-5)
    near(logprobs * mask, array(case["token_logprob"]) * mask, 1e-5)
    for mode, expected in case["entropy"].items():
        weights = weights_of(mask, mode)

        def bonus(x: jax.Array, weights: np.ndarray = weights) -> jax.Array:
            return jnp.sum(weights * of_logits(x, targets, True)[1])

        value, grad = jax.value_and_grad(bonus)(logits)
        near(value, expected["value"], 1e-5, mode)
        near(grad, expected["grad_logits"], 1e-5, mode)
    for mode, expected in case["objective"].items():
        weights = weights_of(mask, "token-mean" if mode == "rllm" else mode)
        dual = math.inf if mode == "rllm" else 10.0

        def objective(x: jax.Array, weights: np.ndarray = weights, dual: float = dual) -> jax.Array:
            now, entropy = of_logits(x, targets, True)
            advantages = np.broadcast_to(array(case["advantages"])[:, None], mask.shape)
            arrays = now, array(case["old_logprob"]), advantages, weights
            loss, _ = policy_objective(*arrays, clip_low=0.2, clip_high=0.28, dual_clip=dual)
            return loss - case["coef"] * jnp.sum(weights * entropy)

        value, grad = jax.value_and_grad(objective)(logits)
        near(value, expected["loss"], 1e-5, mode)
        near(grad, expected["grad_logits"], 1e-5, mode)


# Surrogates and ratios


def ranges_of(params: JsonObject) -> dict[str, float]:
    """The bounds of a vector's parameters, by whatever name its source has for them."""
    low, high = (params.get(name, params.get("clip", 0.2)) for name in ("clip_low", "clip_high"))
    dual = params.get("dual_clip", params.get("c_clip", params.get("delta", math.inf)))
    return {"clip_low": low, "clip_high": high, "dual_clip": dual}


TOKEN, SEQUENCE = "token-mean", "seq-mean-token-mean"
# the mode of a loss, and options besides its bounds; verl, OpenRLHF and SAPO cut log-ratios off at 20
SURROGATES: dict[str, tuple[str, dict[str, object]]] = {
    "verl:vanilla": (TOKEN, {"log_ratio_bound": 20}),
    "verl:gspo": (SEQUENCE, {"ratio": "sequence"}),
    "trl:sequence_level_grpo": (SEQUENCE, {"ratio": "sequence"}),
    "trl:luspo": ("seq-mean-token-sum", {"ratio": "sequence"}),
    "openrlhf:gspo": (SEQUENCE, {"ratio": "sequence"}),
    "nemo:gspo": (SEQUENCE, {"ratio": "sequence"}),
    "verl:cispo": (TOKEN, {"surrogate": score, "log_ratio_bound": 20}),
    "trl:cispo": (TOKEN, {"surrogate": score, "clip_low": 1.0}),
    "nemo:cispo": (TOKEN, {"surrogate": score}),
    "verl:sapo": (SEQUENCE, {"surrogate": Sigmoid(), "log_ratio_bound": 20}),
    "trl:sapo": (SEQUENCE, {"surrogate": Sigmoid()}),
    "verl:gpg": (TOKEN, {"surrogate": score, "clip_low": 0.0, "clip_high": 0.0}),
    "verl:geo_mean": (SEQUENCE, {"ratio": "geometric", "dual_clip": math.inf}),
    "trl:two_sided_delta": (TOKEN, {}),
    "rllm:token_mean": (TOKEN, {}),
    "openrlhf:ppo_dual": (TOKEN, {"log_ratio_bound": 20}),
    "questa:ppo_dual": (TOKEN, {}),
    "nemo:force_on_policy": (TOKEN, {}),
    "trl:off_policy_sequence_mask": (TOKEN, {}),
    "trl:top_entropy": (TOKEN, {}),
    "verl:clip_cov": (TOKEN, {"log_ratio_bound": 20}),
}


@pytest.mark.parametrize("case", cases("policy_losses"))
def test_technique_policy_losses(case: JsonObject) -> None:
    mask = array(case["mask"])
    for name in covered("policy_losses", case["losses"]):
        expected, (mode, options) = case["losses"][name], SURROGATES[name]
        params = expected["params"]
        options = ranges_of(params) | options
        if name == "trl:cispo":
            options["clip_high"] = float(params["ratio_max"] - 1)
        if name == "verl:geo_mean":  # its bounds are of the log-ratio
            options |= {
                "clip_low": 1 - math.exp(-params["clip_low"]),
                "clip_high": math.expm1(params["clip_high"]),
            }
        weights, given = weights_of(mask, mode), case
        if name == "verl:geo_mean":  # rows without a token count
            weights = weights * np.sum(mask.any(axis=1)) / len(mask)
        if name == "nemo:force_on_policy":
            given = case | {"old_logprob": case["logprob"]}
        if name == "trl:off_policy_sequence_mask":
            apart = np.sum((array(case["old_logprob"]) - array(case["logprob"])) * mask, axis=1)
            far = apart / np.maximum(mask.sum(axis=1), 1) > params["threshold"]
            weights = weights * ~(far & (array(case["advantages"]) < 0))[:, None]
        if name == "trl:top_entropy":
            entropies = array(case["token_entropy"])
            weights = weights * (entropies >= np.quantile(entropies[mask == 1], 1 - params["top_quantile"]))
        if name == "verl:clip_cov":
            weights = weights * (1 - array(expected["dropped"]))
        loss, grad, metrics = loss_and_gradient(given, weights, case["advantages"], **options)
        near(loss, expected["loss"], 1e-5, name)
        near(grad, expected["grad"], 1e-5, name)
        if name == "verl:vanilla":
            near(metrics["clip_fraction"], expected["metrics"]["pg_clipfrac"], 1e-6)
            near(metrics["clip_fraction_lower"], expected["metrics"]["pg_clipfrac_lower"], 1e-6)


# Archer


@pytest.mark.parametrize("case", cases("archer"))
def test_technique_archer(case: JsonObject) -> None:
    mask = array(case["mask"])
    lengths = mask.sum(axis=1).astype(int)
    found = high_entropy(
        [array(x)[:n] for x, n in zip(case["token_entropy"], lengths, strict=True)], case["quantile"]
    )
    high = np.array([np.pad(x, (0, mask.shape[1] - len(x))) for x in found])
    near(high * mask, array(case["high_entropy_mask"]) * mask)
    narrow, wide = case["clip_low_entropy"], case["clip_high_entropy"]
    width = np.where(high, wide, narrow).reshape(-1)
    options = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": case["dual_clip"], "log_ratio_bound": 20}
    options["bounds"] = (1 - width, 1 + width)
    for mode, expected in ((TOKEN, case), (SEQUENCE, case["micro_batches_of_one"])):
        if mode == TOKEN and case["aggregation"] != TOKEN:
            mode = case["aggregation"]
        weights, of_low = weights_of(mask, mode), weights_of(mask * ~high, mode)
        loss, grad, _ = loss_and_gradient(case, weights, case["advantages"], **options)
        kl, kl_grad = with_kl(case, case["kl_low_entropy"] * of_low, "k3")
        if case["kl_high_entropy"] and expected is case:
            more = with_kl(case, case["kl_high_entropy"] * weights_of(mask * high, mode), "k3")
            kl, kl_grad = kl + more[0], kl_grad + more[1]
        near(loss + kl, expected["loss"], 1e-6, mode)
        near(grad + kl_grad, expected["grad"], 1e-6, mode)


# Corrections


DUAL = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "log_ratio_bound": 20}
CORRECTIONS: dict[str, tuple[Truncation, Level]] = {
    "verl:token_tis": ("truncated", "token"),
    "verl:sequence_tis": ("truncated", "sequence"),
    "openrlhf:tis": ("truncated", "token"),
    "nemo:tis": ("truncated", "token"),
    "openrlhf:icepop": ("masked", "token"),
    "nemo:icepop": ("masked", "token"),
    "openrlhf:seq-mask-tis": ("filtered", "geometric"),
    "nemo:seq-mask-tis": ("filtered", "geometric"),
    "nemo:untruncated": ("truncated", "token"),
    "trl:token_truncate": ("truncated", "token"),
    "trl:token_mask": ("masked", "token"),
    "trl:sequence_truncate": ("truncated", "sequence"),
    "trl:sequence_mask": ("masked", "sequence"),
    "questa:decoupled_cap": ("masked", "token"),
    "questa:decoupled_no_cap": ("masked", "token"),
    "areal_float32:mask_token": ("masked", "token"),
    "areal_float32:mask_sequence": ("masked", "geometric"),
    "areal_float32:clamp_token": ("truncated", "token"),
    "areal_float32:clamp_sequence": ("truncated", "geometric"),
}


@pytest.mark.parametrize("case", cases("corrections"))
def test_technique_corrected_losses(case: JsonObject) -> None:
    mask = array(case["mask"])
    lengths = mask.sum(axis=1).astype(int)
    trainer, sampler = (
        [array(row)[:n] for row, n in zip(case[name], lengths, strict=True)]
        for name in ("old_logprob", "rollout_logprob")
    )
    for name in covered("corrections/losses", case["losses"]):
        expected, params = case["losses"][name], case["losses"][name]["params"]
        cap, floor = params.get("cap", params.get("high", math.inf)), params.get("low", 0.0)
        ratios = importance_weights(trainer, sampler, *correction_of(name, cap, floor))
        weights = weights_of(mask, TOKEN)
        weights *= np.array([np.pad(r, (0, mask.shape[1] - len(r))) for r in ratios])
        options = (
            DUAL if name.startswith("verl") else {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": math.inf}
        )
        options = options | {key: value for key, value in params.items() if key in options}
        options |= {"clip_low": params["clip"], "clip_high": params["clip"]} if "clip" in params else {}
        loss, grad, _ = loss_and_gradient(case, weights, case["advantages"], **options)
        tolerance = 3e-6 if "float32" in name else 1e-6
        near(loss, expected["loss"], tolerance, name)
        near(grad, expected["grad"], tolerance, name)


def correction_of(name: str, cap: float, floor: float) -> tuple[Correction, float, float, Level]:
    correction, level = CORRECTIONS[name]
    return correction, cap, floor, level
