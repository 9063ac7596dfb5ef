"""The algorithm: `update(state, batch) -> (state, metrics)`, one jitted pure function over a device mesh.

Parameters and Adam's moments are float32, sharded over `fsdp`. An update gathers the parameters once in the compute
dtype, runs each device's own micro-batches without any collective, and reduce-scatters the gradients once (ZeRO,
arXiv 1910.02054). Devices may hold different sequences and different numbers of micro-batches. Where the whole
parameters do not fit, gather = "layer" moves both collectives into the scan over layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxrl import config
from jaxrl.grpo.kl import kl_penalty
from jaxrl.grpo.logprobs import token_logprobs
from jaxrl.grpo.mismatch import mismatch_sums, ratio_histogram
from jaxrl.grpo.objective import Objective, policy_objective
from jaxrl.grpo.packing import Layout, PackedBatch
from jaxrl.grpo.sharded_params import ShardedParams, make_sharded_params
from jaxrl.models import decoder
from jaxrl.models.attention import Segments, packed_attention
from jaxrl.parallel.mesh import BATCH_AXES, abstract_sharded
from jaxrl.types import Backend, Dtype, Gather, Remat

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that training carries from one update to the next."""

    step: Int32[Array, ""]  # optimizer updates tried, the skipped ones included: several a step of the run
    params: decoder.Params  # float32, sharded over fsdp
    opt_state: optax.OptState  # float32 moments, sharded like the parameters


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How the model is computed; results are the same up to rounding."""

    dtype: Dtype = "float32"  # of the computation; losses, gradients and state are float32
    remat: Remat = "none"
    backend: Backend = "xla"
    gather: Gather = "step"
    logprob_chunk: int = 2048  # tokens whose logits exist at one time; divides the stream's


class Update(Protocol):
    """One optimizer update on one mini-batch."""

    def __call__(self, state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]: ...

    def lower(self, state: TrainState, batch: PackedBatch) -> jax.stages.Lowered: ...


class Likelihoods(NamedTuple):
    """Of a mini-batch's tokens, in nats."""

    logprobs: Float32[Array, "G M N"]
    entropies: Float32[Array, "G M N"] | None  # where they were asked for


class Logprobs(Protocol):
    """Log-probabilities (and entropies) of a mini-batch's tokens, without gradient; the batch has no `Terms`."""

    def __call__(self, params: decoder.Params, batch: PackedBatch) -> Likelihoods: ...

    def lower(self, params: decoder.Params, batch: PackedBatch) -> jax.stages.Lowered: ...


class Functions(NamedTuple):
    """What `make_update` builds."""

    update: Update
    logprobs: Logprobs


def learning_rate(section: config.Optimizer, step: int) -> float:
    """The rate of a step's updates: linear warm-up, learning_rate * min(step / warmup_steps, 1), then constant.

    Args:
      section: the recipe's.
      step: batches of rollouts since the optimizer's start, from 0; the first one only fills the moments.
    """
    warm = min(step / section.warmup_steps, 1.0) if section.warmup_steps else 1.0
    return section.learning_rate * warm


def make_optimizer(section: config.Optimizer) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101) on every parameter behind global-norm clipping.

    Its `update` takes the rate as `learning_rate`: a schedule is a number that changes, so nothing is compiled again.
    """
    return optax.chain(
        optax.clip_by_global_norm(section.max_grad_norm),
        optax.scale_by_adam(section.beta1, section.beta2, section.epsilon),
        optax.add_decayed_weights(section.weight_decay),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, _descend),
    )


def _descend(
    updates: decoder.Params,
    state: optax.EmptyState,
    params: decoder.Params | None = None,
    *,
    learning_rate: Float[Array, ""] | float,
) -> tuple[decoder.Params, optax.EmptyState]:
    return jax.tree.map(lambda u: -learning_rate * u, updates), state


def init_state(
    params: decoder.Params, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> TrainState:
    """A state at step 0 with everything where `update` wants it.

    Args:
      params: float32, whole or sharded; they belong to the state afterwards.
      optimizer: see `make_optimizer`.
      mesh: over ("data", "fsdp").
    """
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(params, optimizer, mesh))
    create = functools.partial(_first_state, optimizer=optimizer)
    put = jax.device_put(params, shardings.params)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(put)


def abstract_state(
    params: decoder.Params, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; `params` may be abstract."""
    create = functools.partial(_first_state, optimizer=optimizer)
    return abstract_sharded(jax.eval_shape(create, params), mesh)


