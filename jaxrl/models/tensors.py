"""The weights of a Hugging Face folder: safetensors files, mapped into memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8

from jaxrl.errors import InputError
from jaxrl.files import DTYPES
from jaxrl.models.config_json import read_json
from jaxrl.models.decoder import Spec


class Tensors:
    """The tensors of a folder's safetensors files, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder}: no *.safetensors file; only safetensors weights are read")
        self.folder = folder
        self.by_name = {name: tensor for file in files for name, tensor in _map_safetensors(file).items()}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map", {})
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
