"""The algorithm: `update(state, batch) -> (state, metrics)`, one jitted pure function over a device mesh.

Parameters and Adam's moments are float32, sharded over `fsdp`. An update gathers the parameters once in the compute
dtype, runs each device's own micro-batches without talking to anyone, and reduce-scatters the gradients once
(ZeRO, arXiv 1910.02054). Devices may hold different segments and different numbers of micro-batches. Where the whole
parameters do not fit, gather = "layer" moves both collectives into the scan over layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.distributed import BATCH_AXES, sharding_of, spec_of
from jaxrl.grpo.agreement import ratio_histogram
from jaxrl.grpo.logprobs import token_logprobs
from jaxrl.grpo.objective import policy_objective
from jaxrl.grpo.packing import PackedBatch
from jaxrl.grpo.zero import Gather, make_weights
from jaxrl.models import decoder
from jaxrl.models.attention import Backend, Segments, packed_attention

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that training carries from one update to the next."""

    step: jax.Array  # [] int32: optimizer updates tried, the skipped ones included
    params: decoder.Params  # float32, sharded over fsdp
    opt_state: optax.OptState  # float32 moments, sharded like the parameters


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    updates_per_step: int,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on every parameter behind global-norm clipping, linear warm-up, then constant.

    The rate is learning_rate * min(k / warmup_steps, 1) in rollout batch k = 0, 1, ...; all of a batch's updates
    share it, and the first batch only fills the moments.
    """
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)

    def schedule(count: jax.Array) -> jax.Array:
        return warmup(count // updates_per_step) if warmup_steps else jnp.asarray(learning_rate)

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay),
    )


def init_state(params: decoder.Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state at step 0 with everything where `update` wants it. Takes `params` over."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(params, optimizer, mesh))
    create = lambda p: TrainState(jnp.zeros((), jnp.int32), p, optimizer.init(p))  # noqa: E731
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(
        jax.device_put(params, shardings.params)
    )


def abstract_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; `params` may be abstract."""
    state = jax.eval_shape(lambda p: TrainState(jnp.zeros((), jnp.int32), p, optimizer.init(p)), params)
    shard = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_of(a.shape, mesh))  # noqa: E731
    return jax.tree.map(shard, state)


