"""The loop: sample, mark, compare within groups, update, publish; 4,000 times over."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evals import during
from jaxrl import checkpoint, config, data, distributed, telemetry
from jaxrl.distributed import make_mesh, to_devices
from jaxrl.grpo import group_advantages, packing, verl
from jaxrl.grpo import update as grpo
from jaxrl.grpo.advantages import sequence_weights
from jaxrl.grpo.agreement import importance_weights, ratio_quantiles
from jaxrl.hardware import HARDWARE
from jaxrl.models import attention, decoder, hf
from jaxrl.rewards import VERIFIERS
from jaxrl.rewards.overlong import overlong_penalty
from jaxrl.sampling import publish, servers
from jaxrl.sampling.ahead import Ahead, Sampled
from jaxrl.sampling.local import LocalSampler
from jaxrl.sampling.nccl import NCCL
from jaxrl.sampling.sampler import Prompt, Rollout, SamplingParams
from jaxrl.sampling.shares import Follower, Shared
from jaxrl.sampling.vllm import VLLMSampler

BARRIER = 300.0  # seconds; all processes have the same to do before it
AGREEMENT = ("sampler/logprob_diff", "sampler/ratio")


def train(recipe: config.Recipe, say: Callable[[str], None] = print) -> None:
    """Trains until `run.steps`, from the newest checkpoint of the run folder where there is one."""
    where = servers.place(recipe.sampler.servers, trains=True)
    distributed.start(say)  # jax takes SIGTERM for itself, so it comes first
    with graceful_stop(say) as stop, distributed.lookout(say):
        _train(recipe, where, say if distributed.chief() else _silent, stop)


def _train(recipe: config.Recipe, where: servers.Place, say: Callable[[str], None], stop: Stop) -> None:
    started, chief = time.monotonic(), distributed.chief()
    directory = Path(recipe.run.directory)
    if recipe.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(recipe.run.compilation_cache).expanduser()))
    compilations = telemetry.Compilations()
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp)
    folder = hf.resolve(recipe.model.path)
    model_config = hf.read_config(folder)
    tokenizer = data.load_tokenizer(str(folder))
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    verify = verifier(recipe, decode)
    prompts = data.load_prompts(recipe.data, tokenizer)
    say(prompts.summary())
    held_out = during.load_held_out(recipe, tokenizer) if recipe.eval.every and recipe.eval.path else []
    tests = during.load_benchmarks(recipe, tokenizer) if recipe.eval.every and recipe.eval.benchmarks else {}

    optimizer = make_optimizer(recipe)
    update, score_logprobs = make_update(recipe, model_config, optimizer, mesh)
    sampling = SamplingParams(
        recipe.rollout.temperature, recipe.rollout.top_p, recipe.rollout.top_k, recipe.rollout.max_tokens,
        hf.stop_ids(folder),
    )  # fmt: skip

    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(
        directory / "checkpoints", recipe.checkpoint.keep_last, recipe.checkpoint.keep_every
    )
    start = checkpoints.latest() or 0
    if start:
        start, state = checkpoints.resume(recipe, abstract_state(model_config, optimizer, mesh), say)
        if start >= recipe.run.steps:
            say(f"{directory} has its {start} steps; raise run.steps to go on")
            return
        say(f"going on from step {start}")
    else:
        params = hf.load(folder, mesh=mesh).params
        state = grpo.init_state(params, optimizer, mesh)
    if chief:
        telemetry.write_atomically(directory / "recipe.toml", config.to_toml(recipe))

    def batch(step: int) -> list[Prompt]:
        return data.batch(prompts.prompts, recipe.run.seed, step, recipe.rollout.prompts, recipe.data.order)

    sampled = Counter[int]()  # rollouts of each step

    def sample(at: int) -> list[list[Rollout]]:
        """This process's share of step `at`, marked as it comes, which may be while an earlier step is under way."""

        def each(rollout: Rollout) -> Rollout:
            sampled[at] += 1
            if at == step:
                progress.advance(1, len(rollout.tokens), rollout.server)
            return verify(rollout)

        return sampler.generate(batch(at), recipe.rollout.samples, sampling, (recipe.run.seed, at), each)

    def evaluate(step: int) -> None:
        """Writes eval/step_N.json and eval/benchmarks/step_N.json, unless they are there from before a restart."""
        out = directory / "eval" / f"step_{step:06d}.json"
        if held_out and not out.exists():
            progress.phase("eval", total=len(held_out) * recipe.eval.samples)
            during.run_evaluation(recipe, sampler, held_out, sampling, verify, progress, out, "step", step)
        out = directory / "eval" / "benchmarks" / out.name
        if tests and not out.exists():
            during.run_benchmarks(recipe, sampler, tests, sampling, decode, progress, out, step, say)

    timer = telemetry.Timer()
    with (
        closing(checkpoints),  # outermost: whatever happens, a write under way is finished
        open_sampler(recipe, folder, model_config, mesh, say, where) as sampler,
        telemetry.Progress(recipe.run.steps, start, title=directory.name, quiet=not chief) as progress,
        telemetry.MetricsWriter(directory, start, recipe.run.tensorboard)
        if chief
        else nullcontext() as writer,
        closing(telemetry.Profile(directory / "profile", start, recipe.run.profile)) as profile,
        telemetry.watchdog(timer, print),
        closing(Ahead(sample, start, recipe.run.steps, recipe.sampler.max_staleness)) as ahead,
    ):
        sampler.publish(state.params, start)
        evaluate(start)
        stop.begin()
        for step in range(start, recipe.run.steps):
            timer.reset()
            profile.begin(step)
            began = time.monotonic()
            with timer("sample"):
                progress.phase(
                    "sample", recipe.rollout.prompts * recipe.rollout.samples, sampled.pop(step, 0)
                )
                own = ahead.take(step)
            with timer("exchange"):
                progress.phase("exchange")
                everyone = sampler.gather(own.value, batch(step), f"step {step}")
                groups = [group for group in everyone if group]  # a server may refuse a prompt
            with timer("score"):
                progress.phase("score")
                rewards = np.array([[rollout.reward for rollout in group] for group in groups])
                advantages = group_advantages(
                    rewards, recipe.advantage.epsilon, recipe.advantage.normalize_std
                )
            with timer("old_logprobs"):
                progress.phase("old log-probs")
                stale = any(rollout.version < step for group in groups for rollout in group)
                batches = [
                    with_old_logprobs(recipe, b, mesh, state.params, score_logprobs, stale)
                    for b in minibatches(recipe, model_config, groups, advantages, mesh, stale)
                ]
                jax.block_until_ready(batches)
            distributed.barrier(f"before the update of step {step}", BARRIER)
            with timer("update"):
                progress.phase("update")
                updates = []
                for b in batches:
                    state, metrics = update(state, b)
                    # XLA on CPUs can stall on collectives of two updates at a time
                    jax.block_until_ready(state)
                    updates.append(metrics)
                updates = jax.device_get(updates)
            with timer("publish"):
                progress.phase("publish")
                sampler.publish(state.params, step + 1)
            seconds = time.monotonic() - began
            done = step + 1
            metrics = rollout_metrics(groups, rewards) | update_metrics(updates) | timer.seconds()
            metrics |= sampler_metrics(own, everyone, step)
            if stale and recipe.sampler.correction == "none":  # the trainer's were not computed
                metrics |= {name: np.nan for name in metrics if name.startswith(AGREEMENT)}
            metrics |= {"time/step": seconds, "perf/compilations": float(compilations.new())}
            metrics |= telemetry.resources() | {"perf/devices": float(jax.device_count())}
            metrics |= performance(model_config, groups, updates, seconds, metrics["time/update"])
            if step == start:
                metrics["time/first_step"] = time.monotonic() - started
            ending = distributed.any_of(stop.asked)
            if writer:
                writer.write(step, metrics)
                if recipe.run.rollouts_every and step % recipe.run.rollouts_every == 0:
                    telemetry.write_rollouts(
                        directory, step, groups, tokenizer.decode, recipe.run.rollouts_keep
                    )
            progress.step_done(step, metrics)
            if done % recipe.checkpoint.every == 0 or done == recipe.run.steps or ending:
                checkpoints.save(done, state, recipe)
            if done == recipe.run.steps or (recipe.eval.every and done % recipe.eval.every == 0):
                evaluate(done)
            if ending:
                break
    if ending and done < recipe.run.steps:
        say(f"stopped after step {done}; the same command goes on from there")
        raise stop.reason


