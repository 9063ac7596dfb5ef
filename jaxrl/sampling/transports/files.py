"""The trainer's weights on their way to samplers: by a file, in safetensors' format and with Hugging Face's names."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from blake3 import blake3

from jaxrl.errors import InputError
from jaxrl.files import safetensors_header
from jaxrl.models import decoder, hf
from jaxrl.models.decoder import Config
from jaxrl.sampling.client import Client, ServerError, each
from jaxrl.sampling.transports.base import cast, check_parameters


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
    check_parameters(params, config)
    path, hasher = folder / f"weights_{version:08d}.safetensors", blake3(max_threads=blake3.AUTO)
    try:
        with _recycled(folder, path) as file:
            header = safetensors_header(hf.manifest(config), dtype)
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
