"""What a step learns from the answers that were sampled for it: a function of these and of what was carried to it.

A run calls it between sampling and publishing; `jaxrl replay` calls it with the answers that a run has kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax

from jaxrl import prepare
from jaxrl.collect import Work, choose
from jaxrl.config import Stage
from jaxrl.grpo.update import learning_rate
from jaxrl.metrics import Record
from jaxrl.parallel import processes
from jaxrl.reference import scorer
from jaxrl.run import Carry, Setup
from jaxrl.telemetry.timer import Phase
from jaxrl.types import Rollout, Say

BARRIER = 300.0  # seconds; every process does the same work before this barrier, so none should be late


def enter(setup: Setup, stage: Stage, carry: Carry, say: Say) -> Carry:
    """What a stage begins with, a function of what the one before left; but for the reference, see `with_reference`."""
    if not stage.number:
        return carry
    restarts = ", ".join(sorted(stage.restart))
    say(
        f"{stage.title} begins: steps {stage.first + 1} to {stage.until}"
        + (f", with a restart of {restarts}" if restarts else "")
    )
    state = carry.state
    if "optimizer" in stage.restart:
        state = setup.programs(stage).restarted(state)
    return dataclasses.replace(
        carry, state=state, ledger=carry.ledger.entering(setup.stages[stage.number - 1], stage)
    )


def learn(
    setup: Setup,
    work: Work,
    carry: Carry,
    everyone: Sequence[list[Rollout]],
    phase: Callable[[Phase], AbstractContextManager[None]],
) -> tuple[Carry, Record]:
    """From a step's groups to new parameters: a function of what it is given. The state is donated.

    Args:
      setup: of the run.
      work: of the step's stage.
      carry: before the step.
      everyone: all groups that were sampled for it, marked, in the order of its stream; empty where one was refused.
      phase: times a phase of a step.

    Returns:
      what the next step begins with, and what is reported, without seconds.

    Raises:
      TooFew: before anything is changed, if no prompts are left for enough groups in the band.
    """
    recipe, stage, step, state = work.recipe, work.stage, carry.step, carry.state
    programs = setup.programs(stage)
    with phase("score"):
        score = functools.partial(prepare.scored, programs, state.params)
        chosen = choose(work, everyone, step, carry.ledger.answers, score)
        stale = any(rollout.version < step for group in chosen.groups for rollout in group)
        rate = learning_rate(recipe.optimizer, step - stage.warmed_from)
        reference = scorer(programs, carry.reference, phase) if carry.reference else None
    with phase("old_logprobs"):
        minibatches = prepare.minibatches(
            recipe, work.method, programs, chosen.groups, rate, state.params, reference, stale
        )
        jax.block_until_ready(minibatches)
    processes.barrier(f"before the update of step {step + 1}", BARRIER)
    with phase("update"):
        updates = []
        for minibatch in minibatches * recipe.optimizer.epochs:
            state, metrics = programs.update(state, minibatch)
            jax.block_until_ready(state)  # XLA on CPUs can stall on collectives of two updates at a time
            updates.append(metrics)
        updates = jax.device_get(updates)
    ledger = carry.ledger.after(setup.stages, stage, everyone)
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
    )
    return Carry(step + 1, state, ledger, carry.reference), record
