"""Reads and writes Hugging Face folders: config.json in both dialects, safetensors, copies of the tokenizer's files.

Loading maps the files into memory and copies each device's slice of each parameter straight out of them; saving
streams one tensor at a time. Neither imports torch nor holds a second copy of the model on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from numpy.typing import ArrayLike

from jaxrl.errors import InputError, first_line
from jaxrl.files import at_home, is_hub_id, reading, writing
from jaxrl.json_fields import read_json
from jaxrl.models import config_json, decoder
from jaxrl.models.decoder import Cache, Config, Params, Spec
from jaxrl.models.tensors import INDEX, WHOLE, Tensors, read_index, require_safetensors, safetensors_header
from jaxrl.parallel.mesh import sharding_of
from jaxrl.types import JsonObject

__all__ = ["Model", "load", "manifest", "named_tensors", "read_config", "resolve", "save"]

_COMPANIONS = ("*token*", "vocab.*", "merges.txt", "chat_template*", "generation_config.json", "LICENSE*")


@dataclasses.dataclass(frozen=True)
class Model:
    """A config, its parameters, and the folder of the files that go with them."""

    config: Config
    params: Params
    folder: Path | None = None  # the Hugging Face folder it came from: tokenizer, generation config

    @property
    def forward(self) -> functools.partial[tuple[jax.Array, Cache]]:
        """`decoder.forward` for this config: (params, tokens, positions, attend, ...) -> (hidden, kept)."""
        return functools.partial(decoder.forward, self.config)

    def logits(self, params: Params, tokens: ArrayLike) -> Float32[jax.Array, "... N V"]:
        """Next-token logits of whole rows, [N] or [B, N] token ids; for tests and small models."""
        ids = jnp.asarray(tokens, jnp.int32)
        rows = jnp.atleast_2d(ids)
        return _logits(self.config, params, rows).reshape(*ids.shape, self.config.vocab_size)


_logits = jax.jit(decoder.logits, static_argnums=0)


def resolve(path: str | Path) -> Path:
    """Returns a local folder as it is; downloads a Hub id.

    Raises:
      InputError: if it is neither.
    """
    folder = at_home(path)
    if folder.is_dir():
        return folder
    if not is_hub_id(str(path)):
        remedy = "give a Hugging Face folder or a Hub id such as org/name"
        raise InputError(f"{path}: no such model folder; {remedy}")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors*", "config.json", "adapter_config.json", *_COMPANIONS]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # of the Hub's client, its HTTP library or the disk
        reason = first_line(error)
        raise InputError(f"{path}: no such folder, and the Hub did not have it: {reason}") from error


def read_config(folder: Path) -> Config:
    """`config_json.read_config` of a folder that is no adapter and has no weights of other formats alone.

    Raises:
      InputError: as that does, and for such a folder.
    """
    require_safetensors(folder)
    return config_json.read_config(folder)


def load(path: str | Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a Hugging Face folder or a Hub id.

    Args:
      path: folder with config.json and *.safetensors, or a Hub id.
      dtype: of the parameters in memory.
      mesh: where given, parameters are sharded over its `fsdp` axis; otherwise they lie on one device.

    Raises:
      InputError: for a missing, truncated or incomplete file, naming it, an unsupported architecture, or weights that
        are not finite.
    """
    folder = resolve(path)
    config = read_config(folder)
    tensors = Tensors(folder, config.tied)

    def put(spec: Spec) -> jax.Array:
        shape = decoder.stacked_shape(spec, config)
        read = functools.partial(tensors.read, spec, config.layers, np.dtype(dtype))
        if mesh is None:
            array = jax.device_put(read((slice(None),) * len(shape)))
        else:
            array = jax.make_array_from_callback(shape, sharding_of(shape, mesh), read)
        # or the host copies of many parameters would wait for their transfer
        return array.block_until_ready()

    params = jax.tree.map(put, decoder.declare(config))
    return Model(config, params, folder)


def save(model: Model, path: str | Path, dtype: str | None = None) -> None:
    """Writes a folder that transformers and vLLM load; replaces an older one's files.

    config.json is away while the others are exchanged: whenever the process dies, the folder is the old model, the new
    one, or none that loads.

    Args:
      model: its tokenizer's and other files are copied from `model.folder`.
      path: the folder; created if missing.
      dtype: of the parameters on disk, "float32" or "bfloat16"; their own where None.

    Raises:
      InputError: if the older one's index of weights cannot be read, or the config.json of `model.folder`, or there is
        no room.
      RunError: if a disk fails.
    """
    folder = Path(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or str(jax.tree.leaves(model.params)[0].dtype)
    stale, config = _stale_weights(folder), folder / "config.json"
    new_config, new_weights = config.with_suffix(".json.tmp"), folder / f"{WHOLE}.tmp"
    with writing(new_config):
        new_config.write_text(json.dumps(_config_json(model, dtype), indent=2), encoding="utf-8")
    _write_safetensors(new_weights, model, np.dtype(dtype))
    config.unlink(missing_ok=True)
    for file in stale:
        file.unlink(missing_ok=True)
    new_weights.replace(folder / WHOLE)
    if model.folder and model.folder.resolve() != folder.resolve():
        for pattern in _COMPANIONS:
            for file in model.folder.glob(pattern):
                if file.is_file() and not file.name.endswith(".safetensors"):
                    with reading(file):
                        content = file.read_bytes()
                    with writing(folder / file.name):
                        (folder / file.name).write_bytes(content)
    new_config.replace(config)


def _stale_weights(folder: Path) -> list[Path]:
    """The weights of an older model, which a new WHOLE replaces; the index last, as it names the others.

    Without an index, other files are weights only beside a config.json, or the one of a save that died.
    """
    shards = {folder / name for name in read_index(folder).values()}
    if not shards and not (folder / WHOLE).exists() and any(folder.glob("config.json*")):
        shards = set(folder.glob("*.safetensors"))
    shards |= set(folder.glob("model-*-of-*.safetensors"))
    return [*sorted(shards - {folder / WHOLE}), folder / INDEX]


def manifest(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """(Hugging Face's name, shape) of every tensor of a checkpoint, in the order of `named_tensors`."""
    return [(name, spec.shape) for spec in decoder.specs(config) for name in _names(spec, config)]


def named_tensors(config: Config, params: Params) -> Iterator[tuple[str, jax.Array]]:
    """Yields (Hugging Face's name, array) of every tensor of a checkpoint; slices out a layer only when it comes."""
    for spec, array in zip(decoder.specs(config), jax.tree.leaves(params), strict=True):
        names = _names(spec, config)
        yield from ((name, array[i] if spec.stacked else array) for i, name in enumerate(names))


def _names(spec: Spec, config: Config) -> list[str]:
    return [spec.name.format(i) for i in range(config.layers)] if spec.stacked else [spec.name]


def _write_safetensors(path: Path, model: Model, dtype: np.dtype) -> None:
    with writing(path), path.open("wb") as file:
        file.write(safetensors_header(manifest(model.config), dtype.name, {"format": "pt"}))
        for _, array in named_tensors(model.config, model.params):
            file.write(np.asarray(array).astype(dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _config_json(model: Model, dtype: str) -> JsonObject:
    """The config it came with, whose unknown fields other programs may need, or one made from Config."""
    raw = read_json(model.folder / "config.json") if model.folder else config_json.describe(model.config)
    kept = {name: value for name, value in raw.items() if name not in ("torch_dtype", "dtype")}
    return kept | {"dtype": dtype, "torch_dtype": dtype}
