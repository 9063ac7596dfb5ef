"""The in-process sampler: one prefill a prompt, decoding in slots, a slot refilled soon after its answer ends.

What runs on the device is pure functions over `Slots`; LocalSampler only decides who sits in which slot. On a mesh
each device decodes its own slots with whole parameters, so nothing but a count crosses between devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.errors import InputError
from jaxrl.models import decoder
from jaxrl.parallel.mesh import BATCH_AXES, local_copy, to_devices
from jaxrl.types import Prompt, Rollout, SamplingParams

BLOCK = 64  # decode steps between looks from the host, at most; also the shortest cache
Request = tuple[int, int]  # (prompt, sample)


@flax.struct.dataclass
class Slots:
    """Sequences being decoded: B slots, L layers, K key/value heads, T tokens of cache, C completion tokens."""

    keys: jax.Array  # [L, B, K, D, T] in the compute dtype; so laid out for the product with queries
    values: jax.Array  # [L, B, K, T, D] in the compute dtype
    token: jax.Array  # [B] int32: the newest token, not in the cache yet
    length: jax.Array  # [B] int32: tokens in the cache, so also the position of the newest
    made: jax.Array  # [B] int32: completion tokens so far
    left: jax.Array  # [B] int32: completion tokens still allowed; 0 where the answer ended or nobody sits
    noise: jax.Array  # [B] PRNG keys, of (seed, prompt, sample)
    tokens: jax.Array  # [B, C] int32: the completion
    logprobs: jax.Array  # [B, C] float32: its log-probabilities


@flax.struct.dataclass
class Prefilled:
    """One prompt, ready to be continued any number of times; N tokens, padding included."""

    keys: jax.Array  # [L, K, D, N] in the compute dtype
    values: jax.Array  # [L, K, N, D] in the compute dtype
    logits: jax.Array  # [V] float32: of the first completion token
    length: jax.Array  # [] int32: tokens without padding


class LocalSampler:
    """Samples with the trainer's own decoder on the trainer's own devices.

    The noise of a token depends on (seed, position of the prompt in the list, sample, token) alone, and a prompt is
    prefilled alone; so a completion does not depend on what else is sampled or on the number of slots, up to the
    rounding of the decode step's sums, whose shapes follow the slots and the cache. Log-probabilities are those of
    the whole vocabulary at the sampling temperature, before top-k and top-p; at temperature 0 they are at
    temperature 1.

    Besides the parameters, a cached token takes 2 x layers x key/value heads x head size numbers. The cache is as
    long as the longest live sequence, rounded up by at most a half, times the slots; it needs half as much again at
    the moments when it grows, and is freed when `generate` returns. 64 slots of 16k tokens take 30 GB with
    Qwen2.5-1.5B in bfloat16. Every length is a compiled shape: two for each doubling.

    Attributes:
      steps: decode steps so far, each of all slots together.
    """

    def __init__(self, config: decoder.Config, *, dtype: str, slots: int, mesh: Mesh | None = None):
        """
        Args:
          config: the model's.
          dtype: of the computation and the cache.
          slots: sequences decoded at once; rounded up to a multiple of the devices.
          mesh: over ("data", "fsdp"); the first device alone where None.
        """
        self.steps = 0
        self._config, self._dtype, self._slots = config, dtype, slots
        self._mesh = mesh or jax.make_mesh(
            (1, 1), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1]
        )
        self._programs = _programs(config, dtype, self._mesh)
        self._params: Any = None
        self._version = -1

    def publish(self, params: Any, version: int) -> None:
        """Keeps a copy of the weights in the compute dtype, whole on every device."""
        self._params = None  # freed before the copy is made, not after
        self._params = self._programs.cast(local_copy(params, self._dtype))
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        each: Callable[[Rollout], Rollout] = lambda rollout: rollout,
        first: int = 0,
    ) -> list[list[Rollout]]:
        """See `Sampler.generate`.

        Raises:
          InputError: before `publish`, for an empty prompt, or for one that leaves no room for the budget.
        """
        self._check(prompts, params)
        waiting = deque((p, g) for p in range(len(prompts)) for g in range(samples))
        if not waiting:
            return [[] for _ in prompts]
        noise = functools.reduce(jax.random.fold_in, seed, jax.random.key(0))
        admit, decode = _steps(self._config, self._dtype, self._mesh, params)
        table = self._table(len(waiting), max(len(p.tokens) for p in prompts), params.max_tokens)
        ready: tuple[int, Any] = (-1, None)  # the newest prompt that was prefilled
        rollouts: dict[Request, Rollout] = {}
        while waiting or any(table.seats):
            entering = table.seat(waiting, prompts)
            if not entering and params.max_tokens >= 4 * BLOCK:
                self._squeeze(table)
            self._fit(table)
            for p, who in entering.items():
                if p != ready[0]:
                    ready = p, self._programs.prefill(self._params, *padded(prompts[p].tokens))
                samples_in = np.array([who.get(slot, -1) for slot in range(table.size)], np.int32)
                table.slots = admit(
                    table.slots,
                    ready[1],
                    jax.random.fold_in(noise, first + p),
                    to_devices(samples_in, self._mesh),
                )
            leave_at = max(1, table.size // 8) if waiting else table.size
            limit = min(BLOCK, table.capacity - table.longest)
            table.slots, steps = decode(table.slots, self._params, np.int32(leave_at), np.int32(limit))
            for (p, g), ids, logprobs in self._harvest(table, steps):
                reason: Any = "stop" if ids[-1] in params.stop_ids else "length"
                rollouts[p, g] = each(Rollout(prompts[p], ids, logprobs, reason, self._version))
        return [[rollouts[p, g] for g in range(samples)] for p in range(len(prompts))]

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        if self._params is None:
            raise InputError("the local sampler has no weights; publish some before generating")
        positions = self._config.max_positions
        for prompt in prompts:
            if not len(prompt.tokens):
                raise InputError(f"prompt {prompt.id} is empty; give it at least one token")
            if len(prompt.tokens) + params.max_tokens > positions:
                raise InputError(
                    f"prompt {prompt.id} has {len(prompt.tokens)} tokens, which with max_tokens = "
                    f"{params.max_tokens} is more than the model's {positions} positions; lower "
                    "rollout.max_tokens, or drop long prompts with data.max_prompt_tokens"
                )

    def _table(self, requests: int, longest: int, budget: int) -> _Table:
        size = -(-min(self._slots, requests) // self._mesh.size) * self._mesh.size
        slots = self._programs.empty(size, bucket(longest + 1, BLOCK), budget)
        return _Table(slots, [None] * size, np.zeros(size, np.int32))

    def _squeeze(self, table: _Table) -> None:
        """Drops the free slots of every device once the last long answers would fit in a quarter of them."""
        rows = table.keep(self._mesh.size)
        if rows.size < table.size:
            own = to_devices(rows.reshape(-1), self._mesh)
            table.slots = self._programs.take(table.slots, own)
            every = (rows + np.arange(len(rows))[:, None] * (table.size // len(rows))).reshape(-1)
            table.seats, table.cached = [table.seats[row] for row in every], table.cached[every]

    def _fit(self, table: _Table) -> None:
        """Makes the cache long enough for the next token, or half as long or less where that will do."""
        length = bucket(table.longest + 1, BLOCK)
        if not table.capacity // 2 < length <= table.capacity:
            for name, axis in (("keys", 4), ("values", 3)):  # in turn, so the old keys are freed halfway
                cache = self._programs.resize(getattr(table.slots, name), length, axis)
                table.slots = dataclasses.replace(table.slots, **{name: cache})

    def _harvest(self, table: _Table, steps: jax.Array) -> Iterator[tuple[Request, np.ndarray, np.ndarray]]:
        """Looks at the slots, and empties the seats whose answers ended: their requests, ids and log-probs."""
        slots, fetch = table.slots, self._programs.fetch
        ran, table.cached, made, left = map(np.array, fetch(steps, slots.length, slots.made, slots.left))
        self.steps += int(ran)
        ended = [(i, seat) for i, seat in enumerate(table.seats) if seat and left[i] == 0]
        if ended:
            tokens, logprobs = map(np.asarray, fetch(slots.tokens, slots.logprobs))
        for i, seat in ended:
            table.seats[i] = None
            yield seat, tokens[i, : made[i]].copy(), logprobs[i, : made[i]].copy()


@dataclasses.dataclass
class _Table:
    """Who sits in which slot, as the host sees it."""

    slots: Slots
    seats: list[Request | None]  # None: free
    cached: np.ndarray  # [B] int32: tokens in each slot's cache

    @property
    def size(self) -> int:
        return len(self.seats)

    @property
    def capacity(self) -> int:
        return self.slots.keys.shape[4]

    @property
    def longest(self) -> int:
        """Cached tokens of the longest live sequence."""
        return max(int(n) for n, seat in zip(self.cached, self.seats, strict=True) if seat)

    def seat(self, waiting: deque[Request], prompts: Sequence[Prompt]) -> dict[int, dict[int, int]]:
        """Gives the free slots to those who wait: {prompt: {slot: sample}}."""
        entering: dict[int, dict[int, int]] = {}
        for i in [i for i, seat in enumerate(self.seats) if not seat][: len(waiting)]:
            self.seats[i] = p, g = waiting.popleft()
            self.cached[i] = len(prompts[p].tokens)
            entering.setdefault(p, {})[i] = g
        return entering

    def keep(self, devices: int) -> np.ndarray:
        """[devices, n] int32: which of its slots a device keeps, all or, as the live ones allow, a quarter of them."""
        free = np.array([seat is None for seat in self.seats]).reshape(devices, -1)
        size = free.shape[1]
        while 4 * (~free).sum(axis=1).max() <= size:
            size //= 4
        return np.argsort(free, axis=1, kind="stable")[:, :size].astype(np.int32)


def bucket(length: int, least: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ..., from `least`: a few shapes, each at most a half too long."""
    power = max(least, 1 << (length - 1).bit_length())
    return power * 3 // 4 if max(least, length) <= power * 3 // 4 else power


