"""Model weights by file: the safetensors format, with Hugging Face's names."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from blake3 import blake3

from jaxrl.errors import InputError
from jaxrl.files import writing
from jaxrl.lock import alone
from jaxrl.models import hf
from jaxrl.models.config_json import describe
from jaxrl.models.decoder import Config, Params
from jaxrl.models.tensors import safetensors_header
from jaxrl.sampling.client import Client, Failures, ask_all
from jaxrl.sampling.transports.base import cast, require_shapes
from jaxrl.types import JsonObject, Say


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
          folder: where the files go, see `own_folder`; every server must be able to read it.
          dtype: of the served weights.
          limit: seconds for a server to load a file.
        """
        self._config, self._folder, self._dtype, self._limit = config, folder, dtype, limit
        self._kept: list[Published] = []  # the newest, and the one before it

    def prepare(self, params: Params, version: int) -> None:
        spare = self._kept.pop(0).path if len(self._kept) > 1 else None
        written = write(params, self._config, self._folder, version, self._dtype, spare)
        self._kept = [*(kept for kept in self._kept if kept.path != written.path), written]

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
        newest = self._kept[-1]
        info = {"path": str(newest.path.absolute()), "blake3": newest.blake3}

        def update(url: str) -> Awaitable[JsonObject]:
            return client.order(url, "/update_weights", {"update_info": info}, self._limit)

        await ask_all(urls, update, failed)

    def done(self) -> None:
        pass


@contextlib.contextmanager
def own_folder(folder: Path, say: Say = print) -> Iterator[None]:
    """Makes a folder for weights that one user alone can read and one run at a time owns; it ends without weights.

    What a killed owner has left is deleted first, so nothing in it can be taken for newer than it is.

    Raises:
      InputError: if it is a link or another user's, or another run is at work there.
      RunError: if the disk fails.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise InputError(f"{folder}: is no folder of this user; delete it, or set another sampler.folder")
        folder.chmod(0o700)
    with alone(folder, "publishing", say):
        _clear(folder)
        try:
            yield
        finally:
            _clear(folder)


def _clear(folder: Path) -> None:
    for path in folder.glob("weights_*"):
        with contextlib.suppress(OSError):  # what cannot be deleted is named when it is in the way
            path.unlink()


def write(
    params: Params,
    config: Config,
    folder: Path,
    version: int,
    dtype: str = "bfloat16",
    spare: Path | None = None,
) -> Published:
    """Writes FOLDER/weights_VERSION.safetensors, which no other user can read.

    Each part is gathered and cast while the one before it is being written. The file appears under its name once it is
    complete.

    Args:
      params: the trainer's.
      config: the model's.
      folder: made if missing.
      version: of the weights.
      dtype: of the file.
      spare: a file of `write` that nothing needs any more. It is overwritten and renamed: pages that tmpfs has already
        allocated are written four times faster than new ones.

    Raises:
      InputError: see `require_shapes` and `cast`; or if the folder has no room or may not be written to.
      RunError: if the disk fails.
    """
    require_shapes(params, config)
    path, hasher = folder / f"weights_{version:08d}.safetensors", blake3(max_threads=blake3.AUTO)
    with writing(path), _becoming(path, spare) as file:
        header = safetensors_header(hf.manifest(config), dtype)
        hasher.update(header)
        file.write(header)
        for array in cast(params, config, dtype, split=True):
            part = np.asarray(array).reshape(-1).view(np.uint8).data
            hasher.update(part)
            file.write(part)
    return Published(path, hasher.hexdigest(), version)


@contextlib.contextmanager
def _becoming(path: Path, spare: Path | None) -> Iterator[IO[bytes]]:
    """A file to write, in the memory of `spare`, that becomes `path` when that is done. It follows no link."""
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    if spare:
        spare.replace(partial)
    else:
        partial.unlink(missing_ok=True)
    new = 0 if spare else os.O_CREAT | os.O_EXCL
    try:
        with open(os.open(partial, os.O_RDWR | os.O_NOFOLLOW | new, 0o600), "r+b") as file:  # noqa: PTH123
            yield file
            file.truncate()
        partial.replace(path)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
