"""What a recipe costs before any hardware is rented: bytes on each device, and seconds of each phase of a step.

Bytes are measured: the recipe's own `update` and scoring pass, compiled for its mesh on virtual devices with
abstract arrays. Seconds are a roofline model over a data sheet and five constants (docs/planning.md).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.models import decoder
from jaxrl.models.decoder import Config, forward_flops


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device, from its maker's data sheet."""

    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # bytes/s of device memory
    memory: float  # bytes
    nvlink: float  # bytes/s in each direction to the other devices of a node of 8
    network: float  # bytes/s in each direction to other nodes, as its maker's own 8-device systems have


HARDWARE = {  # sources: docs/planning.md
    "A100": Hardware(312e12, 2.039e12, 80e9, 300e9, 25e9),
    "A800": Hardware(312e12, 2.039e12, 80e9, 200e9, 25e9),
    "H100": Hardware(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "H200": Hardware(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "B200": Hardware(2250e12, 8.0e12, 180e9, 900e9, 50e9),
}

# The same for every system and device. Sources and fits: docs/planning.md.
MFU = 0.40  # model FLOPs over peak, in training, scoring and prefill
BANDWIDTH = 0.6  # reached share of memory and link bandwidth
STEP_OVERHEAD = 3e-3  # s a decode step beyond the roofline, with CUDA graphs
EAGER_OVERHEAD = 12e-3  # the same where every kernel is launched from Python (vLLM's enforce_eager)
PUBLISH_RATE = 3e9  # bytes/s from the trainers' bf16 weights to samplers that run on them
CACHE_SHARE = 0.85  # of a sampler's memory for weights and cache (verl's gpu_memory_utilization)
NODE = 8  # devices that NVLink joins


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of GRPO, whatever program runs it."""

    model: Config
    prompts: int
    samples: int
    prompt_tokens: float  # mean
    response_tokens: float  # mean, the capped ones included
    cap: int  # longest response
    spread: float = 0.8  # standard deviation over mean of the log-normal lengths, before the cap
    updates: int = 4
    scored: float = 1.0  # forward passes without gradient: old log-probs, a reference model's
    trained: float = 1.0  # share of sequences that the trainer computes; those with zero advantage may be left out
    eager: bool = False
    tensor: int = 1  # devices that one sampler spans

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of each phase. Colocated devices do all in turn; otherwise samplers are one step ahead."""

    trainers: int
    samplers: int
    colocated: bool
    prefill: float
    decode: float
    tail: float  # the part of decode in which under a quarter of the slowest sampler's sequences were left
    score: float
    update: float
    communication: float
    publish: float

    @property
    def sampling(self) -> float:
        return self.prefill + self.decode

    @property
    def training(self) -> float:
        return self.score + self.update + self.communication

    @property
    def total(self) -> float:
        together = self.sampling + self.training if self.colocated else max(self.sampling, self.training)
        return together + self.publish


def response_lengths(w: Workload) -> np.ndarray:
    """Lengths of a step's responses, [prompts * samples], longest first: quantiles of a log-normal cut at the cap.

    Raises:
      InputError: if no such distribution has the mean.
    """
    if not 1 <= w.response_tokens < w.cap:
        raise InputError(
            f"a mean response of {w.response_tokens:g} tokens is not between 1 and the cap of {w.cap}; change one"
        )
    normal = _normal_quantiles((np.arange(w.sequences) + 0.5)[::-1] / w.sequences)
    shape = np.exp(normal * math.sqrt(math.log1p(w.spread**2)))
    low, high = -20.0, 60.0  # logarithm of the median
    for _ in range(100):
        middle = (low + high) / 2
        under = np.clip(shape * math.exp(middle), 1, w.cap).mean() < w.response_tokens
        low, high = (middle, high) if under else (low, middle)
    return np.rint(np.clip(shape * math.exp(high), 1, w.cap)).astype(int)


def _normal_quantiles(p: np.ndarray) -> np.ndarray:
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf(x) for x in p])


def parameters(c: Config) -> int:
    specs = jax.tree.leaves(decoder.declare(c), is_leaf=lambda x: isinstance(x, decoder.Spec))
    return sum(math.prod(decoder.stacked_shape(spec, c)) for spec in specs)


def sequence_flops(c: Config, lengths: np.ndarray) -> float:
    """Model FLOPs of one forward pass over whole sequences; a causal token attends to half of its sequence."""
    dense, attended = forward_flops(c)
    return float(dense * lengths.sum() + attended * (lengths**2.0).sum() / 2)