def padded(tokens: np.ndarray) -> tuple[np.ndarray, np.int32]:
    n = len(tokens)
    return np.pad(tokens, (0, bucket(n) - n)).astype(np.int32), np.int32(n)


def sample_tokens(
    logits: jax.Array, noise: jax.Array, sampling: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    """One token a row, by the Gumbel-max trick: of the top_k likeliest, the fewest with top_p of their probability.

    Args:
      logits: [B, V] float32.
      noise: [B] PRNG keys.
      sampling: temperature 0 takes the likeliest token. Ties at the edge of a top-k or nucleus are kept.

    Returns:
      ids [B] int32, and their log-probs [B] float32 under softmax(logits / (temperature or 1)), unfiltered.
    """
    scaled = logits / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        token = jnp.argmax(scaled, axis=-1)
    else:
        kept = scaled
        if sampling.top_k or sampling.top_p < 1:
            kept = jnp.where(_likeliest(jax.nn.softmax(scaled), sampling), scaled, -jnp.inf)
        token = _categorical(noise, kept)
    logprob = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scaled, axis=-1)
    return token.astype(jnp.int32), logprob


def _categorical(noise: jax.Array, logits: jax.Array) -> jax.Array:
    """A draw a row of [B, V], first of a block of the vocabulary and then within it.

    The same distribution as one draw over all of it, for a hundredth of the random numbers, which on a CPU take a
    quarter of the decode step.
    """
    rows, size = logits.shape[0], min(256, logits.shape[1])
    blocks = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % size)), constant_values=-jnp.inf)
    blocks = blocks.reshape(rows, -1, size)
    first, second = jnp.unstack(jax.vmap(jax.random.split)(noise), axis=1)
    draw = jax.vmap(jax.random.categorical)
    block = draw(first, jax.nn.logsumexp(blocks, axis=-1))
    return block * size + draw(second, blocks[jnp.arange(rows), block])


