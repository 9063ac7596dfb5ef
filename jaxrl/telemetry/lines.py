"""Files of a run with a line of JSON a step: read whatever is damaged, and written so that a killed run can go on."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from jaxrl.files import reading, write_atomically, writing
from jaxrl.types import Say

Row = TypeVar("Row", bound=Mapping[str, object])  # has `step`, 0 for the first
Parse = Callable[[object], Row | None]  # from parsed JSON to a row; None for what is none


class StepLines:
    """A file's writer. Rows from `start` on are dropped: those steps are about to be run again.

    Lines that are no rows are moved to NAME.damaged.jsonl, and reported.
    """

    def __init__(self, path: Path, start: int, say: Say, parse: Parse[Row]) -> None:
        rows, damaged = read_lines(path, parse)
        if damaged:
            aside = path.with_name(f"{path.stem}.damaged.jsonl")
            with writing(aside), aside.open("ab") as file:
                file.write(b"".join(line.rstrip(b"\n") + b"\n" for line in damaged))
            say(
                f"{path}: {len(damaged)} lines were damaged and are now in {aside}; the other {len(rows)} are kept"
            )
        kept = [row for row in rows if row["step"] < start]  # type: ignore[operator]
        if missing := start - len({row["step"] for row in kept}):
            say(f"{path}: {missing} of the {start} steps before have no row; the report leaves them out")
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path = path
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, object]) -> None:
        """Adds a step's row, and flushes it.

        Raises:
          InputError, RunError: see `files.writing`.
        """
        with writing(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if not os.fstat(self._file.fileno()).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "it was deleted while the run wrote to it")

    def close(self) -> None:
        with suppress(OSError):  # `write` has flushed, or raised
            self._file.close()


def read_lines(path: Path, parse: Parse[Row]) -> tuple[list[Row], list[bytes]]:
    """The rows of a file, and the lines that are none; a last one without an end is neither, but a killed process's.

    A file that is missing has none.

    Raises:
      InputError, RunError: see `files.reading`.
    """
    rows, damaged = list[Row](), list[bytes]()
    with reading(path):
        text = path.read_bytes() if path.exists() else b""
    for line in text.splitlines(keepends=True):
        try:
            row = parse(json.loads(line))
        except (ValueError, RecursionError):
            row = None
        if row is not None:
            rows.append(row)
        elif line.strip() and line.endswith(b"\n"):
            damaged.append(line)
    return rows, damaged