def make_optimizer(recipe: config.Recipe) -> Any:
    o = recipe.optimizer
    return grpo.make_optimizer(
        learning_rate=o.learning_rate,
        warmup_steps=o.warmup_steps,
        updates_per_step=recipe.updates_per_step,
        beta1=o.beta1,
        beta2=o.beta2,
        epsilon=o.epsilon,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
    )


def make_update(recipe: config.Recipe, model_config: decoder.Config, optimizer: Any, mesh: Any) -> Any:
    return grpo.make_update(
        model_config,
        optimizer,
        mesh,
        buckets=attention_buckets(recipe),
        backend=attention.choose_backend(recipe.model.attention, recipe.model.dtype),
        dtype=recipe.model.dtype,
        remat=recipe.model.remat,
        gather=recipe.mesh.gather,
        temperature=recipe.rollout.temperature,
        chunk=recipe.packing.logprob_chunk,
        clip_low=recipe.loss.clip_low,
        clip_high=recipe.loss.clip_high,
        dual_clip=recipe.loss.dual_clip,
    )


@contextmanager
def open_sampler(
    recipe: config.Recipe, folder: Path, model_config: decoder.Config, mesh: Any, say: Callable[[str], None],
    where: servers.Place = servers.CPU,
) -> Iterator[Shared]:  # fmt: skip
    """The recipe's sampler; vLLM servers that are started for it, at their place, end with the context.

    With several processes, each samples its share of the prompts in process; only the first talks to vLLM servers.
    """
    with own_sampler(recipe, folder, model_config, mesh, say, where) as sampler:
        yield Shared(sampler, jax.process_count() if recipe.rollout.engine == "local" else 1)


