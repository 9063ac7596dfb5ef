"""The device mesh, and what lies where on it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.errors import InputError

BATCH_AXES = ("data", "fsdp")  # every device has its own streams


def make_mesh(data: int = 1, fsdp: int = 0) -> Mesh:
    """A (data, fsdp) mesh over all devices; fsdp = 0 takes all devices / data.

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


def sharded_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The axis of an array that `fsdp` divides: the larger of the last two that it divides evenly, or none."""
    candidates = [axis for axis in range(len(shape))[-2:] if shape[axis] % parts == 0 and shape[axis] > 1]
    return max(candidates, key=lambda axis: shape[axis]) if candidates else None


def spec_of(shape: tuple[int, ...], mesh: Mesh) -> P:
    axis = sharded_axis(shape, mesh.shape["fsdp"])
    return P() if axis is None else P(*("fsdp" if i == axis else None for i in range(len(shape))))


def sharding_of(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec_of(shape, mesh))


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Puts arrays with a leading device axis on the mesh, a slice a device; every process holds them all."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)
