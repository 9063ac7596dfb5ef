"""The loop: sample, mark, compare within groups, update, publish; 4,000 times over."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext

from jaxrl import config
from jaxrl.collect import Collected, TooFew, Work
from jaxrl.errors import RunError
from jaxrl.learn import BARRIER, enter, learn
from jaxrl.lock import alone
from jaxrl.metrics import Record
from jaxrl.parallel import processes
from jaxrl.parallel.signals import Stop, graceful_stop
from jaxrl.run import (
    Carry,
    LoadEvaluation,
    Run,
    load,
    open_checkpoints,
    open_run,
    resume,
    with_reference,
)
from jaxrl.sampling.prefetch import Prefetch
from jaxrl.sampling.servers import choose_devices, require_startable
from jaxrl.types import Say, silent

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
                carry = enter(run.setup, stage, carry, run.say)
            work = run.setup.work(stage, carry.ledger.dropped)
            carry, stopped = run_stage(run, work, carry, stop)
    return carry.step


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
    recipe, step = work.recipe, carry.step
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
    carry, record = learn(run.setup, work, carry, everyone, run.phase)
    with run.phase("publish"):
        run.sampler.publish(carry.state.params, carry.step)
    took = own.ended - own.began, run.timer.seconds(), time.monotonic() - began
    return carry, record.timed(*took)