@contextmanager
def own_sampler(
    recipe: config.Recipe, folder: Path, model_config: decoder.Config, mesh: Any, say: Callable[[str], None],
    where: servers.Place = servers.CPU,
) -> Iterator[Any]:  # fmt: skip
    """This process's part of `open_sampler`."""
    r, s, dtype = recipe.rollout, recipe.sampler, recipe.model.dtype
    if r.engine == "local":
        here = distributed.local_mesh() if jax.process_count() > 1 else mesh
        yield LocalSampler(model_config, dtype=dtype, slots=r.slots, mesh=here)
        return
    with ExitStack() as stack:
        run = Path(recipe.run.directory).absolute()
        weights = Path(s.folder) / f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
        transport: publish.Transport = NCCL(model_config, dtype, s.publish_seconds)
        if s.transport == "files":
            transport = publish.Files(model_config, weights, dtype, s.publish_seconds)
            stack.callback(shutil.rmtree, weights, ignore_errors=True)
        if not distributed.chief():
            yield Follower(transport)
            return
        own: dict[str, servers.Server] = {}
        if s.servers:
            started = servers.running(
                s.servers, s.vllm, str(folder), run / "servers", dtype=dtype, backend=transport.backend,
                max_tokens=recipe.max_tokens, where=where, options=s.vllm_options, say=say,
            )  # fmt: skip
            own = {server.url: server for server in stack.enter_context(started)}
        sampler = VLLMSampler(
            s.urls or list(own), transport, concurrency=s.concurrency, limit=s.request_seconds,
            publish_limit=s.publish_seconds, patience=s.patience_seconds, on_update=s.on_update, say=say,
            restart=lambda url, unwell: url in own and own[url].restart(unwell),
        )  # fmt: skip
        stack.callback(sampler.close)
        yield sampler


def attention_buckets(recipe: config.Recipe) -> tuple[int, ...]:
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_tokens
    return packing.bucket_lengths(recipe.packing.bucket_tokens, longest)


def stream_lengths(recipe: config.Recipe) -> tuple[int, ...]:
    unit = math.lcm(recipe.packing.bucket_tokens, recipe.packing.logprob_chunk)
    return packing.stream_lengths(recipe.packing.stream_tokens, attention_buckets(recipe)[-1], unit)


def abstract_state(model_config: decoder.Config, optimizer: Any, mesh: Any) -> grpo.TrainState:
    """A TrainState of shapes and shardings, for a restore."""
    params = jax.eval_shape(lambda: decoder.initialise(model_config, 0))
    return grpo.abstract_state(params, optimizer, mesh)


