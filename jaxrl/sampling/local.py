"""The in-process sampler: prefill once a prompt, decode in slots, refill a slot as soon as its answer ends."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.errors import InputError
from jaxrl.models import decoder
from jaxrl.sampling.sampler import Prompt, Rollout, SamplingParams

BLOCK = 64  # decode steps between looks from the host, at most
BUCKET = 64  # prompts are padded, and the cache is read, in multiples of this or of powers of two of it


@flax.struct.dataclass
class Slots:
    """Sequences being decoded. B slots, L layers, T cached tokens, C completion tokens."""

    keys: jax.Array  # [L, B, T, K, D] in the compute dtype
    values: jax.Array  # [L, B, T, K, D]
    token: jax.Array  # [B] int32: the newest token, not in the cache yet
    position: jax.Array  # [B] int32: its position
    made: jax.Array  # [B] int32: completion tokens so far
    left: jax.Array  # [B] int32: completion tokens still allowed; 0 where the slot is free
    noise: jax.Array  # [B] PRNG keys, one a sequence
    tokens: jax.Array  # [B, C] int32: the completion
    logprobs: jax.Array  # [B, C] float32


class LocalSampler:
    """Samples with the trainer's own decoder on the trainer's own devices.

    Greedy where the temperature is 0. The noise of a token is a function of (seed, prompt index, sample index, token
    index), and a row is computed apart from the others: who shares the batch does not matter.
    """

    def __init__(self, config: decoder.Config, *, dtype: str, slots: int, mesh: Mesh | None = None):
        self.config = config
        self.steps = 0  # decode steps run, of all slots together
        self._slots = slots
        self._params: Any = None
        self._version = -1
        whole = NamedSharding(mesh, P()) if mesh else None
        cast = lambda params: jax.tree.map(lambda p: p.astype(dtype), params)  # noqa: E731
        self._cast = jax.jit(cast, out_shardings=whole)
        self._whole = whole
        self._prefill = jax.jit(functools.partial(_prefill, config, dtype))
        self._decode = jax.jit(
            functools.partial(_decode, config, dtype),
            static_argnames=("span", "temperature", "top_p", "top_k", "stop_ids"),
            donate_argnames="slots",
        )
        self._admit = jax.jit(_admit, donate_argnames="slots")
        self._dtype = dtype

    def publish(self, params: Any, version: int) -> None:
        """Takes the weights, in the compute dtype, whole on every device."""
        self._params = self._cast(params)
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[list[Rollout]]:
        """See `Sampler.generate`. Log-probs are of the whole vocabulary at the sampling temperature, before top-k and
        top-p; at temperature 0 they are at temperature 1.

        Raises:
          InputError: for an empty prompt, or one that leaves no room for the budget.
        """
        if self._version < 0:
            raise RuntimeError("publish weights before sampling")
        self._check(prompts, params)
        count = min(self._slots, len(prompts) * samples)
        longest = max(len(p.tokens) for p in prompts) + params.max_tokens
        slots = self._empty(count, _bucket(longest), params.max_tokens)
        rollouts: dict[tuple[int, int], Rollout] = {}
        waiting = deque((p, g) for p in range(len(prompts)) for g in range(samples))
        busy: dict[int, tuple[int, int]] = {}  # slot -> (prompt, sample)
        prefilled: dict[int, Any] = {}
        free = list(range(count))
        made = np.zeros(count, np.int32)
        base = functools.reduce(jax.random.fold_in, seed, jax.random.key(0))
        while waiting or busy:
            while waiting and free:
                p = waiting[0][0]
                batch = []
                while waiting and free and waiting[0][0] == p:
                    batch.append((free.pop(), waiting.popleft()))
                if p not in prefilled:
                    prefilled = {p: self._prefill(self._params, _padded(prompts[p].tokens))}
                busy |= dict(batch)
                made[[slot for slot, _ in batch]] = 0
                index = np.full(count, count, np.int32)  # out of range: dropped
                index[: len(batch)] = [slot for slot, _ in batch]
                sample = np.zeros(count, np.uint32)
                sample[: len(batch)] = [g for _, (_, g) in batch]
                slots = self._admit(
                    slots, prefilled[p], index, jax.random.fold_in(base, p), sample,
                    prompts[p].tokens[-1], np.int32(len(prompts[p].tokens) - 1), np.int32(params.max_tokens),
                )  # fmt: skip
            furthest = max(len(prompts[p].tokens) + int(made[slot]) for slot, (p, _) in busy.items())
            span = min(_bucket(furthest + BLOCK), slots.keys.shape[2])
            leave_at = max(1, count // 8) if waiting else count
            slots, ran = self._decode(
                self._params, slots, jnp.int32(leave_at),
                span=span, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
                stop_ids=params.stop_ids,
            )  # fmt: skip
            left, made, tokens, logprobs = map(
                np.array, (slots.left, slots.made, slots.tokens, slots.logprobs)
            )
            self.steps += int(ran)
            for slot in [s for s in busy if left[s] == 0]:
                p, g = busy.pop(slot)
                n = int(made[slot])
                ids = tokens[slot, :n].copy()
                stopped = bool(ids[-1] in params.stop_ids)
                rollout = Rollout(
                    prompts[p], ids, logprobs[slot, :n].copy(), "stop" if stopped else "length", self._version
                )
                rollouts[p, g] = rollout
                free.append(slot)
                if on_rollout:
                    on_rollout(rollout)
        return [[rollouts[p, g] for g in range(samples)] for p in range(len(prompts))]

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        for prompt in prompts:
            room = self.config.max_positions - params.max_tokens
            if not 0 < len(prompt.tokens) <= room:
                raise InputError(
                    f"prompt {prompt.id} has {len(prompt.tokens)} tokens; with max_tokens = {params.max_tokens} and "
                    f"the model's {self.config.max_positions} positions it needs 1 to {room}; lower the budget"
                )

    def _empty(self, count: int, length: int, budget: int) -> Slots:
        c = self.config
        cache = jnp.zeros((c.layers, count, length, c.kv_heads, c.head_dim), self._dtype)
        zero = lambda *shape, dtype=jnp.int32: jnp.zeros(shape, dtype)  # noqa: E731
        slots = Slots(
            keys=cache, values=jnp.zeros_like(cache), token=zero(count), position=zero(count), made=zero(count),
            left=zero(count), noise=jax.random.split(jax.random.key(0), count), tokens=zero(count, budget),
            logprobs=zero(count, budget, dtype=jnp.float32),
        )  # fmt: skip
        return jax.device_put(slots, self._whole) if self._whole else slots


def _prefill(
    config: decoder.Config, dtype: str, params: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, N, K, D] of one padded prompt [N]; what padding made is overwritten before it is read."""
    rows = tokens[None]
    positions = jnp.arange(rows.shape[1])[None]
    _, kept = decoder.forward(config, params, rows, positions, decoder.dense_attend, dtype=dtype)
    return jax.tree.map(lambda x: x[:, 0], kept)


