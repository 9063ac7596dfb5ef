"""Model weights by NCCL: broadcast from the trainer's GPU to the servers' GPUs, without a file.

vLLM's own "nccl" backend is the other end. Its workers and this process form one communicator, in which this process is
rank 0. It is made from a unique id that travels over HTTP, so no torch is needed here.

NCCL refuses ranks of different versions, down to the patch, and two ranks on one GPU (`initTransportsRank` in its
src/init.cc), but only once all have come together, and without a reason. So both are compared before, by what vLLM's
workers report.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import functools
import itertools
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from jaxrl.errors import InputError, RunError
from jaxrl.json_fields import LARGEST, shown
from jaxrl.models import hf
from jaxrl.models.decoder import Config, Params
from jaxrl.sampling.client import BadAnswer, Client, Failures, ServerError, ask_all
from jaxrl.sampling.transports.base import cast, require_shapes
from jaxrl.sampling.vllm_plugin import RANK
from jaxrl.types import JsonObject

TYPES = {"bfloat16": 9, "float32": 7}  # ncclDataType_t
SUM = 0  # ncclRedOp_t
REMEDY = 'start the servers again and repeat the command, or set sampler.transport = "files"'

T = TypeVar("T")


class Rank(NamedTuple):
    """What NCCL compares before ranks join."""

    version: int  # ncclGetVersion's: 22907 is 2.29.7; 0 without NCCL
    gpu: str  # UUID


class NCCL:
    """The Transport that broadcasts. A restarted server waits for the next publication: nothing keeps the weights."""

    backend = "nccl"

    def __init__(self, config: Config, dtype: str = "bfloat16", limit: float = 300.0) -> None:
        """
        Args:
          config: the model's.
          dtype: of the served weights.
          limit: seconds for one publication.
        """
        self._config, self._dtype, self._limit = config, dtype, limit
        self._workers: dict[str, int] = {}  # of each server
        self._gpus: dict[str, set[str]] = {}  # their UUIDs
        self._members: list[str] = []  # servers of the communicator
        self._communicator: Communicator | None = None
        self._params: Params | None = None

    def prepare(self, params: Params, version: int) -> None:
        require_shapes(params, self._config)
        self._params = params

    def follow(self, params: Params) -> None:
        for _ in cast(params, self._config, self._dtype):
            pass

    async def greet(self, client: Client, url: str) -> None:
        """Rejects a server that NCCL would refuse.

        Raises:
          InputError: if its NCCL has another version, or it shares a GPU; without NVIDIA GPUs or NCCL here.
          ServerError: if it does not answer, or does not report them.
        """
        answer = await client.get(url, "/get_world_size")
        workers = answer.get("world_size")
        if type(workers) is not int or not 1 <= workers <= LARGEST:
            raise BadAnswer(f"/get_world_size answered {shown(answer)}")
        self._workers[url] = workers
        here = _this_rank()
        try:
            answer = await client.order(url, "/collective_rpc", {"method": RANK}, self._limit)
        except ServerError as error:
            raise ServerError(f"{error}; it needs this version of jaxrl installed with its vLLM") from None
        ranks = _read_ranks(answer)  # of data-parallel engines, the first one's
        _require_version(url, ranks, here.version)
        self._gpus[url] = {rank.gpu for rank in ranks}
        _require_apart(url, {"this trainer": {here.gpu}} | self._gpus)

    async def connect(self, client: Client, urls: Sequence[str], failed: Failures) -> None:
        """Makes a communicator of these servers' workers, unless there is one.

        Raises:
          InputError: without NVIDIA GPUs or NCCL.
          RunError: if one side fails to join.
        """
        if self._params is None:
            failed |= {url: ServerError("it gets its weights with the next publication") for url in urls}
            return
        await ask_all(urls, functools.partial(self.greet, client), failed)
        members = [url for url in urls if url not in failed]
        if not members or (members == self._members and self._communicator):
            return
        self._leave()
        *ranks, world = itertools.accumulate((self._workers[url] for url in members), initial=1)
        rank_of = dict(zip(members, ranks, strict=True))  # of each server's first worker; this process has 0
        unique = await _in_thread(Communicator.unique_id)

        def join(url: str) -> Awaitable[JsonObject]:
            info = {
                "nccl_unique_id_b64": base64.b64encode(unique).decode(),
                "rank_offset": rank_of[url],
                "world_size": world,
                "packed": False,
            }
            return client.order(url, "/init_weight_transfer_engine", {"init_info": info}, self._limit)

        join_here = functools.partial(Communicator, unique, world)
        self._communicator = await self._together(join_here, join, members)
        self._members = members

    async def deliver(self, client: Client, urls: Sequence[str], failed: Failures) -> None:
        """Broadcasts to the members of the communicator.

        Raises:
          RunError: if one of them, or this side, fails.
        """
        members = [url for url in urls if url not in failed]
        if not members:
            return
        if members != self._members:  # without it the others would wait forever
            raise RunError(f"NCCL: a server of the communicator failed: {failed}; {REMEDY}")
        names, shapes = zip(*hf.manifest(self._config), strict=True)
        info = {"names": names, "dtype_names": [self._dtype] * len(names), "shapes": shapes}

        def update(url: str) -> Awaitable[JsonObject]:
            return client.order(url, "/update_weights", {"update_info": info}, self._limit)

        await self._together(self._send, update, members)

    def done(self) -> None:
        self._params = None

    async def _together(
        self, ours: Callable[[], T], theirs: Callable[[str], Awaitable[JsonObject]], urls: Sequence[str]
    ) -> T:
        """Runs both sides of a collective. It hangs where one of them fails, so then the communicator is left."""
        here = _in_thread(ours)
        tasks: dict[str, asyncio.Future[T] | asyncio.Future[JsonObject]] = {"the trainer": here}
        tasks |= {url: asyncio.ensure_future(theirs(url)) for url in urls}
        done, pending = await asyncio.wait(
            tasks.values(), timeout=self._limit, return_when=asyncio.FIRST_EXCEPTION
        )
        failed = {name: task.exception() for name, task in tasks.items() if task in done and task.exception()}
        if failed or pending:
            self._leave()
            for task in pending:
                task.cancel()
            raise RunError(f"NCCL: {failed or f'nothing came within {self._limit:.0f} s'}; {REMEDY}")
        return here.result()

    def _leave(self) -> None:
        if self._communicator:
            self._communicator.abort()
        self._communicator, self._members = None, []

    def _send(self) -> None:
        assert self._communicator and self._params is not None
        for array in cast(self._params, self._config, self._dtype):
            self._communicator.broadcast(array)


class Communicator:
    """An NCCL communicator in which this process's first device is rank 0. Every call blocks.

    Raises:
      RunError: from every call, if NCCL or the GPU fails.
    """

    def __init__(self, unique: bytes, world: int) -> None:
        """Returns when all `world` ranks have joined."""
        self._device = jax.local_devices()[0]
        (self._nccl, self._cuda), self._comm = _libraries(), ctypes.c_void_p()
        self._enter()
        self._call("ncclCommInitRank", ctypes.byref(self._comm), world, _UniqueId.from_buffer_copy(unique), 0)
        # vLLM's workers begin with a sum of one number
        one = jax.device_put(jax.numpy.zeros(1), self._device)
        at, size = _pointer(one), ctypes.c_size_t(1)
        self._call("ncclAllReduce", at, at, size, TYPES["float32"], SUM, self._comm, None)
        self._wait()

    @staticmethod
    def unique_id() -> bytes:
        unique = _UniqueId()
        nccl, _ = _libraries()
        _require_success(nccl, nccl.ncclGetUniqueId(ctypes.byref(unique)))
        return bytes(unique)

    def broadcast(self, array: jax.Array) -> None:
        self._enter()
        at, size = _pointer(array), ctypes.c_size_t(array.size)
        self._call("ncclBroadcast", at, at, size, TYPES[array.dtype.name], 0, self._comm, None)
        self._wait()  # the caller may free the array when this returns

    def abort(self) -> None:
        """Ends the communicator, and every call that waits for it."""
        self._nccl.ncclCommAbort(self._comm)

    def _enter(self) -> None:
        """Makes the device's context this thread's."""
        device, context = _cuda_device(self._cuda), ctypes.c_void_p()
        failed = self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        if failed or self._cuda.cuCtxSetCurrent(context):
            raise RunError(f"{self._device} cannot be used for NCCL")

    def _wait(self) -> None:
        if self._cuda.cuStreamSynchronize(None):
            raise RunError("the GPU failed during an NCCL call")

    def _call(self, function: str, *args: object) -> None:
        _require_success(self._nccl, getattr(self._nccl, function)(*args))


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The NCCL that came with jax[cuda], and the driver.

    Raises:
      InputError: if one is missing.
    """
    try:
        import nvidia.nccl

        nccl = ctypes.CDLL(str(Path(nvidia.nccl.__path__[0]) / "lib" / "libnccl.so.2"))
        cuda = ctypes.CDLL("libcuda.so.1")
    except (ImportError, OSError) as error:
        raise InputError(
            f'sampler.transport = "nccl" needs NVIDIA GPUs and jax[cuda] ({error}); use "files"'
        ) from None
    nccl.ncclGetErrorString.restype = ctypes.c_char_p
    nccl.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int]
    return nccl, cuda


