"""The in-process sampler: one prefill a prompt, decoding in slots, a slot refilled soon after its answer ends.

What runs on the device is pure functions over `Slots`; LocalSampler only decides which request sits in which slot. On
a mesh each device decodes its own slots with whole parameters, so nothing but a count crosses between devices.

Shape letters: B slots, L layers, K key/value heads, D numbers of a head, T tokens of cache, C completion tokens,
N prompt tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from jaxrl.errors import InputError
from jaxrl.models import decoder
from jaxrl.models.decoder import Params
from jaxrl.parallel.mesh import BATCH_AXES, local_copy, mesh_over, to_devices
from jaxrl.sampling.sampler import no_more, unchanged
from jaxrl.types import FinishReason, OnGroup, OnRollout, Prompt, Rollout, SamplingParams

BLOCK = 64  # decode steps between looks from the host, at most; also the shortest cache
# Free slots wait until one in REFILL is free, as each refill stops all of them for a look from the host and prefills.
REFILL = 8
# Few live slots move to this share of the slots; each size is a program of its own, so sizes are few.
SQUEEZE = 4
# Answers that last fewer blocks end before a program for fewer slots would pay.
SQUEEZE_BLOCKS = 4
VOCABULARY_BLOCK = 256  # tokens; about the root of a vocabulary, so that both draws of a token are short

Request = tuple[int, int]  # (prompt, sample)


@flax.struct.dataclass
class Slots:
    """Sequences being decoded; the cache is in the compute dtype."""

    keys: Float[Array, "L B K D T"]  # so laid out for the product with queries
    values: Float[Array, "L B K T D"]
    token: Int32[Array, " B"]  # the newest token, not in the cache yet
    length: Int32[Array, " B"]  # tokens in the cache, so also the position of the newest
    made: Int32[Array, " B"]  # completion tokens so far
    left: Int32[Array, " B"]  # completion tokens still allowed; 0 where the answer ended or the slot is free
    noise: Key[Array, " B"]  # of (seed, prompt, sample)
    tokens: Int32[Array, "B C"]  # the completion
    logprobs: Float32[Array, "B C"]  # its log-probabilities


@flax.struct.dataclass
class Prefilled:
    """One prompt, ready to be continued any number of times; N includes padding."""

    keys: Float[Array, "L K D N"]
    values: Float[Array, "L K N D"]
    logits: Float32[Array, " V"]  # of the first completion token
    length: Int32[Array, ""]  # tokens without padding


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

    def __init__(self, config: decoder.Config, *, dtype: str, slots: int, mesh: Mesh | None = None) -> None:
        """
        Args:
          config: the model's.
          dtype: of the computation and the cache.
          slots: sequences decoded at once; rounded up to a multiple of the devices.
          mesh: over ("data", "fsdp"); the first device alone where None.
        """
        self.steps = 0
        self._config, self._dtype, self._slots = config, dtype, slots
        self._mesh = mesh or mesh_over(jax.devices()[:1])
        self._programs = _programs(config, dtype, self._mesh)
        self._params: Params | None = None
        self._version = -1

    def publish(self, params: Params, version: int) -> None:
        """Keeps a copy of the parameters in the compute dtype, whole on every device."""
        self._params = None  # freed before the copy is made, not after
        self._params = self._programs.cast(local_copy(params, self._dtype))
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: OnRollout = unchanged,
        first: int = 0,
        on_group: OnGroup = no_more,
    ) -> list[list[Rollout]]:
        """See `Sampler.generate`.

        Raises:
          InputError: before `publish`, for an empty prompt, or for one that leaves no room for the budget.
        """
        if self._params is None:
            raise InputError("the local sampler has no parameters; publish some before generating")
        self._require_possible(prompts, params)
        prompts, left = list(prompts), [samples] * len(prompts)  # samples that are to end, of each prompt
        waiting = deque((p, g) for p in range(len(prompts)) for g in range(samples))
        if not waiting:
            return [[] for _ in prompts]
        words = (word for part in seed for word in _words(part))
        noise = functools.reduce(jax.random.fold_in, words, jax.random.key(0))
        admit, decode = _sampling_programs(self._config, self._dtype, self._mesh, params)
        table = self._table(len(waiting), max(len(p.tokens) for p in prompts), params.max_tokens)
        newest, ready = -1, None  # the last prompt that was prefilled
        rollouts: dict[Request, Rollout] = {}
        while waiting or any(table.seats):
            entering = table.seat(waiting, prompts)
            if not entering and params.max_tokens >= SQUEEZE_BLOCKS * BLOCK:
                self._squeeze(table)
            self._fit(table)
            for p, who in entering.items():
                if ready is None or p != newest:
                    newest, ready = p, self._programs.prefill(self._params, *padded(prompts[p].tokens))
                entrants = np.array([who.get(slot, -1) for slot in range(table.size)], np.int32)
                own_noise = jax.random.fold_in(noise, first + p)
                table.slots = admit(table.slots, ready, own_noise, to_devices(entrants, self._mesh))
            leave_at = max(1, table.size // REFILL) if waiting else table.size
            limit = min(BLOCK, table.capacity - table.longest)
            table.slots, steps = decode(table.slots, self._params, np.int32(leave_at), np.int32(limit))
            for (p, g), ids, logprobs in self._harvest(table, steps):
                reason: FinishReason = "stop" if ids[-1] in params.stop_ids else "length"
                rollouts[p, g] = on_rollout(Rollout(prompts[p], ids, logprobs, reason, self._version))
                left[p] -= 1
                more = () if left[p] else on_group(p, [rollouts[p, each] for each in range(samples)])
                if more:
                    self._require_possible(more, params)
                    waiting += ((len(prompts) + k, each) for k in range(len(more)) for each in range(samples))
                    left += [samples] * len(more)
                    prompts += more
        return [[rollouts[p, g] for g in range(samples)] for p in range(len(prompts))]

    def _require_possible(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        for prompt in prompts:
            if not len(prompt.tokens):
                raise InputError(f"prompt {prompt.id} is empty; give it at least one token")
            require_positions(prompt, params.max_tokens, self._config)

    def _table(self, requests: int, longest: int, budget: int) -> _Table:
        size = -(-min(self._slots, requests) // self._mesh.size) * self._mesh.size
        slots = self._programs.empty(size, bucket(longest + 1, BLOCK), budget)
        return _Table(slots, [None] * size, np.zeros(size, np.int32))

    def _squeeze(self, table: _Table) -> None:
        """Drops free slots of every device once the last long answers fit in one in SQUEEZE of its slots."""
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
        """Empties the seats whose answers ended in the last `steps`; yields their requests, ids and log-probs."""
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
    """Which request sits in which slot, as the host sees it."""

    slots: Slots
    seats: list[Request | None]  # of each slot; None: free
    cached: Int32[np.ndarray, " B"]  # tokens in each slot's cache

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
        """Gives the free slots to waiting requests; returns {prompt: {slot: sample}} of those that enter."""
        entering: dict[int, dict[int, int]] = {}
        for i in [i for i, seat in enumerate(self.seats) if not seat][: len(waiting)]:
            self.seats[i] = p, g = waiting.popleft()
            self.cached[i] = len(prompts[p].tokens)
            entering.setdefault(p, {})[i] = g
        return entering

    def keep(self, devices: int) -> Int32[np.ndarray, "devices n"]:
        """The slots that each device keeps: all, or one in SQUEEZE (and so on) where the live ones fit in them."""
        free = np.array([seat is None for seat in self.seats]).reshape(devices, -1)
        size = free.shape[1]
        while SQUEEZE * (~free).sum(axis=1).max() <= size:
            size //= SQUEEZE
        return np.argsort(free, axis=1, kind="stable")[:, :size].astype(np.int32)


def _words(number: int) -> tuple[int, ...]:
    """A number below 2^64 in 32-bit words, which is what JAX folds in; those of a smaller one are the number."""
    return (number,) if number < 1 << 32 else (number & 0xFFFFFFFF, number >> 32)


def require_positions(prompt: Prompt, max_tokens: int, config: decoder.Config) -> None:
    """Refuses a prompt whose longest completion the model has no positions for.

    Raises:
      InputError: naming it.
    """
    if len(prompt.tokens) + max_tokens > config.positions:
        raise InputError(
            f"prompt {prompt.id} has {len(prompt.tokens)} tokens, which with max_tokens = {max_tokens} is more than "
            f"the model's {config.positions} positions; lower rollout.max_tokens, or drop long prompts with "
            "data.max_prompt_tokens"
        )


def bucket(length: int, least: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ... from `least` on: few shapes, each at most a half too long."""
    power = max(least, 1 << (length - 1).bit_length())
    return power * 3 // 4 if max(least, length) <= power * 3 // 4 else power