def _admit(
    slots: Slots, prefilled: Any, index: jax.Array, noise: jax.Array, sample: jax.Array, token: jax.Array,
    position: jax.Array, budget: jax.Array,
) -> Slots:  # fmt: skip
    """Starts one prompt's samples in the slots `index`; entries past the last slot are dropped."""
    keys, values = prefilled
    n = keys.shape[1]
    return dataclasses.replace(
        slots,
        keys=slots.keys.at[:, index, :n].set(keys[:, None], mode="drop"),
        values=slots.values.at[:, index, :n].set(values[:, None], mode="drop"),
        token=slots.token.at[index].set(token, mode="drop"),
        position=slots.position.at[index].set(position, mode="drop"),
        made=slots.made.at[index].set(0, mode="drop"),
        left=slots.left.at[index].set(budget, mode="drop"),
        noise=slots.noise.at[index].set(
            jax.vmap(functools.partial(jax.random.fold_in, noise))(sample), mode="drop"
        ),
    )


def _decode(
    config: decoder.Config, dtype: str, params: Any, slots: Slots, leave_at: jax.Array, *, span: int,
    temperature: float, top_p: float, top_k: int, stop_ids: tuple[int, ...],
) -> tuple[Slots, jax.Array]:  # fmt: skip
    """Decodes all slots until `leave_at` of them are free, or for BLOCK tokens. Returns the steps taken too."""
    rows = jnp.arange(slots.token.shape[0])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, position: jax.Array) -> Any:
        own = tuple(
            old[:, :span].at[rows, position].set(new[:, 0]) for old, new in zip(cache, (k, v), strict=True)
        )
        out = jax.nn.dot_product_attention(q, *own, key_value_seq_lengths=position + 1)
        return out, (k[:, 0], v[:, 0])

    def step(carry: tuple[Slots, jax.Array]) -> tuple[Slots, jax.Array]:
        s, ran = carry
        hidden, (k, v) = decoder.forward(
            config, params, s.token[:, None], s.position[:, None],
            lambda q, k, v, cache: attend(q, k, v, cache, s.position), cache=(s.keys, s.values), dtype=dtype,
        )  # fmt: skip
        head = decoder.head(params).astype(dtype)
        logits = jnp.einsum("bd,vd->bv", hidden[:, 0], head, preferred_element_type=jnp.float32)
        noise = jax.vmap(jax.random.fold_in)(s.noise, s.made)
        token, logprob = sample_tokens(logits, noise, temperature=temperature, top_p=top_p, top_k=top_k)
        live = s.left > 0
        stop = jnp.isin(token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(live)
        at = jnp.where(live, s.made, s.tokens.shape[1])  # out of range: dropped
        new = dataclasses.replace(
            s,
            keys=s.keys.at[:, rows, s.position].set(k),
            values=s.values.at[:, rows, s.position].set(v),
            tokens=s.tokens.at[rows, at].set(token, mode="drop"),
            logprobs=s.logprobs.at[rows, at].set(logprob, mode="drop"),
            token=token,
            position=s.position + live,
            made=s.made + live,
            left=jnp.where(stop, 0, jnp.maximum(s.left - 1, 0)),
        )
        return new, ran + 1

    def more(carry: tuple[Slots, jax.Array]) -> jax.Array:
        return (jnp.sum(carry[0].left == 0) < leave_at) & (carry[1] < BLOCK)

    return jax.lax.while_loop(more, step, (slots, jnp.int32(0)))


def sample_tokens(
    logits: jax.Array, keys: jax.Array, *, temperature: float, top_p: float, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """One token a row: ids [B] and their log-probs [B] under softmax(logits / temperature), [B, V] float32.

    The nucleus is the smallest set of the likeliest tokens whose probabilities sum to top_p or more
    (arXiv 1904.09751), taken among the top_k likeliest.
    """
    scaled = logits / (temperature or 1.0)
    allowed = scaled
    if top_k and top_k < logits.shape[-1]:
        kth = jax.lax.top_k(allowed, top_k)[0][:, -1:]
        allowed = jnp.where(allowed < kth, -jnp.inf, allowed)
    if top_p < 1:
        order = jnp.sort(jax.nn.softmax(allowed), axis=-1, descending=True)
        before = jnp.cumsum(order, axis=-1) - order
        least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
        allowed = jnp.where(jax.nn.softmax(allowed) < least, -jnp.inf, allowed)
    token = (
        jnp.argmax(allowed, axis=-1) if temperature == 0 else jax.vmap(jax.random.categorical)(keys, allowed)
    )
    logprob = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scaled, axis=-1)
    return token.astype(jnp.int32), logprob


def _bucket(length: int) -> int:
    """The next of 64, 128, 192, 256, 384, 512, 768, ...: a few shapes, at most a third too long."""
    power = BUCKET << max(0, (-(-length // BUCKET) - 1).bit_length())
    return power * 3 // 4 if power >= 4 * BUCKET and length <= power * 3 // 4 else power


def _padded(tokens: np.ndarray) -> np.ndarray:
    return np.pad(tokens, (0, _bucket(len(tokens)) - len(tokens))).astype(np.int32)
