"""The update against an independent one: sequences one at a time, whole logits, plain sums, torch's AdamW.

One trajectory of eight updates is computed in the plain way and every mesh has to follow it. It has mini-batches
that are on-policy, off-policy with ratios beyond every clip, empty, and too few for all devices.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import Mesh

from jaxrl import config
from jaxrl.arrays import Array
from jaxrl.grpo import group_advantages
from jaxrl.grpo.mismatch import EDGES
from jaxrl.grpo.objective import Objective
from jaxrl.grpo.packing import Layout, PackedBatch, bucket_lengths, pack
from jaxrl.grpo.update import (
    Logprobs,
    Metrics,
    Numerics,
    TrainState,
    Update,
    abstract_state,
    init_state,
    learning_rate,
    make_optimizer,
    make_update,
)
from jaxrl.models import decoder
from jaxrl.models.decoder import Config, Params
from jaxrl.parallel.mesh import mesh_over, sharding_of, to_devices
from jaxrl.types import Dtype, Gather, Prompt, Remat, Rollout

Tree = TypeVar("Tree")  # a pytree of arrays
Step = tuple[Params, dict[str, float], Params]  # gradients, metrics, parameters afterwards

# On 8 devices some parameters have no axis that divides (width 20, keys 12), on 4 and 2 all have one.
VOCABULARY = 72
UNTIED = Config("qwen2", VOCABULARY, 20, 2, 4, 2, 6, 24, 1e4, 1e-6, tied=False, max_positions=64)
TIED = dataclasses.replace(UNTIED, tied=True)
SEQUENCES, LONGEST, STREAM = 16, 16, 32
LAYOUT = Layout(streams=(STREAM,), buckets=bucket_lengths(8, LONGEST))
TEMPERATURE, CLIP = 0.8, {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
OPTIMIZER = config.Optimizer(
    learning_rate=0.01, warmup_steps=3, beta2=0.95, epsilon=1e-4, weight_decay=0.1, max_grad_norm=2.05
)
OBJECTIVE = Objective(**CLIP, temperature=TEMPERATURE)
UPDATES_PER_STEP = 2
UPDATES = 8


class MiniBatch(NamedTuple):
    rollouts: list[Rollout]
    advantages: np.ndarray  # [B]
    old_logprobs: list[np.ndarray]  # [B][T]
    on_policy: bool
    step: int  # batches of rollouts before


class Trainer(NamedTuple):
    mesh: Mesh
    state: Callable[[], TrainState]
    update: Update
    logprobs: Logprobs
    traces: list[None]  # one entry each time `update` was traced

    def batch(self, mini: MiniBatch, stream: int = STREAM, **options: bool) -> PackedBatch:
        """Packs a mini-batch and puts it on the devices, `old_logprobs` included."""

        def packed(rollouts: list[Rollout]) -> PackedBatch:
            rate = learning_rate(OPTIMIZER, mini.step)
            return pack(rollouts, mini.advantages, self.mesh.size, layout, learning_rate=rate, **options)

        layout = dataclasses.replace(LAYOUT, streams=(stream,))
        options = {"on_policy": mini.on_policy} | options
        pairs = zip(mini.rollouts, mini.old_logprobs, strict=True)
        old = packed([dataclasses.replace(rollout, logprobs=logprobs) for rollout, logprobs in pairs])
        return to_devices(packed(mini.rollouts).replace(old_logprobs=old.sampler_logprobs), self.mesh)


def with_gradients(
    optimizer: optax.GradientTransformationExtraArgs, traces: list[None]
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, with the gradients that reached it kept in its state: (gradients, its own state)."""
    State = tuple[Params, optax.OptState]

    def update(grads: Params, state: State, params: Params, **rate: Array) -> tuple[Params, State]:
        traces.append(None)
        updates, inner = optimizer.update(grads, state[1], params, **rate)
        return updates, (grads, inner)

    def init(params: Params) -> State:
        return jax.tree.map(jnp.zeros_like, params), optimizer.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


def trainer(
    devices: int = 1,
    data: int = 1,
    model: Config = UNTIED,
    gather: Gather = "step",
    remat: Remat = "full",
    dtype: Dtype = "float32",
    objective: Objective = OBJECTIVE,
) -> Trainer:
    return build(devices, data, model, gather, remat, dtype, objective)


