"""What a recipe costs before any hardware is rented: bytes on each device, and seconds of each phase of a step.

Bytes are measured: the recipe's own `update` and log-prob pass, compiled for its mesh with abstract arrays, by the
GPU's compiler where it is installed. Seconds are a roofline model over a data sheet and a few constants
(docs/planning.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Literal, NamedTuple, TypedDict, cast

import jax
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrl import aot, config
from jaxrl.errors import InputError
from jaxrl.files import at_home
from jaxrl.hardware import HARDWARE, Hardware
from jaxrl.models import decoder, hf
from jaxrl.models.decoder import KEPT, Config, forward_flops, parameters
from jaxrl.parallel.mesh import mesh_over
from jaxrl.plugins import is_plugin
from jaxrl.sampling.servers import SERVERS_MEMORY, TRAINERS_MEMORY
from jaxrl.types import JsonObject, Remat

Lengths = Int[np.ndarray, " N"]  # of responses or whole sequences, in tokens

# The same for every system and device. Sources and fits: docs/planning.md.
PRODUCTS = 0.55  # share of peak that matrix products reach, with gaps between kernels and padding
ATTENTION = 0.5  # share of peak that attention reaches
BANDWIDTH = 0.6  # share of memory and link bandwidth that is reached
STEP_OVERHEAD = 3e-3  # s a decode step beyond the roofline, with CUDA graphs
EAGER_OVERHEAD = 12e-3  # the same where every kernel is launched from Python (vLLM's enforce_eager)
PUBLISH_RATE = 3e9  # bytes/s of bf16 model weights, from the trainers until samplers run on them
MEMORY_SHARE = 0.85  # of device memory that can be used (verl's gpu_memory_utilization)
NODE = 8  # devices that NVLink joins

_R1_DISTILL = Config("qwen2", 151_936, 1536, 28, 12, 2, 128, 8960, 1e4, 1e-6, False, 131_072)
# Models that can be planned for without network, from their config.json.
KNOWN = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_DISTILL,
    "nvidia/OpenMath-Nemotron-1.5B": _R1_DISTILL,
    "nvidia/Nemotron-Research-Reasoning-Qwen-1.5B": _R1_DISTILL,
    "Qwen/Qwen3-1.7B": Config("qwen3", 151_936, 2048, 28, 16, 8, 128, 6144, 1e6, 1e-6, True, 40_960),
}


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
    epochs: int = 1  # passes of these over a step's sequences
    kept: float = 1.0  # share of sampled groups that are trained on: others are sampled in their place
    logprob_passes: float = 1.0  # forward passes over all sequences: old log-probs, a reference model's
    trained: float = 1.0  # share of sequences that are trained on: zero advantages may be left out
    remat: Remat = "full"
    eager: bool = False
    tensor: int = 1  # devices that one sampler spans
    room: float = MEMORY_SHARE  # of a device's memory that a sampler may use

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def refilled(self) -> int:
        """Sequences that are sampled and not trained on."""
        return round(self.sequences / self.kept) - self.sequences


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of each phase. Colocated devices sample and train in turn; other samplers are one step ahead."""

    trainers: int
    samplers: int
    colocated: bool
    prefill: float
    decode: float
    tail: float  # the part of decode in which under a quarter of the slowest sampler's sequences were left
    old_logprobs: float
    update: float
    communication: float
    publish: float

    @property
    def total(self) -> float:
        sampling, training = self.prefill + self.decode, self.old_logprobs + self.update + self.communication
        return (sampling + training if self.colocated else max(sampling, training)) + self.publish