def _likeliest(probs: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Mask of the top-k and then the nucleus (arXiv 1904.09751) of the rows of [B, V]."""
    if sampling.top_k:
        probs = jnp.where(_fewest(probs, jnp.ones_like(probs), sampling.top_k), probs, 0)
    if sampling.top_p < 1:
        enough = sampling.top_p * jnp.sum(probs, axis=-1, keepdims=True)
        probs = jnp.where(_fewest(probs, probs, enough), probs, 0)
    return probs > 0


def _fewest(probs: jax.Array, weights: jax.Array, enough: Any) -> jax.Array:
    """Mask of the largest probabilities, just so many that their weights sum to `enough`, or all.

    Bisects the threshold over the bit patterns of float32, which order as the numbers do: exact after 30 sums over
    the vocabulary, which cost less than sorting it.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # `low` and more is enough, `high` and more is not
        middle = (low + high) // 2
        fits = jnp.sum(jnp.where(bits >= middle, weights, 0), axis=-1, keepdims=True) >= enough
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low = jnp.zeros((len(probs), 1), jnp.int32)
    high = jnp.full_like(low, np.float32(1).view(np.int32) + 1)
    return bits >= jax.lax.fori_loop(0, 30, halve, (low, high))[0]


class _Programs(NamedTuple):
    """What is compiled whatever the sampling parameters; arguments follow the functions of the same name."""

    cast: Callable[..., Any]
    fetch: Callable[..., Any]  # makes arrays readable in every process
    empty: Callable[..., Slots]
    prefill: Callable[..., Prefilled]
    take: Callable[..., Slots]
    resize: Callable[..., jax.Array]


_ROWS, _CACHE = P(BATCH_AXES), P(None, BATCH_AXES)
_SLOTS = Slots(_CACHE, _CACHE, *[_ROWS] * 7)  # type: ignore[arg-type]


@functools.cache
def _programs(config: decoder.Config, dtype: str, mesh: Mesh) -> _Programs:
    whole, cache = NamedSharding(mesh, P()), NamedSharding(mesh, _CACHE)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), _SLOTS)
    # copies even where the dtype is the same: the trainer donates its parameters to the next update
    cast = lambda params: jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params)  # noqa: E731
    take = jax.shard_map(_take, mesh=mesh, in_specs=(_SLOTS, _ROWS), out_specs=_SLOTS, check_vma=False)
    return _Programs(
        cast=jax.jit(cast, out_shardings=whole),
        fetch=jax.jit(lambda *arrays: arrays, out_shardings=whole),
        empty=jax.jit(
            functools.partial(_empty, config, dtype), static_argnums=(0, 1, 2), out_shardings=shardings
        ),
        prefill=jax.jit(functools.partial(_prefill, config, dtype), out_shardings=whole),
        take=jax.jit(take),
        resize=jax.jit(_resize, static_argnums=(1, 2), out_shardings=cache),
    )


