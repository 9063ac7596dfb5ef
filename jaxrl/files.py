"""Files that are there completely or not at all, and what a failed write amounts to."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxrl.errors import file_error


def is_hub_id(path: str) -> bool:
    """Whether a path has the form of an id of the Hugging Face Hub, ORG/NAME, as a folder may too."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def at_home(path: Path | str) -> Path:
    """The path, with ~ as the home folder; as it is where there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path's method raises where there is no home


def reading(path: Path) -> contextlib.AbstractContextManager[None]:
    """Names the file in what a failed read in the context raises.

    Raises:
      InputError: if it may not be read.
      RunError: if the disk fails.
    """
    return _naming(path, "read")


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Names the file in what a failed write in the context raises.

    Raises:
      InputError: if there is no room for the file, or it may not be written.
      RunError: if the disk fails.
    """
    return _naming(path, "written")


@contextlib.contextmanager
def _naming(path: Path, use: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise file_error(path, use, error.errno, error.strerror or str(error)) from None


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Writes all of the text or none of it, whenever the process dies. Makes the folder if it is missing.

    Args:
      path: of the file.
      text: whole, or parts of it, which are never in memory all at once.

    Raises:
      InputError, RunError: see `writing`.
    """
    with replacing(path) as file:
        file.writelines(part.encode() for part in ([text] if isinstance(text, str) else text))


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[BinaryIO]:
    """Opens a file that is written in the context, and is at `path` once that ends. Makes the folder if it is missing.

    Until then its name has the suffix, which is each process's own where several may write the file at a time.

    Raises:
      InputError, RunError: see `writing`.
    """
    temporary = path.with_name(path.name + suffix)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)


def append(path: Path, text: str) -> None:
    """Adds text to a file, which is made if it is missing.

    Raises:
      InputError, RunError: see `writing`.
    """
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def set_aside(path: Path, folder: Path) -> Path:
    """Moves a file or folder into `folder`, made if missing, under its name or a numbered one; returns where.

    Raises:
      InputError, RunError: see `writing`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([path.name], (f"{path.stem}-{n}{path.suffix}" for n in itertools.count(2)))
    aside = next(folder / name for name in names if not (folder / name).exists())
    with writing(aside):
        return path.rename(aside)
