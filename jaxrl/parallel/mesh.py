"""The device mesh, and what lies where on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.errors import InputError

BATCH_AXES = ("data", "fsdp")  # every device has its own streams
Tree = TypeVar("Tree")  # a pytree


def mesh_over(devices: Sequence[jax.Device], data: int = 1) -> Mesh:
    """A (data, devices / data) mesh over these devices in their order, for programs that shard explicitly."""
    grid = np.array(devices).reshape(data, -1)
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def make_mesh(data: int = 1, fsdp: int = 0) -> Mesh:
    """A (data, fsdp) mesh over all devices of the run, ordered for the links between them.

    Args:
      data: replicas of the sharded state.
      fsdp: devices that share one copy of it; 0 takes all devices / data.

    Raises:
      InputError: if the devices cannot be divided that way.
    """
    devices = jax.device_count()
    fsdp = fsdp or devices // data
    if data * fsdp != devices:
        raise InputError(
            f"mesh.data = {data} x mesh.fsdp = {fsdp} is not the {devices} devices there are; "
            f"set mesh.fsdp = 0 and mesh.data to a divisor of {devices}"
        )
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def local_mesh() -> Mesh:
    """A mesh over this process's own devices."""
    return mesh_over(jax.local_devices())


def sharded_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The axis of an array that `fsdp` divides: the larger of the last two that it divides evenly, or none."""
    candidates = [axis for axis in range(len(shape))[-2:] if shape[axis] % parts == 0 and shape[axis] > 1]
    return max(candidates, key=lambda axis: shape[axis]) if candidates else None


def spec_of(shape: tuple[int, ...], mesh: Mesh) -> P:
    axis = sharded_axis(shape, mesh.shape["fsdp"])
    return P() if axis is None else P(*("fsdp" if i == axis else None for i in range(len(shape))))


def sharding_of(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec_of(shape, mesh))


def abstract_sharded(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes, dtypes and shardings of a tree of (abstract) arrays on the mesh."""

    def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf.shape, mesh))

    return jax.tree.map(abstract, tree)


def to_devices(batch: Tree, mesh: Mesh) -> Tree:
    """Puts a batch on the mesh, a slice of it on each device.

    Args:
      batch: NumPy arrays [G, ...], all of them in every process.
      mesh: of G devices.
    """
    sharding = NamedSharding(mesh, P(BATCH_AXES))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def local_copy(params: Tree, dtype: str) -> Tree:
    """Copies parameters whole onto each of this process's own devices, in `dtype`.

    A run of one process gets them back as they are.
    """
    if jax.process_count() == 1:
        return params
    here = NamedSharding(local_mesh(), P())

    def copy(leaf: jax.Array) -> jax.Array:
        assert isinstance(leaf.sharding, NamedSharding)
        whole = NamedSharding(leaf.sharding.mesh, P())
        everywhere = jax.jit(_cast, static_argnums=1, out_shardings=whole)(leaf, dtype)
        shards = [shard.data for shard in everywhere.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, here, shards)

    return jax.tree.map(copy, params)


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype)  # a function of its own: of a lambda, jax.jit compiles every one anew
