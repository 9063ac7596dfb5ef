"""The processes of a run: joining them, waiting for them with a limit, and noticing that one is gone."""

from __future__ import annotations

import atexit
import contextlib
import io
import ipaddress
import itertools
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl.errors import TRY_AGAIN, InputError, RunError
from jaxrl.parallel.signals import PEER, Stop
from jaxrl.types import Say

# What is kept of a process in place of its beat when it is over; after FAILED come the exit status and the error.
LEFT, FAILED = "left", "failed"
PIECE = 1 << 22  # bytes sent at a time: for another size, JAX compiles another program
_hosts: list[str] = []


def start(say: Say = print) -> None:
    """Joins the other processes of the run if JAXRL_COORDINATOR (host:port), JAXRL_PROCESSES and JAXRL_PROCESS are set.

    Every process takes all devices that it can see. Call it before anything else that uses JAX.

    Raises:
      InputError: if some of the three are missing or malformed.
      RunError: if the other processes do not come.
    """
    names = ("JAXRL_COORDINATOR", "JAXRL_PROCESSES", "JAXRL_PROCESS")
    values = [os.environ.get(name, "") for name in names]
    if not any(values):
        return
    coordinator, count, index = values
    if not (":" in coordinator and count.isdigit() and index.isdigit() and int(index) < int(count)):
        given = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
        raise InputError(f"{given}: give all three, as host:port, a number, and a number below it")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            int(count),
            int(index),
            cluster_detection_method="deactivate",
            initialization_timeout=300,
            shutdown_timeout_seconds=30,
            coordinator_bind_address=_bind_address(coordinator),
        )
    except RuntimeError as error:
        raise RunError(f"process {index} of {count} could not join at {coordinator}: {error}") from None
    devices = jax.local_devices()
    _client().key_value_set(f"jaxrl/host/{index}", socket.gethostname())
    _hosts.extend(_client().blocking_key_value_get(f"jaxrl/host/{i}", 60_000) for i in range(int(count)))
    say(f"process {index} of {count} on {_hosts[int(index)]}: {len(devices)} x {devices[0].device_kind}")


def _bind_address(coordinator: str) -> str | None:
    """The address at which process 0 listens: the coordinator's own.

    It is None (all interfaces) where that host resolves its own name to a loopback address, as Debian does: no other
    host would reach that.
    """
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return None
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return None if loopback and host not in (address, "localhost") else coordinator


