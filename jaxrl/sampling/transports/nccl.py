"""The trainer's weights on their way to samplers: broadcast from GPU to GPUs by NCCL, without a file.

vLLM's own "nccl" backend is the other end. Its workers and this process make one group, in which this process is rank
0; the group is made by a unique id that travels over HTTP, so no torch is needed here.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrl.errors import InputError
from jaxrl.models import decoder, hf
from jaxrl.models.decoder import Config
from jaxrl.sampling.client import Client, ServerError, each
from jaxrl.sampling.transports.base import cast, check_parameters

TYPES = {"bfloat16": 9, "float32": 7}  # ncclDataType_t
SUM = 0  # ncclRedOp_t
REMEDY = 'start the servers again and repeat the command, or set sampler.transport = "files"'


class NCCL:
    """A Transport. A server that comes back has to wait for the next publication: nothing keeps the weights."""

    backend = "nccl"

    def __init__(self, config: Config, dtype: str = "bfloat16", limit: float = 300.0):
        """Args: limit: seconds for one publication."""
        self._config, self._dtype, self._limit = config, dtype, limit
        self._worlds: dict[str, int] = {}  # workers of each server
        self._members: list[str] = []
        self._group: Communicator | None = None
        self._params: decoder.Params | None = None

    def prepare(self, params: decoder.Params, version: int) -> None:
        check_parameters(params, self._config)
        self._params = params

    def follow(self, params: decoder.Params) -> None:
        for _ in cast(params, self._config, self._dtype):
            pass

    async def greet(self, client: Client, url: str) -> None:
        self._worlds[url] = int((await client.get(url, "/get_world_size"))["world_size"])

    async def connect(self, client: Client, urls: Sequence[str], failed: dict[str, ServerError]) -> None:
        """Makes a group of these servers' workers, unless there is one."""
        if self._params is None:
            failed |= {url: ServerError("it gets its weights with the next publication") for url in urls}
            return
        await each(urls, functools.partial(self.greet, client), failed)
        members = [url for url in urls if url not in failed]
        if not members or (members == self._members and self._group):
            return
        self._leave()
        offsets = dict(
            zip(members, itertools.accumulate((self._worlds[u] for u in members), initial=1), strict=False)
        )
        world = 1 + sum(self._worlds[url] for url in members)
        unique = await _in_thread(Communicator.unique_id)

        def join(url: str) -> Any:
            info = {
                "nccl_unique_id_b64": base64.b64encode(unique).decode(), "rank_offset": offsets[url],
                "world_size": world, "packed": False,
            }  # fmt: skip
            return client.order(url, "/init_weight_transfer_engine", {"init_info": info}, self._limit)

        self._group = await self._together(functools.partial(Communicator, unique, world), join, members)
        self._members = members

    async def deliver(self, client: Client, urls: Sequence[str], failed: dict[str, ServerError]) -> None:
        members = [url for url in urls if url not in failed]
        if not members:
            return
        if members != self._members:  # without it the others would wait for ever
            raise InputError(f"NCCL: a server of the group failed: {failed}; {REMEDY}")
        names, shapes = zip(*hf.manifest(self._config), strict=True)
        info = {"names": names, "dtype_names": [self._dtype] * len(names), "shapes": shapes}

        def update(url: str) -> Any:
            return client.order(url, "/update_weights", {"update_info": info}, self._limit)

        await self._together(self._send, update, members)

    def done(self) -> None:
        self._params = None

    async def _together(self, ours: Callable[[], Any], theirs: Callable[[str], Any], urls: list[str]) -> Any:
        """Both sides of a collective, which hangs where one of them fails: then the group is left."""
        here = _in_thread(ours)
        tasks = {"the trainer": here} | {url: asyncio.ensure_future(theirs(url)) for url in urls}
        done, pending = await asyncio.wait(
            tasks.values(), timeout=self._limit, return_when=asyncio.FIRST_EXCEPTION
        )
        failed = {name: task.exception() for name, task in tasks.items() if task in done and task.exception()}
        if failed or pending:
            self._leave()
            for task in pending:
                task.cancel()
            raise InputError(f"NCCL: {failed or f'nothing came within {self._limit:.0f} s'}; {REMEDY}")
        return here.result()

    def _leave(self) -> None:
        if self._group:
            self._group.abort()
        self._group, self._members = None, []

    def _send(self) -> None:
        assert self._group and self._params is not None
        for array in cast(self._params, self._config, self._dtype):
            self._group.broadcast(array)


