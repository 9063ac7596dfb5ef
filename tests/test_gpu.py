"""Attention at real sizes in bfloat16, on every backend: `make test-gpu`. "xla" runs on any machine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.grpo.packing import bucket_lengths
from jaxrl.models.attention import Segments, choose_backend, packed_attention

BUCKETS, STREAM = bucket_lengths(256, 1024), 4096
LAYOUTS = {"ragged": (1000, 37, 513, 256, 1, 700), "full": (1024,) * 4, "one": (300,), "none": ()}


def backend_or_skip(name):
    try:
        return choose_backend(name, "bfloat16")
    except InputError as error:
        pytest.skip(str(error))


def inputs(heads=12, kv_heads=2, head_dim=128):
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (STREAM, h, head_dim), jnp.bfloat16)
        for key, h in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(5, 6))
def values_and_gradients(q, k, v, d_out, segments, lengths, backend):
    out, vjp = jax.vjp(lambda *qkv: packed_attention(*qkv, segments, lengths, backend), q, k, v)
    return out, *vjp(d_out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "backend", ["xla", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cudnn", "cudnn_packed"))]
)
def test_packed_is_one_by_one(backend, layout):
    """Each sequence in a stream of its own, in float32, against all of them in one stream."""
    backend, lengths = backend_or_skip(backend), LAYOUTS[layout]
    q, k, v, d_out = inputs()
    starts, buckets = np.zeros(8, np.int32), np.full(8, -1, np.int32)
    starts[: len(lengths)] = np.cumsum((0, *lengths))[: len(lengths)]
    buckets[: len(lengths)] = np.searchsorted(BUCKETS, lengths)
    d_out = d_out.at[sum(lengths) :].set(0)
    found = values_and_gradients(q, k, v, d_out, Segments(starts, buckets), BUCKETS, backend)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    for start, length in zip(starts, lengths, strict=False):
        own = [x[start : start + length].astype(jnp.float32) for x in (q, k, v, d_out)]
        alone = Segments(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
        with jax.default_matmul_precision("highest"):
            expected = values_and_gradients(*own, alone, (length,), "xla")
        for x, y in zip(found, expected, strict=True):
            x, y = np.asarray(x[start : start + length], np.float32), np.asarray(y)
            assert np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(y) + 1e-4  # of one token, dq is 0