def _first_state(params: decoder.Params, optimizer: optax.GradientTransformationExtraArgs) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_update(
    model: decoder.Config,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    layout: Layout,
    numerics: Numerics,
    objective: Objective,
    entropies: bool = False,
) -> Functions:
    """Builds `update(state, batch) -> (state, metrics)` and `logprobs(params, batch) -> Likelihoods`, jitted.

    `update` donates the state. It takes one AdamW step on sum(weights * token_loss) over all devices; if the
    gradient norm is not finite it changes nothing but `step`, and the metric `skipped` is 1.

    Args:
      model: what the parameters mean.
      optimizer: see `make_optimizer`.
      mesh: over ("data", "fsdp").
      layout: of the batches; its attention lengths are static.
      numerics: see `Numerics`.
      objective: see `Objective`.
      entropies: whether `logprobs` gives them too.
    """
    shapes = decoder.abstract_params(model)
    sharded = make_sharded_params(shapes, mesh.shape["fsdp"], numerics.dtype, numerics.gather)
    device = _OnDevice(model, layout, numerics, objective, sharded, entropies)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(shapes, optimizer, mesh))
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings.params)
    per_device, replicated = NamedSharding(mesh, P(BATCH_AXES)), NamedSharding(mesh, P())
    in_specs = (specs, P(BATCH_AXES))
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, check_vma=False)

    def update(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        grads, totals = on_mesh(device.gradients, out_specs=(specs, P()))(state.params, batch)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            rate = batch.learning_rate[0]
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate=rate)
            finite = jnp.isfinite(norm)
            keep = functools.partial(jax.tree.map, functools.partial(jnp.where, finite))
            new = TrainState(
                step=state.step + 1,
                params=keep(optax.apply_updates(state.params, updates), state.params),
                opt_state=keep(opt_state, state.opt_state),
            )
        return new, _averages(totals, batch.response_tokens[0]) | {"grad_norm": norm, "skipped": ~finite}

    def logprobs(params: decoder.Params, batch: PackedBatch) -> Likelihoods:
        return on_mesh(device.logprobs, out_specs=P(BATCH_AXES))(params, batch)

    takes, gives = (shardings, per_device), (shardings, replicated)
    return Functions(
        jax.jit(update, in_shardings=takes, out_shardings=gives, donate_argnums=0),
        jax.jit(logprobs, in_shardings=(shardings.params, per_device), out_shardings=per_device),
    )


@dataclasses.dataclass(frozen=True)
class _OnDevice:
    """What one device computes, inside the shard_map: its parameters are shards, its batch [1, M, N]."""

    model: decoder.Config
    layout: Layout
    numerics: Numerics
    objective: Objective
    sharded: ShardedParams
    entropies: bool

    def gradients(self, params: decoder.Params, batch: PackedBatch) -> tuple[decoder.Params, Metrics]:
        """Gathers, goes through the device's own micro-batches, scatters. Metrics are summed over the mesh."""
        own = jax.tree.map(lambda x: x[0], batch)
        held = self.sharded.hold(params)
        gradient_of = jax.grad(self._loss, has_aux=True)
        Carry = tuple[decoder.Params, Metrics, Metrics]

        def accumulate(m: Int[Array, ""], carry: Carry) -> Carry:
            total, sums, peaks = carry
            grads, metrics = gradient_of(held, _micro_batch(own, m))
            with jax.named_scope("accumulate"):
                total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
            return (
                total,
                jax.tree.map(jnp.add, sums, metrics["sums"]),
                jax.tree.map(jnp.maximum, peaks, metrics["peaks"]),
            )

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), held)
        of_one = jax.eval_shape(self._loss, held, _micro_batch(own, 0))[1]
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), of_one)
        carry = (zeros, blank["sums"], blank["peaks"])
        total, sums, peaks = jax.lax.fori_loop(0, self.sharded.rounds(own.micro_batches), accumulate, carry)
        return self.sharded.sum(total), jax.lax.psum(sums, BATCH_AXES) | jax.lax.pmax(peaks, BATCH_AXES)

    def logprobs(self, params: decoder.Params, batch: PackedBatch) -> Likelihoods:
        own = jax.tree.map(lambda x: x[0], batch)
        held = self.sharded.hold(params)

        def one(m: Int[Array, ""], out: Likelihoods) -> Likelihoods:
            logprobs, entropy = self._logprobs(held, _micro_batch(own, m))
            return Likelihoods(
                out.logprobs.at[m].set(logprobs),
                None if out.entropies is None else out.entropies.at[m].set(entropy),
            )

        rounds, zeros = self.sharded.rounds(own.micro_batches), jnp.zeros_like(own.weights)
        found = jax.lax.fori_loop(0, rounds, one, Likelihoods(zeros, zeros if self.entropies else None))
        return jax.tree.map(lambda x: x[None], found)

    def _loss(self, held: decoder.Params, micro: MicroBatch) -> tuple[Float[Array, ""], dict[str, Metrics]]:
        o = self.objective
        logprobs, entropy = self._logprobs(held, micro)
        old = jnp.where(micro.on_policy, jax.lax.stop_gradient(logprobs), micro.old_logprobs)
        loss, metrics = policy_objective(
            logprobs,
            old,
            micro.advantages,
            micro.weights,
            corrections=micro.corrections,
            clip_low=o.clip_low,
            clip_high=o.clip_high,
            dual_clip=o.dual_clip,
            bounds=micro.bounds,
            surrogate=o.surrogate,
            ratio=o.ratio,
            sequences=None if o.ratio == "token" else jnp.cumsum(micro.positions == 0) - 1,
            log_ratio_bound=o.log_ratio_bound,
        )
        live = micro.weights != 0
        count = live.sum().astype(jnp.float32)
        difference = jnp.where(live, jnp.abs(old - micro.sampler_logprobs), 0.0)
        sums = {name: value * count for name, value in metrics.items() if name != "ratio_max"}
        if micro.kl_weights is not None and micro.ref_logprobs is not None:
            kl = kl_penalty(logprobs, micro.ref_logprobs, o.estimator)
            has_kl = micro.kl_weights != 0
            loss += jnp.sum(micro.kl_weights * jnp.where(has_kl, kl, 0.0))
            sums |= {"kl": jnp.sum(jnp.where(has_kl, kl, 0.0)), "kl_tokens": has_kl.sum().astype(jnp.float32)}
        if micro.entropy_weights is not None:
            loss -= jnp.sum(micro.entropy_weights * jnp.where(micro.entropy_weights != 0, entropy, 0.0))
        sums |= {"loss": loss, "tokens": count, "sequences": jnp.sum(micro.buckets >= 0).astype(jnp.float32)}
        sums |= {"entropy": jnp.sum(jnp.where(live, entropy, 0.0)), "logprob_diff_mean": difference.sum()}
        sums |= {"ratio_histogram": ratio_histogram(old, micro.sampler_logprobs, live)}
        sums |= mismatch_sums(old, micro.sampler_logprobs, live)
        peaks = {"ratio_max": metrics["ratio_max"], "logprob_diff_max": difference.max()}
        return loss, {"sums": sums, "peaks": peaks}

    def _logprobs(
        self, held: decoder.Params, micro: MicroBatch
    ) -> tuple[Float32[Array, " N"], Float32[Array, " N"]]:
        """Log-probabilities and entropies (nats) of each token given those before it in its sequence."""
        segments = Segments(micro.starts, micro.buckets)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: None) -> tuple[jax.Array, None]:
            return packed_attention(q, k, v, segments, self.layout.buckets, self.numerics.backend), None

        params = self.sharded.enter(held)
        hidden, _ = decoder.forward(
            self.model,
            params,
            micro.tokens,
            micro.positions,
            attend,
            dtype=self.numerics.dtype,
            remat=self.numerics.remat,
            fetch=self.sharded.fetch,
        )
        logprobs, entropy = token_logprobs(
            hidden,
            decoder.head(params),
            jnp.roll(micro.tokens, -1),
            temperature=self.objective.temperature,
            chunk=self.numerics.logprob_chunk,
            entropy_gradient=micro.entropy_weights is not None,
        )
        return jnp.roll(logprobs, 1), jnp.roll(entropy, 1)  # at the token's own index


