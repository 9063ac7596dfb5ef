"""Files that are there completely or not at all, and the safetensors header."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}  # safetensors' names
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


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
      dtype: of all of them, a key of DTYPE_CODES.
      metadata: written as `__metadata__`.
    """
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name, shape in tensors:
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