def response_lengths(w: Workload) -> Lengths:
    """Lengths of a step's responses, longest first: quantiles of a log-normal cut at the cap.

    Raises:
      InputError: if no such distribution has the mean.
    """
    if not 1 <= w.response_tokens < w.cap:
        raise InputError(
            f"--mean-response = {w.response_tokens:g} is not between 1 and the cap of {w.cap} tokens"
        )
    normal = np.array([NormalDist().inv_cdf(1 - (i + 0.5) / w.sequences) for i in range(w.sequences)])
    shape = np.exp(normal * math.sqrt(math.log1p(w.spread**2)))
    low, high = -20.0, 60.0  # logarithm of the median
    for _ in range(100):
        middle = (low + high) / 2
        under = np.clip(shape * math.exp(middle), 1, w.cap).mean() < w.response_tokens
        low, high = (middle, high) if under else (low, middle)
    return np.rint(np.clip(shape * math.exp(high), 1, w.cap)).astype(int)


def outside_layers(c: Config) -> int:
    """The number of parameters of the embedding and of the LM head."""
    return c.vocab_size * c.width * (1 if c.tied else 2)


def sequence_flops(c: Config, lengths: Lengths | Float[np.ndarray, " N"]) -> float:
    """Model FLOPs of one forward pass over whole sequences; a causal token attends to half of its sequence."""
    dense, attended = forward_flops(c)
    return float(dense * lengths.sum() + attended * (lengths**2.0).sum() / 2)


class Parts(NamedTuple):
    """Seconds of one device by what limits them."""

    products: float
    attention: float
    memory: float

    @property
    def total(self) -> float:
        return sum(self)


def pass_seconds(
    c: Config, lengths: Lengths | Float[np.ndarray, " N"], hardware: Hardware, remat: Remat | None = None
) -> Parts:
    """Seconds of one device for whole sequences.

    Args:
      c: the model.
      lengths: of the sequences, in tokens.
      hardware: the device.
      remat: forward and backward with it; None for a pass without gradient. docs/planning.md explains the terms.
    """
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    # parameters in matrix products
    projections = c.layers * c.width * 2 * (heads + kv)
    mlp, head = c.layers * c.width * 3 * c.mlp_width, c.width * c.vocab_size
    # bytes of a token: norms 2 x 2, residual sums 2 x 3, rotations 2, copies around attention 4, silu(gate) up 3
    layers = 2 * c.layers * (10 * c.width + 6 * (heads + kv) + 3 * c.mlp_width)
    products, attention, moved = projections + mlp + head, 1.0, layers + 4 * c.vocab_size
    if remat:
        # two products more in the backward pass; logits again, and what is not kept, but never down
        kept = KEPT["products" if remat == "none" else remat]
        again = head + projections * ("qkv" not in kept) + 2 * mlp // 3 * ("mlp" not in kept)
        products = 3 * products + again
        attention = 1 + 2.5 + ("attention" not in kept)
        # gradients of logits are computed from float32 into bf16
        moved = (3 + (remat != "none")) * layers + (4 + 4 + 2) * c.vocab_size
    tokens, pairs = float(lengths.sum()), float((lengths**2.0).sum()) / 2
    return Parts(
        products=2 * products * tokens / (PRODUCTS * hardware.flops),
        attention=attention * forward_flops(c)[1] * pairs / (ATTENTION * hardware.flops),
        memory=moved * tokens / (BANDWIDTH * hardware.bandwidth),
    )


def cache_bytes(c: Config) -> int:
    """Bytes of one token's keys and values, of all layers in bf16."""
    return 2 * 2 * c.layers * c.kv_heads * c.head_dim


