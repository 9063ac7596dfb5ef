"""The reference of a KL term: the policy of an earlier step, in the dtype that the model computes in.

The forward pass casts every parameter to that dtype, so nothing is lost. Cast back, it goes through the program that
scores the policy: no other is compiled, and after a restart both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.grpo.packing import PackedBatch
from jaxrl.grpo.update import Likelihoods
from jaxrl.models import decoder
from jaxrl.prepare import Scorer, likelihoods
from jaxrl.programs import Programs
from jaxrl.telemetry.timer import Phase


class Reference(NamedTuple):
    """What a KL term is relative to."""

    step: int  # before which it was the policy; 0 is the model that training starts from
    params: decoder.Params  # in the compute dtype, sharded like the policy's


def take(params: decoder.Params, dtype: str, step: int) -> Reference:
    """A copy of the policy's parameters, which the next update will overwrite."""
    return Reference(step, jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params))


def as_reference(params: decoder.Params, dtype: str) -> decoder.Params:
    """Shapes, dtype and shardings of a reference, by those of the policy's parameters."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), params)


def scorer(
    programs: Programs, reference: Reference, phase: Callable[[Phase], AbstractContextManager[None]]
) -> Scorer:
    """Returns a function that scores a mini-batch under the reference, and waits for the result.

    Args:
      programs: that score the policy.
      reference: see `Reference`.
      phase: times a phase of a step.
    """

    def score(batch: PackedBatch) -> Likelihoods:
        with phase("reference"):
            whole = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), reference.params)
            return jax.block_until_ready(likelihoods(programs, whole, batch))

    return score
