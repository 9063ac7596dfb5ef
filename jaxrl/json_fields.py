"""JSON objects that others wrote: read within bounds, and asked for their fields one by one."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jaxrl.errors import InputError, read_error
from jaxrl.types import JsonObject

LARGEST_FILE = 16 << 20  # bytes; a config or an index of tensors is far smaller
LARGEST = 2**31 - 1  # of sizes, ids and positions, which are int32
MISSING = object()


def read_json(path: Path) -> JsonObject:
    """Reads a JSON object from a file of at most LARGEST_FILE bytes.

    Raises:
      InputError: if it is missing, no regular file (opening a pipe would wait), too large, or no JSON object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a regular file; put the JSON file of the model there")
        if found.st_size > LARGEST_FILE:
            raise InputError(
                f"{path}: {found.st_size} bytes are more than any such file has ({LARGEST_FILE})"
            )
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; a Hugging Face folder has one") from None
    except OSError as error:
        raise read_error(path, error, "let this user read it") from None
    except RecursionError:
        raise InputError(f"{path}: not valid JSON: nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:  # of the encoding, the syntax, or an integer of thousands of digits
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def shown(value: object) -> str:
    """A value in at most 80 characters of one line."""
    try:
        text = repr(value)
    except RecursionError:  # as deep as JSON may just be
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are asked for by name; one without a default has to be there.

    Each method raises InputError, naming `where` and the field, if the field is missing or not what is asked for.
    `null` is a value like another, and none of these.
    """

    where: str  # for messages: the file
    values: JsonObject

    def integer(self, name: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            kind = "a positive int" if least == 1 else f"an int from {least}"
            raise InputError(f"{self.where}: {name} = {shown(value)} is not {kind} of at most {most}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        # the bound also keeps out infinity and ints that have no float
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e30:
            raise InputError(f"{self.where}: {name} = {shown(value)} is not a positive float")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise InputError(f"{self.where}: {name} = {shown(value)} is not true or false")
        return value

    def without_null(self, *names: str) -> Fields:
        """These fields, where `null` in one of `names` is as good as none."""
        kept = {k: v for k, v in self.values.items() if v is not None or k not in names}
        return Fields(self.where, kept)

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name, MISSING if default is None else default)
        if value is MISSING:
            raise InputError(f"{self.where}: the field {name} is missing")
        return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