def verifier(recipe: config.Recipe, decode: Callable[[Any], str]) -> Callable[[Rollout], Rollout]:
    """Marks a rollout: the completion's text, special tokens removed, against the answer; and its length."""
    r, judge = recipe.reward, VERIFIERS[recipe.reward.verifier]

    def verify(rollout: Rollout) -> Rollout:
        before = decode(rollout.prompt.tokens) if r.with_prompt else ""
        score = judge(before + decode(rollout.tokens), rollout.prompt.answer)
        penalty = overlong_penalty(
            len(rollout.tokens), recipe.rollout.max_tokens, r.overlong_tokens, r.overlong_penalty
        )
        return dataclasses.replace(rollout, score=score, penalty=penalty)

    return verify


def minibatches(
    recipe: config.Recipe,
    model_config: decoder.Config,
    groups: list[list[Rollout]],
    advantages: np.ndarray,
    mesh: Any,
    stale: bool = False,
) -> Iterator[packing.PackedBatch]:
    """Packs the mini-batches of a step. `stale`: some were sampled by older weights."""
    skip = recipe.loss.skip_first_old_logprobs and not stale and recipe.sampler.correction == "none"
    dense, attended = decoder.forward_flops(model_config)
    rollouts = [rollout for group in groups for rollout in group]
    for k, (chosen, weights) in enumerate(divided(recipe, rollouts)):
        yield packing.pack(
            [rollouts[i] for i in chosen],
            advantages.reshape(-1)[chosen],
            devices=mesh.size,
            streams=stream_lengths(recipe),
            segments=recipe.packing.segments,
            buckets=attention_buckets(recipe),
            weights=weights,
            attention_cost=attended / dense,
            on_policy=k == 0 and skip,
            skip_zero_advantage=recipe.loss.skip_zero_advantage,
        )


def divided(recipe: config.Recipe, rollouts: list[Rollout]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sequences of each mini-batch, `minibatch_prompts` prompts in order, and the weight of each one's tokens."""
    response = np.array([len(r.tokens) for r in rollouts])
    loss, size = recipe.loss, recipe.optimizer.minibatch_prompts * recipe.rollout.samples
    if loss.normalization == "verl_dynamic":
        lengths = [len(r.prompt.tokens) + len(r.tokens) for r in rollouts]
        for mini in verl.divide(lengths, loss.verl_ranks, recipe.updates_per_step, loss.verl_tokens):
            yield verl.weights(mini, response)
        return
    for first in range(0, len(rollouts), size):
        chosen = np.arange(first, min(first + size, len(rollouts)))
        yield chosen, sequence_weights(response[chosen], loss.normalization, recipe.rollout.max_tokens)


def with_old_logprobs(
    recipe: config.Recipe, packed: packing.PackedBatch, mesh: Any, params: Any, score: Any, stale: bool
) -> Any:
    """A batch on the devices, with what the objective's ratios are relative to: the policy before this step's updates,
    for which the first mini-batch needs no pass; or where older weights sampled, the sampler's. With a correction it
    is always the former, and weights make up for the difference to the sampler (decoupled PPO, arXiv 2110.00641).
    """
    correction, batch = recipe.sampler.correction, to_devices(packed, mesh)
    if stale and correction == "none":
        return batch.replace(old_logprobs=batch.sampler_logprobs)
    if packed.on_policy.all():
        return batch
    batch = batch.replace(old_logprobs=score(params, batch))
    return batch if correction == "none" else _corrected(batch, correction, recipe.sampler.correction_cap)


@functools.partial(jax.jit, static_argnames=("correction", "cap"))
def _corrected(batch: Any, correction: Any, cap: float) -> Any:
    weights = importance_weights(batch.old_logprobs, batch.sampler_logprobs, correction, cap)
    return batch.replace(weights=jax.numpy.where(batch.weights != 0, batch.weights * weights, 0.0))


def rollout_metrics(groups: list[list[Rollout]], rewards: np.ndarray) -> dict[str, float]:
    """Over all rollouts of a step; rewards are [P, G], penalties included. What is right the verifier says."""
    flat = [rollout for group in groups for rollout in group]
    lengths = np.array([len(r.tokens) for r in flat])
    right = np.array([[rollout.score > 0 for rollout in group] for group in groups])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/accuracy": float(right.mean()),
        "groups/all_correct_fraction": float(right.all(axis=1).mean()),
        "groups/all_wrong_fraction": float((~right).all(axis=1).mean()),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in flat])),
    }


