"""The loop: sample, mark, compare within groups, update, publish; 4,000 times over."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext

import jax
import numpy as np

from jaxrl import config, prepare
from jaxrl.errors import RunError
from jaxrl.grpo.update import TrainState, learning_rate
from jaxrl.lock import alone
from jaxrl.metrics import Record
from jaxrl.parallel import processes
from jaxrl.parallel.signals import Stop, graceful_stop
from jaxrl.run import LoadEvaluation, Run, load, open_checkpoints, open_run, resume
from jaxrl.sampling.prefetch import Prefetch
from jaxrl.sampling.servers import choose_devices, require_startable
from jaxrl.types import Rollout, Say, silent

BARRIER = 300.0  # seconds; every process does the same work before this barrier, so none should be late

Batches = Prefetch[list[list[Rollout]]]


def train(recipe: config.Recipe, evaluation: LoadEvaluation | None = None, say: Say = print) -> None:
    """Trains until `run.steps`, from the newest checkpoint of the run folder where there is one.

    Args:
      recipe: the whole experiment.
      evaluation: what evaluates during training, such as `evals.in_training.load`; needed where `eval.every` is set.
      say: prints a line.

    Raises:
      InputError: for a recipe, model or data that cannot be used; for `eval.every` without an evaluation.
      RunError: where a host, a server or the disk failed; the same call goes on from the last checkpoint.
      KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once the step under way is saved.
    """
    devices = choose_devices(recipe.sampler.servers, trains=True)  # before JAX looks for GPUs
    processes.start(say)  # JAX takes SIGTERM for itself, so this comes before graceful_stop
    with graceful_stop(say) as stop, processes.lookout(say, stop):
        say = say if processes.chief() else silent
        if processes.chief():
            require_startable(recipe, devices)
        setup = load(recipe, evaluation, say)
        with alone(setup.directory, "training", say) if processes.chief() else nullcontext():
            # a collective would not wait as long as the first process may for the folder's last owner
            processes.barrier("taking the run folder", BARRIER)
            checkpoints = open_checkpoints(recipe)
            with setup.compile_ahead(checkpoints.latest() or 0):
                start, state = resume(setup, checkpoints, say, stop.raise_if_asked)
                if start and start >= recipe.run.steps and not setup.owes(start):
                    say(f"{setup.directory} has its {start} steps; raise run.steps to go on")
                    return
                with open_run(setup, checkpoints, start, devices, say, stop) as run:
                    try:
                        done = run_steps(run, state, stop)
                    except RunError as error:
                        if stop.asked:
                            say(f"the step was not finished: {error}")
                        stop.raise_if_asked()
                        raise
        if done < recipe.run.steps:
            say(f"stopped after step {done}; the same command goes on from there")
            raise stop.reason


def run_steps(run: Run, state: TrainState, stop: Stop) -> int:
    """Trains from `run.start` to `run.steps`, or until asked to stop; returns the steps done. `state` is donated."""
    recipe, steps = run.recipe, run.recipe.run.steps
    with run.phase("publish"):
        run.sampler.publish(state.params, run.start)
    run.evaluate(run.start)
    stop.arm()
    processes.any_of(False)  # compiled before the first step
    with closing(Prefetch(run.sample, run.start, steps, recipe.sampler.max_staleness)) as batches:
        for step in range(run.start, steps):
            state, record = one_step(run, state, step, batches)
            if problem := run.log(step, record):
                stop.ask(problem)
            stopping = processes.any_of(stop.asked)
            done = step + 1
            evaluates = run.setup.evaluates(done)  # what it may be stopped in, so it is saved before
            if stopping or evaluates or done == steps or done % recipe.checkpoint.every == 0:
                with run.phase("checkpoint"):
                    run.checkpoints.save(done, state, recipe, run.setup.content)
            if stopping:  # the evaluation is made on the restart
                return done
            if evaluates:
                with stop.at_once():
                    run.evaluate(done)
    return steps


def one_step(run: Run, state: TrainState, step: int, batches: Batches) -> tuple[TrainState, Record]:
    """From prompts to new parameters, which the sampler has when this returns. `state` is donated."""
    recipe, programs, prompts = run.recipe, run.setup.programs, run.setup.batch(step)
    run.timer.reset()
    run.profile.begin(step)
    began = time.monotonic()
    with run.phase("sample"):
        run.progress.sampling(step, total=recipe.rollout.prompts * recipe.rollout.samples)
        own = batches.take(step)
    with run.phase("exchange"):
        everyone = run.sampler.gather(own.value, prompts, f"step {step + 1}")
        groups = [group for group in everyone if group]  # a server may refuse a prompt
        stale = any(rollout.version < step for group in groups for rollout in group)
    with run.phase("score"):
        rewards = np.array([[rollout.reward for rollout in group] for group in groups])
        rate = learning_rate(recipe.optimizer, step)
    with run.phase("old_logprobs"):
        minibatches = prepare.minibatches(
            recipe, run.setup.method, programs, groups, rate, state.params, run.reference, stale
        )
        jax.block_until_ready(minibatches)
    processes.barrier(f"before the update of step {step + 1}", BARRIER)
    with run.phase("update"):
        updates = []
        for minibatch in minibatches * recipe.optimizer.epochs:
            state, metrics = programs.update(state, minibatch)
            jax.block_until_ready(state)  # XLA on CPUs can stall on collectives of two updates at a time
            updates.append(metrics)
        updates = jax.device_get(updates)
    with run.phase("publish"):
        run.sampler.publish(state.params, step + 1)
    record = Record(
        groups=groups,
        refused=everyone.count([]),
        rewards=rewards,
        stale=stale,
        updates=updates,
        sampling_seconds=own.ended - own.began,
        phases=run.timer.seconds(),
        seconds=time.monotonic() - began,
    )
    return state, record
