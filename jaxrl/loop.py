"""The loop: sample, mark, compare within groups, update, publish; 4,000 times over."""

from __future__ import annotations

import dataclasses
import functools
import time
from contextlib import closing, nullcontext

import jax

from jaxrl import config, prepare
from jaxrl.collect import Collected, TooFew, Work, choose
from jaxrl.config import Stage
from jaxrl.errors import RunError
from jaxrl.grpo.update import learning_rate
from jaxrl.lock import alone
from jaxrl.metrics import Record
from jaxrl.parallel import processes
from jaxrl.parallel.signals import Stop, graceful_stop
from jaxrl.reference import scorer
from jaxrl.run import Carry, LoadEvaluation, Run, load, open_checkpoints, open_run, resume, with_reference
from jaxrl.sampling.prefetch import Prefetch
from jaxrl.sampling.servers import choose_devices, require_startable
from jaxrl.types import Say, silent

BARRIER = 300.0  # seconds; every process does the same work before this barrier, so none should be late

Batches = Prefetch[Collected]


def train(
    recipe: config.Recipe, evaluation: LoadEvaluation | None = None, say: Say = print, quiet: bool = False
) -> None:
    """Trains until `run.steps`, from the newest checkpoint of the run folder where there is one.

    Args:
      recipe: the whole experiment.
      evaluation: what evaluates during training, such as `evals.in_training.load`; needed where `eval.every` is set.
      say: prints a line.
      quiet: whether to show no progress.

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
                carry = resume(setup, checkpoints, say, stop.raise_if_asked)
                if (start := carry.step) and start >= recipe.run.steps and not setup.owes(start):
                    longer = "append a stage" if recipe.stages else "raise run.steps"
                    say(f"{setup.directory} has its {start} steps; {longer} to go on")
                    return
                with open_run(setup, checkpoints, start, devices, say, stop, quiet) as run:
                    try:
                        done = run_steps(run, carry, stop)
                    except RunError as error:
                        if stop.asked:
                            say(f"the step was not finished: {error}")
                        stop.raise_if_asked()
                        raise
        if done < recipe.run.steps:
            say(f"stopped after step {done}; the same command goes on from there")
            raise stop.reason


def run_steps(run: Run, carry: Carry, stop: Stop) -> int:
    """Trains from `run.start` to `run.steps`, or until asked to stop; returns the steps done. The state is donated."""
    with run.phase("publish"):
        run.sampler.publish(carry.state.params, run.start)
    run.evaluate(run.start)
    stop.arm()
    processes.any_of(False)  # compiled before the first step
    stopped = False
    while carry.step < run.recipe.run.steps and not stopped:
        stage = run.setup.stage_at(carry.step)
        with run.setup.compile_ahead(carry.step):
            if stage.first == carry.step:  # the checkpoint before holds what was: a kill here repeats it
                carry = enter(run, stage, carry)
            work = run.setup.work(stage, carry.ledger.dropped)
            carry, stopped = run_stage(run, work, carry, stop)
    return carry.step


def enter(run: Run, stage: Stage, carry: Carry) -> Carry:
    """What a stage begins with, a function of what the one before left; but for the reference, see `with_reference`."""
    if not stage.number:
        return carry
    restarts = ", ".join(sorted(stage.restart))
    run.say(
        f"{stage.title} begins: steps {stage.first + 1} to {stage.until}"
        + (f", with a restart of {restarts}" if restarts else "")
    )
    state = carry.state
    if "optimizer" in stage.restart:
        state = run.setup.programs(stage).restarted(state)
    return dataclasses.replace(
        carry, state=state, ledger=carry.ledger.entering(run.setup.stages[stage.number - 1], stage)
    )


def run_stage(run: Run, work: Work, carry: Carry, stop: Stop) -> tuple[Carry, bool]:
    """Trains to the end of a stage, or until asked to stop, which it returns; saves the end. The state is donated."""
    stage, recipe = work.stage, work.recipe
    if len(run.setup.stages) > 1:
        run.progress.stage(stage.name)
    collector = run.collector(work, carry.ledger)
    with closing(Prefetch(collector, carry.step, stage.until, recipe.sampler.max_staleness)) as batches:
        while carry.step < stage.until:
            step, collector.answers = carry.step, carry.ledger.answers
            carry = with_reference(run.setup, run.checkpoints, carry)
            try:
                carry, record = one_step(run, work, carry, batches)
            except TooFew:  # the state is whole, so nothing is lost
                if carry.step > (run.checkpoints.latest() or 0):
                    run.save(carry)
                raise
            if problem := run.log(work, step, record):
                stop.ask(problem)
            stopping = processes.any_of(stop.asked)
            evaluates = run.setup.evaluates(carry.step)  # what it may be stopped in, so it is saved before
            due = carry.step == stage.until or carry.step % recipe.checkpoint.every == 0
            if stopping or evaluates or due:
                run.save(carry)
            if stopping:  # the evaluation is made on the restart
                return carry, True
            if evaluates:
                with stop.at_once():
                    run.evaluate(carry.step)
    return carry, False


def one_step(run: Run, work: Work, carry: Carry, batches: Batches) -> tuple[Carry, Record]:
    """From prompts to new parameters, which the sampler has when this returns. The state is donated.

    Raises:
      TooFew: before anything is changed, if no prompts are left for enough groups in the band.
    """
    recipe, stage, step, state = work.recipe, work.stage, carry.step, carry.state
    programs = run.setup.programs(stage)
    run.timer.reset()
    run.profile.begin(step)
    began = time.monotonic()
    with run.phase("sample"):
        run.progress.sampling(step, total=recipe.rollout.prompts * recipe.rollout.samples)
        own = batches.take(step)
    with run.phase("exchange"):
        everyone, whole = own.value
        if not whole:
            everyone = run.sampler.gather(everyone, work.stream(carry.ledger.cursor), f"step {step + 1}")
    with run.phase("score"):
        score = functools.partial(prepare.scored, programs, state.params)
        chosen = choose(work, everyone, step, carry.ledger.answers, score)
        stale = any(rollout.version < step for group in chosen.groups for rollout in group)
        rate = learning_rate(recipe.optimizer, step - stage.warmed_from)
        reference = scorer(programs, carry.reference, run.phase) if carry.reference else None
    with run.phase("old_logprobs"):
        minibatches = prepare.minibatches(
            recipe, work.method, programs, chosen.groups, rate, state.params, reference, stale
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
    ledger = carry.ledger.after(run.setup.stages, stage, everyone)
    record = Record(
        sampled=[group for group in everyone if group],
        groups=chosen.groups,
        rescued=chosen.rescued,
        rounds=chosen.rounds,
        refused=everyone.count([]),
        passes=ledger.cursor / len(work.prompts.prompts),
        stale=stale,
        rate=rate,
        updates=updates,
        sampling_seconds=own.ended - own.began,
        phases=run.timer.seconds(),
        seconds=time.monotonic() - began,
    )
    return Carry(step + 1, state, ledger, carry.reference), record
