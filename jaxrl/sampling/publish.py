"""The trainer's weights as a file that samplers load: safetensors with Hugging Face's names."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blake3 import blake3
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.errors import InputError
from jaxrl.models import decoder
from jaxrl.models.decoder import Config, Spec

TYPES = {"bfloat16": "BF16", "float32": "F32"}


class Published(NamedTuple):
    path: Path
    blake3: str  # digest of the file
    version: int


def write(
    params: decoder.Params, config: Config, folder: Path, version: int, dtype: str = "bfloat16"
) -> Published:
    """Writes FOLDER/weights_VERSION.safetensors; it and its predecessor are kept.

    A stacked parameter is gathered, cast and fetched as one array, while the one before it is being written. The file
    appears under its name when it is complete. Every process takes part; the first one writes.

    Raises:
      InputError: if a parameter is not what the config declares or holds a value that is not finite, which servers
        load without a word; or if the file cannot be written.
    """
    declared = jax.tree.leaves(decoder.declare(config), is_leaf=lambda x: isinstance(x, Spec))
    leaves = jax.tree.leaves(params)
    shapes = [decoder.stacked_shape(spec, config) for spec in declared]
    if [leaf.shape for leaf in leaves] != shapes:
        raise InputError("the parameters to publish are not those of the model; was its config changed?")
    path, hasher = folder / f"weights_{version:08d}.safetensors", blake3(max_threads=blake3.AUTO)
    writes = jax.process_index() == 0
    try:
        with _recycled(folder, path) if writes else open(os.devnull, "wb") as file:  # noqa: PTH123
            parts = zip(declared, _fetched(leaves, dtype), strict=True)
            header = _header(declared, config, dtype)
            hasher.update(header)
            file.write(header)
            for spec, (array, finite) in parts:
                if not finite:
                    raise InputError(f"{spec.name} holds values that are not finite; go back to a checkpoint")
                part = array.reshape(-1).view(np.uint8).data
                if writes:
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


def _fetched(leaves: list[jax.Array], dtype: str) -> Iterator[tuple[np.ndarray, bool]]:
    """Whole arrays in `dtype` on the host, and whether they are finite; one in the making while another is used."""
    ahead: Any = None
    for leaf in leaves:
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        current = _cast(dtype, sharding)(leaf)
        if ahead is not None:
            yield np.asarray(ahead[0]), bool(ahead[1])
        ahead = current
    if ahead is not None:
        yield np.asarray(ahead[0]), bool(ahead[1])


@functools.cache
def _cast(dtype: str, sharding: Any) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    return jax.jit(lambda x: (x.astype(dtype), jnp.isfinite(x).all()), out_shardings=(sharding, None))


def _header(declared: list[Spec], config: Config, dtype: str) -> bytes:
    """safetensors': 8 bytes of length, then JSON; the layers of a stacked parameter lie one behind another."""
    entries, at = {}, 0
    for spec in declared:
        size = int(np.prod(spec.shape)) * jnp.dtype(dtype).itemsize
        layers = range(config.layers) if "{}" in spec.name else [0]
        for layer in layers:
            entries[spec.name.format(layer)] = {
                "dtype": TYPES[dtype], "shape": list(spec.shape), "data_offsets": [at, at + size],
            }  # fmt: skip
            at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
