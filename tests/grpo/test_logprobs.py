"""Chunked log-probabilities against NumPy, against whole logits, and against the promise that those never exist."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.arrays import Array
from jaxrl.grpo import token_logprobs

TOKENS, WIDTH, VOCABULARY = 64, 16, 97


def inputs(seed: int = 0, tokens: int = TOKENS, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """Hidden states, a head, targets, and a gradient of the log-probs."""
    rng = np.random.default_rng(seed)
    hidden = scale * rng.normal(size=(tokens, WIDTH)).astype(np.float32)
    head = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    targets = rng.integers(VOCABULARY, size=tokens).astype(np.int32)
    return hidden, head, targets, rng.normal(size=tokens).astype(np.float32)


def reference(
    hidden: Array, head: Array, targets: np.ndarray, cotangent: np.ndarray, temperature: float = 1.0
) -> tuple[np.ndarray, ...]:
    """(log-probs, entropies, d hidden, d head) of sum(cotangent * log-probs), in float64 with whole logits."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logits = hidden @ head.T / temperature
    top = logits.max(-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    p = np.exp(logp)
    d_logits = (np.eye(VOCABULARY)[targets] - p) * cotangent[:, None] / temperature
    return logp[np.arange(len(targets)), targets], -(p * logp).sum(-1), d_logits @ head, d_logits.T @ hidden


@functools.partial(jax.jit, static_argnames=("temperature", "chunk"))
def ours(
    hidden: Array, head: Array, targets: Array, cotangent: Array, temperature: float = 1.0, chunk: int = 8
) -> tuple[jax.Array, ...]:
    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logprobs, entropy = token_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
        return jnp.sum(cotangent * logprobs), (logprobs, entropy)

    grads, outputs = jax.grad(loss, (0, 1), has_aux=True)(hidden, head)
    return *outputs, *grads


@pytest.mark.parametrize("chunk", [1, 8, TOKENS])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_in_float64(temperature: float, chunk: int) -> None:
    arrays = inputs()
    expected = reference(*arrays, temperature)
    found = ours(*arrays, temperature=temperature, chunk=chunk)
    for a, b, tolerance in zip(found, expected, (2e-5, 1e-4, 2e-5, 2e-5), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance)


def test_gradients_are_autodiffs_of_whole_logits() -> None:
    hidden, head, targets, cotangent = inputs(1)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(hidden @ head.T / 0.7)
        return jnp.sum(cotangent * logp[np.arange(TOKENS), targets])

    d_hidden, d_head = jax.grad(loss, (0, 1))(hidden, head)
    _, _, *grads = ours(hidden, head, targets, cotangent, temperature=0.7)
    np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[1], d_head, rtol=1e-5, atol=1e-5)


def test_logits_of_thousands_do_not_overflow() -> None:
    arrays = inputs(2, scale=1000.0)
    logprobs, entropy, *grads = ours(*arrays)
    expected = reference(*arrays)
    np.testing.assert_allclose(logprobs, expected[0], rtol=1e-4, atol=5e-3)
    np.testing.assert_allclose(entropy, expected[1], atol=5e-3)
    assert all(np.isfinite(g).all() for g in grads)


def test_entropy_of_a_uniform_and_of_a_sure_distribution() -> None:
    hidden, head, targets, cotangent = inputs()
    uniform = ours(0 * hidden, head, targets, cotangent)
    np.testing.assert_allclose(uniform[1], math.log(VOCABULARY), rtol=1e-6)
    np.testing.assert_allclose(uniform[0], -math.log(VOCABULARY), rtol=1e-6)
    sure = ours(1000 * hidden, head, targets, cotangent)
    assert (np.asarray(sure[1]) >= -1e-2).all() and np.median(sure[1]) < 1e-2


