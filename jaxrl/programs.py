"""The jitted programs of a recipe for a model and a mesh, and the shapes that they take."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl import background, config
from jaxrl.background import Job
from jaxrl.errors import InputError, first_line
from jaxrl.grpo import packing
from jaxrl.grpo import update as grpo
from jaxrl.grpo.objective import Objective, Sigmoid, Surrogate, clip, score
from jaxrl.models import attention, decoder
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import BATCH_AXES
from jaxrl.plugins import is_plugin, load_plugin
from jaxrl.types import Remat, Say, silent

# Threads that compile ahead; where the devices are CPUs, the sampler needs them at the same time.
THREADS, THREADS_ON_CPUS = 4, 1
SHARE = 0.9  # of a device's memory for an update; a sampler's parameters may be there too
Takes = TypeVar("Takes", contravariant=True)
Gives = TypeVar("Gives", covariant=True)


class Jitted(Protocol[Takes, Gives]):
    """A jitted function of a state, or of parameters, and a mini-batch."""

    def __call__(self, state: Takes, batch: packing.PackedBatch, /) -> Gives: ...

    def lower(self, state: Takes, batch: packing.PackedBatch, /) -> jax.stages.Lowered: ...


@dataclasses.dataclass
class Program(Generic[Takes, Gives]):
    """A jitted function, and executables of it that a call takes where the shape of its batch has one.

    Attributes:
      name: of the function.
      function: compiles at the call for other shapes: what `lower().compile()` gives is not in its own cache.
      executables: by shape [G, M, N]; they may still be compiling.
      waited: seconds that calls waited for them.
    """

    name: str
    function: Jitted[Takes, Gives]
    executables: dict[tuple[int, ...], Future[jax.stages.Compiled]] = dataclasses.field(default_factory=dict)
    waited: float = 0.0

    def __call__(self, state: Takes, batch: packing.PackedBatch) -> Gives:
        """Calls the function, once its executable is ready.

        Raises:
          InputError: if there was no memory to compile it.
        """
        shape = batch.tokens.shape
        if shape not in self.executables:
            return self.function(state, batch)
        began = time.monotonic()
        # others come before it; in a thread, as signals wait for XLA here
        if self.executables[shape].cancel():
            del self.executables[shape]
            background.start(self.expect(state, batch), threads=1)
        try:
            executable = self.executables[shape].result()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"compiling {self.name} for streams of {shape[-1]} tokens ran out of memory ({first_line(error)}); "
                "lower packing.stream_tokens; jaxrl plan predicts what fits"
            ) from None
        self.waited += time.monotonic() - began
        return executable(state, batch)

    def lower(self, state: Takes, batch: packing.PackedBatch) -> jax.stages.Lowered:
        return self.function.lower(state, batch)

    def expect(self, state: Takes, batch: packing.PackedBatch) -> list[Job[jax.stages.Compiled]]:
        """Has calls for this shape of (abstract) batch wait for the job that is returned; none where they have one."""
        if batch.tokens.shape in self.executables:
            return []
        future = self.executables[batch.tokens.shape] = Future()
        return [(future, lambda: self.lower(state, batch).compile())]


@dataclasses.dataclass(frozen=True)
class Programs:
    """What runs on the devices of the trainer."""

    model: decoder.Config
    mesh: Mesh
    sequences: int  # of a mini-batch
    layout: packing.Layout
    optimizer: optax.GradientTransformationExtraArgs
    update: Program[grpo.TrainState, tuple[grpo.TrainState, grpo.Metrics]]
    logprobs: Program[decoder.Params, grpo.Likelihoods]
    terms: tuple[str, ...] = ()  # of an update's mini-batches, see `packing.Terms`

    def abstract_batch(self, stream: int) -> packing.PackedBatch:
        """Shapes, dtypes and shardings of an update's mini-batches in streams of that many tokens."""
        per_device = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        return packing.abstract_batch(self.sequences, stream, self.layout, per_device, self.terms)

    def init_state(self, params: decoder.Params) -> grpo.TrainState:
        """The state at step 0. Takes `params` over."""
        return grpo.init_state(params, self.optimizer, self.mesh)

    def abstract_state(self) -> grpo.TrainState:
        """Shapes, dtypes and shardings of the state, for a restore."""
        return grpo.abstract_state(decoder.abstract_params(self.model), self.optimizer, self.mesh)

    def restarted(self, state: grpo.TrainState) -> grpo.TrainState:
        """The state with a new optimizer: no moments, no counts. Takes `state` over."""
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_state().opt_state)
        jax.tree.map(lambda x: x.delete(), state.opt_state)  # whoever else names it, its memory is needed
        fresh = jax.jit(self.optimizer.init, out_shardings=shardings)(state.params)
        return grpo.TrainState(state.step, state.params, fresh)

    def waited(self) -> float:
        """Seconds that calls have waited for executables since this was last asked."""
        seconds = self.update.waited + self.logprobs.waited
        self.update.waited = self.logprobs.waited = 0.0
        return seconds

    def compile_ahead(self, logprobs: bool = True) -> AbstractContextManager[None]:
        """Compiles the programs for every stream length in background threads, the longest first.

        A call waits for its own executable alone, and raises its error. The end of the context gives up the rest; see
        `background.working`.

        Args:
          logprobs: whether `logprobs` too; see `prepare.needs_logprobs`.
        """
        state, jobs = self.abstract_state(), list[Job[jax.stages.Compiled]]()
        for stream in reversed(self.layout.streams):  # several processes have the same order
            batch = self.abstract_batch(stream)
            jobs += self.update.expect(state, batch)
            jobs += self.logprobs.expect(state.params, packing.without_terms(batch)) if logprobs else []
        on_cpus = self.mesh.devices.flat[0].platform == "cpu"
        return background.working(jobs, THREADS_ON_CPUS if on_cpus else THREADS)


