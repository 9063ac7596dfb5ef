from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import decoder, hf
from jaxrl.models.attention import Segments, packed_attention
from jaxrl.models.decoder import Config, Params

FAMILIES = ("qwen2", "qwen3", "llama")
LENGTHS = (5, 1, 9, 7)
STREAM, BUCKETS = 32, (4, 8, 16)


def config(family: str = "qwen2", **changes: int | bool) -> Config:
    values = {
        "family": family,
        "vocab_size": 50,
        "width": 24,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp_width": 40,
        "rope_theta": 10_000.0,
        "norm_epsilon": 1e-6,
        "tied": False,
        "max_positions": 64,
    }
    return Config(**values | changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_that_transformers_saves(
    family: str, tied: bool, checkpoint: Callable[..., Path]
) -> None:
    from safetensors import safe_open

    saved = {}
    for file in checkpoint(family, tied).glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            saved |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    declared = hf.manifest(hf.read_config(checkpoint(family, tied)))
    assert len(declared) == len(dict(declared))
    assert dict(declared) == saved


def test_the_paper_model_has_its_size() -> None:
    c = Config("qwen2", 151_936, 1536, 28, 12, 2, 128, 8960, 10_000.0, 1e-6, False, 131_072)
    assert sum(math.prod(shape) for _, shape in hf.manifest(c)) == 1_777_088_000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_stream_equals_each_sequence_alone(
    family: str, random_params: Callable[[Config], Params]
) -> None:
    c = config(family)
    params = random_params(c)
    rows = [np.random.default_rng(i).integers(0, c.vocab_size, n) for i, n in enumerate(LENGTHS)]
    padding = STREAM - sum(LENGTHS)
    tokens = np.concatenate([*rows, np.zeros(padding, np.int64)])
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, padding)])
    starts = np.cumsum([0, *LENGTHS[:-1], 0])
    segments = Segments(jnp.asarray(starts), jnp.asarray([*np.searchsorted(BUCKETS, LENGTHS), -1]))

    def packed(q: jax.Array, k: jax.Array, v: jax.Array, _: None) -> tuple[jax.Array, None]:
        return packed_attention(q, k, v, segments, BUCKETS, "xla"), None

    hidden, kept = jax.jit(lambda p: decoder.forward(c, p, tokens, positions, packed))(params)
    assert kept is None

    @jax.jit
    def alone(row: jax.Array) -> jax.Array:
        return decoder.forward(c, params, row, jnp.arange(row.size)[None], decoder.dense_attend)[0]

    for start, row in zip(starts, rows, strict=False):
        expected = alone(row[None])[0]
        np.testing.assert_allclose(hidden[start : start + row.size], expected, atol=2e-5)


def test_later_tokens_change_nothing_before_them(random_params: Callable[[Config], Params]) -> None:
    c = config()
    params = random_params(c)
    one = np.random.default_rng(0).integers(0, c.vocab_size, (1, 12))
    two = one.copy()
    two[0, 8:] = (two[0, 8:] + 1) % c.vocab_size
    logits = jax.jit(decoder.logits, static_argnums=0)
    a, b = (logits(c, params, jnp.asarray(x)) for x in (one, two))
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert not np.allclose(a[:, 8:], b[:, 8:], atol=1e-2)


def test_only_differences_of_positions_matter(random_params: Callable[[Config], Params]) -> None:
    c = config("qwen3")
    params = random_params(c)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, c.vocab_size, (1, 10)))

    @jax.jit
    def hidden(positions: jax.Array) -> jax.Array:
        return decoder.forward(c, params, tokens, positions[None], decoder.dense_attend)[0]

    plain = hidden(jnp.arange(10))
    np.testing.assert_allclose(hidden(jnp.arange(10) + 7), plain, atol=1e-4)
    assert not np.allclose(hidden(2 * jnp.arange(10)), plain, atol=1e-2)
    assert not np.allclose(hidden(jnp.zeros(10, jnp.int32)), plain, atol=1e-2)


