from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.arrays import Array
from jaxrl.errors import InputError
from jaxrl.models import attention, decoder
from jaxrl.models.attention import Segments, packed_attention
from jaxrl.types import Backend, Remat

LENGTHS = (4, 8, 16)
TOKENS, SEGMENTS, HEADS, KV_HEADS, HEAD_DIM = 32, 8, 4, 2, 8
# Segment lengths; a segment's bucket must end inside the stream, so the last one may not overrun the end.
LAYOUTS = {
    "exact_buckets": (4, 8, 16),
    "odd_lengths": (5, 3, 7, 1, 9),
    "overruns": (9, 9),  # buckets of 16: the first reaches 7 tokens into the second
    "single_tokens": (1,) * 8,
    "one_full_length": (16,),
    "one_short": (3,),
}


def layout(lengths: tuple[int, ...]) -> Segments:
    """Segments one after another, each in the smallest bucket that holds it."""
    starts, buckets = np.zeros(SEGMENTS, np.int32), np.full(SEGMENTS, -1, np.int32)
    for i, length in enumerate(lengths):
        starts[i] = sum(lengths[:i])
        buckets[i] = np.searchsorted(LENGTHS, length)
        assert starts[i] + LENGTHS[buckets[i]] <= TOKENS
    return Segments(jnp.asarray(starts), jnp.asarray(buckets))