def decode_seconds(w: Workload, hardware: Hardware, lengths: Lengths) -> tuple[float, float]:
    """Seconds for one sampler to decode these responses, and the part with under a quarter of them left.

    Each decode step reads all parameters (or does their FLOPs, whichever takes longer) and the cache of every live
    sequence. A sequence enters when the cache has room for one of mean length. Between two ends of sequences, the sums
    have closed forms.

    Raises:
      InputError: if the parameters leave no room for the longest sequence.
    """
    dense, _ = forward_flops(w.model)  # also the bytes that are read: 2 FLOPs and 2 bytes a parameter
    bandwidth, flops = w.tensor * BANDWIDTH * hardware.bandwidth, w.tensor * PRODUCTS * hardware.flops
    room = w.room * hardware.memory * w.tensor - 2 * parameters(w.model)
    slots = int(room / (cache_bytes(w.model) * (w.prompt_tokens + w.response_tokens)))
    longest = cache_bytes(w.model) * (w.prompt_tokens + w.cap)
    if room < longest:  # vLLM would not start
        raise InputError(
            f"{w.tensor} device(s) with {w.room * hardware.memory / 1e9:.0f} GB for a sampler cannot sample: the "
            f"parameters take {2 * parameters(w.model) / 1e9:.0f} GB and leave no room for a sequence of "
            f"{w.cap} tokens, {longest / 1e9:.1f} GB; raise --tensor"
        )
    overhead = EAGER_OVERHEAD if w.eager else STEP_OVERHEAD
    waiting = list(np.random.default_rng(0).permutation(lengths))
    left = np.zeros(0)  # tokens to go of each live sequence
    cached = np.zeros(0)  # tokens in the cache, of each
    seconds = tail = 0.0
    while waiting or left.size:
        entering = waiting[: slots - left.size]
        del waiting[: slots - left.size]
        left = np.concatenate([left, entering])
        cached = np.concatenate([cached, np.full(len(entering), w.prompt_tokens)])
        live, steps = left.size, left.min()
        read = steps * cached.sum() + live * steps * (steps + 1) / 2
        took = steps * (overhead + max(dense / bandwidth, live * dense / flops))
        took += cache_bytes(w.model) * read / bandwidth
        seconds += took
        tail += took if live + len(waiting) < len(lengths) / 4 else 0.0
        going_on = left > steps
        left, cached = left[going_on] - steps, cached[going_on] + steps
    return seconds, tail


def predict(w: Workload, hardware: Hardware, trainers: int, samplers: int, colocated: bool = False) -> Step:
    """Predicts the seconds of a step. `samplers` counts devices; colocated, both counts are all devices.

    Raises:
      InputError: if the devices cannot be divided so, or cannot sample.
    """
    if min(trainers, samplers) < 1 or samplers % w.tensor:
        raise InputError(
            f"{trainers} trainers and {samplers} samplers: each needs a device, samplers whole groups of {w.tensor}"
        )
    lengths, engines = response_lengths(w), samplers // w.tensor
    # responses are dealt out in turn, so the first sampler has the longest
    asked = np.concatenate([lengths, lengths[np.linspace(0, len(lengths) - 1, w.refilled).astype(int)]])
    decode, tail = decode_seconds(w, hardware, asked[::engines])
    dense, _ = forward_flops(w.model)
    # a prompt is prefilled once for its whole group
    rate = w.tensor * PRODUCTS * hardware.flops
    prefill = math.ceil(w.prompts / w.kept / engines) * w.prompt_tokens * dense / rate
    whole, share = lengths + w.prompt_tokens, w.trained / trainers
    size = parameters(w.model)
    link = hardware.nvlink if trainers <= NODE else hardware.network
    # gather in bf16, reduce-scatter in float32; embedding and head are gathered in float32 too
    traffic = (6 * size + 2 * outside_layers(w.model)) * (trainers - 1) / trainers
    return Step(
        trainers=trainers,
        samplers=samplers,
        colocated=colocated,
        prefill=prefill,
        decode=decode,
        tail=tail,
        old_logprobs=w.logprob_passes / trainers * pass_seconds(w.model, whole, hardware).total,
        update=w.epochs * share * pass_seconds(w.model, whole, hardware, w.remat).total,
        communication=w.updates * traffic / (link * BANDWIDTH),
        publish=2 * size / PUBLISH_RATE,
    )


