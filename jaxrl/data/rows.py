"""Rows of files: which files a path names, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl.errors import InputError, first_line
from jaxrl.types import JsonObject

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[str, JsonObject]]  # where a row is, for messages, and its values by column


def read_rows(
    path: str, columns: Sequence[str], optional: Sequence[str] = (), objects: Sequence[str] = ()
) -> Rows:
    """Yields (where, {column: value}) from a .jsonl or .parquet file, or the training files of a Hub data set.

    Args:
      path: the file, or a Hub id.
      columns: to read; a dot enters a struct.
      optional: to read where a row or file has them.
      objects: to read whole, as one value, where they are structs too; None where a row has none.

    Raises:
      InputError: if there is no such file, data set or column, or a line is not JSON.
    """
    for file in _files(path):
        yield from (_parquet_rows if file.suffix == ".parquet" else _jsonl_rows)(
            file, columns, optional, objects
        )


def _files(path: str) -> list[Path]:
    file = Path(path)
    if file.suffix in (".jsonl", ".parquet"):
        if not file.is_file():
            raise InputError(f"{path}: no such file; data.path takes a .jsonl or .parquet file or a Hub id")
        return [file]
    if path.count("/") != 1 or file.exists():
        raise InputError(f"{path}: neither a .jsonl nor a .parquet file nor a Hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl"]))
    except Exception as error:  # of the network, of the Hub, or about the name; the client has dozens
        raise InputError(f"{path}: no such file, and the Hub did not have it: {first_line(error)}") from None
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".jsonl", ".parquet"))
    if not files:
        raise InputError(f"{path}: the data set has no .parquet or .jsonl file; convert it to one of them")
    return [f for f in files if "train" in str(f.relative_to(folder))] or files


def _jsonl_rows(file: Path, columns: Sequence[str], optional: Sequence[str], objects: Sequence[str]) -> Rows:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error}); write one object a line") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: a {type(row).__name__}, not an object; write one object a line")
            flat = _flat(row)
            _require(columns, flat, where)
            found = {c: flat[c] for c in (*columns, *optional) if c in flat}
            yield where, found | {c: row.get(c) for c in objects}


def _parquet_rows(
    file: Path, columns: Sequence[str], optional: Sequence[str], objects: Sequence[str]
) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a parquet file ({first_line(error)}); get it again") from None
    there = _flat_table(parquet.schema_arrow.empty_table()).column_names
    _require(columns, there, str(file))
    _require(objects, parquet.schema_arrow.names, str(file))
    wanted = [*columns, *(c for c in optional if c in there)]
    number = 0
    for chunk in parquet.iter_batches(columns=[*wanted, *objects]):
        whole = pa.Table.from_batches([chunk])
        table = _flat_table(whole)
        read = [*(_single_users(table[c]) for c in wanted), *(whole[c] for c in objects)]
        for values in zip(*(column.to_pylist() for column in read), strict=True):
            number += 1
            yield f"{file}, row {number}", dict(zip((*wanted, *objects), values, strict=True))


def _flat(row: JsonObject, prefix: str = "") -> JsonObject:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: JsonObject = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _flat_table(table: pa.Table) -> pa.Table:
    """The same for the columns of a table."""
    import pyarrow as pa

    while any(pa.types.is_struct(kind) for kind in table.schema.types):
        table = table.flatten()
    return table


def _single_users(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The text of chats, where each is one message of the user's; other columns as they are.

    Arrow does it without Python objects: DAPO's file has 1.8 million rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    chats = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
    if not chats or {field.name for field in kind.value_type} != {"role", "content"}:
        return column
    if not pa.types.is_string(kind.value_type.field("content").type):
        return column  # parts
    lengths = pc.min_max(pc.list_value_length(column)).as_py()
    if lengths != {"min": 1, "max": 1} or column.null_count:
        return column
    messages = pc.list_flatten(column)
    users = pc.all(pc.equal(pc.struct_field(messages, "role"), "user"), skip_nulls=False).as_py()
    return pc.struct_field(messages, "content") if users else column


def _require(columns: Sequence[str], there: Iterable[str], where: str) -> None:
    for name in columns:
        if name not in there:
            raise InputError(
                f"{where}: no column '{name}'; there are: {', '.join(there)}. Set data.problem_column and "
                "data.answer_column"
            )