def random_qkv(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [rng.standard_normal((TOKENS, h, HEAD_DIM)).astype(np.float32) for h in heads]


@functools.partial(jax.jit, static_argnums=4)
def run(q: Array, k: Array, v: Array, segments: Segments, lengths: tuple[int, ...] = LENGTHS) -> jax.Array:
    return packed_attention(q, k, v, segments, lengths, "xla")


@functools.partial(jax.jit, static_argnums=5)
def run_vjp(
    q: Array, k: Array, v: Array, segments: Segments, d_out: Array, lengths: tuple[int, ...] = LENGTHS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jax.vjp(lambda *qkv: packed_attention(*qkv, segments, lengths, "xla"), q, k, v)[1](d_out)


def dense(
    q: Array, k: Array, v: Array, lengths: tuple[int, ...], d_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The whole computation in float64 with one dense mask: (out, dq, dk, dv)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, heads, shared = len(q), q.shape[1], q.shape[1] // k.shape[1]
    ids = np.repeat(np.arange(len(lengths) + 1), (*lengths, n - sum(lengths)))
    mask = (ids[:, None] == ids[None, :]) & np.tri(n, dtype=bool)
    d_out = np.zeros_like(q) if d_out is None else np.asarray(d_out, np.float64)
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(heads):
        kv = h // shared
        s = np.where(mask, q[:, h] @ k[:, kv].T / np.sqrt(q.shape[2]), -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[:, h] = p @ v[:, kv]
        dp = d_out[:, h] @ v[:, kv].T
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[2])
        dq[:, h] = ds @ k[:, kv]
        dk[:, kv] += ds.T @ q[:, h]
        dv[:, kv] += p.T @ d_out[:, h]
    return out, dq, dk, dv


def random_d_out(lengths: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """The gradient that reaches attention from the loss: 0 past the last segment."""
    d_out = np.random.default_rng(seed).standard_normal((TOKENS, HEADS, HEAD_DIM)).astype(np.float32)
    d_out[sum(lengths) :] = 0
    return d_out


def check(lengths: tuple[int, ...], seed: int = 0) -> None:
    qkv, segments, d_out = random_qkv(seed), layout(lengths), random_d_out(lengths, seed + 1)
    expected, *expected_grads = dense(*qkv, lengths, d_out)
    out = run(*qkv, segments)
    used = sum(lengths)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:used], expected[:used], atol=2e-6)
    for grad, reference in zip(run_vjp(*qkv, segments, d_out), expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_dense_masking(name: str) -> None:
    check(LAYOUTS[name])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, ...]:
    lengths: list[int] = []
    while len(lengths) < SEGMENTS and draw(st.booleans()):
        rest = TOKENS - sum(lengths)
        fits = [n for n in range(1, 17) if LENGTHS[np.searchsorted(LENGTHS, n)] <= rest]
        if not fits:
            break
        lengths.append(draw(st.sampled_from(fits)))
    return tuple(lengths)


def poisoned_past_the_end(kernel: attention.Kernel, trip: int) -> attention.Kernel:
    """A kernel of trips as cuDNN's: rows past a sequence's length are never read, and hold NaN in the results."""

    def mask(x: jax.Array, lengths: jax.Array) -> jax.Array:
        own = jnp.arange(x.shape[1])[None] < lengths[:, None]
        return jnp.where(own.reshape(*own.shape, *(1,) * (x.ndim - 2)), x, jnp.nan)

    def one_by_one(function: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array) -> list[jax.Array]:
        lengths = arrays[-1]
        rows = [function(*(x[i : i + 1] for x in arrays)) for i in range(len(lengths))]
        return [mask(jnp.concatenate(x), lengths) for x in zip(*rows, strict=True)]

    return attention.Kernel(
        lambda *x: attention.Attended(*one_by_one(kernel.forward, *x)),
        lambda *x: attention.QKV(*one_by_one(kernel.backward, *x)),
        trip,
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("trip", [1, 16, 32])
def test_trips_of_several_segments_equal_dense_masking(
    trip: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = poisoned_past_the_end(attention._kernel("xla"), trip)
    monkeypatch.setattr(attention, "_kernel", lambda _: kernel)
    lengths, qkv = LAYOUTS[name], random_qkv()
    segments, d_out, used = layout(lengths), random_d_out(lengths), sum(lengths)

    @jax.jit
    def both(*qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, vjp = jax.vjp(lambda *x: packed_attention(*x, segments, LENGTHS, "cudnn"), *qkv)
        return out, vjp(jnp.asarray(d_out))

    out, grads = both(*qkv)
    expected, *expected_grads = dense(*qkv, lengths, d_out)
    # what follows the last segment is its own as far as its bucket reaches, and never an earlier one's
    np.testing.assert_allclose(out[:used], expected[:used], atol=2e-6)
    assert np.isfinite(out).all()
    for grad, reference in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, atol=1e-5)


def test_padded_lengths_are_halves_of_the_longest() -> None:
    assert attention.padded_lengths((4, 8, 16), 0) == (4, 8, 16)
    assert attention.padded_lengths(tuple(range(512, 16_385, 512)), 8192) == (
        512, 1024, 2048, 4096, 8192, 16_384,
    )  # fmt: skip
    assert attention.padded_lengths((512, 1024, 1536), 8192) == (512, 1024, 1536)
    assert attention.padded_lengths((512,), 8192) == (512,)


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 2**16))
def test_equals_dense_masking_for_any_layout(lengths: tuple[int, ...], seed: int) -> None:
    check(lengths, seed)


def test_the_reference_gradients_are_derivatives() -> None:
    lengths, step = (5, 3, 7), 1e-5
    qkv, d_out = [x.astype(np.float64) for x in random_qkv()], random_d_out((5, 3, 7))
    _, *grads = dense(*qkv, lengths, d_out)
    rng = np.random.default_rng(3)
    for i, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)
        ahead, behind = (
            [x + sign * step * direction if i == j else x for j, x in enumerate(qkv)] for sign in (1, -1)
        )
        slope = ((dense(*ahead, lengths)[0] - dense(*behind, lengths)[0]) * d_out).sum() / (2 * step)
        np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-7)