def build_programs(recipe: config.Recipe, model: decoder.Config, mesh: Mesh, say: Say = silent) -> Programs:
    """Builds the programs of a recipe; they are compiled when they first run, or see `Programs.compile_ahead`.

    Where `model.remat` is "auto", `update` is compiled for the longest streams, with less and less kept for the
    backward pass, until its bytes fit into SHARE of what JAX may use of a device, or of a CPU device's part of memory,
    beside the step's other mini-batches and a reference.

    Args:
      recipe: what to compute.
      model: of the policy.
      mesh: over ("data", "fsdp").
      say: prints what "auto" has chosen.

    Raises:
      InputError: for an attention backend that cannot run there.
    """
    if recipe.model.remat != "auto":
        return _build(recipe, model, mesh, recipe.model.remat)
    room, choices = SHARE * device_bytes(mesh.local_devices[0]), list(decoder.KEPT)
    room -= reference_bytes(recipe, model, mesh.shape["fsdp"])
    while True:
        remat = choices.pop()
        programs = _build(recipe, model, mesh, remat)
        if not choices:
            say(f"model.remat: {remat}, which takes the least memory")
            return programs
        needed = _bytes_of_update(programs, recipe.minibatches)
        if not processes.any_of(needed > room):
            say(f"model.remat: {remat}, with which an update takes {needed / 1e9:.1f} of {room / 1e9:.1f} GB")
            return programs


def _bytes_of_update(programs: Programs, minibatches: int) -> float:
    """Bytes of `update` for the longest streams, whose executable it keeps; infinite where the compiler refuses.

    All mini-batches of a step are on the devices before the first update.
    """
    batch = programs.abstract_batch(programs.layout.streams[-1])
    of_one = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(batch))
    others = (minibatches - 1) * of_one / programs.mesh.size
    jobs = programs.update.expect(programs.abstract_state(), batch)
    background.start(jobs, threads=1)
    try:
        return peak_bytes(jobs[0][0].result()) + others
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def _build(recipe: config.Recipe, model: decoder.Config, mesh: Mesh, remat: Remat) -> Programs:
    layout = layout_of(recipe, model)
    numerics = grpo.Numerics(
        dtype=recipe.model.dtype,
        remat=remat,
        backend=attention.choose_backend(recipe.model.attention, recipe.model.dtype, mesh.devices.flat[0]),
        gather=recipe.mesh.gather,
        logprob_chunk=recipe.packing.logprob_chunk,
    )
    optimizer, entropies = grpo.make_optimizer(recipe.optimizer), bool(recipe.entropy.quantile)
    functions = grpo.make_update(model, optimizer, mesh, layout, numerics, objective_of(recipe), entropies)
    sequences = recipe.optimizer.minibatch_prompts * recipe.rollout.samples
    programs = Program("update", functions.update), Program("logprobs", functions.logprobs)
    return Programs(model, mesh, sequences, layout, optimizer, *programs, terms_of(recipe))


def objective_of(recipe: config.Recipe) -> Objective:
    """What the recipe maximizes.

    Raises:
      InputError: for a surrogate of the recipe's that cannot be imported.
    """
    loss, name = recipe.loss, recipe.loss.surrogate
    sigmoid = Sigmoid(loss.sigmoid_positive, loss.sigmoid_negative)
    named: dict[str, Surrogate] = {"clip": clip, "score": score, "sigmoid": sigmoid}
    surrogate = cast(Surrogate, load_plugin("loss.surrogate", name)) if is_plugin(name) else named[name]
    _require_losses(name, surrogate)
    # sequences without advantage are computed for their other terms, and 0 times an infinite ratio is not 0
    bound = 20.0 if recipe.kl.in_loss or recipe.entropy.bonus else math.inf
    return Objective(
        loss.clip_low,
        loss.clip_high,
        loss.dual_clip,
        recipe.rollout.temperature,
        surrogate,
        loss.ratio,
        min(loss.log_ratio_bound, bound),
        recipe.kl.estimator,
    )