@functools.cache
def build(
    devices: int, data: int, model: Config, gather: Gather, remat: Remat, dtype: Dtype, objective: Objective
) -> Trainer:
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices")
    mesh = mesh_over(jax.devices()[:devices], data)
    traces: list[None] = []
    optimizer = with_gradients(make_optimizer(OPTIMIZER), traces)
    numerics = Numerics(dtype=dtype, remat=remat, gather=gather, logprob_chunk=8)
    functions = make_update(model, optimizer, mesh, LAYOUT, numerics, objective, entropies=True)

    def state() -> TrainState:
        return init_state(to_jax(first_params(model)), optimizer, mesh)

    return Trainer(mesh, state, *functions, traces)


@functools.cache
def first_params(model: Config) -> Params:
    """Norms and biases random too; the functions of this file never change them."""
    rng = np.random.default_rng(0)

    def create(spec: decoder.Spec) -> np.ndarray:
        scale = 0.3 if len(spec.shape) > 1 else 0.1
        noise = scale * rng.normal(size=decoder.stacked_shape(spec, model))
        return np.float32((spec.init == "ones") + noise)

    return jax.tree.map(create, decoder.declare(model))


def to_jax(tree: Tree) -> Tree:
    return jax.tree.map(jnp.array, tree)


def to_numpy(tree: Tree) -> Tree:
    return jax.tree.map(np.array, tree)


