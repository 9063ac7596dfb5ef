"""Reads and writes Hugging Face folders: config.json in both dialects, safetensors, copies of the tokenizer's files.

Loading maps the files into memory and copies each device's slice of each parameter straight out of them; saving
streams one tensor at a time. Neither imports torch nor holds a second copy of the model on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from numpy.typing import ArrayLike

from jaxrl.errors import InputError, first_line
from jaxrl.files import DTYPES, safetensors_header, write_atomically
from jaxrl.models import decoder
from jaxrl.models.decoder import Cache, Config, Params, Spec
from jaxrl.parallel.mesh import sharding_of
from jaxrl.types import JsonObject

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
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
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        remedy = "give a Hugging Face folder or a Hub id such as org/name"
        raise InputError(f"{path}: no such model folder; {remedy}")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors*", "config.json", *_COMPANIONS]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # of the Hub's client, its HTTP library or the disk
        reason = first_line(error)
        raise InputError(f"{path}: no such folder, and the Hub did not have it: {reason}") from error


def read_config(folder: Path) -> Config:
    """Reads config.json, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
      InputError: if it is missing, of another architecture, or has a feature that the decoder lacks.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    family = raw.get("model_type")
    if family not in _ARCHITECTURES:
        raise InputError(f"{path}: model_type = {family!r} is not supported; {', '.join(_ARCHITECTURES)} are")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters = {rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        f"rope scaling of type {kind!r}": kind != "default",
        "sliding-window attention": bool(raw.get("use_sliding_window")),
        f"hidden_act = {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": family != "qwen2" and bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
    }
    if any(refused.values()):
        features = ", ".join(feature for feature, present in refused.items() if present)
        raise InputError(f"{path}: {features} is not supported; only the plain {family} decoder is")
    fields = raw | rope
    integer, real = functools.partial(_integer, path, fields), functools.partial(_real, path, fields)
    heads = integer("num_attention_heads")
    return Config(
        family=family,
        vocab_size=integer("vocab_size"),
        width=integer("hidden_size"),
        layers=integer("num_hidden_layers"),
        heads=heads,
        kv_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", integer("hidden_size") // heads),
        mlp_width=integer("intermediate_size"),
        rope_theta=real("rope_theta", 10_000.0),
        norm_epsilon=real("rms_norm_eps", 1e-6),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_positions=integer("max_position_embeddings", 32_768),
    )


def _integer(path: Path, fields: JsonObject, name: str, default: int | None = None) -> int:
    return int(_positive(path, fields, name, default, (int,)))


def _real(path: Path, fields: JsonObject, name: str, default: float) -> float:
    return float(_positive(path, fields, name, default, (int, float)))


def _positive(
    path: Path, fields: JsonObject, name: str, default: float | None, kinds: tuple[type, ...]
) -> float:
    """A field that has to be a positive number of one of these types."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise InputError(f"{path}: the field {name} is missing")
    if type(value) not in kinds or value <= 0:
        raise InputError(f"{path}: {name} = {value!r} is not a positive {kinds[-1].__name__}")
    return value


def stop_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, or else of config.json.

    Raises:
      InputError: if neither has any.
    """
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise InputError(f"{folder}: neither generation_config.json nor config.json has an eos_token_id; add one")


