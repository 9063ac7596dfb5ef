"""From marked groups to what `update` takes: packed mini-batches with old log-probs, on the devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from jaxrl import config
from jaxrl.grpo import packing, verl
from jaxrl.grpo.advantages import sequence_weights
from jaxrl.grpo.mismatch import importance_weights
from jaxrl.models import decoder
from jaxrl.parallel.mesh import to_devices
from jaxrl.programs import Programs
from jaxrl.types import Groups, Rollout, Truncation


def minibatches(
    recipe: config.Recipe,
    programs: Programs,
    groups: Groups,
    advantages: Float32[np.ndarray, "P G"],
    stale: bool = False,
) -> Iterator[packing.PackedBatch]:
    """Packs the mini-batches of a step.

    Args:
      recipe: how they are divided, weighted and packed.
      programs: whose layout and mesh they are for.
      groups: [P][G] marked rollouts.
      advantages: [P, G].
      stale: whether some were sampled by older parameters than the step's.
    """
    skip = recipe.loss.skip_first_old_logprobs and not stale and recipe.sampler.correction == "none"
    rollouts = [rollout for group in groups for rollout in group]
    for k, (chosen, weights) in enumerate(divide(recipe, rollouts)):
        yield packing.pack(
            [rollouts[i] for i in chosen],
            advantages.reshape(-1)[chosen],
            programs.mesh.size,
            programs.layout,
            weights=weights,
            on_policy=k == 0 and skip,
            skip_zero_advantage=recipe.loss.skip_zero_advantage,
        )


def divide(
    recipe: config.Recipe, rollouts: Sequence[Rollout]
) -> Iterator[tuple[Int[np.ndarray, " B"], Float[np.ndarray, " B"]]]:
    """Yields the sequences of each mini-batch, and the weight of each one's tokens in the loss.

    A mini-batch has the rollouts of `minibatch_prompts` prompts in order.
    """
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


def needs_logprobs(recipe: config.Recipe) -> bool:
    """Whether `with_old_logprobs` may call `programs.logprobs` for a batch of `minibatches`."""
    first = not recipe.loss.skip_first_old_logprobs or recipe.sampler.correction != "none"
    return first or recipe.updates_per_step > 1


def with_old_logprobs(
    recipe: config.Recipe,
    programs: Programs,
    packed: packing.PackedBatch,
    params: decoder.Params,
    stale: bool = False,
) -> packing.PackedBatch:
    """Puts a batch on the devices, with the log-probs that the objective's ratios are relative to.

    They are those of the policy before this step's updates, for which the first mini-batch needs no pass; or the
    sampler's, where older parameters sampled. With a correction they are always the former, and importance weights
    make up for the difference to the sampler (decoupled PPO, arXiv 2110.00641).
    """
    correction, batch = recipe.sampler.correction, to_devices(packed, programs.mesh)
    if stale and correction == "none":
        return batch.replace(old_logprobs=batch.sampler_logprobs)
    if packed.on_policy.all():
        return batch
    batch = batch.replace(old_logprobs=programs.logprobs(params, batch))
    return batch if correction == "none" else _corrected(batch, correction, recipe.sampler.correction_cap)


@functools.partial(jax.jit, static_argnames=("correction", "cap"))
def _corrected(batch: packing.PackedBatch, correction: Truncation, cap: float) -> packing.PackedBatch:
    weights = importance_weights(batch.old_logprobs, batch.sampler_logprobs, correction, cap)
    return batch.replace(weights=jnp.where(batch.weights != 0, batch.weights * weights, 0.0))
