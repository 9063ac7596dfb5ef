"""The trainer's weights on their way to samplers: by a file, in safetensors' format and with Hugging Face's names."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from blake3 import blake3
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models import decoder, hf
from jaxrl.models.decoder import Config
from jaxrl.sampling.client import Client, ServerError, each

TYPES = {"bfloat16": "BF16", "float32": "F32"}
PART = 1 << 22  # elements


class Transport(Protocol):
    """Carries weights to vLLM servers that have paused for them.

    prepare -> connect -> (servers pause) -> deliver -> (servers go on) -> done. Between prepare and done, and for
    Files at any time after, connect and deliver may be repeated for a server that has come back.
    """

    backend: str  # of vLLM's --weight-transfer-config

    def prepare(self, params: decoder.Params, version: int) -> None:
        """In the thread that owns the parameters, which stay as they are until `done`."""

    def follow(self, params: decoder.Params) -> None:
        """What the other processes of the run do meanwhile: their part in making the parameters whole."""

    async def greet(self, client: Client, url: str) -> None:
        """Raises: ServerError if the server cannot take these weights."""

    async def connect(self, client: Client, urls: Sequence[str], failed: dict[str, ServerError]) -> None: ...

    async def deliver(self, client: Client, urls: Sequence[str], failed: dict[str, ServerError]) -> None: ...

    def done(self) -> None: ...


class Published(NamedTuple):
    path: Path
    blake3: str  # digest of the file
    version: int


class Files:
    """Every server reads the file in which the newest weights are."""

    backend = "jaxrl_file"

    def __init__(self, config: Config, folder: Path, dtype: str = "bfloat16", limit: float = 300.0):
        """
        Args:
          folder: where the files go; every server must be able to read it (/dev/shm, a shared file system).
          limit: seconds for a server to load one.
        """
        self._config, self._folder, self._dtype, self._limit = config, folder, dtype, limit
        self._published: Published | None = None

    def prepare(self, params: decoder.Params, version: int) -> None:
        self._published = write(params, self._config, self._folder, version, self._dtype)

    def follow(self, params: decoder.Params) -> None:
        for _ in cast(params, self._config, self._dtype, split=True):
            pass

    async def greet(self, client: Client, url: str) -> None:
        model = {
            key: value for key, value in hf.describe(self._config).items() if isinstance(value, str | int)
        }
        del model["max_position_embeddings"]  # of which a server may be told another
        await client.order(url, "/init_weight_transfer_engine", {"init_info": {"model": model}}, self._limit)

    async def connect(self, client: Client, urls: Sequence[str], failed: dict[str, ServerError]) -> None:
        await each(urls, functools.partial(self.greet, client), failed)  # it may have been started anew

    async def deliver(self, client: Client, urls: Sequence[str], failed: dict[str, ServerError]) -> None:
        assert self._published
        info = {"path": str(self._published.path.absolute()), "blake3": self._published.blake3}
        update = lambda url: client.order(url, "/update_weights", {"update_info": info}, self._limit)  # noqa: E731
        await each(urls, update, failed)

    def done(self) -> None:
        pass


def write(
    params: decoder.Params, config: Config, folder: Path, version: int, dtype: str = "bfloat16"
) -> Published:
    """Writes FOLDER/weights_VERSION.safetensors; it and its predecessor are kept.

    A part is gathered and cast while the one before it is being written. The file appears under its name when it is
    complete.

    Raises:
      InputError: see `check` and `cast`; or if the file cannot be written.
    """
    check(params, config)
    path, hasher = folder / f"weights_{version:08d}.safetensors", blake3(max_threads=blake3.AUTO)
    try:
        with _recycled(folder, path) as file:
            header = _header(config, dtype)
            hasher.update(header)
            file.write(header)
            for array in cast(params, config, dtype, split=True):
                part = np.asarray(array).reshape(-1).view(np.uint8).data
                hasher.update(part)
                file.write(part)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write the weights ({error.strerror}); choose another folder"
        ) from None
    return Published(path, hasher.hexdigest(), version)


def check(params: decoder.Params, config: Config) -> None:
    """Raises: InputError if the parameters are not what the config declares."""
    shapes = [decoder.stacked_shape(spec, config) for spec in hf.specs(config)]
    if [leaf.shape for leaf in jax.tree.leaves(params)] != shapes:
        raise InputError("the parameters to publish are not those of the model; was its config changed?")


@contextlib.contextmanager
def _recycled(folder: Path, path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when that is done: one that is older than the newest, if there is one.

    Memory that a file system in memory holds already takes a quarter of the time of new memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    for spare in [*sorted(folder.glob("weights_*.safetensors"))[:-1], *folder.glob("*.partial")]:
        spare.replace(partial)
    partial.touch()
    with partial.open("r+b") as file:
        yield file
        file.truncate()
    partial.replace(path)


def cast(params: decoder.Params, config: Config, dtype: str, split: bool = False) -> Iterator[jax.Array]:
    """Each tensor of the manifest in `dtype`, whole on every device; one is ahead of what is asked for.

    Args:
      split: in flat parts of PART elements at most, where it is not divided among devices: such small ones find
        memory that was used before, and page faults would take longer than all the rest.

    Raises:
      InputError: if a value is not finite (or its square is not), which servers load without a word.
    """
    ahead: deque[tuple[str, jax.Array, jax.Array]] = deque()
    for spec, leaf in zip(hf.specs(config), jax.tree.leaves(params), strict=True):
        parts = config.layers if "{}" in spec.name else 1
        if split and leaf.is_fully_replicated:
            parts = next(
                n for n in range(parts, leaf.size + 1, parts) if leaf.size <= n * PART and not leaf.size % n
            )
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
def _part(dtype: str, parts: int, sharding: Any) -> Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]:
    """Part i of a parameter, and the sum of its squares: quicker than asking of each value whether it is finite."""

    def part(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        if parts > 1:
            x = x if x.shape[0] == parts else x.reshape(parts, -1)  # layers stay as they are divided
            x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x.astype(dtype), jnp.vdot(x, x)

    return jax.jit(part, out_shardings=(sharding, None))


def _header(config: Config, dtype: str) -> bytes:
    """safetensors': 8 bytes of length, then JSON; the layers of a stacked parameter lie one behind another."""
    entries, at = {}, 0
    for name, shape in hf.manifest(config):
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