def best_split(
    w: Workload, hardware: Hardware, devices: int, fits: Callable[[int], Remat | None] | None = None
) -> Step:
    """The fastest division of devices into trainers and samplers that are one step ahead.

    Args:
      w: the step.
      hardware: of all devices.
      devices: trainers and samplers.
      fits: returns the recomputation with which that number of trainers has the memory, if it has; by default `w`'s.

    Raises:
      InputError: if there is none.
    """
    able = {t: fits(t) if fits else w.remat for t in range(1, devices) if (devices - t) % w.tensor == 0}
    possible = {t: dataclasses.replace(w, remat=remat) for t, remat in able.items() if remat}
    if not possible:
        raise InputError(f"no split of {devices} devices into trainers and samplers will do; take more")
    steps = (predict(own, hardware, t, devices - t) for t, own in possible.items())
    return min(steps, key=lambda step: step.total)


def estimated_bytes(recipe: config.Recipe, c: Config, trainers: int) -> dict[str, float]:
    """Bytes on each trainer by arithmetic: state, mini-batches of a step, an update at its fullest moment."""
    size, shards = parameters(c), trainers // recipe.mesh.data
    stream, chunk = recipe.packing.stream_tokens, recipe.packing.logprob_chunk
    compute = jax.numpy.dtype(recipe.model.dtype).itemsize
    head, outside = c.vocab_size * c.width, outside_layers(c)
    layers = size - outside
    # gathered in float32, where there is something to gather
    held = 4.0 * outside if shards > 1 else 0.0
    if recipe.mesh.gather == "layer":
        # sums of gradients, of all micro-batches and of this one, in shards; a layer and its gradient, whole
        held += 4 * size / shards
        gradients = 4 * layers / shards + (compute + 4) * layers / c.layers
    else:
        # all layers, and sums of gradients; gradients of this micro-batch
        held += compute * layers + 4 * size
        gradients = compute * layers
    # backward pass through a layer: gate, up, their product and two of their gradients; the residual's gradient twice
    layer = gradients + 4 * head + compute * stream * (5 * c.mlp_width + 2 * c.width)
    # through the head: itself and its gradient; logits, softmax and the gradient of a chunk
    logits = (compute + 4) * head + (4 + 4 + compute) * chunk * c.vocab_size
    return {
        "parameters": 4 * size / shards,
        "optimizer": 8 * size / shards,
        "batch": recipe.minibatches * _batch_bytes(recipe, c, trainers),
        **({"reference": compute * size / shards} if recipe.kl.coefficient else {}),
        "activations": stream * c.layers * kept_bytes(c, cast(Remat, recipe.model.remat), compute),
        "temporaries": held + max(layer, logits),
    }


def _batch_bytes(recipe: config.Recipe, c: Config, trainers: int) -> float:
    """Bytes on each trainer of a mini-batch, which has room for the longest sequences."""
    # heavy
    from jaxrl.grpo.packing import most_streams
    from jaxrl.programs import layout_of, terms_of

    layout, streams = layout_of(recipe, c), 6 + len(terms_of(recipe))  # of a number a token
    stream = layout.streams[-1]
    rows = most_streams(recipe.optimizer.minibatch_prompts * recipe.rollout.samples, trainers, stream, layout)
    return 4 * rows * (streams * stream + 2 * layout.segments)


def with_remat(
    recipe: config.Recipe, c: Config, trainers: int, hardware: Hardware, share: float = MEMORY_SHARE
) -> config.Recipe:
    """The recipe with the least recomputation that fits by arithmetic, where its `model.remat` is "auto".

    Args:
      recipe: the run's.
      c: the model.
      trainers: devices that train.
      hardware: each of them.
      share: of its memory that a trainer may use.
    """
    if recipe.model.remat != "auto":
        return recipe
    for remat in reversed(KEPT):
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, remat=remat))
        if sum(estimated_bytes(recipe, c, trainers).values()) <= share * hardware.memory:
            break
    return recipe