def test_what_attention_keeps_is_stacked_over_layers(random_params: Callable[[Config], Params]) -> None:
    c = config()
    tokens = jnp.zeros((2, 6), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    _, (k, v) = decoder.forward(c, random_params(c), tokens, positions, decoder.dense_attend)
    assert k.shape == v.shape == (c.layers, 2, 6, c.kv_heads, c.head_dim)


def test_each_layer_gets_its_slice_of_the_cache(random_params: Callable[[Config], Params]) -> None:
    c = config()
    cache = jnp.arange(float(c.layers))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(q), part * 10

    tokens = jnp.zeros((4,), jnp.int32)
    _, kept = decoder.forward(c, random_params(c), tokens, jnp.arange(4), attend, cache=cache)
    np.testing.assert_array_equal(kept, [0, 10, 20])


def test_computes_in_the_dtype_asked_for(random_params: Callable[[Config], Params]) -> None:
    c = config()
    params, tokens = random_params(c), jnp.arange(10)[None]
    hidden, _ = decoder.forward(c, params, tokens, tokens, decoder.dense_attend, dtype="bfloat16")
    assert hidden.dtype == jnp.bfloat16
    exact, half = decoder.logits(c, params, tokens), decoder.logits(c, params, tokens, "bfloat16")
    assert exact.dtype == half.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(exact - half).max()) < 0.1 * float(jnp.abs(exact).max())


def test_tied_models_use_the_embedding_as_head(random_params: Callable[[Config], Params]) -> None:
    tied, untied = config(tied=True), config()
    params = random_params(tied)
    assert "head" not in params
    assert decoder.head(params) is params["embed"]
    tokens = jnp.arange(10)[None]
    expected = decoder.logits(untied, params | {"head": params["embed"]}, tokens)
    np.testing.assert_array_equal(decoder.logits(tied, params, tokens), expected)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm(epsilon: float) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 5, 16)), rng.standard_normal(16)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * w
    got = decoder.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), epsilon)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_rms_norm_of_bfloat16_is_rounded_once() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.bfloat16)
    got = decoder.rms_norm(x, jnp.ones(32, jnp.bfloat16), 1e-6)
    assert got.dtype == jnp.bfloat16
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    half_a_unit = 2**-8
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=1.01 * half_a_unit)


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_rope(theta: float) -> None:
    """Dimension i of the first half and i of the second turn as one complex number, by position * theta^(-2i/D)."""
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 6, 3, 16)), np.array([[0, 1, 2, 3, 4, 5], [7, 50, 3, 999, 1, 0]])
    z = x[..., :8] + 1j * x[..., 8:]
    angles = positions[..., None, None] * theta ** (-2 * np.arange(8) / 16)
    z = z * np.exp(1j * angles)
    got = decoder.rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta)
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=3e-4)
    np.testing.assert_array_equal(got[:, 0][0], np.asarray(x[0, 0], np.float32))  # position 0 turns nothing


def test_initialize_draws_what_is_declared() -> None:
    c = config("qwen3", vocab_size=400, width=64)
    params = decoder.initialize(c, 0, scale=0.05)
    for spec, leaf in zip(decoder.specs(c), jax.tree.leaves(params), strict=True):
        assert leaf.shape == decoder.stacked_shape(spec, c) and leaf.dtype == jnp.float32, spec.name
        if spec.init == "normal":
            np.testing.assert_allclose(np.std(leaf), 0.05, rtol=0.05, err_msg=spec.name)
            np.testing.assert_allclose(np.mean(leaf), 0, atol=0.004, err_msg=spec.name)
        else:
            np.testing.assert_array_equal(leaf, 1.0, err_msg=spec.name)
    layers = params["layers"]["q"].reshape(c.layers, -1)
    assert abs(np.corrcoef(layers)[np.triu_indices(c.layers, 1)]).max() < 0.1
    assert abs(np.corrcoef(params["layers"]["k"].ravel(), params["layers"]["v"].ravel())[0, 1]) < 0.1


def test_initialize_follows_seed_dtype_and_family() -> None:
    c = config("qwen2", layers=1)
    one, same, other = (decoder.initialize(c, seed, "bfloat16") for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["embed"], same["embed"])
    assert not np.array_equal(one["embed"], other["embed"])
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {jnp.dtype("bfloat16")}
    for name in ("q_bias", "k_bias", "v_bias"):
        np.testing.assert_array_equal(one["layers"][name].astype(jnp.float32), 0.0)
    np.testing.assert_array_equal(one["norm"].astype(jnp.float32), 1.0)