@functools.cache
def _this_rank() -> Rank:
    """The library that this process really loads, and its first GPU. Raises: InputError, RunError."""
    nccl, cuda = _libraries()
    version, gpu = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    _require_success(nccl, nccl.ncclGetVersion(ctypes.byref(version)))
    if cuda.cuDeviceGetUuid_v2(gpu, _cuda_device(cuda)):
        raise RunError(f"{jax.local_devices()[0]} has no UUID")
    return Rank(version.value, str(uuid.UUID(bytes=bytes(gpu))))


def _read_ranks(answer: JsonObject) -> list[Rank]:
    """Raises: BadAnswer."""
    match answer.get("results"):
        case [*found] if found and all(isinstance(rank, dict) for rank in found):
            ranks = [Rank(rank.get("version"), rank.get("gpu")) for rank in found]
            if all(type(rank.version) is int and type(rank.gpu) is str for rank in ranks):
                return ranks
    raise BadAnswer(f"/collective_rpc answered {shown(answer)}")


def _require_version(url: str, ranks: Sequence[Rank], here: int) -> None:
    """Raises: InputError unless the ranks have this version of NCCL."""
    for version, _ in ranks:
        if not version:
            raise InputError(f'{url} has no NCCL; it needs NVIDIA GPUs, or set sampler.transport = "files"')
        if version != here:
            theirs, ours = (f"{v // 10000}.{v // 100 % 100}.{v % 100}" for v in (version, here))
            raise InputError(
                f"{url} has NCCL {theirs} and this trainer {ours}, and NCCL joins equal versions only; pip install "
                f'nvidia-nccl-cu12=={theirs} here (cu13 with jax[cuda13]), or set sampler.transport = "files"'
            )