def make_update(
    config: decoder.Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    buckets: tuple[int, ...],
    backend: Backend,
    dtype: str,
    remat: decoder.Remat,
    gather: Gather = "step",
    temperature: float,
    chunk: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[
    Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]], Callable[[Any, PackedBatch], jax.Array]
]:
    """Builds `update(state, batch) -> (state, metrics)` and `score(params, batch) -> old_logprobs [G, M, N]`.

    `update` donates the state. It takes one AdamW step on sum(weights * token_loss) over all devices; if the
    gradient norm is not finite it changes nothing but `step` and says so in the metrics.
    """

    shapes = jax.eval_shape(lambda: decoder.initialise(config, 0))
    weights = make_weights(shapes, mesh.shape["fsdp"], dtype, gather)

    def logprobs_of(params: decoder.Params, micro: PackedBatch) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and entropies [N] of each token given those before it, in its segment."""
        segments = Segments(micro.starts, micro.buckets)
        attend = lambda q, k, v, _: (packed_attention(q, k, v, segments, buckets, backend), None)  # noqa: E731
        params = weights.enter(params)
        hidden, _ = decoder.forward(
            config,
            params,
            micro.tokens,
            micro.positions,
            attend,
            dtype=dtype,
            remat=remat,
            fetch=weights.fetch,
        )
        targets = jnp.roll(micro.tokens, -1)
        predicted = token_logprobs(
            hidden, decoder.head(params), targets, temperature=temperature, chunk=chunk
        )
        return tuple(jnp.roll(x, 1) for x in predicted)  # type: ignore[return-value]  # the token's own index

    def loss_of(params: decoder.Params, micro: PackedBatch) -> tuple[jax.Array, dict[str, Metrics]]:
        logprobs, entropy = logprobs_of(params, micro)
        old = jnp.where(micro.on_policy, jax.lax.stop_gradient(logprobs), micro.old_logprobs)
        loss, metrics = policy_objective(
            logprobs, old, micro.advantages, micro.weights,
            clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        )  # fmt: skip
        live = micro.weights != 0
        count = live.sum().astype(jnp.float32)
        difference = jnp.where(live, jnp.abs(old - micro.sampler_logprobs), 0.0)
        sums = {name: metrics[name] * count for name in ("clip_fraction", "clip_fraction_lower", "approx_kl")}
        sums |= {"loss": loss, "tokens": count, "sequences": jnp.sum(micro.buckets >= 0).astype(jnp.float32)}
        sums |= {"entropy": jnp.sum(jnp.where(live, entropy, 0.0)), "logprob_diff_mean": difference.sum()}
        sums |= {"ratio_histogram": ratio_histogram(old, micro.sampler_logprobs, live)}
        peaks = {"ratio_max": metrics["ratio_max"], "logprob_diff_max": difference.max()}
        return loss, {"sums": sums, "peaks": peaks}

    def gradients(params: decoder.Params, batch: PackedBatch) -> tuple[decoder.Params, Metrics]:
        """On each device: gather, all own micro-batches, scatter. Metrics are summed over the mesh."""
        own = jax.tree.map(lambda x: x[0], batch)
        held = weights.hold(params)
        gradient_of = jax.grad(loss_of, has_aux=True)

        def accumulate(m: jax.Array, carry: tuple) -> tuple:
            total, sums, peaks = carry
            grads, metrics = gradient_of(held, _micro_batch(own, m))
            total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
            return (
                total,
                jax.tree.map(jnp.add, sums, metrics["sums"]),
                jax.tree.map(jnp.maximum, peaks, metrics["peaks"]),
            )

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), held)
        of_one = jax.eval_shape(loss_of, held, _micro_batch(own, 0))[1]
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), of_one)
        carry = (zeros, blank["sums"], blank["peaks"])
        total, sums, peaks = jax.lax.fori_loop(0, weights.rounds(own.micro_batches), accumulate, carry)
        return weights.sum(total), jax.lax.psum(sums, BATCH_AXES) | jax.lax.pmax(peaks, BATCH_AXES)

    def update(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        specs = jax.tree.map(lambda p: spec_of(p.shape, mesh), state.params)
        grads, totals = jax.shard_map(
            gradients, mesh=mesh, in_specs=(specs, P(BATCH_AXES)), out_specs=(specs, P()), check_vma=False
        )(state.params, batch)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        fine = jnp.isfinite(norm)
        keep = lambda new, old: jax.tree.map(functools.partial(jnp.where, fine), new, old)  # noqa: E731
        new = TrainState(
            step=state.step + 1,
            params=keep(optax.apply_updates(state.params, updates), state.params),
            opt_state=keep(opt_state, state.opt_state),
        )
        return new, _averages(totals, batch.response_tokens[0]) | {"grad_norm": norm, "skipped": ~fine}

    def score(params: decoder.Params, batch: PackedBatch) -> jax.Array:
        def on_device(params: decoder.Params, batch: PackedBatch) -> jax.Array:
            own = jax.tree.map(lambda x: x[0], batch)
            held = weights.hold(params)

            def one(m: jax.Array, out: jax.Array) -> jax.Array:
                return out.at[m].set(logprobs_of(held, _micro_batch(own, m))[0])

            rounds = weights.rounds(own.micro_batches)
            return jax.lax.fori_loop(0, rounds, one, jnp.zeros_like(own.weights))[None]

        specs = jax.tree.map(lambda p: spec_of(p.shape, mesh), params)
        return jax.shard_map(
            on_device, mesh=mesh, in_specs=(specs, P(BATCH_AXES)), out_specs=P(BATCH_AXES), check_vma=False
        )(params, batch)

    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(shapes, optimizer, mesh))
    per_device, replicated = NamedSharding(mesh, P(BATCH_AXES)), NamedSharding(mesh, P())
    return (
        jax.jit(
            update,
            in_shardings=(shardings, per_device),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        jax.jit(score, in_shardings=(shardings.params, per_device), out_shardings=per_device),
    )


def _micro_batch(own: PackedBatch, m: jax.Array | int) -> PackedBatch:
    """Stream m of a device; what has no stream axis (the flags and counts) stays."""
    at = lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False)  # noqa: E731
    return jax.tree.map(lambda x: at(x) if x.ndim else x, own)


def _averages(totals: Metrics, response_tokens: jax.Array) -> Metrics:
    """Means from sums. Clip fractions are shares of all response tokens, as verl counts them: those left out
    have a zero advantage and cannot be clipped. The others are means over the tokens that were trained on."""
    over_all = {name: totals[name] / response_tokens for name in ("clip_fraction", "clip_fraction_lower")}
    over_trained = {
        name: totals[name] / totals["tokens"] for name in ("approx_kl", "entropy", "logprob_diff_mean")
    }
    return totals | over_all | over_trained