def kept_bytes(c: Config, remat: Remat, compute: int) -> int:
    """Bytes that one layer keeps of one token for the backward pass; `compute` is the size of a value."""
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    named = {"attention": heads, "qkv": heads + 2 * kv, "residual": c.width, "mlp": 2 * c.mlp_width}
    if remat == "none":
        # 6 arrays of the MLP, 3 of the residual stream, queries, keys and values twice; of each norm 3 in float32
        normed = 2 * c.width + (heads + kv) * c.qk_norm
        return compute * (6 * c.mlp_width + 3 * c.width + 2 * heads + 2 * kv) + 3 * 4 * normed
    lse = 4 * c.heads if KEPT[remat] else 0
    return compute * (c.width + sum(named[name] for name in KEPT[remat])) + lse


def compiler(hardware: str) -> Literal["cuda", "cpu"]:
    """Whose compiler `compiled_bytes` uses: a GPU's own where it is installed, else the CPU's."""
    return "cuda" if hardware in aot.TARGETS and aot.available(hardware) else "cpu"


def compiled_bytes(recipe: config.Recipe, c: Config, trainers: int, hardware: str) -> dict[str, float]:
    """Bytes on each trainer as XLA assigns them, compiled for devices that need not exist; nothing is allocated.

    The batch has the longest sequences that the recipe allows. The CPU's compiler, which stands in for one that is not
    installed (`compiler`), computes in float32 where a GPU computes in bfloat16: its temporaries are an upper bound.

    Raises:
      InputError: if JAX has already started with fewer CPU devices and needs them, or if the recipe's attention cannot
        run on the hardware.
    """
    # heavy, and an estimate needs none of it
    from jaxrl.grpo.packing import without_terms
    from jaxrl.programs import build_programs, layout_of
    from jaxrl.reference import as_reference

    recipe = with_remat(recipe, c, trainers, HARDWARE[hardware])
    jax.config.update("jax_platforms", "cpu")  # leaves the memory of GPUs alone
    if compiler(hardware) == "cuda":
        # as few hosts as hold them, all with the same number
        hosts = next(n for n in range(-(-trainers // NODE), trainers + 1) if trainers % n == 0)
        devices, fast = aot.devices(hardware, trainers, hosts), False
    else:
        devices, fast = _cpu_devices(trainers), True
        # a single attention length compiles fast, and the longest holds the most
        packing = dataclasses.replace(recipe.packing, bucket_tokens=layout_of(recipe, c).buckets[-1])
        model = dataclasses.replace(recipe.model, attention="xla")
        recipe = dataclasses.replace(recipe, model=model, packing=packing)
    programs = build_programs(recipe, c, mesh_over(devices, recipe.mesh.data))
    state = programs.abstract_state()
    batch = programs.abstract_batch(programs.layout.streams[-1])
    training = _temporary_bytes(programs.update.lower(state, batch), fast)
    scoring = _temporary_bytes(programs.logprobs.lower(state.params, without_terms(batch)), fast)
    activations = min(estimated_bytes(recipe, c, trainers)["activations"], training)
    held = {"parameters": state.params, "optimizer": state.opt_state, "batch": batch}
    if recipe.kl.coefficient:
        held["reference"] = as_reference(state.params, recipe.model.dtype)
        scoring += round(_shard_bytes(state.params))  # the reference as the program takes it
    sizes = {name: _shard_bytes(tree) for name, tree in held.items()}
    sizes["batch"] *= recipe.minibatches  # those of a step are all there before the first update
    return sizes | {
        "activations": activations,
        "temporaries": training - activations,
        "temporaries of scoring": scoring,
    }


def _cpu_devices(count: int) -> list[jax.Device]:
    """Virtual devices of this machine's processor.

    Raises:
      InputError: if JAX has already started with fewer.
    """
    if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            raise InputError(f"{count} trainers, but jax has started with fewer virtual devices") from None
    return jax.devices("cpu")[:count]


def _temporary_bytes(lowered: jax.stages.Lowered, fast: bool) -> int:
    """Bytes that a program needs besides its arguments and results; `fast` compiles for a CPU into the same buffers."""
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    options["xla_llvm_disable_expensive_passes"] = True
    analysis = lowered.compile(options if fast else None).memory_analysis()
    assert analysis  # both compilers have one
    return analysis.temp_size_in_bytes


def _shard_bytes(tree: object) -> float:
    """Bytes on one device of a pytree of arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )


def model_config(path: str) -> Config:
    """The shape of a model, by a Hugging Face folder, a name in KNOWN or a Hub id; reads only its config.json.

    Raises:
      InputError: if it is none of these.
    """
    folder = at_home(path)
    if folder.is_dir():
        return hf.read_config(folder)
    if path in KNOWN:
        return KNOWN[path]
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(path, "config.json")
    except Exception as error:  # of the network, of the Hub, or about the name; the client has dozens
        raise InputError(
            f"{path}: no such folder, and the Hub did not have its config.json ({type(error).__name__}); "
            f"known without network: {', '.join(KNOWN)}"
        ) from error
    return hf.read_config(Path(file).parent)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a plan needs besides the recipe; the options of `jaxrl plan`."""

    hardware: str = "H100"
    trainers: int = 0
    samplers: int = 0
    devices: int = 0
    mean_response: float = 5000
    mean_prompt: float = 150
    spread: float = 0.8
    zero_advantage: float = 0.0
    kept: float = 1.0
    tensor: int = 1
    eager: bool = False
    compile: bool = True


class Plan(TypedDict):
    """The file that `jaxrl plan --json` writes, of a stage where the recipe has several; see `plans`."""

    stage: str
    steps_of_run: int  # that it has
    tokens_of_step: int  # at most

    recipe: JsonObject
    assumptions: JsonObject  # the fields of Assumptions
    parameters: int
    capped_fraction: float  # of responses
    steps: list[dict[str, float]]  # the fields of Step, and the total; the fastest first
    flops: dict[str, float]  # model FLOPs of a step, by phase
    bytes: dict[str, float]  # on each of the fastest step's trainers
    compiler: Literal["cuda", "cpu", "none"]  # of the bytes; none: by arithmetic


def plans(recipe: config.Recipe, a: Assumptions) -> list[Plan]:
    """The plan of each stage, in order; see `plan`."""
    made = list[Plan]()
    for stage in config.stages_of(recipe):
        own = plan(stage.recipe, a)
        own["stage"], own["steps_of_run"] = stage.name, stage.until - stage.first
        made.append(own)
    return made


def plan(recipe: config.Recipe, a: Assumptions) -> Plan:
    """Predicts step time and memory of a recipe without stages.

    Raises:
      InputError: for options that are out of range or exclude each other, or a recipe that these devices cannot run.
    """
    _require_possible(a)
    if a.kept < 1 and recipe.groups.filter not in ("refill", "drop"):
        raise InputError(
            f'--kept = {a.kept:g} is for groups.filter = "refill" and "drop", and the recipe has another; leave it out'
        )
    c, hardware, data = model_config(recipe.model.path), HARDWARE[a.hardware], recipe.mesh.data
    decoder.require_positions(c, recipe.data.max_prompt_tokens + recipe.rollout.max_tokens)
    count = a.trainers or a.devices or (recipe.mesh.fsdp or NODE) * data
    if count % data:
        raise InputError(f"{count} devices cannot be divided by mesh.data = {data}; change one of them")
    in_turn = not a.samplers  # trainer and sampler share each device, as `sampling.servers` divides it
    share = TRAINERS_MEMORY if in_turn else MEMORY_SHARE
    w = _workload(with_remat(recipe, c, count, hardware, share), c, a)

    def fits(trainers: int) -> Remat | None:
        if trainers % data or c.width % (trainers // data):  # uneven shards are no shards
            return None
        of_some = with_remat(recipe, c, trainers, hardware)
        able = sum(estimated_bytes(of_some, c, trainers).values()) <= MEMORY_SHARE * hardware.memory
        return cast(Remat, of_some.model.remat) if able else None

    own = dataclasses.replace(w, room=SERVERS_MEMORY if in_turn else MEMORY_SHARE)
    steps = [predict(own, hardware, count, a.samplers or count, colocated=in_turn)]
    if a.devices > 1:
        steps.append(best_split(w, hardware, count, fits))
    steps.sort(key=lambda step: step.total)
    trainers, lengths = steps[0].trainers, response_lengths(w)
    share = TRAINERS_MEMORY if steps[0].colocated else MEMORY_SHARE
    recipe = with_remat(recipe, c, trainers, hardware, share)
    held = (
        compiled_bytes(recipe, c, trainers, a.hardware) if a.compile else estimated_bytes(recipe, c, trainers)
    )
    if steps[0].colocated:
        held["sampler"] = SERVERS_MEMORY * hardware.memory
    forward = sequence_flops(c, lengths + w.prompt_tokens)
    return {
        "stage": "whole run",
        "steps_of_run": recipe.run.steps,
        "tokens_of_step": recipe.step_tokens,
        "recipe": config.to_dict(recipe),
        "assumptions": dataclasses.asdict(a),
        "parameters": parameters(c),
        "capped_fraction": float((lengths >= w.cap).mean()),
        "steps": [dataclasses.asdict(step) | {"total": step.total} for step in steps],
        "flops": {"old log-probs": w.logprob_passes * forward, "update": 3 * w.epochs * w.trained * forward},
        "bytes": held,
        "compiler": compiler(a.hardware) if a.compile else "none",
    }


def _require_possible(a: Assumptions) -> None:
    """Refuses options that are out of range or exclude each other.

    Raises:
      InputError: naming the option.
    """
    for name in ("mean_response", "mean_prompt", "tensor"):
        if not getattr(a, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} = {getattr(a, name)} is not positive")
    if a.hardware not in HARDWARE:
        raise InputError(f"--hardware = {a.hardware} is not known; {', '.join(HARDWARE)} are")
    if not (0 <= a.zero_advantage < 1 and 0 <= a.spread < 10 and 0 < a.kept <= 1):
        raise InputError(
            "--zero-advantage must be from 0 to below 1, --spread from 0 to below 10, --kept above 0 and at most 1"
        )
    conflict = (a.devices and a.trainers) or (a.samplers and not a.trainers)
    if conflict or min(a.trainers, a.samplers, a.devices) < 0:
        raise InputError("give --devices N to find the best split, or --trainers N and --samplers M")


def _workload(recipe: config.Recipe, c: Config, a: Assumptions) -> Workload:
    advantage, loss = recipe.advantage, recipe.loss
    # groups that agree have nothing to learn, unless something else than their mean is taken off, or there are terms
    by_group = (
        advantage.center not in ("none", "batch")
        and not is_plugin(advantage.center)
        and advantage.scale != "batch"
    )
    terms = (
        recipe.kl.coefficient or recipe.entropy.bonus or recipe.length.cosine or recipe.reward.overlong_tokens
    )
    trained = 1 - a.zero_advantage if by_group and not terms and loss.skip_zero_advantage else 1.0
    skipped = 1 / recipe.minibatches if loss.skip_first_old_logprobs and recipe.optimizer.epochs == 1 else 0
    passes = 1.0 if recipe.looks else (1 - skipped) * trained
    dropped = a.kept if recipe.groups.filter == "drop" else 1.0
    return Workload(
        model=c,
        prompts=recipe.rollout.prompts,
        samples=recipe.rollout.samples,
        prompt_tokens=a.mean_prompt,
        response_tokens=a.mean_response,
        cap=recipe.rollout.max_tokens,
        spread=a.spread,
        updates=recipe.updates_per_step,
        epochs=recipe.optimizer.epochs,
        kept=a.kept if recipe.groups.filter == "refill" else 1.0,
        logprob_passes=dropped * (passes + bool(recipe.kl.coefficient)),
        trained=dropped * trained,
        remat=cast(Remat, recipe.model.remat),  # by `with_remat`
        eager=a.eager,
        tensor=a.tensor,
    )


def show(plans: Sequence[Plan]) -> None:
    """Prints the plans of a run's stages, and what all of it takes."""
    console = Console()
    for plan in plans:
        if len(plans) > 1:
            console.rule(Text(f"stage '{plan['stage']}', {plan['steps_of_run']:,} steps"))
        _show(plan)
    fastest = [plan["steps"][0] for plan in plans]
    seconds = [plan["steps_of_run"] * step["total"] for plan, step in zip(plans, fastest, strict=True)]
    hours = sum(took * _devices(step) for took, step in zip(seconds, fastest, strict=True)) / 3600
    steps = sum(plan["steps_of_run"] for plan in plans)
    budget = float(sum(plan["steps_of_run"] * plan["tokens_of_step"] for plan in plans))
    console.print(
        f"{steps:,} steps in {sum(seconds) / 86400:.1f} days, {hours:,.0f} device hours; {budget:.2g} tokens at most"
    )


def _devices(step: Mapping[str, float]) -> float:
    return step["trainers"] if step["colocated"] else step["trainers"] + step["samplers"]


def _show(plan: Plan) -> None:
    console, steps, a = Console(), plan["steps"], Assumptions(**plan["assumptions"])
    console.print(_seconds_table(steps, a))
    trainers, flops = int(steps[0]["trainers"]), sum(plan["flops"].values())
    console.print(_bytes_table(plan, trainers, a.hardware))
    mfu = plan["flops"]["update"] / (trainers * HARDWARE[a.hardware].flops * steps[0]["update"])
    console.print(
        f"{plan['parameters'] / 1e9:.2f} B parameters; {flops:.3g} model FLOPs a step, {flops / trainers:.3g} on "
        f"each trainer; {mfu:.0%} MFU in forward and backward; mean response {a.mean_response:g}, "
        f"{plan['capped_fraction']:.1%} at the cap"
    )


def _seconds_table(steps: list[dict[str, float]], a: Assumptions) -> Table:
    table = Table(f"{a.hardware}: seconds a step", title_justify="left")
    for s in steps:
        split = f"{s['trainers']} trainers : {s['samplers']} samplers\none step ahead"
        table.add_column(f"{s['trainers']} devices\nin turn" if s["colocated"] else split, justify="right")
    names = ("prefill", "decode", "tail", "old_logprobs", "update", "communication", "publish", "total")
    titles = {"tail": "  of which the long tail", "update": "forward and backward"}
    titles["old_logprobs"] = "old log-probs"
    for name in names:
        last = name in ("tail", "publish")
        table.add_row(titles.get(name, name), *(f"{s[name]:.1f}" for s in steps), end_section=last)
    return table


def _bytes_table(plan: Plan, trainers: int, hardware: str) -> Table:
    held = plan["bytes"]
    how = {
        "cuda": f"compiled for {hardware} by XLA's GPU compiler",
        "cpu": f"compiled in float32 by XLA's CPU compiler, an upper bound: there is none for {hardware} here",
        "none": "estimated",
    }[plan["compiler"]]
    table = Table(f"each of {trainers} trainers, {how}", "GB")
    for name, size in held.items():
        table.add_row(name, f"{size / 1e9:.2f}", end_section=name == "temporaries")
    # the log-prob pass is over when the update begins, and takes less
    peak = sum(size for name, size in held.items() if name != "temporaries of scoring")
    table.add_row("at most at one time", f"{peak / 1e9:.1f} of {HARDWARE[hardware].memory / 1e9:.0f}")
    return table
