"""Model weights by file: the safetensors format, with Hugging Face's names."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from blake3 import blake3

from jaxrl.files import safetensors_header, writing
from jaxrl.models import hf
from jaxrl.models.config_json import describe
from jaxrl.models.decoder import Config, Params
from jaxrl.sampling.client import Client, Failures, ask_all
from jaxrl.sampling.transports.base import cast, require_shapes
from jaxrl.types import JsonObject


class Published(NamedTuple):
    """A complete file of model weights."""

    path: Path
    blake3: str  # digest of the file
    version: int


class Files:
    """The Transport in which every server reads a file of the newest model weights."""

    backend = "jaxrl_file"

    def __init__(self, config: Config, folder: Path, dtype: str = "bfloat16", limit: float = 300.0) -> None:
        """
        Args:
          config: the model's.
          folder: where the files go; every server must be able to read it (/dev/shm, a shared file system).
          dtype: of the served weights.
          limit: seconds for a server to load a file.
        """
        self._config, self._folder, self._dtype, self._limit = config, folder, dtype, limit
        self._published: Published | None = None

    def prepare(self, params: Params, version: int) -> None:
        self._published = write(params, self._config, self._folder, version, self._dtype)

    def follow(self, params: Params) -> None:
        for _ in cast(params, self._config, self._dtype, split=True):
            pass

    async def greet(self, client: Client, url: str) -> None:
        fields = describe(self._config)
        # servers may have another limit, and theta is in rope_parameters
        left_out = ("max_position_embeddings", "rope_theta", "rope_scaling", "architectures")
        model = {key: value for key, value in fields.items() if key not in left_out}
        if self._config.family == "llama":
            model["sliding_window"] = None  # transformers ignores it in a Llama, vLLM does not
        await client.order(url, "/init_weight_transfer_engine", {"init_info": {"model": model}}, self._limit)

    async def connect(self, client: Client, urls: Sequence[str], failed: Failures) -> None:
        await ask_all(urls, functools.partial(self.greet, client), failed)  # it may have been restarted

    async def deliver(self, client: Client, urls: Sequence[str], failed: Failures) -> None:
        assert self._published
        info = {"path": str(self._published.path.absolute()), "blake3": self._published.blake3}

        def update(url: str) -> Awaitable[JsonObject]:
            return client.order(url, "/update_weights", {"update_info": info}, self._limit)

        await ask_all(urls, update, failed)

    def done(self) -> None:
        pass


def write(params: Params, config: Config, folder: Path, version: int, dtype: str = "bfloat16") -> Published:
    """Writes FOLDER/weights_VERSION.safetensors; it and its predecessor are kept.

    Each part is gathered and cast while the one before it is being written. The file appears under its name once it is
    complete.

    Raises:
      InputError: see `require_shapes` and `cast`; or if the folder has no room or may not be written to.
      RunError: if the disk fails.
    """
    require_shapes(params, config)
    path, hasher = folder / f"weights_{version:08d}.safetensors", blake3(max_threads=blake3.AUTO)
    with writing(path), _recycled(folder, path) as file:
        header = safetensors_header(hf.manifest(config), dtype)
        hasher.update(header)
        file.write(header)
        for array in cast(params, config, dtype, split=True):
            part = np.asarray(array).reshape(-1).view(np.uint8).data
            hasher.update(part)
            file.write(part)
    return Published(path, hasher.hexdigest(), version)


@contextlib.contextmanager
def _recycled(folder: Path, path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when that is done: an older one than the newest, where there is one.

    Overwriting pages that tmpfs has already allocated is four times faster than allocating new ones.
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
