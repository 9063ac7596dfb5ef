"""The jitted programs of a recipe for a model and a mesh, and the shapes that they take."""

from __future__ import annotations

import dataclasses
import math
import os

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl import config
from jaxrl.grpo import packing
from jaxrl.grpo import update as grpo
from jaxrl.grpo.objective import Objective
from jaxrl.models import attention, decoder
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import BATCH_AXES
from jaxrl.types import Remat


@dataclasses.dataclass(frozen=True)
class Programs:
    """What runs on the devices of the trainer."""

    model: decoder.Config
    mesh: Mesh
    sequences: int  # of a mini-batch
    layout: packing.Layout
    optimizer: optax.GradientTransformation
    update: grpo.Update
    logprobs: grpo.Logprobs

    def abstract_batch(self, stream: int) -> packing.PackedBatch:
        """Shapes, dtypes and shardings of mini-batches in streams of that many tokens."""
        per_device = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        return packing.abstract_batch(self.sequences, stream, self.layout, per_device)

    def compile_longest(self) -> jax.stages.Compiled:
        """`update` for the longest streams, which takes the most memory."""
        return self.update.lower(
            self.abstract_state(), self.abstract_batch(self.layout.streams[-1])
        ).compile()

    def init_state(self, params: decoder.Params) -> grpo.TrainState:
        """The state at step 0. Takes `params` over."""
        return grpo.init_state(params, self.optimizer, self.mesh)

    def abstract_state(self) -> grpo.TrainState:
        """Shapes, dtypes and shardings of the state, for a restore."""
        return grpo.abstract_state(decoder.abstract_params(self.model), self.optimizer, self.mesh)


def build_programs(recipe: config.Recipe, model: decoder.Config, mesh: Mesh) -> Programs:
    """Builds the programs of a recipe; they are compiled when they first run.

    Where `model.remat` is "auto", `update` is compiled for the longest streams, with less and less kept for
    the backward pass, until its bytes fit: those that JAX may use of a device, or a CPU device's part of the host's.

    Args:
      recipe: what to compute.
      model: of the policy.
      mesh: over ("data", "fsdp").

    Raises:
      InputError: for an attention backend that cannot run there.
    """
    remat = recipe.model.remat
    if remat != "auto":
        return _build(recipe, model, mesh, remat)
    room = device_bytes(mesh.local_devices[0])
    for remat in reversed(decoder.KEPT):
        programs = _build(recipe, model, mesh, remat)
        if remat == "full" or not processes.any_of(peak_bytes(programs.compile_longest()) > room):
            break
    return programs


def _build(recipe: config.Recipe, model: decoder.Config, mesh: Mesh, remat: Remat) -> Programs:
    layout = layout_of(recipe, model)
    numerics = grpo.Numerics(
        dtype=recipe.model.dtype,
        remat=remat,
        backend=attention.choose_backend(recipe.model.attention, recipe.model.dtype, mesh.devices.flat[0]),
        gather=recipe.mesh.gather,
        logprob_chunk=recipe.packing.logprob_chunk,
    )
    loss = recipe.loss
    objective = Objective(loss.clip_low, loss.clip_high, loss.dual_clip, recipe.rollout.temperature)
    optimizer = grpo.make_optimizer(recipe.optimizer, recipe.updates_per_step)
    functions = grpo.make_update(model, optimizer, mesh, layout, numerics, objective)
    sequences = recipe.optimizer.minibatch_prompts * recipe.rollout.samples
    return Programs(model, mesh, sequences, layout, optimizer, *functions)


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