def _require_apart(url: str, gpus: Mapping[str, set[str]]) -> None:
    """Raises: InputError if the server shares a GPU with one of the others."""
    for other, theirs in gpus.items():
        if other != url and (shared := gpus[url] & theirs):
            raise InputError(
                f"{url} and {other} are on one GPU ({shared.pop()}), which NCCL refuses; give each its own, or set "
                'sampler.transport = "files"'
            )


def _cuda_device(cuda: ctypes.CDLL) -> ctypes.c_int:
    """The driver's handle of this process's first device. Raises: RunError."""
    device, first = ctypes.c_int(), jax.local_devices()[0]
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), first.local_hardware_id):
        raise RunError(f"{first} cannot be used for NCCL")
    return device


def _require_success(library: ctypes.CDLL, code: int) -> None:
    if code:
        raise RunError(f"NCCL: {library.ncclGetErrorString(code).decode()}")


def _pointer(array: jax.Array) -> ctypes.c_void_p:
    """The address of the copy on this process's first device, once it has been computed."""
    return ctypes.c_void_p(array.addressable_data(0).block_until_ready().unsafe_buffer_pointer())


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Runs `work` in a daemon thread, which does not keep the program alive where a collective hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def succeed(result: T) -> None:
        if not future.cancelled():
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.cancelled():
            future.set_exception(error)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # the future raises it to whoever waits
            loop.call_soon_threadsafe(fail, error)
        else:
            loop.call_soon_threadsafe(succeed, result)

    threading.Thread(target=run, name="NCCL", daemon=True).start()
    return future