class Communicator:
    """An NCCL communicator in which this process's first device is rank 0. Every call blocks."""

    def __init__(self, unique: bytes, world: int):
        """Returns when all `world` ranks have joined."""
        self._device = jax.local_devices()[0]
        self._nccl, self._cuda, self._comm = _library(), ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        self._enter()
        self._call("ncclCommInitRank", ctypes.byref(self._comm), world, _UniqueId.from_buffer_copy(unique), 0)
        ready = jax.device_put(
            jax.numpy.zeros(1), self._device
        )  # vLLM's workers begin with a sum of one number
        pointer = _pointer(ready)
        self._call(
            "ncclAllReduce", pointer, pointer, ctypes.c_size_t(1), TYPES["float32"], SUM, self._comm, None
        )
        self._wait()

    @staticmethod
    def unique_id() -> bytes:
        unique = _UniqueId()
        _check(_library(), _library().ncclGetUniqueId(ctypes.byref(unique)))
        return bytes(unique)

    def broadcast(self, array: jax.Array) -> None:
        self._enter()
        at, size = _pointer(array), ctypes.c_size_t(array.size)
        self._call("ncclBroadcast", at, at, size, TYPES[array.dtype.name], 0, self._comm, None)
        self._wait()  # the array may go when this returns

    def abort(self) -> None:
        """Ends the group, and every call that waits for it."""
        self._nccl.ncclCommAbort(self._comm)

    def _enter(self) -> None:
        """Makes the device's context this thread's."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        failed = self._cuda.cuInit(0)
        failed = failed or self._cuda.cuDeviceGet(ctypes.byref(device), self._device.local_hardware_id)
        failed = failed or self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        if failed or self._cuda.cuCtxSetCurrent(context):
            raise RuntimeError(f"{self._device} cannot be used for NCCL")

    def _wait(self) -> None:
        if self._cuda.cuStreamSynchronize(None):
            raise RuntimeError("the GPU failed while NCCL sent")

    def _call(self, function: str, *args: Any) -> None:
        _check(self._nccl, getattr(self._nccl, function)(*args))


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


@functools.cache
def _library() -> Any:
    """The NCCL that came with jax[cuda].

    Raises:
      InputError: without one.
    """
    try:
        import nvidia.nccl

        library = ctypes.CDLL(str(Path(nvidia.nccl.__path__[0]) / "lib" / "libnccl.so.2"))
    except (ImportError, OSError) as error:
        raise InputError(
            f'sampler.transport = "nccl" needs NVIDIA GPUs and jax[cuda] ({error}); use "files"'
        ) from None
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int]
    return library


def _check(library: Any, code: int) -> None:
    if code:
        raise RuntimeError(f"NCCL: {library.ncclGetErrorString(code).decode()}")


def _pointer(array: jax.Array) -> ctypes.c_void_p:
    """Of this process's first device's copy, when it has been computed."""
    return ctypes.c_void_p(array.addressable_data(0).block_until_ready().unsafe_buffer_pointer())


def _in_thread(work: Callable[[], Any]) -> asyncio.Future:
    """In a daemon, which does not keep the program alive where a collective hangs."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as caught:
            result, error = None, caught

        def tell() -> None:
            if future.cancelled():
                return
            if error:
                future.set_exception(error)
            else:
                future.set_result(result)

        loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, name="NCCL", daemon=True).start()
    return future