def load(path: str | Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a Hugging Face folder or a Hub id.

    Args:
      path: folder with config.json and *.safetensors, or a Hub id.
      dtype: of the parameters in memory.
      mesh: where given, parameters are sharded over its `fsdp` axis; otherwise they lie on one device.

    Raises:
      InputError: for a missing, truncated or incomplete file, naming it, or an unsupported architecture.
    """
    folder = resolve(path)
    config = read_config(folder)
    tensors = _Tensors(folder)

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
    """Writes a folder that transformers and vLLM load; replaces the files of an older one atomically.

    Args:
      model: its tokenizer's and other files are copied from `model.folder`.
      path: the folder; created if missing.
      dtype: of the parameters on disk, "float32" or "bfloat16"; their own where None.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or str(jax.tree.leaves(model.params)[0].dtype)
    if model.folder and model.folder.resolve() != folder.resolve():
        for pattern in _COMPANIONS:
            for file in model.folder.glob(pattern):
                if file.is_file() and not file.name.endswith(".safetensors"):
                    shutil.copyfile(file, folder / file.name)
    write_atomically(folder / "config.json", json.dumps(_config_json(model, dtype), indent=2))
    _write_safetensors(folder / "model.safetensors", model, np.dtype(dtype))
    for stale in (*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors.index.json")):
        stale.unlink()


class _Tensors:
    """The tensors of a folder's safetensors files, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder}: no *.safetensors file; only safetensors weights are read")
        self.folder = folder
        self.by_name = {name: tensor for file in files for name, tensor in _map_safetensors(file).items()}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = _read_json(index).get("weight_map", {})
            if missing := set(shards) - set(self.by_name):
                name = min(missing)
                raise InputError(
                    f"{index}: {name} should be in {shards[name]}, which is missing; get it again"
                )

    def read(
        self, spec: Spec, layers: int, dtype: np.dtype, index: tuple[slice, ...]
    ) -> Shaped[np.ndarray, " ..."]:
        """Reads the slice `index` of a parameter, stacked over layers where there is one a layer."""
        if not spec.stacked:
            return np.asarray(self._get(spec.name, spec.shape)[index]).astype(dtype)
        names = [spec.name.format(layer) for layer in range(layers)[index[0]]]
        parts = [self._get(name, spec.shape)[index[1:]] for name in names]
        out = np.empty((len(parts), *parts[0].shape), dtype)
        for i, part in enumerate(parts):
            out[i] = part  # converts while copying: one layer in flight
        return out

    def _get(self, name: str, shape: tuple[int, ...]) -> Shaped[np.ndarray, " ..."]:
        if name not in self.by_name:
            reason = f"the weights have no tensor {name}; they do not belong to config.json"
            raise InputError(f"{self.folder}: {reason}")
        tensor = self.by_name[name]
        if tensor.shape != shape:
            raise InputError(f"{self.folder}: {name} has shape {tensor.shape}, config.json makes it {shape}")
        return tensor


def _map_safetensors(path: Path) -> dict[str, Shaped[np.ndarray, " ..."]]:
    """Maps a file's tensors as read-only views. Format: u64 header size, JSON header, raw little-endian tensors.

    Parsed here because safetensors' NumPy front end does not know bfloat16.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r")
        size = int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8 : 8 + size]))
        header.pop("__metadata__", None)
        body = data[8 + size :]
        tensors = {k: _view(body, **entry) for k, entry in header.items() if entry["dtype"] in DTYPES}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: truncated or not a safetensors file; download it again") from None
    for name in header.keys() - tensors.keys():
        stored = header[name]["dtype"]
        raise InputError(f"{path}: {name} is stored as {stored}; {', '.join(DTYPES)} are read")
    return tensors


def _view(
    body: UInt8[np.ndarray, " bytes"], dtype: str, shape: list[int], data_offsets: list[int]
) -> Shaped[np.ndarray, " ..."]:
    begin, end = data_offsets
    if not 0 <= begin <= end <= body.size:
        raise ValueError
    return body[begin:end].view(DTYPES[dtype]).reshape(shape)


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
    header = safetensors_header(manifest(model.config), dtype.name, {"format": "pt"})
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(header)
        for _, array in named_tensors(model.config, model.params):
            file.write(np.asarray(array).astype(dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _config_json(model: Model, dtype: str) -> JsonObject:
    """The config it came with, whose unknown fields other programs may need, or one made from Config."""
    raw = _read_json(model.folder / "config.json") if model.folder else describe(model.config)
    kept = {name: value for name, value in raw.items() if name not in ("torch_dtype", "dtype")}
    return kept | {"dtype": dtype, "torch_dtype": dtype}


def describe(c: Config) -> JsonObject:
    """The fields of config.json that describe a model."""
    return {
        "architectures": [_ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied,
    }


def _read_json(path: Path) -> JsonObject:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; a Hugging Face folder has one") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value
