"""The weights of a Hugging Face folder: safetensors files, mapped into memory."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import ml_dtypes
import numpy as np
from blake3 import blake3
from jaxtyping import Shaped, UInt8
from safetensors import SafetensorError, safe_open

from jaxrl.errors import InputError, first_line
from jaxrl.files import reading
from jaxrl.json_fields import read_json, shown
from jaxrl.models.decoder import Spec

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def require_safetensors(folder: Path) -> None:
    """Raises: InputError, with the remedy, for an adapter, and for a folder of PyTorch's or GGUF files alone."""
    here = _quoted(folder)
    if (folder / "adapter_config.json").exists():
        merged = _quoted(folder.absolute().with_name(f"{folder.absolute().name}-merged"))
        code = (
            "from peft import AutoPeftModelForCausalLM as M; "
            f'M.from_pretrained({here}, dtype="auto").merge_and_unload().save_pretrained({merged})'
        )
        raise InputError(
            f"{folder}: adapter_config.json makes it an adapter of another model; delete that file if the weights are "
            f"whole, or merge it and copy its tokenizer there: python -c {shlex.quote(code)}"
        )
    if any(folder.glob("*.safetensors*")):
        return
    only = "only safetensors weights are read"
    if any(folder.glob("pytorch_model*")):
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f'M.from_pretrained({here}, dtype="auto").save_pretrained({here})'
        )
        raise InputError(f"{folder}: {only}; convert pytorch_model: python -c {shlex.quote(code)}")
    if any(folder.glob("*.gguf")):
        raise InputError(f"{folder}: {only}; get the folder that its GGUF file was made from")


def _quoted(folder: Path) -> str:
    """A folder as a string of Python, in double quotes."""
    return json.dumps(str(folder.absolute()), ensure_ascii=False)


def read_index(folder: Path) -> dict[str, str]:
    """The name of each tensor's file, from the index of a folder's weights; empty without an index.

    Raises:
      InputError: if the index cannot be read, or names anything but *.safetensors files of the folder.
    """
    path = folder / INDEX
    # a dangling link is there too: an index that cannot be read is not the same as none
    if not os.path.lexists(path):
        return {}
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path}: weight_map = {shown(files)} names no files; get the index again")
    for name in files.values():
        plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise InputError(
                f"{path}: weight_map has {shown(name)}, not a *.safetensors file of the folder; get the index again"
            )
    return files


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, sorted: those of its index, or model.safetensors, or all *.safetensors.

    Raises:
      InputError: if there are none, or one is missing.
    """
    names, index, whole = set(read_index(folder).values()), folder / INDEX, folder / WHOLE
    files = [folder / name for name in names] or ([whole] if os.path.lexists(whole) else [])
    files = sorted(files or folder.glob("*.safetensors"))
    if not files:
        require_safetensors(folder)
        raise InputError(f"{folder}: no *.safetensors file; only safetensors weights are read")
    for file in files:
        # opening a pipe would wait; Path.is_file raises for a name that is too long
        if not os.path.isfile(file):  # noqa: PTH113
            why = f"{index} names it, and it" if names else "it"
            raise InputError(f"{file}: {why} is missing or not a regular file; get it again")
    return files


def hash_weights(folder: Path) -> str:
    """A digest of the files of a folder's weights."""
    weights = blake3(max_threads=blake3.AUTO)
    for file in weight_files(folder):
        with reading(file):
            weights.update_mmap(file)
    return weights.hexdigest()


class _Stored(NamedTuple):
    """A tensor of a file."""

    file: Path
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    data: UInt8[np.ndarray, " bytes"]


