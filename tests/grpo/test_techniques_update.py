"""Every term of the objective in a whole update: on any mesh, packed or one by one, it is the plain sum over sequences.

The plain computation has one sequence at a time, whole logits, and each formula as its paper writes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_update import (
    LAYOUT,
    LONGEST,
    OBJECTIVE,
    UNTIED,
    MiniBatch,
    Trainer,
    assert_close,
    first_params,
    gradients_of,
    minibatches,
    padded,
    to_numpy,
    trainer,
    whole_logprobs,
)

from jaxrl.arrays import Array
from jaxrl.grpo.objective import Objective, Sigmoid, score
from jaxrl.grpo.packing import PackedBatch, Terms, pack
from jaxrl.models.decoder import Params
from jaxrl.parallel.mesh import to_devices
from jaxrl.types import Gather, Rollout

LOW, HIGH = 0.7, 1.4  # bounds of half of the tokens; the others have the objective's


class Token:
    """What the formulas are about: arrays [T] of one sequence."""

    def __init__(
        self, now: Array, old: Array, advantages: Array, low: Array, high: Array, live: Array
    ) -> None:
        self.now, self.advantages, self.low, self.high, self.live = now, advantages, low, high, live
        self.log_ratio = jnp.where(live, now - old, 0.0)
        self.ratio = jnp.exp(self.log_ratio)

    def mean(self, x: Array) -> Array:
        return jnp.sum(jnp.where(self.live, x, 0.0)) / jnp.sum(self.live)

    def with_own_gradient(self, value: Array) -> Array:
        """`value` for all tokens, and the gradient of each one's own probability, as GSPO-token has it."""
        stop = jax.lax.stop_gradient
        return stop(value) * jnp.exp(self.now - stop(self.now))


def ppo(t: Token, ratio: Array) -> Array:
    return -jnp.minimum(t.advantages * ratio, t.advantages * jnp.clip(ratio, t.low, t.high))


def gspo(t: Token) -> Array:
    return ppo(t, t.with_own_gradient(jnp.exp(t.mean(t.log_ratio))))


def gmpo(t: Token) -> Array:
    """A R with R the geometric mean of ratios, of which those that go too far are constants."""
    log_low, log_high = jnp.log(t.low), jnp.log(t.high)
    beyond = jnp.where(t.advantages > 0, t.log_ratio > log_high, t.log_ratio < log_low)
    kept = jnp.where(beyond, jnp.where(t.advantages > 0, log_high, log_low), t.log_ratio)
    value = jnp.exp(t.mean(kept))
    moved = t.with_own_gradient(value)
    return -t.advantages * jnp.where(beyond, jax.lax.stop_gradient(moved), moved)


def cispo(t: Token) -> Array:
    return -jax.lax.stop_gradient(jnp.clip(t.ratio, t.low, t.high)) * t.advantages * t.now


def sapo(t: Token) -> Array:
    tau = jnp.where(t.advantages > 0, 0.7, 1.3)
    return -t.advantages * 4 / tau / (1 + jnp.exp(-tau * (t.ratio - 1)))


@dataclasses.dataclass(frozen=True)
class Case:
    objective: Objective
    loss: Callable[[Token], Array]
    kl: Callable[[Array], Array]  # of log-ratios, reference over policy


def of(loss: Callable[[Token], Array], kl: Callable[[Array], Array], **changes: object) -> Case:
    return Case(dataclasses.replace(OBJECTIVE, **changes), loss, kl)


CASES = {
    "gspo": of(gspo, lambda d: jnp.exp(d) - d - 1, ratio="sequence", dual_clip=np.inf),
    "gmpo": of(gmpo, lambda d: d**2 / 2, ratio="geometric", dual_clip=np.inf, estimator="k2"),
    "cispo": of(cispo, lambda d: -d, surrogate=score, estimator="k1"),
    "sapo": of(sapo, jnp.abs, surrogate=Sigmoid(0.7, 1.3), estimator="abs"),
}
MESHES = [(1, 1, "step"), (2, 1, "layer"), (8, 2, "step"), (8, 1, "layer")]
RUNS = [
    pytest.param(name, *mesh, marks=() if name == "gspo" or mesh == MESHES[1] else pytest.mark.slow)
    for name in CASES
    for mesh in MESHES
]