def test_entropy_carries_no_gradient() -> None:
    hidden, head, targets, _ = inputs()

    def entropy(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return token_logprobs(hidden, head, targets, temperature=1.0, chunk=8)[1].sum()

    assert not any(np.asarray(g).any() for g in jax.grad(entropy, (0, 1))(hidden, head))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_gradient_is_that_of_finite_differences(temperature: float) -> None:
    """In float64 from whole logits, along random directions; together with the log-probability's own."""
    hidden, head, targets, cotangent = inputs()
    of_entropy = np.random.default_rng(7).normal(size=TOKENS)

    def plain(hidden: np.ndarray, head: np.ndarray) -> float:
        logits = np.float64(hidden) @ np.float64(head).T / temperature
        logp = logits - logits.max(axis=1, keepdims=True)
        logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
        entropy = -np.sum(np.exp(logp) * logp, axis=1)
        return float(np.sum(cotangent * logp[np.arange(TOKENS), targets] + of_entropy * entropy))

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        options = {"temperature": temperature, "chunk": 8, "entropy_gradient": True}
        logprobs, entropy = token_logprobs(hidden, head, targets, **options)
        return jnp.sum(cotangent * logprobs + of_entropy * entropy)

    grads = jax.jit(jax.grad(loss, (0, 1)))(hidden, head)
    rng, step = np.random.default_rng(8), 1e-5
    for _ in range(5):
        along = [rng.normal(size=x.shape) for x in (hidden, head)]
        ahead, behind = (
            plain(*(x + sign * step * d for x, d in zip((hidden, head), along, strict=True)))
            for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * step)
        found = sum(float(np.sum(np.float64(g) * d)) for g, d in zip(grads, along, strict=True))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_head_gradient_is_summed_in_float32() -> None:
    """256 chunks of bfloat16: the sum over chunks must not itself be rounded to bfloat16."""
    hidden, head, targets, cotangent = inputs(3, tokens=512)
    cotangent = np.abs(cotangent)  # one sign, so that the running sum grows past its terms
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    expected = reference(hidden, jnp.asarray(head, jnp.bfloat16), targets, cotangent)[3]

    def error(d_head: jax.Array) -> float:
        return np.linalg.norm(np.asarray(d_head, np.float64) - expected) / np.linalg.norm(expected)

    d_head = ours(hidden, head, targets, cotangent, chunk=2)[3]
    assert d_head.dtype == jnp.float32
    assert error(d_head) < 2e-3
    # so the error does show where it is rounded
    rounded = jnp.zeros(head.shape, jnp.bfloat16)
    for i in range(0, len(targets), 2):
        own = slice(i, i + 2)
        rounded += ours(hidden[own], head, targets[own], cotangent[own], chunk=2)[3].astype(jnp.bfloat16)
    assert error(rounded) > 4 * error(d_head)


def largest_array(function: Callable[..., object], *args: np.ndarray) -> int:
    """Elements of the largest array in the compiled program, fused-away ones aside."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f32|bf16|f16|f64|s32|u32|pred)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_logits_of_a_stream_never_exist(entropy_gradient: bool) -> None:
    hidden, head, targets, cotangent = inputs()

    def loss(hidden: jax.Array, head: jax.Array, chunk: int) -> jax.Array:
        options = {"temperature": 1.0, "chunk": chunk, "entropy_gradient": entropy_gradient}
        logprobs, entropy = token_logprobs(hidden, head, targets, **options)
        return jnp.sum(cotangent * (logprobs + entropy))

    gradients = jax.value_and_grad(loss, (0, 1))
    chunked = {chunk: functools.partial(gradients, chunk=chunk) for chunk in (8, TOKENS)}
    sizes = {chunk: largest_array(function, hidden, head) for chunk, function in chunked.items()}
    assert sizes[8] == max(head.size, hidden.size, 8 * VOCABULARY)
    assert sizes[TOKENS] >= TOKENS * VOCABULARY  # so the search does see logits where they are


def test_chunk_must_divide() -> None:
    hidden, head, targets, _ = inputs()
    with pytest.raises(AssertionError):
        token_logprobs(hidden, head, targets, temperature=1.0, chunk=24)