def sampler_metrics(own: Sampled[Any], everyone: list[list[Rollout]], step: int) -> dict[str, float]:
    """Of the sampling of a step's batch, which may have been during an earlier step; seconds are this process's."""
    rollouts, seconds = [r for group in everyone for r in group], own.ended - own.began
    return {
        "time/sampling": seconds,
        "perf/sampling_tokens_per_second": sum(len(r.tokens) for r in rollouts) / seconds,
        "sampler/refused": float(everyone.count([])),
        "sampler/staleness": float(step - np.mean([r.version for r in rollouts])),
    }


def update_metrics(updates: list[dict[str, Any]]) -> dict[str, float]:
    """Of a step's updates: means weighted by trained tokens, maxima, and counts."""
    value = lambda name: np.array([float(u[name]) for u in updates])  # noqa: E731
    tokens = value("tokens")
    ratios = np.sum([u["ratio_histogram"] for u in updates], axis=0)
    low, median, high = ratio_quantiles(ratios, (0.01, 0.5, 0.99))

    def mean(name: str) -> float:
        return (
            float(np.sum(np.where(tokens > 0, value(name) * tokens, 0)) / tokens.sum())
            if tokens.sum()
            else np.nan
        )

    return {
        "policy/entropy": mean("entropy"),
        "update/loss": float(value("loss").mean()),
        "update/grad_norm": float(value("grad_norm").mean()),
        "update/clip_fraction": float(np.nanmean(value("clip_fraction"))),
        "update/clip_fraction_lower": float(np.nanmean(value("clip_fraction_lower"))),
        "update/approx_kl": mean("approx_kl"),
        "update/ratio_max": float(value("ratio_max").max()),
        "update/skipped": float(value("skipped").sum()),
        "update/tokens": float(tokens.sum()),
        "update/sequences": float(value("sequences").sum()),
        "sampler/logprob_diff_mean": mean("logprob_diff_mean"),
        "sampler/logprob_diff_max": float(value("logprob_diff_max").max()),
        "sampler/ratio_p01": low,
        "sampler/ratio_p50": median,
        "sampler/ratio_p99": high,
    }


def performance(
    model_config: decoder.Config,
    groups: list[list[Rollout]],
    updates: list[Any],
    seconds: float,
    update_seconds: float,
) -> dict[str, float]:
    """Tokens a second of the whole step, and the update's model FLOPs over the devices' peak where it is known."""
    lengths = np.array([len(r.prompt.tokens) + len(r.tokens) for g in groups for r in g], float)
    metrics = {"perf/tokens_per_second": float(lengths.sum() / seconds)}
    kind = jax.devices()[0].device_kind
    peak = next((hardware.flops for name, hardware in HARDWARE.items() if name in kind), None)
    if peak:
        dense, attended = decoder.forward_flops(model_config)
        forward = dense * lengths.sum() + attended * (lengths**2).sum() / 2
        share = sum(float(u["sequences"]) for u in updates) / len(lengths)
        metrics["perf/mfu"] = float(3 * forward * share / (update_seconds * peak * jax.device_count()))
    return metrics


class Stop:
    """Whether the run is to end after this step, and how."""

    training = asked = False
    reason: BaseException = SystemExit(distributed.TRY_AGAIN)  # for schedulers that start it again

    def begin(self) -> None:
        self.training = True
        if self.asked:  # while loading, and a library swallowed the exception
            raise self.reason


@contextmanager
def graceful_stop(say: Callable[[str], None]) -> Iterator[Stop]:
    """Once training, the first Ctrl-C or SIGTERM lets the step finish and be saved; any other stops at once.

    Raises:
      KeyboardInterrupt after Ctrl-C, SystemExit with the status TRY_AGAIN after SIGTERM.
    """
    stop = Stop()

    def ask(number: int, _: Any) -> None:
        at_once, stop.asked = stop.asked or not stop.training, True
        if number == signal.SIGINT:
            stop.reason = KeyboardInterrupt()
        if at_once:
            raise stop.reason
        say("finishing this step and saving it; again to stop at once (the last checkpoint is kept)")

    def unraisable(error: Any) -> None:
        if error.exc_value is not stop.reason:  # swallowed where it cannot be raised, it is raised in `begin`
            hook(error)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _silent(_: str) -> None:
    pass