@functools.cache
def _steps(
    config: decoder.Config, dtype: str, mesh: Mesh, sampling: SamplingParams
) -> tuple[Callable[..., Slots], Callable[..., tuple[Slots, jax.Array]]]:
    """`_admit` and `_decode` on every device's own slots."""
    on_slots = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    admit = on_slots(
        functools.partial(_admit, sampling), in_specs=(_SLOTS, P(), P(), _ROWS), out_specs=_SLOTS
    )
    decode = on_slots(
        functools.partial(_decode, config, dtype, sampling),
        in_specs=(_SLOTS, P(), P(), P()),
        out_specs=(_SLOTS, P()),
    )
    return jax.jit(admit, donate_argnums=0), jax.jit(decode, donate_argnums=0)


def _empty(config: decoder.Config, dtype: str, size: int, length: int, budget: int) -> Slots:
    values = jnp.zeros((config.layers, size, config.kv_heads, length, config.head_dim), dtype)
    row, grid = jnp.zeros(size, jnp.int32), jnp.zeros((size, budget), jnp.int32)
    noise = jax.random.split(jax.random.key(0), size)
    return Slots(
        jnp.swapaxes(values, 3, 4), values, row, row, row, row, noise, grid, grid.astype(jnp.float32)
    )


def _take(slots: Slots, rows: jax.Array) -> Slots:
    return jax.tree.map(lambda x: x[:, rows] if x.ndim == slots.keys.ndim else x[rows], slots)


def _resize(cache: jax.Array, length: int, axis: int) -> jax.Array:
    cache = jax.lax.slice_in_dim(cache, 0, min(length, cache.shape[axis]), axis=axis)
    return jax.lax.pad(
        cache,
        jnp.zeros((), cache.dtype),
        [(0, (i == axis) * (length - n), 0) for i, n in enumerate(cache.shape)],
    )


def _prefill(
    config: decoder.Config, dtype: str, params: Any, tokens: jax.Array, length: jax.Array
) -> Prefilled:
    positions = jnp.arange(len(tokens))[None]
    hidden, kept = decoder.forward(config, params, tokens[None], positions, decoder.dense_attend, dtype=dtype)
    keys, values = kept[0][:, 0].transpose(0, 2, 3, 1), kept[1][:, 0].transpose(0, 2, 1, 3)
    return Prefilled(keys, values, _logits(params, hidden[:, length - 1], dtype)[0], length)


def _logits(params: Any, hidden: jax.Array, dtype: str) -> jax.Array:
    head = decoder.head(params).astype(dtype)
    return jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)