def padded(tokens: Int[np.ndarray, " n"]) -> tuple[Int32[np.ndarray, " N"], np.int32]:
    """Token ids padded to the next `bucket`, and how many there are."""
    n = len(tokens)
    return np.pad(tokens, (0, bucket(n) - n)).astype(np.int32), np.int32(n)


def sample_tokens(
    logits: Float32[Array, "B V"], noise: Key[Array, " B"], sampling: SamplingParams
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """Samples one token a row, from the fewest likeliest tokens that hold top_p of the top_k's probability.

    Args:
      logits: of the next token.
      noise: PRNG keys.
      sampling: temperature 0 takes the likeliest token. Ties at the edge of a top-k or nucleus are kept.

    Returns:
      ids, and their log-probs (nats) under softmax(logits / (temperature or 1)), unfiltered.
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


def _categorical(noise: Key[Array, " B"], logits: Float32[Array, "B V"]) -> Int[Array, " B"]:
    """Draws one token a row by the Gumbel-max trick, first a block of the vocabulary and then a token of it.

    The distribution is that of one draw over all of it, for a hundredth of the random numbers, which on a CPU take a
    quarter of the decode step.
    """
    rows, size = logits.shape[0], min(VOCABULARY_BLOCK, logits.shape[1])
    blocks = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % size)), constant_values=-jnp.inf)
    blocks = blocks.reshape(rows, -1, size)
    first, second = jnp.unstack(jax.vmap(jax.random.split)(noise), axis=1)
    draw = jax.vmap(jax.random.categorical)
    block = draw(first, jax.nn.logsumexp(blocks, axis=-1))
    return block * size + draw(second, blocks[jnp.arange(rows), block])


def _likeliest(probs: Float32[Array, "B V"], sampling: SamplingParams) -> Bool[Array, "B V"]:
    """Mask of each row's top-k, and then of the nucleus (arXiv 1904.09751) of what is left."""
    if sampling.top_k:
        probs = jnp.where(_fewest(probs, jnp.ones_like(probs), sampling.top_k), probs, 0)
    if sampling.top_p < 1:
        enough = sampling.top_p * jnp.sum(probs, axis=-1, keepdims=True)
        probs = jnp.where(_fewest(probs, probs, enough), probs, 0)
    return probs > 0


def _fewest(
    probs: Float32[Array, "B V"], amounts: Float32[Array, "B V"], enough: float | Float32[Array, "B 1"]
) -> Bool[Array, "B V"]:
    """Mask of each row's largest probabilities, just so many that their amounts sum to `enough`, or all.

    Bisects the threshold over the bit patterns of float32, which order as the numbers do: exact after 30 sums over
    the vocabulary, which cost less than sorting it.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # `low` and more is enough, `high` and more is not
        middle = (low + high) // 2
        fits = jnp.sum(jnp.where(bits >= middle, amounts, 0), axis=-1, keepdims=True) >= enough
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low = jnp.zeros((len(probs), 1), jnp.int32)
    high = jnp.full_like(low, np.float32(1).view(np.int32) + 1)
    return bits >= jax.lax.fori_loop(0, 30, halve, (low, high))[0]


class _Programs(NamedTuple):
    """What is compiled whatever the sampling parameters; arguments follow the functions of the same name."""

    cast: Callable[[Params], Params]
    fetch: Fetch
    empty: Callable[[int, int, int], Slots]
    prefill: Callable[[Params, np.ndarray, np.int32], Prefilled]
    take: Callable[[Slots, np.ndarray | jax.Array], Slots]
    resize: Callable[[jax.Array, int, int], jax.Array]


class Fetch(Protocol):
    """Makes arrays readable in every process."""

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]: ...


Admit = Callable[[Slots, Prefilled, jax.Array, np.ndarray | jax.Array], Slots]
Decode = Callable[[Slots, Params, np.int32, np.int32], tuple[Slots, jax.Array]]

_ROWS, _CACHE = P(BATCH_AXES), P(None, BATCH_AXES)
_SLOTS = Slots(_CACHE, _CACHE, *[_ROWS] * 7)  # type: ignore[arg-type]


@functools.cache
def _programs(config: decoder.Config, dtype: str, mesh: Mesh) -> _Programs:
    whole, cache = NamedSharding(mesh, P()), NamedSharding(mesh, _CACHE)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), _SLOTS)

    def cast(params: Params) -> Params:
        # copies even where the dtype is the same: the trainer donates its parameters to the next update
        return jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params)

    def fetch(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return arrays

    empty, prefill = functools.partial(_empty, config, dtype), functools.partial(_prefill, config, dtype)
    take = jax.shard_map(_take, mesh=mesh, in_specs=(_SLOTS, _ROWS), out_specs=_SLOTS, check_vma=False)
    return _Programs(
        cast=jax.jit(cast, out_shardings=whole),
        fetch=jax.jit(fetch, out_shardings=whole),
        empty=jax.jit(empty, static_argnums=(0, 1, 2), out_shardings=shardings),
        prefill=jax.jit(prefill, out_shardings=whole),
        take=jax.jit(take),
        resize=jax.jit(_resize, static_argnums=(1, 2), out_shardings=cache),
    )


@functools.cache
def _sampling_programs(
    config: decoder.Config, dtype: str, mesh: Mesh, sampling: SamplingParams
) -> tuple[Admit, Decode]:
    """`_admit` and `_decode` on every device's own slots."""
    on_slots = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    admit = functools.partial(_admit, sampling)
    decode = functools.partial(_decode, config, dtype, sampling)
    admit = on_slots(admit, in_specs=(_SLOTS, P(), P(), _ROWS), out_specs=_SLOTS)
    decode = on_slots(decode, in_specs=(_SLOTS, P(), P(), P()), out_specs=(_SLOTS, P()))
    return jax.jit(admit, donate_argnums=0), jax.jit(decode, donate_argnums=0)


def _empty(config: decoder.Config, dtype: str, size: int, length: int, budget: int) -> Slots:
    values = jnp.zeros((config.layers, size, config.kv_heads, length, config.head_dim), dtype)
    row, grid = jnp.zeros(size, jnp.int32), jnp.zeros((size, budget), jnp.int32)
    noise = jax.random.split(jax.random.key(0), size)
    return Slots(
        jnp.swapaxes(values, 3, 4), values, row, row, row, row, noise, grid, grid.astype(jnp.float32)
    )


def _take(slots: Slots, rows: Int32[Array, " n"]) -> Slots:
    return jax.tree.map(lambda x: x[:, rows] if x.ndim == slots.keys.ndim else x[rows], slots)


def _resize(cache: Float[Array, "L B K _ _"], length: int, axis: int) -> Float[Array, "L B K _ _"]:
    """Cuts or pads the token axis of keys or values to `length`."""
    cache = jax.lax.slice_in_dim(cache, 0, min(length, cache.shape[axis]), axis=axis)
    padding = [(0, (i == axis) * (length - n), 0) for i, n in enumerate(cache.shape)]
    return jax.lax.pad(cache, jnp.zeros((), cache.dtype), padding)


def _prefill(
    config: decoder.Config,
    dtype: str,
    params: Params,
    tokens: Int32[Array, " N"],
    length: Int32[Array, ""],
) -> Prefilled:
    positions = jnp.arange(len(tokens))[None]
    hidden, kept = decoder.forward(config, params, tokens[None], positions, decoder.dense_attend, dtype=dtype)
    keys, values = kept[0][:, 0].transpose(0, 2, 3, 1), kept[1][:, 0].transpose(0, 2, 1, 3)
    return Prefilled(keys, values, _logits(params, hidden[:, length - 1], dtype)[0], length)


def _logits(params: Params, hidden: Float[Array, "B width"], dtype: str) -> Float32[Array, "B V"]:
    head = decoder.head(params).astype(dtype)
    return jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)