def chief() -> bool:
    """Whether this is process 0, which alone writes to the disk, prints, and calls the sampling servers."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float) -> None:
    """Waits on the host for all processes; a collective would wait forever. Signals are handled meanwhile.

    Raises:
      RunError: naming the processes that did not come in time.
    """
    if jax.process_count() == 1:
        return
    client, outcome = _client(), queue.SimpleQueue[jax.errors.JaxRuntimeError | None]()

    def wait() -> None:
        try:
            client.wait_at_barrier(f"jaxrl/{name}", int(1000 * seconds))
            outcome.put(None)
        except jax.errors.JaxRuntimeError as error:
            outcome.put(error)

    threading.Thread(target=wait, name="barrier", daemon=True).start()  # Python handles no signal in C++
    if error := outcome.get():
        late = re.findall(r"^\d+$", str(error).partition("timed out task names:")[2], re.MULTILINE)
        raise RunError(f"{name}: {_names(map(int, late))} did not come within {seconds:.0f} s") from None


@contextmanager
def lookout(say: Say, stop: Stop, silence: float = 20.0) -> Iterator[None]:
    """Ends this process when another one has failed, as that one does, or with TRY_AGAIN when it is not heard of.

    After `silence` seconds: it may be on its way out too. A collective would wait forever for the other one, and JAX's
    own heartbeat does not say which process is missing. A process that is asked to stop asks the others.
    """
    if jax.process_count() == 1:
        yield
        return
    leaving, me, client = threading.Event(), jax.process_index(), _client()
    main, takes_signals = threading.main_thread().ident, threading.current_thread() is threading.main_thread()
    assert main

    def keep(value: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"jaxrl/alive/{me}", value, allow_overwrite=True)

    def beats() -> dict[int, str]:
        return {int(key.rpartition("/")[2]): beat for key, beat in client.key_value_dir_get("jaxrl/alive/")}

    def leave(status: int, gone: Sequence[int] = ()) -> NoReturn:
        """Ends this process, the chief after the others: JAX's own exit waits for all, and then aborts."""
        end = time.monotonic() + silence + 10
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while chief() and time.monotonic() < end:
                if all(i in (me, *gone) or beat.startswith((LEFT, FAILED)) for i, beat in beats().items()):
                    break
                time.sleep(0.5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def tell() -> None:
        if stop.asked:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"jaxrl/stop/{me}", "", allow_overwrite=True)

    def watch() -> None:
        heard = dict.fromkeys(range(jax.process_count()), ("", time.monotonic()))
        for beat in itertools.count():
            try:
                client.key_value_set(f"jaxrl/alive/{me}", str(beat), allow_overwrite=True)
                if not stop.asked and client.key_value_dir_get("jaxrl/stop/"):
                    if takes_signals:
                        signal.pthread_kill(main, PEER)
                    else:
                        stop.ask(stop.reason)
                kept = beats()
            except jax.errors.JaxRuntimeError:  # process 0 keeps them, so it is the one that is gone
                kept = dict.fromkeys(range(1, jax.process_count()), LEFT)
            now = time.monotonic()
            heard = {
                i: last if kept.get(i, last[0]) == last[0] != LEFT else (kept.get(i, LEFT), now)
                for i, last in heard.items()
            }
            gone = [i for i, (_, when) in heard.items() if i != me and now - when > silence]
            failed = [i for i in gone if heard[i][0].startswith(FAILED)]
            if failed:
                _, status, line = heard[failed[0]][0].split(" ", 2)
                say(f"{_names(failed[:1])} failed: {line}")
                keep(LEFT)
                leave(int(status), gone)
            if gone:
                say(
                    f"{_names(gone)} has not been heard of for {silence:.0f} s, and this run ends. "
                    "The same command goes on from the last checkpoint"
                )
                keep(LEFT)
                leave(TRY_AGAIN, gone)
            tell()
            if leaving.wait(2):
                return

    over = LEFT
    thread = threading.Thread(target=watch, name="lookout", daemon=True)
    thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError:
        # a collective failed because a peer is gone; `watch` will report which one
        thread.join(silence + 10)
        raise
    except (InputError, RunError) as error:
        over = f"{FAILED} {error.status} {error}"
        atexit.register(leave, error.status)  # after the error was printed
        raise
    finally:
        leaving.set()
        thread.join(5)
        tell()
        keep(over)


def _names(processes: Iterable[int]) -> str:
    """Processes with the names of their hosts."""
    return " and ".join(f"process {i} on {_hosts[i]}" for i in processes) or "some process"


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def exchange(mine: bytes) -> list[bytes]:
    """Sends each process's bytes to all; returns those of every process in order."""
    if jax.process_count() == 1:
        return [mine]
    sizes = multihost_utils.process_allgather(np.array(len(mine)))
    received = []
    for i, size in enumerate(sizes):
        is_source, pieces = i == jax.process_index(), list[bytes]()
        for first in range(0, int(size), PIECE):
            piece = np.zeros(PIECE, np.uint8)
            own = mine[first : first + PIECE] if is_source else b""
            piece[: len(own)] = np.frombuffer(own, np.uint8)
            pieces.append(np.asarray(multihost_utils.broadcast_one_to_all(piece, is_source)).tobytes())
        received.append(b"".join(pieces)[: int(size)])
    return received


def whole(array: jax.Array) -> np.ndarray:
    """An array [G, ...] with a row on each device, on the host of every process. Nothing is compiled for its shape."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = array.addressable_shards
    with io.BytesIO() as file:
        rows = np.concatenate([np.asarray(shard.data) for shard in shards])
        np.savez(file, rows=rows, places=[shard.index[0].start or 0 for shard in shards])
        parts = exchange(file.getvalue())
    found = np.zeros(array.shape, array.dtype)
    for part in parts:
        with np.load(io.BytesIO(part), allow_pickle=False) as arrays:
            found[arrays["places"]] = arrays["rows"]
    return found


class _Client(Protocol):
    """JAX's client of the coordination service, which has no public name; a barrier with a limit needs it."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...
    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None: ...


def _client() -> _Client:
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None
    return client