def _admit(
    sampling: SamplingParams, slots: Slots, prompt: Prefilled, noise: jax.Array, sample: jax.Array
) -> Slots:
    """Starts samples of one prompt and draws their first token.

    Args:
      noise: PRNG key of (seed, prompt).
      sample: [B] int32: the sample that a slot is given, -1 where it is left alone.
    """
    rows = jnp.nonzero(sample >= 0, size=len(sample), fill_value=0)[0]

    def start(i: jax.Array, s: Slots) -> Slots:
        row = rows[i]
        own = jax.random.fold_in(noise, sample[row])
        token, logprob = sample_tokens(prompt.logits[None], jax.random.fold_in(own, 0)[None], sampling)
        return Slots(
            keys=jax.lax.dynamic_update_slice(s.keys, prompt.keys[:, None], (0, row, 0, 0, 0)),
            values=jax.lax.dynamic_update_slice(s.values, prompt.values[:, None], (0, row, 0, 0, 0)),
            token=s.token.at[row].set(token[0]),
            length=s.length.at[row].set(prompt.length),
            made=s.made.at[row].set(1),
            left=s.left.at[row].set(jnp.where(_stops(token, sampling), 0, sampling.max_tokens - 1)[0]),
            noise=s.noise.at[row].set(own),
            tokens=s.tokens.at[row, 0].set(token[0]),
            logprobs=s.logprobs.at[row, 0].set(logprob[0]),
        )

    return jax.lax.fori_loop(0, jnp.sum(sample >= 0), start, slots)


def _decode(
    config: decoder.Config, dtype: str, sampling: SamplingParams, slots: Slots, params: Any, leave_at: jax.Array,
    limit: jax.Array,
) -> tuple[Slots, jax.Array]:  # fmt: skip
    """Decodes until `leave_at` slots of all devices are free, `limit` tokens at most; returns the steps taken too."""

    def free(s: Slots) -> jax.Array:
        return jax.lax.psum(jnp.sum(s.left == 0), BATCH_AXES)

    def step(carry: tuple[Slots, jax.Array, jax.Array]) -> tuple[Slots, jax.Array, jax.Array]:
        s, steps, _ = carry
        attend = functools.partial(_attend, s.length)
        tokens, positions, cache = s.token[:, None], s.length[:, None], (s.keys, s.values)
        hidden, (k, v) = decoder.forward(config, params, tokens, positions, attend, cache=cache, dtype=dtype)
        noise = jax.vmap(jax.random.fold_in)(s.noise, s.made)
        token, logprob = sample_tokens(_logits(params, hidden[:, 0], dtype), noise, sampling)
        rows, live = jnp.arange(len(token)), s.left > 0
        at = jnp.where(
            live, s.made, sampling.max_tokens
        )  # out of range, so dropped, once the answer has ended
        s = Slots(
            keys=s.keys.at[:, rows, :, :, s.length].set(jnp.swapaxes(k, 0, 1), mode="drop"),
            values=s.values.at[:, rows, :, s.length].set(jnp.swapaxes(v, 0, 1), mode="drop"),
            token=token,
            length=s.length + live,
            made=s.made + live,
            left=jnp.where(_stops(token, sampling), 0, jnp.maximum(s.left - 1, 0)),
            noise=s.noise,
            tokens=s.tokens.at[rows, at].set(token, mode="drop"),
            logprobs=s.logprobs.at[rows, at].set(logprob, mode="drop"),
        )
        return s, steps + 1, free(s)

    def more(carry: tuple[Slots, jax.Array, jax.Array]) -> jax.Array:
        return (carry[2] < leave_at) & (carry[1] < limit)

    return jax.lax.while_loop(more, step, (slots, jnp.int32(0), free(slots)))[:2]


def _attend(
    length: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, cache: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One new token a row, [B, 1, heads, D], over the row's cached tokens and itself.

    The cache is only read; the loop writes all layers' new keys and values at once, in place.
    """
    keys, values = cache  # [B, K, D, T], [B, K, T, D]
    b, heads, t, d = values.shape
    q, k, v = q.reshape(b, heads, -1, d), k[:, 0], v[:, 0]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    cached = (jnp.arange(t)[None] < length[:, None])[:, None, None]
    past = jnp.where(cached, dot("bkgd,bkdt->bkgt", q, keys), -jnp.inf)
    scores = jnp.concatenate([past, dot("bkgd,bkd->bkg", q, k)[..., None]], axis=-1)
    weights = jax.nn.softmax(scores * d**-0.5).astype(q.dtype)
    out = dot("bkgt,bktd->bkgd", weights[..., :t], values) + dot("bkg,bkd->bkgd", weights[..., t], v)
    return out.astype(q.dtype).reshape(b, 1, -1, d), (k, v)


def _stops(token: jax.Array, sampling: SamplingParams) -> jax.Array:
    return jnp.any(token[:, None] == jnp.array(sampling.stop_ids, jnp.int32)[None], axis=-1)