def _admit(
    sampling: SamplingParams,
    slots: Slots,
    prompt: Prefilled,
    noise: Key[Array, ""],
    sample: Int32[Array, " B"],
) -> Slots:
    """Starts samples of one prompt and draws their first token.

    Args:
      sampling: how tokens are sampled.
      slots: all of a device.
      prompt: prefilled.
      noise: PRNG key of (seed, prompt).
      sample: the sample that each slot is given, -1 where it is left alone.
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
    config: decoder.Config,
    dtype: str,
    sampling: SamplingParams,
    slots: Slots,
    params: Params,
    leave_at: Int32[Array, ""],
    limit: Int32[Array, ""],
) -> tuple[Slots, Int32[Array, ""]]:
    """Decodes until `leave_at` slots of all devices are free, at most `limit` steps; returns the steps taken too."""
    Carry = tuple[Slots, jax.Array, jax.Array]

    def free(s: Slots) -> jax.Array:
        return jax.lax.psum(jnp.sum(s.left == 0), BATCH_AXES)

    def step(carry: Carry) -> Carry:
        s, steps, _ = carry
        attend = functools.partial(_attend, s.length)
        tokens, positions, cache = s.token[:, None], s.length[:, None], (s.keys, s.values)
        hidden, (k, v) = decoder.forward(config, params, tokens, positions, attend, cache=cache, dtype=dtype)
        noise = jax.vmap(jax.random.fold_in)(s.noise, s.made)
        token, logprob = sample_tokens(_logits(params, hidden[:, 0], dtype), noise, sampling)
        rows, live = jnp.arange(len(token)), s.left > 0
        # once the answer has ended, out of range and so dropped
        at = jnp.where(live, s.made, sampling.max_tokens)
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

    def more(carry: Carry) -> jax.Array:
        return (carry[2] < leave_at) & (carry[1] < limit)

    return jax.lax.while_loop(more, step, (slots, jnp.int32(0), free(slots)))[:2]


def _attend(
    length: Int32[Array, " B"],
    q: Float[Array, "B 1 heads D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    cache: tuple[Float[Array, "B K D T"], Float[Array, "B K T D"]],
) -> tuple[Float[Array, "B 1 heads D"], tuple[Float[Array, "B K D"], Float[Array, "B K D"]]]:
    """Attention of one new token a row over the row's cached tokens and itself.

    The cache is only read; the loop writes all layers' new keys and values at once, in place.
    """
    keys, values = cache
    b, heads, t, d = values.shape
    q, k, v = q.reshape(b, heads, -1, d), k[:, 0], v[:, 0]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    cached = (jnp.arange(t)[None] < length[:, None])[:, None, None]
    past = jnp.where(cached, dot("bkgd,bkdt->bkgt", q, keys), -jnp.inf)
    logits = jnp.concatenate([past, dot("bkgd,bkd->bkg", q, k)[..., None]], axis=-1)
    shares = jax.nn.softmax(logits * d**-0.5).astype(q.dtype)
    out = dot("bkgt,bktd->bkgd", shares[..., :t], values) + dot("bkg,bkd->bkgd", shares[..., t], v)
    return out.astype(q.dtype).reshape(b, 1, -1, d), (k, v)


def _stops(token: Int32[Array, " B"], sampling: SamplingParams) -> Bool[Array, " B"]:
    return jnp.any(token[:, None] == jnp.array(sampling.stop_ids, jnp.int32)[None], axis=-1)
