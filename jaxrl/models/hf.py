"""Hugging Face folders in and out: config.json in both dialects, safetensors, tokenizer files carried along.

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
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxrl.errors import InputError, first_line
from jaxrl.files import safetensors_header, write_atomically
from jaxrl.models import decoder
from jaxrl.models.decoder import Config, Params, Spec
from jaxrl.parallel.mesh import sharding_of

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
_COMPANIONS = ("*token*", "vocab.*", "merges.txt", "chat_template*", "generation_config.json", "LICENSE*")


@dataclasses.dataclass(frozen=True)
class Model:
    """A config, its parameters, and where the files that travel with them are."""

    config: Config
    params: Params
    folder: Path | None = None  # the Hugging Face folder it came from: tokenizer, generation config

    @property
    def forward(self):
        """`decoder.forward` for this config: (params, tokens, positions, attend, ...) -> (hidden, kept)."""
        return functools.partial(decoder.forward, self.config)

    def logits(self, params: Params, tokens: Any) -> jax.Array:
        """Next-token logits in float32, [..., N] int -> [..., N, V]; whole rows, for checks and small models."""
        tokens = jnp.asarray(tokens, jnp.int32)
        rows = jnp.atleast_2d(tokens)
        return _logits(self.config, params, rows).reshape(*tokens.shape, self.config.vocab_size)


_logits = jax.jit(decoder.logits, static_argnums=0)


def resolve(path: str | Path) -> Path:
    """A local folder as it is, a Hub id downloaded.

    Raises:
      InputError: if it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise InputError(
            f"{path}: no such model folder; give a Hugging Face folder or a Hub id such as org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.safetensors*", "config.json", *_COMPANIONS])
        )
    except Exception as error:
        raise InputError(
            f"{path}: no such folder, and the Hub did not have it: {first_line(error)}"
        ) from error


def read_config(folder: Path) -> Config:
    """Reads config.json, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
      InputError: if it is missing, of another architecture, or asks for something this decoder does not do.
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
    number = functools.partial(_number, path, raw | rope)
    heads = number("num_attention_heads")
    return Config(
        family=family,
        vocab_size=number("vocab_size"),
        width=number("hidden_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", number("hidden_size") // heads),
        mlp_width=number("intermediate_size"),
        rope_theta=float(number("rope_theta", 10_000.0)),
        norm_epsilon=float(number("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_positions=number("max_position_embeddings", 32_768),
    )


def _number(path: Path, raw: dict[str, Any], name: str, default: Any = None) -> Any:
    """A positive number, an integer unless the default is a float."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise InputError(f"{path}: the field {name} is missing")
    kinds = (int, float) if isinstance(default, float) else (int,)
    if type(value) not in kinds or value <= 0:
        raise InputError(f"{path}: {name} = {value!r} is not a positive {kinds[-1].__name__}")
    return value


def stop_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise InputError(f"{folder}: neither generation_config.json nor config.json has an eos_token_id; add one")


def load(path: str | Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a Hugging Face folder or Hub id.

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

    def place(spec: Spec) -> jax.Array:
        shape = decoder.stacked_shape(spec, config)
        read = functools.partial(tensors.read, spec, config.layers, np.dtype(dtype))
        if mesh is None:
            array = jax.device_put(read((slice(None),) * len(shape)))
        else:
            array = jax.make_array_from_callback(shape, sharding_of(shape, mesh), read)
        return (
            array.block_until_ready()
        )  # or the host copies of many parameters would wait for their transfer

    params = jax.tree.map(place, decoder.declare(config), is_leaf=lambda x: isinstance(x, Spec))
    return Model(config, params, folder)


def save(model: Model, path: str | Path, dtype: str | None = None) -> None:
    """Writes a folder that transformers and vLLM load; replaces the files of an older one atomically.

    Args:
      model: what to save; files that travel with a model are copied from `model.folder`.
      path: the folder; created if missing.
      dtype: of the weights on disk, "float32" or "bfloat16"; the parameters' own where None.
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

    def __init__(self, folder: Path):
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

    def read(self, spec: Spec, layers: int, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` of a parameter, stacked over layers where it is one per layer."""
        if "{}" not in spec.name:
            return np.asarray(self._get(spec.name, spec.shape)[index]).astype(dtype)
        names = [spec.name.format(layer) for layer in range(layers)[index[0]]]
        parts = [self._get(name, spec.shape)[index[1:]] for name in names]
        out = np.empty((len(parts), *parts[0].shape), dtype)
        for i, part in enumerate(parts):
            out[i] = part  # converts while copying: one layer in flight
        return out

    def _get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.by_name:
            raise InputError(
                f"{self.folder}: the weights have no tensor {name}; they do not belong to config.json"
            )
        tensor = self.by_name[name]
        if tensor.shape != shape:
            raise InputError(f"{self.folder}: {name} has shape {tensor.shape}, config.json makes it {shape}")
        return tensor


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read-only views of a file's tensors. The format: u64 header size, JSON header, raw little-endian tensors.

    Parsed here because safetensors' NumPy front end does not know bfloat16.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r")
        size = int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8 : 8 + size]))
        header.pop("__metadata__", None)
        body = data[8 + size :]
        tensors = {k: _view(body, **entry) for k, entry in header.items() if entry["dtype"] in _DTYPES}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: truncated or not a safetensors file; download it again") from None
    for name in header.keys() - tensors.keys():
        stored = header[name]["dtype"]
        raise InputError(f"{path}: {name} is stored as {stored}; {', '.join(_DTYPES)} are read")
    return tensors


def _view(body: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    begin, end = data_offsets
    if not 0 <= begin <= end <= body.size:
        raise ValueError
    return body[begin:end].view(_DTYPES[dtype]).reshape(shape)


def manifest(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """(Hugging Face name, shape) of every tensor of a checkpoint, in the order of `named_tensors`."""
    return [(name, spec.shape) for spec in decoder.specs(config) for name in _names(spec, config)]


def named_tensors(config: Config, params: Params) -> Iterator[tuple[str, jax.Array]]:
    """(Hugging Face name, array) of every tensor of a checkpoint; a layer is sliced out only when it is asked for."""
    for spec, array in zip(decoder.specs(config), jax.tree.leaves(params), strict=True):
        names = _names(spec, config)
        yield from ((name, array[i] if "{}" in spec.name else array) for i, name in enumerate(names))


def _names(spec: Spec, config: Config) -> list[str]:
    return [spec.name.format(i) for i in range(config.layers)] if "{}" in spec.name else [spec.name]


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


def _config_json(model: Model, dtype: str) -> dict[str, Any]:
    """The config it came with, whose unknown fields other programs may need, or one made from Config."""
    if model.folder:
        raw = _read_json(model.folder / "config.json")
        return {k: v for k, v in raw.items() if k not in ("torch_dtype", "dtype")} | {
            "dtype": dtype,
            "torch_dtype": dtype,
        }
    return describe(model.config) | {"dtype": dtype, "torch_dtype": dtype}


def describe(c: Config) -> dict[str, Any]:
    """A model as config.json has it."""
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; a Hugging Face folder has one") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value