def test_gradients_are_derivatives_of_the_function_itself() -> None:
    lengths = LAYOUTS["odd_lengths"]
    segments, d_out = layout(lengths), random_d_out(lengths)

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(run(*qkv, segments) * d_out)

    jax.test_util.check_grads(loss, random_qkv(), order=1, modes="rev", atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("target", range(4))
def test_a_segment_does_not_depend_on_its_neighbors(target: int) -> None:
    lengths = (9, 3, 5, 6)  # every bucket overruns its segment
    start, end = sum(lengths[:target]), sum(lengths[: target + 1])
    segments, qkv, d_out = layout(lengths), random_qkv(), random_d_out(lengths)
    own = (np.arange(TOKENS) >= start) & (np.arange(TOKENS) < end)
    own = own[:, None, None]
    poisoned = [np.where(own, x, 1e4 * y) for x, y in zip(qkv, random_qkv(7), strict=True)]
    poisoned_d_out = np.where(own, d_out, 1e4 * random_d_out((TOKENS,), 8))
    # the last segment's overrun belongs to no segment: its gradient is zero by contract
    if target == len(lengths) - 1:
        poisoned_d_out[end:] = 0
    clean, dirty = run(*qkv, segments), run(*poisoned, segments)
    assert np.asarray(clean[start:end]).tobytes() == np.asarray(dirty[start:end]).tobytes()
    assert not np.array_equal(clean[: sum(lengths)], dirty[: sum(lengths)])
    grads, poisoned_grads = run_vjp(*qkv, segments, d_out), run_vjp(*poisoned, segments, poisoned_d_out)
    for one, two in zip(grads, poisoned_grads, strict=True):
        np.testing.assert_array_equal(one[start:end], two[start:end])


def test_no_segments() -> None:
    qkv, d_out = random_qkv(), random_d_out((TOKENS,))
    np.testing.assert_array_equal(run(*qkv, layout(())), 0)
    for grad in run_vjp(*qkv, layout(()), d_out):
        np.testing.assert_array_equal(grad, 0)


def test_one_segment_that_fills_the_stream() -> None:
    qkv, d_out = random_qkv(), random_d_out((TOKENS,))
    segments = Segments(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    expected, *expected_grads = dense(*qkv, (TOKENS,), d_out)
    np.testing.assert_allclose(run(*qkv, segments, (TOKENS,)), expected, atol=2e-6)
    for grad, reference in zip(run_vjp(*qkv, segments, d_out, (TOKENS,)), expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads: int) -> None:
    rng = np.random.default_rng(0)
    lengths = LAYOUTS["odd_lengths"]
    q, k, v = (rng.standard_normal((TOKENS, h, HEAD_DIM)).astype(np.float32) for h in (4, kv_heads, kv_heads))
    expected, *expected_grads = dense(q, k, v, lengths, random_d_out(lengths))
    np.testing.assert_allclose(run(q, k, v, layout(lengths))[:25], expected[:25], atol=2e-6)
    grads = run_vjp(q, k, v, layout(lengths), random_d_out(lengths))
    for grad, reference in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, atol=1e-5)


def test_bfloat16_stays_close() -> None:
    lengths = LAYOUTS["odd_lengths"]
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in random_qkv()]
    out = run(*qkv, layout(lengths))
    assert out.dtype == jnp.bfloat16
    expected, *_ = dense(*qkv, lengths)
    np.testing.assert_allclose(out[:25].astype(jnp.float32), expected[:25], atol=0.03)


@pytest.mark.parametrize("length", [96, 128, 200, 512, 1280])
def test_long_sequences_are_scored_by_blocks(length: int) -> None:
    rng = np.random.default_rng(length)
    q, k, v, d_out = (rng.standard_normal((length, h, HEAD_DIM)).astype(np.float32) for h in (4, 2, 2, 4))
    segments = Segments(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    expected, *expected_grads = dense(q, k, v, (length,), d_out)
    np.testing.assert_allclose(run(q, k, v, segments, (length,)), expected, atol=5e-6)
    for grad, reference in zip(run_vjp(q, k, v, segments, d_out, (length,)), expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, atol=3e-5)


def test_no_length_is_scored_densely() -> None:
    """Forward and backward of 8,192 tokens: no buffer holds as much as an eighth of the scores."""
    length = 8192
    q, k, v, d_out = (jax.ShapeDtypeStruct((length, h, HEAD_DIM), np.float32) for h in (4, 2, 2, 4))
    segments = Segments(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    compiled = run_vjp.lower(q, k, v, segments, d_out, (length,)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * length * length / 8


@dataclasses.dataclass(frozen=True)
class Device:
    """What `choose_backend` asks of one."""

    platform: str
    compute_capability: str = "0.0"


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (Device("cpu"), "bfloat16", "xla"),
        (Device("tpu"), "bfloat16", "splash"),
        (Device("gpu", "7.5"), "bfloat16", "xla"),
        (Device("gpu", "8.0"), "bfloat16", "cudnn"),
        (Device("gpu", "9.0"), "bfloat16", "cudnn"),
        (Device("gpu", "9.0"), "float32", "xla"),
    ],
)
def test_backend_is_chosen_by_the_device_that_the_program_is_for(
    device: Device, dtype: str, expected: str
) -> None:
    assert attention.choose_backend("auto", dtype, device) == expected
    assert attention.choose_backend("xla", dtype, device) == "xla"
    for other in {"cudnn", "splash"} - {expected}:
        with pytest.raises(InputError, match=rf"model\.attention = {other} needs"):
            attention.choose_backend(other, dtype, device)


def test_cudnn_lowers_and_runs_forward_once(cudnn_anywhere: None) -> None:
    """The program for a GPU, which needs none to be lowered, has one forward and one backward call a length."""
    segments = Segments(jnp.array([0, 128, 0], jnp.int32), jnp.array([0, 0, -1], jnp.int32))
    shapes = [jax.ShapeDtypeStruct((512, h, 128), jnp.bfloat16) for h in (4, 2, 2)]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention"))
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, segments, (128,), "cudnn")

    # what comes before attention is recomputed, attention is not
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(jnp.sin(q), k, v).astype(jnp.float32) ** 2)

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",))
    calls = re.findall(r"@__cudnn\$(\w+)\(", lowered.as_text())
    assert sorted(calls) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]


