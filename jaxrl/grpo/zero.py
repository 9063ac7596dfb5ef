"""When sharded parameters are whole, and when their gradients are summed (ZeRO, arXiv 1910.02054).

Everything here runs inside a shard_map over ("data", "fsdp"), on one device's shards.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl.distributed import BATCH_AXES, sharded_axis
from jaxrl.models.decoder import Params

Gather = Literal["step", "layer"]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The life of the parameters within one update.

    hold (once) -> enter (in every micro-batch) -> fetch (in every layer) -> sum (the gradients of what was held).

    gather = "step": `hold` gathers everything in the compute dtype, `sum` reduce-scatters float32 gradients; nothing
    is sent in between. gather = "layer": shards are held; layers are gathered when their turn comes, forward and
    backward, and their gradients are reduce-scattered at once. That takes 1 / fsdp of the memory, and three collectives
    a layer and micro-batch, in which every device has to take part as often as the busiest.
    """

    axes: Any  # sharded axis of each parameter, -1 where every device has all of it
    dtype: str
    gather: Gather

    def hold(self, shards: Params) -> Params:
        return self._whole(shards, self.axes) if self.gather == "step" else shards

    def enter(self, held: Params) -> Params:
        """Parameters for `decoder.forward`, all whole but what `fetch` completes."""
        if self.gather == "step":
            return held
        now = jax.tree.map(lambda axis: axis if axis == 0 else -1, self.axes["layers"])  # divided by layer
        return self._whole(held, self.axes | {"layers": now})

    def fetch(self, layer: Params) -> Params:
        if self.gather == "step":
            return layer
        return self._whole({"layers": layer}, {"layers": jax.tree.map(lambda a: a - 1, self.axes["layers"])})[
            "layers"
        ]

    def rounds(self, micro_batches: jax.Array) -> jax.Array:
        """How often this device goes through the loop; past its own micro-batches it works on padding."""
        return micro_batches if self.gather == "step" else jax.lax.pmax(micro_batches, "fsdp")

    def sum(self, grads: Params) -> Params:
        """Sums over the mesh; each device keeps its shard."""

        def reduce(g: jax.Array, axis: int) -> jax.Array:
            if axis < 0:
                return jax.lax.psum(g, BATCH_AXES)
            if self.gather == "step":
                g = jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True)
            return jax.lax.psum(g, "data")

        return jax.tree.map(reduce, grads, self.axes)

    def _whole(self, shards: Params, axes: Any) -> Params:
        """The LM head, the last to be used, stays float32 (see `token_logprobs`)."""
        last = "head" if "head" in shards else "embed"

        def gather(dtype: str, shard: jax.Array, axis: int) -> jax.Array:
            return shard if axis < 0 else _all_gather(shard, axis, dtype)

        return {
            name: jax.tree.map(
                functools.partial(gather, "float32" if name == last else self.dtype), part, axes[name]
            )
            for name, part in shards.items()
        }


def make_weights(shapes: Any, parts: int, dtype: str, gather: Gather) -> Weights:
    """Args: shapes: abstract parameters. parts: devices that share them."""

    def axis_of(p: jax.ShapeDtypeStruct) -> int:
        axis = sharded_axis(p.shape, parts)
        return -1 if axis is None else axis

    return Weights(jax.tree.map(axis_of, shapes), dtype, gather)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(shard: jax.Array, axis: int, dtype: str) -> jax.Array:
    """Sent in `dtype`; the gradient comes back summed in float32."""
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)


def _all_gather_backward(axis: int, dtype: str, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(g.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),)


_all_gather.defvjp(lambda shard, axis, dtype: (_all_gather(shard, axis, dtype), None), _all_gather_backward)