@functools.cache
def terms() -> tuple[Terms, list[np.ndarray]]:
    """Terms and advantages for the second mini-batch, where ratios are far from 1; one sequence has KL alone."""
    rng, rollouts = np.random.default_rng(3), minibatches(UNTIED)[1].rollouts
    sizes = [len(r.tokens) for r in rollouts]
    wide = [rng.random(n) < 0.5 for n in sizes]
    found = Terms(
        ratio_low=[np.where(w, LOW, 0.9) for w in wide],
        ratio_high=[np.where(w, HIGH, 1.1) for w in wide],
        corrections=[rng.random(n) * (rng.random(n) < 0.8) for n in sizes],
        ref_logprobs=[r.logprobs + rng.normal(0, 0.5, len(r.tokens)) for r in rollouts],
        kl_weights=[0.02 * rng.random(n) * (rng.random(n) < 0.7) for n in sizes],
        entropy_weights=[0.03 * rng.random(n) * (rng.random(n) < 0.7) for n in sizes],
    )
    # per token, of one sign in a sequence, as GMPO's clip asks for it; none for one sequence
    signs = rng.choice([-1, 1], len(sizes)) * (np.arange(len(sizes)) != 2)
    return found, [sign * (0.5 + rng.random(n)) for sign, n in zip(signs, sizes, strict=True)]


def mini_batch() -> MiniBatch:
    return minibatches(UNTIED)[1]


def packed(t: Trainer, streams: int = 32) -> PackedBatch:
    mini, (own, advantages) = mini_batch(), terms()
    layout = dataclasses.replace(LAYOUT, streams=(streams,))
    options = {"learning_rate": 0.01, "terms": own, "old_logprobs": mini.old_logprobs}
    return to_devices(pack(mini.rollouts, advantages, t.mesh.size, layout, **options), t.mesh)


@functools.cache
def reference(name: str) -> tuple[float, Params]:
    """(loss, gradients) one sequence at a time."""
    case, (own, advantages), mini = CASES[name], terms(), mini_batch()
    total = sum(len(r.tokens) for r in mini.rollouts)

    @jax.jit
    @jax.value_and_grad
    def one(params: Params, tokens: Array, live: Array, *arrays: Array) -> Array:
        old, a, corrections, low, high, ref, kl_weights, entropy_weights = arrays
        logp = whole_logprobs(UNTIED, params, tokens)
        now, entropy = logp[np.arange(LONGEST - 1), tokens[1:]], -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        loss = corrections * case.loss(Token(now, old, a, low, high, live)) / total
        loss += kl_weights * case.kl(ref - now) - entropy_weights * entropy
        return jnp.sum(jnp.where(live, loss, 0.0))

    loss, grads = 0.0, jax.tree.map(lambda p: np.zeros(p.shape), first_params(UNTIED))
    for i, rollout in enumerate(mini.rollouts):
        arrays = [mini.old_logprobs[i], advantages[i], *(x[i] for x in own)]
        value, gradient = one(first_params(UNTIED), *in_place(rollout, arrays))
        loss += float(value)
        grads = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), grads, gradient)
    return loss, grads


def in_place(rollout: Rollout, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The tokens, where the completion's are, and arrays of these at the index before each token; all LONGEST long."""
    prompt, whole = len(rollout.prompt.tokens), np.append(rollout.prompt.tokens, rollout.tokens)
    at = slice(prompt - 1, len(whole) - 1)
    placed = np.ones((len(arrays) + 1, LONGEST - 1), np.float32)
    placed[0] = 0
    for row, values in zip(placed, [np.ones(len(rollout.tokens)), *arrays], strict=True):
        row[at] = values
    return [padded(whole), placed[0] > 0, *placed[1:]]


@pytest.mark.parametrize(("name", "devices", "data", "gather"), RUNS)
def test_technique_is_the_plain_sum_on_any_mesh(name: str, devices: int, data: int, gather: Gather) -> None:
    t = trainer(devices, data, gather=gather, objective=CASES[name].objective)
    loss, expected = reference(name)
    grads, metrics = gradients_of(t, packed(t))
    assert_close(grads, expected, floor=1e-6)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4, abs=1e-6)
    own, _ = terms()
    trained = np.concatenate([k != 0 for k in own.kl_weights])
    assert float(metrics["tokens"]) == len(
        trained
    )  # those that a correction leaves out are measured all the same
    assert float(metrics["kl_tokens"]) == trained.sum() and np.isfinite(metrics["kl"])


def test_technique_does_not_depend_on_how_streams_are_cut() -> None:
    t = trainer(objective=CASES["gspo"].objective)
    (one, _), (two, _) = gradients_of(t, packed(t, LONGEST)), gradients_of(t, packed(t, 256))
    assert_close(one, two, 1e-5, floor=1e-7)


def test_a_sequence_without_advantage_is_kept_for_its_other_terms() -> None:
    t = trainer()
    own, advantages = terms()
    rollouts = mini_batch().rollouts
    silent = Terms(
        kl_weights=[0 * k for k in own.kl_weights], entropy_weights=[0 * k for k in own.kl_weights]
    )
    options = {"learning_rate": 0.01}
    for kept, given in ((15, Terms()), (15, silent), (16, own)):
        batch = pack(rollouts, advantages, t.mesh.size, LAYOUT, terms=given, **options)
        assert np.sum(batch.buckets >= 0) == kept
    assert not to_numpy(batch).advantages[batch.kl_weights == 0].all()