def cache_bytes(c: Config) -> int:
    """Of one token, keys and values of all layers in bf16."""
    return 2 * 2 * c.layers * c.kv_heads * c.head_dim


def decode_seconds(w: Workload, hardware: Hardware, lengths: np.ndarray) -> tuple[float, float]:
    """Seconds for one sampler to decode these responses, and the part with under a quarter of them left.

    Each step reads all weights (or does their FLOPs, whichever is longer) and every live sequence's cache. Sequences
    enter as the cache has room for one of mean length; between two that end, the sums have closed forms.

    Raises:
      InputError: if the weights leave no room for a sequence.
    """
    dense, _ = forward_flops(w.model)  # also the bytes of these weights: 2 FLOPs and 2 bytes a parameter
    bandwidth, flops = (rate * w.tensor for rate in (hardware.bandwidth * BANDWIDTH, hardware.flops * MFU))
    per_token = cache_bytes(w.model)
    room = CACHE_SHARE * hardware.memory * w.tensor - 2 * parameters(w.model)
    slots = int(room / (per_token * (w.prompt_tokens + w.response_tokens)))
    if slots < 1:
        raise InputError(
            f"{w.tensor} device(s) of {hardware.memory / 1e9:.0f} GB cannot sample: the weights take "
            f"{2 * parameters(w.model) / 1e9:.0f} GB and leave no room for a sequence; raise --tensor"
        )
    overhead = EAGER_OVERHEAD if w.eager else STEP_OVERHEAD
    waiting = list(np.random.default_rng(0).permutation(lengths))
    left = np.zeros(0)  # tokens to go of each live sequence
    cached = np.zeros(0)  # its tokens in the cache
    seconds = tail = 0.0
    while waiting or left.size:
        entering = waiting[: slots - left.size]
        del waiting[: slots - left.size]
        left = np.concatenate([left, entering])
        cached = np.concatenate([cached, np.full(len(entering), w.prompt_tokens)])
        live, steps = left.size, left.min()
        read = steps * cached.sum() + live * steps * (steps + 1) / 2
        took = steps * (overhead + max(dense / bandwidth, live * dense / flops)) + per_token * read / bandwidth
        seconds += took
        tail += took if live + len(waiting) < len(lengths) / 4 else 0.0
        going_on = left > steps
        left, cached = left[going_on] - steps, cached[going_on] + steps
    return seconds, tail


def predict(w: Workload, hardware: Hardware, trainers: int, samplers: int, colocated: bool = False) -> Step:
    """Seconds of a step. `samplers` counts devices; colocated, both counts are all devices."""
    if min(trainers, samplers) < 1 or samplers % w.tensor:
        raise InputError(
            f"{trainers} trainers and {samplers} samplers of {w.tensor}: give both at least one device, "
            "and whole samplers"
        )
    lengths, engines = response_lengths(w), samplers // w.tensor
    decode, tail = decode_seconds(w, hardware, lengths[::engines])  # dealt out in turn: the first gets the longest
    dense, _ = forward_flops(w.model)
    prefill = math.ceil(w.prompts / engines) * w.prompt_tokens * dense / (hardware.flops * MFU * w.tensor)
    forward = sequence_flops(w.model, lengths + w.prompt_tokens) * w.trained / (trainers * hardware.flops * MFU)
    size = parameters(w.model)
    link = hardware.nvlink if trainers <= NODE else hardware.network
    traffic = 6 * size * (trainers - 1) / trainers  # gather in bf16, reduce-scatter in float32
    return Step(
        trainers, samplers, colocated, prefill, decode, tail,
        score=w.scored * forward,
        update=3 * forward,
        communication=w.updates * traffic / (link * BANDWIDTH),
        publish=2 * size / PUBLISH_RATE,
    )  # fmt: skip


def best_split(
    w: Workload, hardware: Hardware, devices: int, fits: Callable[[int], bool] = lambda trainers: True
) -> Step:
    """The fastest division of devices into trainers and samplers that are one step ahead.

    Args:
      fits: whether so many trainers have the memory.

    Raises:
      InputError: if there is none.
    """
    trainers = [t for t in range(1, devices) if (devices - t) % w.tensor == 0 and fits(t)]
    if not trainers:
        raise InputError(
            f"no split of {devices} devices into trainers and samplers has the memory; take more of them"
        )
    return min((predict(w, hardware, t, devices - t) for t in trainers), key=lambda step: step.total)


