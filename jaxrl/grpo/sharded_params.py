"""Gathers sharded parameters and sums their gradients, once an update or layer by layer (ZeRO, arXiv 1910.02054).

Everything here runs inside a shard_map over ("data", "fsdp"), on one device's shards.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from jaxrl.models.decoder import Layer, Params, ParamTree
from jaxrl.parallel.mesh import BATCH_AXES, sharded_axis
from jaxrl.types import Gather

Axes = ParamTree[int]  # sharded axis of each parameter, -1 where every device has all of it
FLOAT32 = ("embed", "head")  # gathered in float32: their gradients are sums over all tokens


@dataclasses.dataclass(frozen=True)
class ShardedParams:
    """The parameters of one update, from shards to whole and back.

    hold (once) -> enter (in every micro-batch) -> fetch (in every layer) -> sum (the gradients of what was held).

    gather = "step": `hold` gathers everything in the compute dtype, `sum` reduce-scatters float32 gradients; nothing
    is sent in between. gather = "layer": shards are held; each layer is gathered just before it runs, forward and
    backward, and its gradients are reduce-scattered at once. That takes 1 / fsdp of the memory, and three collectives
    a layer and micro-batch, in which every device has to take part as often as the busiest.
    """

    axes: Axes
    dtype: str
    gather: Gather

    def hold(self, shards: Params) -> Params:
        """Parameters that stay on the device during the whole update."""
        return self._gather(shards, self.axes) if self.gather == "step" else shards

    def enter(self, held: Params) -> Params:
        """Parameters for `decoder.forward`, whole except for what `fetch` completes."""
        if self.gather == "step":
            return held
        # parameters that are divided along the layer axis are gathered now, the others in `fetch`
        now = {name: axis if axis == 0 else -1 for name, axis in self.axes["layers"].items()}
        return self._gather(held, {**self.axes, "layers": now})

    def fetch(self, layer: Layer) -> Layer:
        """Completes the parameters of one layer, a slice in the scan over layers."""
        if self.gather == "step":
            return layer
        return {name: self._whole(shard, self.axes["layers"][name] - 1) for name, shard in layer.items()}

    def rounds(self, micro_batches: Int[jax.Array, ""]) -> Int[jax.Array, ""]:
        """Iterations of this device's loop; past its own micro-batches it works on padding."""
        return micro_batches if self.gather == "step" else jax.lax.pmax(micro_batches, "fsdp")

    def sum(self, grads: Params) -> Params:
        """Sums gradients over the mesh; each device keeps its shard."""

        def reduce(g: Float[jax.Array, " ..."], axis: int) -> Float[jax.Array, " ..."]:
            if axis < 0:
                return jax.lax.psum(g, BATCH_AXES)
            if self.gather == "step":
                g = jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True)
            return jax.lax.psum(g, "data")

        return jax.tree.map(reduce, grads, self.axes)

    def _gather(self, shards: Params, axes: Axes) -> Params:
        def gather(path: tuple[jax.tree_util.DictKey, ...], shard: jax.Array, axis: int) -> jax.Array:
            return self._whole(shard, axis, "float32" if path[0].key in FLOAT32 else self.dtype)

        return jax.tree_util.tree_map_with_path(gather, shards, axes)

    def _whole(self, shard: jax.Array, axis: int, dtype: str | None = None) -> jax.Array:
        return shard if axis < 0 else _all_gather(shard, axis, dtype or self.dtype)


def make_sharded_params(shapes: Params, parts: int, dtype: str, gather: Gather) -> ShardedParams:
    """Decides which axis of each parameter is sharded.

    Args:
      shapes: abstract parameters.
      parts: devices that share them.
      dtype: of the computation.
      gather: when they are gathered, see `ShardedParams`.
    """

    def axis_of(p: jax.Array) -> int:
        axis = sharded_axis(p.shape, parts)
        return -1 if axis is None else axis

    return ShardedParams(jax.tree.map(axis_of, shapes), dtype, gather)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(shard: Float[jax.Array, " ..."], axis: int, dtype: str) -> Float[jax.Array, " ..."]:
    """Sends shards in `dtype`; the gradient comes back summed in float32."""
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)


def _all_gather_forward(
    shard: Float[jax.Array, " ..."], axis: int, dtype: str
) -> tuple[Float[jax.Array, " ..."], None]:
    return _all_gather(shard, axis, dtype), None


def _all_gather_backward(
    axis: int, _: str, __: None, g: Float[jax.Array, " ..."]
) -> tuple[Float32[jax.Array, " ..."]]:
    return (jax.lax.psum_scatter(g.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)
