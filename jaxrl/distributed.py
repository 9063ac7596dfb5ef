"""The processes of a run, the device mesh, and what lies where on it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.errors import InputError

BATCH_AXES = ("data", "fsdp")  # every device has its own streams
TRY_AGAIN = (
    75  # exit status of a run that was stopped from outside: EX_TEMPFAIL, for schedulers to start it again
)
LEFT = "left"
_hosts: list[str] = []


def start(say: Callable[[str], None] = print) -> None:
    """Joins the other processes of the run, if JAXRL_COORDINATOR (host:port), JAXRL_PROCESSES and JAXRL_PROCESS say so.

    Every process takes all devices that it can see. Call it before anything else that uses JAX.

    Raises:
      InputError: if they do not say it completely, or the others do not come.
    """
    names = ("JAXRL_COORDINATOR", "JAXRL_PROCESSES", "JAXRL_PROCESS")
    values = [os.environ.get(name, "") for name in names]
    if not any(values):
        return
    coordinator, count, index = values
    if not (":" in coordinator and count.isdigit() and index.isdigit() and int(index) < int(count)):
        said = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
        raise InputError(f"{said}: give all three, as host:port, a number, and a number below it")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, int(count), int(index), cluster_detection_method="deactivate", initialization_timeout=300,
            shutdown_timeout_seconds=30, coordinator_bind_address=_bind_address(coordinator),
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(f"process {index} of {count} could not join at {coordinator}: {error}") from None
    devices = jax.local_devices()
    _client().key_value_set(f"jaxrl/host/{index}", socket.gethostname())
    _hosts.extend(_client().blocking_key_value_get(f"jaxrl/host/{i}", 60_000) for i in range(int(count)))
    say(f"process {index} of {count} on {_hosts[int(index)]}: {len(devices)} x {devices[0].device_kind}")


def _bind_address(coordinator: str) -> str | None:
    """Where process 0 listens: at the coordinator's address. None, all interfaces, where its own host calls that by a
    loopback address, as Debian does, which no other host would reach."""
    host = coordinator.rpartition(":")[0]
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return None
    return None if address.startswith("127.") and host not in (address, "localhost") else coordinator


def chief() -> bool:
    """Whether this is the process that talks: to samplers, to the disk and to people."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float) -> None:
    """Waits for all processes on the host, where a collective would wait for ever.

    Raises:
      InputError: naming the processes that did not come in time.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(f"jaxrl/{name}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        late = re.findall(r"^\d+$", str(error).partition("timed out task names:")[2], re.MULTILINE)
        raise InputError(f"{name}: {_called(map(int, late))} did not come within {seconds:.0f} s") from None


@contextmanager
def lookout(say: Callable[[str], None], silence: float = 20.0) -> Iterator[None]:
    """Ends this process with TRY_AGAIN when another one has not been heard of for `silence` seconds.

    A collective would wait for it for ever, and jax's own heartbeat does not say who is missing.
    """
    if jax.process_count() == 1:
        yield
        return
    leaving, me, client = threading.Event(), jax.process_index(), _client()

    def look() -> None:
        heard = dict.fromkeys(range(jax.process_count()), ("", time.monotonic()))
        for beat in itertools.count():
            try:
                client.key_value_set(f"jaxrl/alive/{me}", str(beat), allow_overwrite=True)
                beats = {
                    int(key.rpartition("/")[2]): value
                    for key, value in client.key_value_dir_get("jaxrl/alive/")
                }
            except jax.errors.JaxRuntimeError:  # process 0 keeps them, and is the one to miss
                beats = dict.fromkeys(range(1, jax.process_count()), LEFT)
            now = time.monotonic()
            heard = {
                i: last if beats.get(i, last[0]) == last[0] != LEFT else (beats.get(i, LEFT), now)
                for i, last in heard.items()
            }
            gone = [i for i, (_, when) in heard.items() if i != me and now - when > silence]
            if gone:
                say(
                    f"{_called(gone)} has not been heard of for {silence:.0f} s, and this run ends. "
                    "The same command goes on from the last checkpoint"
                )
                sys.stdout.flush()
                os._exit(TRY_AGAIN)
            if leaving.wait(2):
                return

    thread = threading.Thread(target=look, name="lookout", daemon=True)
    thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError:  # a collective failed for want of somebody; soon it is said of whom
        thread.join(silence + 10)
        raise
    finally:
        leaving.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"jaxrl/alive/{me}", LEFT, allow_overwrite=True)


def _called(processes: Iterable[int]) -> str:
    """With the names of their hosts."""
    return " and ".join(f"process {i} on {_hosts[i]}" for i in processes) or "some process"


def any_of(flag: bool) -> bool:
    """Whether it is set in any process."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def exchange(mine: bytes) -> list[bytes]:
    """What each process has to say, at every process."""
    if jax.process_count() == 1:
        return [mine]
    sizes = multihost_utils.process_allgather(np.array(len(mine)))
    said = []
    for i, size in enumerate(sizes):
        here = i == jax.process_index()
        part = np.frombuffer(mine, np.uint8) if here else np.zeros(size, np.uint8)
        said.append(np.asarray(multihost_utils.broadcast_one_to_all(part, is_source=here)).tobytes())
    return said


def local_mesh() -> Mesh:
    """Over this process's own devices."""
    devices = np.array(jax.local_devices()).reshape(1, -1)
    return Mesh(devices, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def local_copy(params: Any, dtype: str) -> Any:
    """Parameters whole on each of this process's own devices, in `dtype`; as they are where there is one process."""
    if jax.process_count() == 1:
        return params
    here = NamedSharding(local_mesh(), P())

    def copy(leaf: Any) -> jax.Array:
        everywhere = jax.jit(lambda x: x.astype(dtype), out_shardings=NamedSharding(leaf.sharding.mesh, P()))(
            leaf
        )
        shards = [shard.data for shard in everywhere.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, here, shards)

    return jax.tree.map(copy, params)


def _client() -> Any:
    from jax._src import distributed  # barriers with a time-out have no public name

    return distributed.global_state.client


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