def _require_losses(name: str, surrogate: Surrogate) -> None:
    """Refuses a surrogate that does not give a loss and a flag for each token.

    Raises:
      InputError: naming it.
    """
    tokens, bound = jax.ShapeDtypeStruct((7,), np.float32), 1.0
    try:
        losses, binds = jax.eval_shape(
            lambda x, r, a: surrogate(x, r, a, bound, bound), tokens, tokens, tokens
        )
        found = (losses.shape, losses.dtype.name, binds.shape, binds.dtype.name)
    except Exception as error:  # whatever it raises
        raise InputError(f'loss.surrogate = "{name}": {type(error).__name__}: {first_line(error)}') from error
    if found != ((7,), "float32", (7,), "bool"):
        raise InputError(
            f'loss.surrogate = "{name}" gives {found[1]}{list(found[0])} and {found[3]}{list(found[2])} for 7 tokens; '
            "it has to give a float32 loss and a bool for each"
        )


def same_programs(a: config.Recipe, b: config.Recipe) -> bool:
    """Whether two stages of a run compute by the same programs: they differ in what is no part of them."""

    def part(recipe: config.Recipe) -> tuple[object, ...]:
        r = recipe
        optimizer = dataclasses.replace(r.optimizer, learning_rate=0.0, warmup_steps=0, epochs=1)
        shape = (r.data.max_prompt_tokens, r.rollout.max_tokens, r.rollout.temperature, r.rollout.samples)
        room = r.model.remat == "auto" and bool(r.kl.coefficient)  # a reference takes some
        terms = (terms_of(r), r.kl.estimator, bool(r.entropy.quantile), room)
        loss = dataclasses.replace(r.loss, normalization="token_mean", verl_ranks=1, verl_tokens=1)
        # on the host
        loss = dataclasses.replace(loss, skip_zero_advantage=True, skip_first_old_logprobs=True)
        return optimizer, shape, terms, loss, r.packing

    return part(a) == part(b)


def terms_of(recipe: config.Recipe) -> tuple[str, ...]:
    """The names of the `packing.Terms` that the recipe's mini-batches have."""
    names = ["corrections"] * (recipe.sampler.correction != "none")
    names += ["ratio_low", "ratio_high"] * bool(recipe.entropy.quantile)
    names += ["ref_logprobs", "kl_weights"] * recipe.kl.in_loss
    names += ["entropy_weights"] * bool(recipe.entropy.bonus)
    return tuple(names)


def reference_bytes(recipe: config.Recipe, model: decoder.Config, shards: int) -> float:
    """Bytes of a KL term's reference on each device; 0 without one."""
    each = np.dtype(recipe.model.dtype).itemsize if recipe.kl.coefficient else 0
    return decoder.parameters(model) * each / shards


def require_room(recipe: config.Recipe, model: decoder.Config, mesh: Mesh) -> None:
    """Refuses a reference that a device has no memory for beside the training state.

    Raises:
      InputError: with the bytes of both.
    """
    shards, room = mesh.shape["fsdp"], device_bytes(mesh.local_devices[0])
    reference, state = reference_bytes(recipe, model, shards), 3 * 4 * decoder.parameters(model) / shards
    if reference and state + reference > room:
        raise InputError(
            f"kl.coefficient = {recipe.kl.coefficient}: its reference takes {reference / 1e9:.1f} GB beside "
            f"{state / 1e9:.1f} GB of the training state, and each device has {room / 1e9:.1f} GB; raise mesh.fsdp, or "
            "set it to 0"
        )


def device_bytes(device: jax.Device) -> float:
    """Bytes that JAX may use of a device of this process."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of a program's arguments, results and temporaries on each device; donated arguments are its results."""
    analysis = compiled.memory_analysis()
    assert analysis  # every backend has one
    own = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return own + analysis.temp_size_in_bytes


def layout_of(recipe: config.Recipe, model: decoder.Config) -> packing.Layout:
    """What the recipe's streams may look like."""
    p = recipe.packing
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_tokens
    buckets = packing.bucket_lengths(p.bucket_tokens, longest)
    unit = math.lcm(p.bucket_tokens, p.logprob_chunk)
    streams = packing.stream_lengths(p.stream_tokens, buckets[-1], unit)
    dense, attended = decoder.forward_flops(model)
    return packing.Layout(streams, buckets, p.segments, attended / dense)
