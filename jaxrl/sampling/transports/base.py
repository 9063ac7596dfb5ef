"""How model weights get to samplers, and the parameters on their way: verified, whole, in the served dtype."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models import decoder
from jaxrl.models.decoder import Config, Params
from jaxrl.sampling.client import Client, Failures

PART = 1 << 22  # elements


class Transport(Protocol):
    """Carries model weights to vLLM servers that have paused for them.

    prepare -> connect -> (servers pause) -> deliver -> (servers resume) -> done. Between prepare and done, and for
    Files at any time after, connect and deliver may be repeated for a server that has come back. Both leave out the
    servers in `failed`, and add to it those that fail.
    """

    backend: str  # of vLLM's --weight-transfer-config

    def prepare(self, params: Params, version: int) -> None:
        """Takes the parameters, which stay as they are until `done`. Call it in the thread that owns them.

        Raises:
          InputError: if they are not the model's, or not finite.
          RunError: if the disk fails.
        """

    def follow(self, params: Params) -> None:
        """Joins, in the other processes of the run, the collectives that gather the parameters."""

    async def greet(self, client: Client, url: str) -> None:
        """Raises: ServerError if the server cannot take these model weights."""

    async def connect(self, client: Client, urls: Sequence[str], failed: Failures) -> None: ...

    async def deliver(self, client: Client, urls: Sequence[str], failed: Failures) -> None: ...

    def done(self) -> None: ...


def require_shapes(params: Params, config: Config) -> None:
    """Raises: InputError if the parameters are not those that the config declares."""
    shapes = [decoder.stacked_shape(spec, config) for spec in decoder.specs(config)]
    if [leaf.shape for leaf in jax.tree.leaves(params)] != shapes:
        raise InputError("the parameters to publish are not those of the model; was its config changed?")


def cast(params: Params, config: Config, dtype: str, split: bool = False) -> Iterator[jax.Array]:
    """Yields each tensor of `hf.manifest` in `dtype`, whole on every device; computes one ahead.

    Args:
      params: the trainer's.
      config: the model's.
      dtype: of the served weights.
      split: in flat parts of PART elements at most, where a parameter is not divided among devices: such small parts
        reuse memory, and page faults would take longer than all the rest.

    Raises:
      InputError: if a value is not finite (or its square is not), which a server would load without complaint.
    """
    ahead: deque[tuple[str, jax.Array, jax.Array]] = deque()
    for spec, leaf in zip(decoder.specs(config), jax.tree.leaves(params), strict=True):
        parts = config.layers if spec.stacked else 1
        if split and leaf.is_fully_replicated:
            counts = range(parts, leaf.size + 1, parts)
            parts = next(n for n in counts if leaf.size <= n * PART and not leaf.size % n)
        whole = leaf.sharding
        if isinstance(whole, NamedSharding):
            whole = NamedSharding(whole.mesh, PartitionSpec())
        for i in range(parts):
            ahead.append((spec.name, *_part(dtype, parts, whole)(leaf, i)))
            if len(ahead) > 1:
                yield _finite(*ahead.popleft())
    yield from (_finite(*last) for last in ahead)


def _finite(name: str, array: jax.Array, square: jax.Array) -> jax.Array:
    if not np.isfinite(square):
        raise InputError(f"{name} holds values that are not finite; go back to a checkpoint")
    return array


@functools.cache
def _part(
    dtype: str, parts: int, sharding: jax.sharding.Sharding
) -> Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]:
    """Part i of a parameter, and the sum of its squares, which is cheaper than testing that each value is finite."""

    def part(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        if parts > 1:
            x = x if x.shape[0] == parts else x.reshape(parts, -1)  # layers keep their sharding
            x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x.astype(dtype), jnp.vdot(x, x)

    return jax.jit(part, out_shardings=(sharding, None))