class Tensors:
    """The tensors of a folder's weights, mapped into memory; those that nobody reads do not matter.

    Args:
      folder: the Hugging Face folder.
      tied: whether config.json makes the embedding the LM head; then the files may have it under either name.

    Raises:
      InputError: for files that safetensors refuses, and for a tied model with an LM head of its own.
    """

    def __init__(self, folder: Path, tied: bool) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.by_name: dict[str, list[_Stored]] = {}
        for file in weight_files(folder):
            for tensor in _map_safetensors(file):
                self.by_name.setdefault(tensor.name, []).append(tensor)
        self.head_is_embedding = tied and not self._named(EMBED)
        if tied and self._named(EMBED) and self._named(HEAD):
            self._require_equal()

    def read(
        self, spec: Spec, layers: int, dtype: np.dtype, index: tuple[slice, ...]
    ) -> Shaped[np.ndarray, " ..."]:
        """Reads the slice `index` of a parameter, stacked over layers where there is one a layer.

        Raises:
          InputError: if a tensor is missing, ambiguous, of another shape or type, or not finite.
        """
        names, within = [spec.name], index
        if spec.stacked:
            names, within = [spec.name.format(i) for i in range(layers)[index[0]]], index[1:]
        parts = [self._get(name, spec.shape)[within] for name in names]
        out = np.empty((len(parts), *parts[0].shape), dtype)
        for i, part in enumerate(parts):
            with np.errstate(over="ignore", invalid="ignore"):
                out[i] = part  # converts while copying: one layer in flight
            if not np.isfinite(out[i]).all():
                self._refuse_values(names[i], spec.shape, dtype)
        return out if spec.stacked else out[0]

    def _named(self, name: str) -> list[_Stored]:
        """The tensors of a name. A base model's names lack the prefix `model.`, as in transformers."""
        return [
            t for n in dict.fromkeys((name, name.removeprefix("model."))) for t in self.by_name.get(n, [])
        ]

    def _get(self, name: str, shape: tuple[int, ...] | None = None) -> Shaped[np.ndarray, " ..."]:
        found = self._named(HEAD if name == EMBED and self.head_is_embedding else name)
        if not found:
            reason = f"the weights have no tensor {name}; they do not belong to config.json"
            raise InputError(f"{self.folder}: {reason}")
        tensor = found[0]
        if len(found) > 1:
            both = " and ".join(f"{t.file.name} ({t.name})" for t in found[:2])
            raise InputError(f"{self.folder}: {name} is in {both}; keep one")
        named = self.index.get(tensor.name, tensor.file.name)
        if named != tensor.file.name:
            where = f"{tensor.name} should be in {named}, but is in {tensor.file.name}"
            raise InputError(f"{self.folder / INDEX}: {where}; get the folder again")
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError(f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; {known} are read")
        if shape not in (None, tensor.shape):
            raise InputError(f"{self.folder}: {name} has shape {tensor.shape}, config.json makes it {shape}")
        return tensor.data.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def _require_equal(self) -> None:
        """Raises: InputError if LM head and embedding differ: transformers unties them, vLLM takes the embedding."""
        embed, head = self._get(EMBED), self._get(HEAD)
        # row by row, or the comparison would hold a third matrix
        if embed.shape != head.shape or not all(map(np.array_equal, embed, head)):
            raise InputError(
                f"{self.folder}: config.json ties {HEAD} to {EMBED}, but they differ; set tie_word_embeddings to false "
                "in config.json"
            )

    def _refuse_values(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> NoReturn:
        whole = self._get(name, shape)
        lost = whole.size - np.count_nonzero(np.isfinite(whole))
        reason = f"{lost} values that are NaN or infinite; the checkpoint is damaged, get another"
        if not lost:
            with np.errstate(over="ignore"):
                lost = whole.size - np.count_nonzero(np.isfinite(whole.astype(dtype)))
            reason = f"{lost} values too large for {dtype}; load it in a wider type, or get another"
        raise InputError(f"{self.folder}: {name} has {reason}")


def _map_safetensors(path: Path) -> list[_Stored]:
    """Maps a file's tensors as read-only views. Format: u64 header size, JSON header, raw little-endian tensors.

    safetensors checks the file, so that both refuse the same; its NumPy front end does not know bfloat16.
    """
    try:
        with safe_open(path, "numpy"):
            data = np.memmap(path, np.uint8, mode="r")
    except (SafetensorError, OSError) as error:
        reason = f"truncated or not a safetensors file ({first_line(error)})"
        raise InputError(f"{path}: {reason}; download it again") from None
    size = int(data[:8].view("<u8")[0])
    header, body = json.loads(bytes(data[8 : 8 + size])), data[8 + size :]
    header.pop("__metadata__", None)
    return [
        _Stored(path, name, entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    ]


def safetensors_header(
    tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: str, metadata: dict[str, str] | None = None
) -> bytes:
    """The bytes before the tensors: 8 of length, then JSON, padded to a multiple of 8.

    Args:
      tensors: (name, shape) in the order in which their bytes follow.
      dtype: of all of them, one of DTYPES by NumPy's name.
      metadata: written as `__metadata__`.
    """
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begin, kind = 0, np.dtype(dtype)
    code = next(code for code, known in DTYPES.items() if known == kind)
    for name, shape in tensors:
        end = begin + math.prod(shape) * kind.itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