@pytest.fixture
def cudnn_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips JAX's checks of the local GPU, which a lowering for another machine does not need."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *_, **__: None)


LAYERS = 3
MODEL = decoder.Config("qwen3", 40, 16, LAYERS, HEADS, KV_HEADS, HEAD_DIM, 24, 1e4, 1e-6, True, TOKENS)


@pytest.fixture
def kernel_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the executions of attention forward: one element a run."""
    runs: list[int] = []

    def tick(x: np.ndarray) -> np.ndarray:
        runs.append(1)
        return np.float32(0)

    @jax.custom_jvp
    def counted(x: jax.Array) -> jax.Array:
        zero = jax.pure_callback(tick, jax.ShapeDtypeStruct((), jnp.float32), x.ravel()[0])
        return x + zero.reshape((1,) * x.ndim)

    @counted.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return (counted(*primals), *tangents)

    plain = attention._kernel

    def kernel(backend: Backend) -> attention.Kernel:
        own = plain(backend)
        return own._replace(forward=lambda q, k, v, lengths: own.forward(counted(q), k, v, lengths))

    monkeypatch.setattr(attention, "_kernel", kernel)
    return runs


def model_grads(remat: Remat, params: decoder.Params) -> decoder.Params:
    lengths = LAYOUTS["odd_lengths"]
    segments, used = layout(lengths), sum(lengths)
    positions = jnp.concatenate([jnp.arange(n) for n in (*lengths, TOKENS - used)])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: None) -> tuple[jax.Array, None]:
        return packed_attention(q, k, v, segments, LENGTHS, "xla"), None

    @jax.jit
    @jax.grad
    def grads(params: decoder.Params) -> jax.Array:
        hidden, _ = decoder.forward(MODEL, params, jnp.arange(TOKENS), positions, attend, remat=remat)
        return jnp.sum(jnp.square(hidden[:used]) * jnp.linspace(0, 1, 16).reshape(1, -1))

    return jax.block_until_ready(grads(params))


# A run is one segment of one layer.
@pytest.mark.parametrize(
    ("remat", "passes"), [("none", 1), ("products", 1), ("projections", 1), ("attention", 1), ("full", 2)]
)
def test_what_is_recomputed(
    remat: Remat, passes: int, kernel_runs: list[int], random_params: Callable[..., decoder.Params]
) -> None:
    model_grads(remat, random_params(MODEL))
    jax.effects_barrier()
    assert len(kernel_runs) == passes * LAYERS * len(LAYOUTS["odd_lengths"])


def test_recomputation_changes_no_gradient(random_params: Callable[..., decoder.Params]) -> None:
    params = random_params(MODEL)
    plain = model_grads("none", params)
    for remat in decoder.KEPT:
        for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(model_grads(remat, params)), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5 * float(jnp.abs(one).max()))