def workload(recipe: config.Recipe, model: Config, **assumed: Any) -> Workload:
    """What the recipe asks for; `assumed` are the fields that a recipe does not say."""
    updates = recipe.updates_per_step
    scored = 1 - 1 / updates if recipe.loss.skip_first_old_logprobs else 1.0
    rollout = recipe.rollout
    return Workload(
        model, rollout.prompts, rollout.samples, cap=rollout.max_tokens, updates=updates, scored=scored, **assumed
    )


def estimated_bytes(recipe: config.Recipe, c: Config, trainers: int) -> dict[str, float]:
    """Bytes on each trainer by arithmetic: float32 state, and what one update holds beside it."""
    size, shards = parameters(c), trainers // recipe.mesh.data
    stream, compute = int(np.max(recipe.packing.stream_tokens)), jax.numpy.dtype(recipe.model.dtype).itemsize
    whole = 1 / c.layers if getattr(recipe.mesh, "gather", "step") == "layer" else 1.0
    attention = c.heads * c.head_dim
    kept = {
        "full": c.width,
        "attention": c.width + attention,
        "none": 4 * c.width + 2 * attention + 2 * c.kv_heads * c.head_dim + 3 * c.mlp_width,
    }[recipe.model.remat]
    gradients = 4 * size * max(whole, 1 / shards) + compute * size * whole  # the sum, one micro-batch's
    return {
        "parameters": 4 * size / shards,
        "optimizer": 8 * size / shards,
        "activations": compute * stream * c.layers * kept,
        "temporaries": compute * size * whole + gradients + 3 * 4 * recipe.packing.logprob_chunk * c.vocab_size,
    }


def compiled_bytes(recipe: config.Recipe, c: Config, trainers: int) -> dict[str, float]:
    """Bytes on each trainer as XLA assigns them, compiled for virtual devices; nothing is allocated.

    The CPU compiler computes in float32 where a GPU computes in bfloat16, so the temporaries are an upper bound.
    """
    try:  # before jax starts; where it has, its devices have to do
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", trainers)
    except RuntimeError:
        pass
    if jax.device_count("cpu") < trainers:
        raise InputError(f"{trainers} trainers cannot be compiled for: jax started with fewer virtual devices")
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxrl import distributed, train

    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, attention="xla"))
    shape = (recipe.mesh.data, trainers // recipe.mesh.data)
    mesh = jax.make_mesh(
        shape, distributed.BATCH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices("cpu")[:trainers],
    )  # fmt: skip
    optimizer = train.make_optimizer(recipe)
    update, score = train.make_update(recipe, c, optimizer, mesh)
    state = train.abstract_state(c, optimizer, mesh)
    per_device = NamedSharding(mesh, PartitionSpec(distributed.BATCH_AXES))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=per_device), _longest_batch(recipe, c, mesh)
    )
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # buffers stay the same
    memory, scoring = (
        function.lower(argument, batch).compile(fast).memory_analysis()
        for function, argument in ((update, state), (score, state.params))
    )
    activations = min(estimated_bytes(recipe, c, trainers)["activations"], memory.temp_size_in_bytes)
    return {
        "parameters": _shard_bytes(state.params),
        "optimizer": _shard_bytes(state.opt_state),
        "batch": _shard_bytes(batch),
        "activations": activations,
        "temporaries": memory.temp_size_in_bytes - activations,
        "arguments of update": memory.argument_size_in_bytes,
        "temporaries of scoring": scoring.temp_size_in_bytes,
    }


def _longest_batch(recipe: config.Recipe, c: Config, mesh: Any) -> Any:
    """A mini-batch of the longest sequences that the recipe allows, packed as training packs it."""
    from jaxrl import train
    from jaxrl.sampling.sampler import Prompt, Rollout

    longest, minibatch = recipe.rollout.max_tokens, recipe.optimizer.minibatch_prompts
    prompt = Prompt("", np.zeros(recipe.data.max_prompt_tokens, np.int32), "")
    rollout = Rollout(prompt, np.zeros(longest, np.int32), np.zeros(longest, np.float32), "length", 0)
    groups = [[rollout] * recipe.rollout.samples] * minibatch
    return next(iter(train.minibatches(recipe, c, groups, np.ones((minibatch, recipe.rollout.samples)), mesh)))


def _shard_bytes(tree: Any) -> float:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