class MicroBatch(NamedTuple):
    """One stream of a device; see `PackedBatch`."""

    tokens: Int32[Array, " N"]
    positions: Int32[Array, " N"]
    starts: Int32[Array, " S"]
    buckets: Int32[Array, " S"]
    weights: Float32[Array, " N"]
    advantages: Float32[Array, " N"]
    old_logprobs: Float32[Array, " N"]
    sampler_logprobs: Float32[Array, " N"]
    on_policy: Bool[Array, ""]
    corrections: Float32[Array, " N"] | None
    ratio_low: Float32[Array, " N"] | None
    ratio_high: Float32[Array, " N"] | None
    ref_logprobs: Float32[Array, " N"] | None
    kl_weights: Float32[Array, " N"] | None
    entropy_weights: Float32[Array, " N"] | None

    @property
    def bounds(self) -> tuple[Float32[Array, " N"], Float32[Array, " N"]] | None:
        """Of each token's ratio, where they are not the objective's."""
        low, high = self.ratio_low, self.ratio_high
        return None if low is None or high is None else (low, high)


def _micro_batch(own: PackedBatch, m: Int[Array, ""] | int) -> MicroBatch:
    """Stream m of a device's batch, whose arrays have lost their leading axis."""

    def at(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, m, keepdims=False) if x.ndim else x

    return jax.tree.map(at, MicroBatch(*(getattr(own, name) for name in MicroBatch._fields)))


def _averages(totals: Metrics, response_tokens: Float32[Array, ""]) -> Metrics:
    """Means from sums.

    Clip fractions are shares of all response tokens, as verl counts them: tokens that were left out have a zero
    advantage and cannot be clipped. The others are means over the tokens that were trained on, NaN over none.
    """
    over_all = {name: totals[name] / response_tokens for name in totals if name.startswith("clip_fraction")}
    over_trained = {
        name: totals[name] / totals["tokens"] for name in ("approx_kl", "entropy", "logprob_diff_mean")
    }
    if "kl" in totals:
        over_trained["kl"] = totals["kl"] / totals["kl_tokens"]
    return totals | over_all | over_trained
