"""Splash attention, interpreted on the CPU, beside JAX's dense attention with one mask."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.arrays import Array
from jaxrl.models import splash
from jaxrl.models.splash import splash_attention

LENGTHS = (64, 128, 256, 384)
TOKENS, SEGMENTS = 384, 8
# first tokens and lengths, in blocks of 128 tokens
LAYOUTS = {
    "several": ((0, 130), (130, 1), (131, 99), (230, 100)),
    "of whole blocks": ((0, 128), (128, 256)),
    "one": ((0, 384),),
    "an empty tail": ((0, 60),),
    "an empty head": ((150, 60), (210, 128)),
    "none": (),
}
Layout = tuple[tuple[int, int], ...]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "BLOCK", 128)


def packed(layout: Layout) -> tuple[Array, Array, Array]:
    """Starts and buckets, and the segment of each token, -1 outside all."""
    starts, buckets = np.zeros(SEGMENTS, np.int32), np.full(SEGMENTS, -1, np.int32)
    ids = np.full(TOKENS, -1)
    for i, (start, length) in enumerate(layout):
        starts[i], buckets[i] = start, np.searchsorted(LENGTHS, length)
        ids[start : start + length] = i
    return starts, buckets, ids


def inputs(heads: int = 4, kv_heads: int = 2, head_dim: int = 128, seed: int = 0) -> list[np.ndarray]:
    """Queries, keys, values, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    counts = (heads, kv_heads, kv_heads, heads)
    return [rng.standard_normal((TOKENS, count, head_dim), np.float32) for count in counts]


@jax.jit
def run(q: Array, k: Array, v: Array, d_out: Array, starts: Array, buckets: Array) -> list[jax.Array]:
    """The output and the gradients of q, k and v."""
    attend = functools.partial(
        splash_attention, starts=starts, buckets=buckets, lengths=LENGTHS, interpret=True
    )
    out, vjp = jax.vjp(attend, q, k, v)
    return [out, *vjp(d_out)]


@jax.jit
def dense(q: Array, k: Array, v: Array, d_out: Array, ids: Array) -> list[jax.Array]:
    mask = (ids[:, None] == ids[None]) & np.tri(len(ids), dtype=bool)

    def attend(*qkv: Array) -> jax.Array:
        return jax.nn.dot_product_attention(*(x[None] for x in qkv), mask=mask[None, None])[0]

    out, vjp = jax.vjp(attend, q, k, v)
    return [out, *vjp(d_out)]


def check(layout: Layout, qkvd: list[np.ndarray], atol: float, dtype: str = "float32") -> None:
    """Inside segments it is dense attention; outside all buckets, output and gradients are 0."""
    starts, buckets, ids = packed(layout)
    covered = np.zeros(TOKENS, bool)
    for start, bucket in zip(starts, buckets[buckets >= 0], strict=False):
        covered[start : start + LENGTHS[bucket]] = True
    inside = (ids >= 0)[:, None, None]
    *qkv, d_out = qkvd
    # of a bucket's overrun, no gradient may come in
    d_out = np.where(inside | ~covered[:, None, None], d_out, 0)
    found = run(*(jnp.asarray(x, dtype) for x in (*qkv, d_out)), starts, buckets)
    expected = dense(*qkv, np.where(inside, d_out, 0), ids)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        array = np.asarray(ours, np.float32)
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array[~covered], 0)
        np.testing.assert_allclose(np.where(inside, array, 0), np.where(inside, theirs, 0), atol=atol)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_dense_attention(name: str) -> None:
    check(LAYOUTS[name], inputs(), atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 128), (4, 1, 64)])
def test_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    check(LAYOUTS["several"], inputs(heads, kv_heads, head_dim), atol=1e-5)


def test_bfloat16_stays_close() -> None:
    check(LAYOUTS["several"], inputs(), atol=0.05, dtype="bfloat16")


def test_streams_of_any_length() -> None:
    """The kernel takes whole blocks; 300 tokens are padded."""
    *qkv, d_out = (x[:300] for x in inputs())
    starts, buckets, ids = packed(((0, 130), (130, 128)))
    d_out[ids[:300] < 0] = 0
    found, expected = run(*qkv, d_out, starts, buckets), dense(*qkv, d_out, ids[:300])
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == 300
        np.testing.assert_allclose(ours[:258], theirs[:258], atol=1e-5)


# NaN would get out of a block that is computed and masked
@pytest.mark.parametrize(("name", "other"), [("several", 1e4), ("of whole blocks", np.nan)])
def test_segments_do_not_see_each_other(name: str, other: float) -> None:
    layout, qkvd, noise = LAYOUTS[name], inputs(), inputs(seed=1)
    starts, buckets, ids = packed(layout)
    noise[3][ids < 0] = qkvd[3][ids < 0] = 0
    clean = run(*qkvd, starts, buckets)
    for target, (start, length) in enumerate(layout):
        own = (ids == target)[:, None, None]
        found = run(*(np.where(own, x, other * y) for x, y in zip(qkvd, noise, strict=True)), starts, buckets)
        for x, y in zip(clean, found, strict=True):
            np.testing.assert_array_equal(x[start : start + length], y[start : start + length])


@pytest.mark.parametrize(("remat", "forwards"), [("attention", 1), ("full", 2)])
def test_lowers_for_tpus_and_reruns_forward_only_if_not_saved(
    remat: str, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program for a TPU, which needs none to be lowered, at the block size that is used there."""
    monkeypatch.setattr(splash, "BLOCK", 1024)
    saved = jax.checkpoint_policies.save_only_these_names(*["attention"] * (remat == "attention"))
    starts, buckets, _ = packed(LAYOUTS["several"])

    @functools.partial(jax.checkpoint, policy=saved)
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return splash_attention(q, k, v, jnp.asarray(starts), jnp.asarray(buckets), LENGTHS)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(jnp.sin(q), k, v).astype(jnp.float32) ** 2)

    shapes = [jax.ShapeDtypeStruct((4096, count, 128), jnp.bfloat16) for count in (12, 2, 2)]
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes).lower(lowering_platforms=("tpu",))
    calls = re.findall(r'kernel_name = "splash_mha_(\w+?)_', lowered.as_text())
    assert sorted(calls) == ["dkv", "dq", *["fwd"] * forwards]