@functools.cache
def minibatches(model: Config) -> list[MiniBatch]:
    rng = np.random.default_rng(1)

    def one(k: int) -> MiniBatch:
        rewards = np.tile([1.0, -1.0, -1.0, 1.0], (4, 1))
        rewards[0] = 1  # all right: nothing to learn
        rewards[1, 3] = -1
        if k == 4:
            rewards[:] = -1  # nothing is kept
        if k == 6:
            rewards[:3] = -1  # four sequences for up to eight devices
        rollouts, old = [], []
        for _ in range(SEQUENCES):
            prompt, completion = rng.integers(1, 6), rng.integers(1, LONGEST - 5)
            tokens = rng.integers(VOCABULARY, size=prompt + completion).astype(np.int32)
            logprobs, _ = reference_logprobs(model, first_params(model), tokens)
            behind = logprobs[prompt - 1 :] + rng.normal(0, 0.5, completion)
            sampler = np.float32(behind + rng.normal(0, 0.01, completion))
            rollouts.append(Rollout(Prompt("", tokens[:prompt], ""), tokens[prompt:], sampler, "stop", 0))
            old.append(np.float32(behind))
        advantages = group_advantages(rewards).reshape(-1)
        return MiniBatch(rollouts, advantages, old, on_policy=k in (0, 5), step=k // UPDATES_PER_STEP)

    return [one(k) for k in range(UPDATES)]


def whole_logprobs(model: Config, params: Params, tokens: Array) -> jax.Array:
    """Log-probabilities of all tokens after each token of one sequence [T]: [T - 1, V]."""
    return jax.nn.log_softmax(decoder.logits(model, params, tokens[None])[0, :-1] / TEMPERATURE)


def padded(tokens: np.ndarray) -> np.ndarray:
    """Pads to one length, for one compilation; at the end, where causality keeps it from mattering."""
    return np.pad(tokens, (0, LONGEST - len(tokens)))


@functools.partial(jax.jit, static_argnums=0)
def reference_logprobs_padded(model: Config, params: Params, tokens: Array) -> tuple[jax.Array, jax.Array]:
    logp = whole_logprobs(model, params, tokens)
    return logp[np.arange(LONGEST - 1), tokens[1:]], -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def reference_logprobs(model: Config, params: Params, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of tokens 1 ... T - 1 of a sequence, and entropies of the distributions they are drawn from."""
    logprobs, entropy = reference_logprobs_padded(model, params, padded(tokens))
    return np.array(logprobs[: len(tokens) - 1]), np.array(entropy[: len(tokens) - 1])


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def reference_loss(
    model: Config, params: Params, tokens: Array, old: Array, advantage: Array, weights: Array
) -> jax.Array:
    logprobs = whole_logprobs(model, params, tokens)[np.arange(LONGEST - 1), tokens[1:]]
    ratio = jnp.exp(logprobs - old)
    high = jnp.minimum(ratio, 1 + CLIP["clip_high"])
    low = jnp.minimum(jnp.maximum(ratio, 1 - CLIP["clip_low"]), CLIP["dual_clip"])
    return jnp.sum(-advantage * weights * jnp.where(advantage >= 0, high, low))


def reference_gradient(model: Config, params: Params, mini: MiniBatch) -> tuple[Params, dict[str, float]]:
    """(gradients, metrics), in float64 from one sequence to the next."""
    total = sum(len(r.tokens) for r in mini.rollouts)
    loss, grads = 0.0, jax.tree.map(lambda p: np.zeros(p.shape), params)
    rows = []  # of each trained token: A, old - sampler, new - old, entropy
    for rollout, advantage, old in zip(mini.rollouts, mini.advantages, mini.old_logprobs, strict=True):
        prompt, tokens = len(rollout.prompt.tokens), np.append(rollout.prompt.tokens, rollout.tokens)
        now, entropy = (x[prompt - 1 :] for x in reference_logprobs(model, params, tokens))
        old = now if mini.on_policy else old
        whole_old, weights = np.zeros((2, LONGEST - 1), np.float32)
        whole_old[prompt - 1 : len(tokens) - 1] = old
        weights[prompt - 1 : len(tokens) - 1] = 1 / total
        one, gradient = reference_loss(model, params, padded(tokens), whole_old, advantage, weights)
        loss += float(one)
        grads = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), grads, gradient)
        if advantage:
            rows += zip([advantage] * len(old), old - rollout.logprobs, now - old, entropy, strict=True)
    metrics = {
        "loss": loss,
        "tokens": len(rows),
        "sequences": np.count_nonzero(mini.advantages),
        "skipped": 0,
    }
    metrics["grad_norm"] = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    a, difference, log_ratio, entropy = np.array(rows).reshape(-1, 4).T
    ratio = np.exp(log_ratio)
    binds = ((a > 0) & (ratio > 1 + CLIP["clip_high"])) | ((a < 0) & (ratio < 1 - CLIP["clip_low"]))
    metrics["clip_fraction"] = binds.sum() / total
    metrics["clip_fraction_low"] = (binds & (a < 0)).sum() / total
    metrics["clip_fraction_high"] = (binds & (a > 0)).sum() / total
    metrics["clip_fraction_lower"] = ((a < 0) & (ratio > CLIP["dual_clip"])).sum() / total
    metrics["ratio_max"] = ratio.max(initial=0)
    metrics["logprob_diff_max"] = abs(difference).max(initial=0)
    metrics["ratio_histogram"] = np.bincount(np.searchsorted(EDGES, difference), minlength=len(EDGES) + 1)
    metrics["mismatch_k3"] = (np.exp(difference) - 1 - difference).sum()
    metrics["mismatch_ratio"], metrics["mismatch_square"] = (np.exp(n * difference).sum() for n in (1, 2))
    means = {"approx_kl": -log_ratio, "entropy": entropy, "logprob_diff_mean": abs(difference)}
    return grads, metrics | {name: x.mean() if rows else np.nan for name, x in means.items()}


def assert_same_metrics(found: Metrics, metrics: Mapping[str, float | Array]) -> None:
    assert found.keys() == metrics.keys()
    for name, value in metrics.items():
        if name == "ratio_histogram":  # a token may be next to an edge
            a, b = np.asarray(found[name]), np.asarray(value)
            assert np.abs(a - b).sum() <= 4 and a.sum() == b.sum()
        else:
            assert float(found[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6, nan_ok=True), name


class Torch:
    """AdamW behind clipping, LambdaLR stepped once a rollout batch."""

    def __init__(self, params: Params, o: config.Optimizer, updates_per_step: int) -> None:
        self.leaves, self.tree = jax.tree.flatten(params)
        self.leaves = [torch.tensor(leaf) for leaf in self.leaves]
        self.max_norm, self.updates_per_step, self.count = o.max_grad_norm, updates_per_step, 0
        betas, warmup_steps = (o.beta1, o.beta2), o.warmup_steps
        self.optimizer = torch.optim.AdamW(self.leaves, o.learning_rate, betas, o.epsilon, o.weight_decay)

        def rate(step: int) -> float:
            return min(step / warmup_steps, 1.0) if warmup_steps else 1.0

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def step(self, grads: Params) -> Params:
        leaves = jax.tree.leaves(grads)
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in leaves))
        for leaf, g in zip(self.leaves, leaves, strict=True):
            leaf.grad = torch.tensor(np.float32(g * min(1, self.max_norm / norm) if norm else g))
        self.optimizer.step()
        self.count += 1
        if self.count % self.updates_per_step == 0:
            self.schedule.step()
        return jax.tree.unflatten(self.tree, [leaf.numpy().copy() for leaf in self.leaves])


@functools.cache
def trajectory(model: Config) -> list[Step]:
    """The updates of the plain computation."""
    params = first_params(model)
    optimizer, steps = Torch(params, OPTIMIZER, UPDATES_PER_STEP), []
    for mini in minibatches(model):
        grads, metrics = reference_gradient(model, params, mini)
        params = optimizer.step(grads)
        steps.append((grads, metrics, params))
    return steps


def assert_close(a: Tree, b: Tree, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    """Each array to `tolerance` of its own norm."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y)
        assert error <= tolerance * np.linalg.norm(y) + floor, f"{jax.tree_util.keystr(path)}: off by {error}"


def assert_same_bits(a: Tree, b: Tree) -> None:
    jax.tree.map(np.testing.assert_array_equal, to_numpy(a), to_numpy(b))


def gradients_of(t: Trainer, batch: PackedBatch) -> tuple[Params, Metrics]:
    state, metrics = t.update(t.state(), batch)
    return to_numpy(state.opt_state[0]), metrics


# The trajectory itself


@pytest.mark.parametrize("gather", ["step", "layer"])
@pytest.mark.parametrize(
    ("devices", "data", "tied"), [(1, 1, False), (2, 1, True), (8, 1, False), (8, 2, False)]
)
def test_follows_the_reference(devices: int, data: int, tied: bool, gather: Gather) -> None:
    """Parameters along a trajectory of their own; gradients and metrics at the parameters reached so far."""
    model = TIED if tied else UNTIED
    t = trainer(devices, data, model, gather)
    state = t.state()
    for k, (mini, (_, _, params)) in enumerate(zip(minibatches(model), trajectory(model), strict=True)):
        grads, metrics = reference_gradient(model, to_numpy(state.params), mini)
        state, found = t.update(state, t.batch(mini))
        assert_close(state.opt_state[0], grads, floor=1e-6)
        assert_close(state.params, params)
        assert int(state.step) == k + 1
        assert_same_metrics(found, metrics)


@pytest.mark.parametrize(("data", "gather"), [(1, "step"), pytest.param(2, "layer", marks=pytest.mark.slow)])
def test_two_processes_follow_the_reference(data: int, gather: Gather, tmp_path: Path) -> None:
    """The mesh of 8 over two processes of 4, as two hosts have it. gather = "layer" is slow: each layer is sent."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out, environment = tmp_path / "steps", os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(port)]
    start = functools.partial(
        subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    processes = [start([*command, str(rank), str(data), gather, str(out)]) for rank in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    steps = pickle.loads(out.read_bytes())
    t = trainer(8, data)
    state = t.state()
    expected_steps = zip(minibatches(UNTIED), trajectory(UNTIED), steps, strict=True)
    for mini, (_, _, expected), (params, found, logprobs) in expected_steps:
        batch = t.batch(mini)
        expected_logprobs = t.logprobs(state.params, batch).logprobs
        np.testing.assert_allclose(logprobs.logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
        state, metrics = t.update(state, batch)
        assert_close(params, expected)
        assert_same_metrics(found, metrics)


def test_parameters_divided_by_layer() -> None:
    """Eight layers on eight devices: norms and biases have no other axis to divide."""
    model = dataclasses.replace(UNTIED, layers=8)
    step, layer = (trainer(8, model=model, gather=gather) for gather in ("step", "layer"))
    assert sharding_of(step.state().params["layers"]["mlp_norm"].shape, step.mesh).spec[0] == "fsdp"
    batch = step.batch(minibatches(UNTIED)[1])
    (one, a), (two, b) = gradients_of(step, batch), gradients_of(layer, batch)
    assert_close(one, two, 1e-5, floor=1e-7)
    assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-5)


def test_the_trajectory_has_everything_in_it() -> None:
    """On-policy and off, clipped above and below, norms on both sides of the clip, real movement, an idle device."""
    grads, metrics, params = zip(*trajectory(UNTIED), strict=True)
    pairs = zip(metrics, minibatches(UNTIED), strict=True)
    off_policy = [m for m, mini in pairs if not mini.on_policy and m["tokens"]]
    assert all(m["clip_fraction"] > 0.05 for m in off_policy)
    assert any(m["clip_fraction_lower"] > 0 for m in off_policy)
    norms = [m["grad_norm"] for m in metrics]
    assert norms[4] == 0 and min(norms[:4]) < OPTIMIZER.max_grad_norm < max(norms), norms
    assert_same_bits(params[1], first_params(UNTIED))  # the first rollout batch runs at 0, both updates of it
    moved = [a["norm"] - b["norm"] for a, b in zip(params[2:], params[1:], strict=False)]
    assert all(abs(m).min() > 1e-5 for m in moved)
    assert sum(bool(a) for a in minibatches(UNTIED)[6].advantages) < 8
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# The optimizer, with the numbers of the recipe


@pytest.mark.parametrize(("warmup_steps", "updates_per_step"), [(10, 4), (0, 4), (1, 1)])
def test_optimizer_is_torchs(warmup_steps: int, updates_per_step: int) -> None:
    section = config.Optimizer(learning_rate=1e-3, warmup_steps=warmup_steps)
    rng = np.random.default_rng(0)
    params = {"matrix": np.float32(rng.normal(size=(3, 4))), "norm": np.ones(5, np.float32)}
    reference = Torch(params, section, updates_per_step)
    ours = make_optimizer(section)
    ours_params, opt_state, step = to_jax(params), ours.init(to_jax(params)), jax.jit(ours.update)
    for k in range(12 * updates_per_step):
        before, size = ours_params, (0.02, 2.0)[k % 2]
        grads = {name: np.float32(size * rng.normal(size=p.shape)) for name, p in params.items()}
        rate = learning_rate(section, k // updates_per_step)
        updates, opt_state = step(grads, opt_state, ours_params, learning_rate=rate)
        ours_params = optax.apply_updates(ours_params, updates)
        assert_close(ours_params, reference.step(grads), 1e-6)
        if warmup_steps and k < updates_per_step:
            assert_same_bits(ours_params, before)


# What must not change the result


def run(t: Trainer, old_logprobs: bool = False, stream: int = STREAM, **options: bool) -> Params:
    """Parameters after the first four updates of the trajectory."""
    state = t.state()
    for mini in minibatches(UNTIED)[:4]:
        batch = t.batch(mini, stream, **options)
        if old_logprobs:
            batch = batch.replace(old_logprobs=t.logprobs(state.params, batch).logprobs)
        state, _ = t.update(state, batch)
    return to_numpy(state.params)


def test_leaving_out_zero_advantages_changes_nothing() -> None:
    t = trainer(8, 2)
    assert_close(run(t, skip_zero_advantage=True), run(t, skip_zero_advantage=False), 1e-6)


@pytest.mark.parametrize("mesh", [(1, 1), (8, 2)])
def test_on_policy_is_recomputed_log_probs(mesh: tuple[int, int]) -> None:
    t = trainer(*mesh)
    assert_close(run(t, on_policy=True), run(t, on_policy=False, old_logprobs=True), 1e-6)


@pytest.mark.parametrize(("remat", "stream"), [("attention", LONGEST), ("none", 256)])
def test_neither_remat_nor_the_cut_into_streams_changes_anything(remat: Remat, stream: int) -> None:
    """Two sequences a stream at most, and all of a mini-batch in one."""
    t, mini = trainer(remat=remat), minibatches(UNTIED)[1]
    streams = [int(t.batch(mini, stream=n).micro_batches[0]) for n in (LONGEST, STREAM, 256)]
    assert streams[0] > streams[1] > streams[2] == 1
    assert_close(run(t, stream=stream), run(trainer()), 1e-6)


def test_bfloat16_compute_float32_state() -> None:
    t, mini = trainer(dtype="bfloat16"), minibatches(UNTIED)[0]
    state, metrics = t.update(t.state(), t.batch(mini))
    for leaf in jax.tree.leaves((state.params, state.opt_state, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)
    assert_close(state.opt_state[0], trajectory(UNTIED)[0][0], 0.05, floor=1e-3)
    assert float(metrics["loss"]) == pytest.approx(trajectory(UNTIED)[0][1]["loss"], abs=1e-3)


@pytest.mark.parametrize("gather", ["step", "layer"])
def test_gradients_are_summed_over_tokens_in_float32(gather: Gather) -> None:
    """In bfloat16 the sums for a bias, or the embedding of a token that comes hundreds of times, would stop growing."""
    t = trainer(gather=gather, dtype="bfloat16")
    program = t.update.lower(t.state(), t.batch(minibatches(UNTIED)[1])).as_text()
    scattered = re.findall(r'"stablehlo.scatter"\(.*?-> tensor<([\dx]+x\w+)>', program, flags=re.S)
    assert "72x20xf32" in scattered and "72x20xbf16" not in scattered
    sums = re.findall(r"applies stablehlo.add across .*-> tensor<(?:[\dx]+x)?(\w+)>", program)
    assert "f32" in sums and "bf16" not in sums


# Log-probabilities before the update


@pytest.mark.parametrize("mesh", [(1, 1), (8, 1), (8, 2)])
def test_logprobs_are_those_of_each_sequence(mesh: tuple[int, int]) -> None:
    t, mini = trainer(*mesh), minibatches(UNTIED)[2]
    batch = t.batch(mini, skip_zero_advantage=False)
    logprobs = np.asarray(t.logprobs(t.state().params, batch).logprobs)
    host, found = to_numpy(batch), 0
    assert logprobs.shape == host.tokens.shape and logprobs.dtype == np.float32
    for at in np.ndindex(host.starts.shape):
        if host.buckets[at] < 0:
            continue
        g, m, _ = at
        stream = host.tokens[g, m, host.starts[at] :]
        rollout = next(r for r in mini.rollouts if starts_with(stream, r))
        prompt, length = len(rollout.prompt.tokens), len(rollout.prompt.tokens) + len(rollout.tokens)
        expected, _ = reference_logprobs(UNTIED, first_params(UNTIED), stream[:length])
        of_sequence = logprobs[g, m, host.starts[at] : host.starts[at] + length]
        np.testing.assert_allclose(of_sequence[prompt:], expected[prompt - 1 :], rtol=1e-5, atol=1e-5)
        found += 1
    assert found == SEQUENCES


def starts_with(stream: np.ndarray, rollout: Rollout) -> bool:
    whole = np.append(rollout.prompt.tokens, rollout.tokens)
    return np.array_equal(stream[: len(whole)], whole)


# When something is not finite, or there is nothing


@pytest.mark.parametrize("mesh", [(1, 1), (8, 2)])
@pytest.mark.parametrize("what", ["advantage", "old_logprob", "parameter"])
def test_not_finite_changes_nothing_but_step(mesh: tuple[int, int], what: str) -> None:
    """One bad number in one sequence, so on one device: all devices have to agree to skip."""
    t, mini = trainer(*mesh), minibatches(UNTIED)[1]
    state, _ = t.update(t.state(), t.batch(minibatches(UNTIED)[0]))  # moments that are not zero
    if what == "advantage":
        mini.advantages[5:6], before = np.nan, mini.advantages.copy()
        batch = t.batch(mini)
        mini.advantages[:] = before
    elif what == "old_logprob":
        batch = t.batch(mini)
        bad = np.array(batch.old_logprobs)
        bad[tuple(np.argwhere(np.asarray(batch.weights) > 0)[0])] = np.nan
        batch = batch.replace(old_logprobs=jax.device_put(bad, batch.old_logprobs.sharding))
    else:
        batch = t.batch(mini)
        norm = state.params["layers"]["mlp_norm"]
        seventh = np.arange(norm.size).reshape(norm.shape) == 7
        broken = jax.device_put(np.where(seventh, np.inf, norm), norm.sharding)
        state = state.replace(params=state.params | {"layers": state.params["layers"] | {"mlp_norm": broken}})
    before = to_numpy(state)
    after, metrics = t.update(state, batch)
    assert bool(metrics["skipped"]) and not np.isfinite(metrics["grad_norm"])
    assert int(after.step) == int(before.step) + 1
    assert_same_bits((after.params, after.opt_state), (before.params, before.opt_state))
    if what != "parameter":  # and training goes on
        _, metrics = t.update(after, t.batch(mini))
        assert not metrics["skipped"] and np.isfinite(metrics["grad_norm"])


@pytest.mark.parametrize("mesh", [(1, 1), (8, 2)])
def test_nothing_kept_only_decays(mesh: tuple[int, int]) -> None:
    t, empty = trainer(*mesh), minibatches(UNTIED)[4]
    state, metrics = t.update(t.state(), t.batch(empty))
    rate = learning_rate(OPTIMIZER, empty.step)
    assert rate > 0
    decayed = jax.tree.map(lambda p: p * (1 - rate * OPTIMIZER.weight_decay), first_params(UNTIED))
    assert_close(state.params, decayed, 1e-6)
    undefined = {"approx_kl", "entropy", "logprob_diff_mean"}  # means over no tokens
    assert {name for name, value in metrics.items() if np.isnan(value).any()} == undefined
    assert not any(np.any(value) for name, value in metrics.items() if name not in undefined)


# What it asks of XLA

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def computations(hlo: str) -> dict[str, str]:
    """{name: text} of a compiled module."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", hlo, flags=re.M | re.S)
    return dict(found)


def inside_loops(hlo: str) -> str:
    """The text of all that a while loop runs, whatever calls it."""
    parts = computations(hlo)
    waiting = re.findall(r"\bwhile\([^\n]*?body=%?([\w.-]+)", hlo)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen and name in parts:
            seen.add(name)
            waiting += [word for word in re.findall(r"%([\w.-]+)", parts[name]) if word in parts]
    return "\n".join(parts[name] for name in seen)


def compiled(t: Trainer, program: str) -> str:
    state, batch = t.state(), t.batch(minibatches(UNTIED)[1])
    lowered = t.update.lower(state, batch) if program == "update" else t.logprobs.lower(state.params, batch)
    return lowered.compile().as_text()


@pytest.mark.parametrize("program", ["update", "logprobs"])
def test_no_collective_runs_in_a_loop(program: str) -> None:
    hlo = compiled(trainer(8, 2), program)
    assert "all-gather" in hlo and "while" in hlo
    assert not [name for name in COLLECTIVES if f" {name}" in inside_loops(hlo)]
    per_layer = inside_loops(compiled(trainer(8, 2, gather="layer"), program))
    assert " all-gather" in per_layer  # so the search does find what is there


def test_no_buffer_of_tokens_by_vocabulary() -> None:
    """Logits exist a chunk at a time; 72 is the vocabulary, 32 the stream, 8 the chunk."""
    for program in ("update", "logprobs"):
        shapes = set(re.findall(r"\w+\[([\d,]+)\]", compiled(trainer(8, 2), program)))
        sizes = [set(map(int, shape.split(","))) for shape in shapes]
        assert any({72, 8} <= size for size in sizes)
        assert not [size for size in sizes if {72, 32} <= size]


# What it asks of JAX


def test_the_state_is_donated_and_stays_where_it_is() -> None:
    t = trainer(8, 2)
    state = t.state()
    shardings = jax.tree.map(lambda a: a.sharding, state)
    new, _ = t.update(state, t.batch(minibatches(UNTIED)[1]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    for leaf, sharding in zip(jax.tree.leaves(new), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    q = new.params["layers"]["q"]
    assert q.addressable_shards[0].data.size * 4 == q.size  # a quarter each; the two replicas hold the same
    by_index: dict[str, list[np.ndarray]] = {}
    for shard in q.addressable_shards:
        by_index.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    for first, second in by_index.values():
        np.testing.assert_array_equal(first, second)


def test_abstract_state_is_the_states() -> None:
    t = trainer(8, 2)
    optimizer = with_gradients(make_optimizer(OPTIMIZER), [])
    abstract = abstract_state(decoder.abstract_params(UNTIED), optimizer, t.mesh)
    assert isinstance(abstract, TrainState)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(t.state()), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and b.sharding.is_equivalent_to(a.sharding, b.ndim)


def test_equal_shapes_are_traced_once() -> None:
    t = trainer(8, 2)
    before = len(t.traces)
    state = t.state()
    for mini in minibatches(UNTIED):  # full, empty, on-policy and not
        state, _ = t.update(state, t.batch(mini))
        state, _ = t.update(state, t.batch(mini, skip_zero_advantage=False))
    assert len(t.traces) <= max(before, 1)


def test_nothing_moves_between_host_and_device() -> None:
    t = trainer(8, 2)
    state, batch = t.state(), t.batch(minibatches(UNTIED)[1])
    with jax.transfer_guard("disallow"):
        old = t.logprobs(state.params, batch).logprobs
        state, metrics = t.update(state, batch.replace(old_logprobs=old))
        jax.block_until_ready((state, metrics))
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"(?i)disallowed"):
        t.logprobs(state.params, to_numpy(batch))  # the guard does guard
