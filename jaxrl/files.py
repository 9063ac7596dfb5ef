"""Files that are there completely or not at all, and the safetensors header."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

# safetensors' names
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def write_atomically(path: Path, text: str) -> None:
    """Writes all of the text or none of it, whenever the process dies."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
