"""Rows of files: JSON lines, whole JSON files and parquet, by column."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxrl.data.files import LINES, WHOLE, format_of
from jaxrl.errors import InputError, first_line, read_error
from jaxrl.types import JsonObject

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[str, JsonObject]]  # where a row is, for messages, and its values by column
Json = Iterator[
    tuple[str, object, bool]
]  # where a row is, the row, and whether half a character may be in it
PROBLEM = "data.problem_column and data.answer_column"  # the keys that name most columns
BOM = b"\xef\xbb\xbf"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a character, as JSON writes it


def read_rows(
    files: Iterable[Path],
    columns: Sequence[str],
    optional: Sequence[str] = (),
    objects: Mapping[str, str] = MappingProxyType({}),
    named: Mapping[str, str] | None = None,
) -> Rows:
    """Yields (where, {column: value}) from the rows of files, one file after another.

    Args:
      files: of the formats in files.py.
      columns: to read; a dot enters a struct.
      optional: to read where a row or file has them.
      objects: to read whole, as one value, where they are structs too, each with the recipe's key that names it; None
        where a row of JSON has none. With an empty key they are read where a row or file has them.
      named: more columns to read, each with the recipe's key that names it, for messages.

    Raises:
      InputError: naming the file, and the row where it is known, for what cannot be read or lacks a column.
    """
    needed = {**(named or {}), **dict.fromkeys(columns, PROBLEM)}
    for file in files:
        kind = format_of(file.name)
        if kind in (*LINES, *WHOLE):
            for where, row, halves in (_lines if kind in LINES else _whole)(file):
                yield where, _values(where, row, halves, needed, optional, objects)
        else:
            yield from _parquet_rows(file, needed, optional, objects)


def _lines(file: Path) -> Json:
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                yield f"{file}:{number}", _parsed(text, f"{file}:{number}"), bool(SURROGATE.search(text))


def _whole(file: Path) -> Json:
    """The rows of a list, which may be the only one in an object; or JSON lines, which some call .json."""
    with _opened(file) as opened:
        text = opened.read().removeprefix(BOM)
    if not text.strip():
        return
    try:
        found = _parsed(text, str(file))
    except InputError as error:
        if "Extra data" not in str(error):
            raise
        yield from _lines(file)
        return
    lists = [
        each for each in (found.values() if isinstance(found, dict) else [found]) if isinstance(each, list)
    ]
    if len(lists) != 1:
        raise InputError(
            f"{file}: neither a list of objects nor an object with one list; write one object a line"
        )
    halves = bool(SURROGATE.search(text))
    yield from ((f"{file}, row {number}", row, halves) for number, row in enumerate(lists[0], 1))


@contextmanager
def _opened(file: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb") as opened:
            yield opened
    except (OSError, EOFError, zlib.error) as error:
        raise read_error(file, error, "get it again") from None


def _parsed(text: bytes, where: str) -> object:
    try:
        return json.loads(text.decode())
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; write one object of few levels") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); write one object a line, in UTF-8") from None


def _values(
    where: str,
    row: object,
    halves: bool,
    columns: Mapping[str, str],
    optional: Sequence[str],
    objects: Mapping[str, str],
) -> JsonObject:
    """The wanted values of a row of JSON."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not an object; write one object a line")
    try:
        flat = _flat(row)
        _require(columns, flat, where)
        found = {c: flat[c] for c in (*columns, *optional) if c in flat}
        found |= {c: row.get(c) for c, key in objects.items() if key or c in row}
        if halves:
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; write one object of few levels") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(
            f"{where}: has {half}, half of a character; mend the text or remove the row"
        ) from None
    return found


def _parquet_rows(
    file: Path, columns: Mapping[str, str], optional: Sequence[str], objects: Mapping[str, str]
) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        there = _flat_table(parquet.schema_arrow.empty_table()).column_names
        _require(columns, there, str(file))
        names = parquet.schema_arrow.names
        _require({c: key for c, key in objects.items() if key}, names, str(file))
        wanted, wholes = [*columns, *(c for c in optional if c in there)], [c for c in objects if c in names]
        for chunk in parquet.iter_batches(columns=[*dict.fromkeys((*wanted, *wholes))]):
            whole = pa.Table.from_batches([chunk])
            table = _flat_table(whole)
            read = [*(_shortest(_single_users(table[c])) for c in wanted), *(whole[c] for c in wholes)]
            for values in zip(*(column.to_pylist() for column in read), strict=True):
                number += 1
                yield f"{file}, row {number}", dict(zip((*wanted, *wholes), values, strict=True))
        if number != parquet.metadata.num_rows:
            raise ValueError(f"it has {number} of {parquet.metadata.num_rows} rows")
    except InputError:
        raise
    except (
        Exception
    ) as error:  # damage shows as any of Arrow's errors, Python's of text, or the file system's
        at = f"{file}, after row {number}" if number else str(file)
        raise InputError(
            f"{at}: not a parquet file, or damaged ({first_line(error)}); get it again"
        ) from None


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


def _shortest(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats of 32 bits as the decimals that were meant: 0.1, not 0.10000000149011612."""
    import pyarrow as pa

    return column.cast(pa.string()).cast(pa.float64()) if pa.types.is_float32(column.type) else column


def _require(columns: Mapping[str, str], there: Iterable[str], where: str) -> None:
    """Raises InputError for a column that is missing; columns are by name, with the key to set."""
    for name, key in columns.items():
        if name not in there:
            raise InputError(f"{where}: no column '{name}'; there are: {', '.join(there)}. Set {key}")
