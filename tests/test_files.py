"""Files that are there completely or not at all, and what a failed write amounts to."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import largest_file
from jaxrl.errors import InputError, RunError, read_error
from jaxrl.files import reading, write_atomically, writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_a_write_that_fails_again_is_bad_input(number: int) -> None:
    refused = pytest.raises(InputError, match=rf"^here: cannot be written \({os.strerror(number)}\); ")
    with refused, writing(Path("here")):
        raise OSError(number, os.strerror(number), "elsewhere.tmp")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT])
def test_a_write_that_may_pass_is_tried_again(number: int) -> None:
    passes = pytest.raises(RunError, match=r"^here: cannot be written .*; the same command tries again$")
    with passes, writing(Path("here")):
        raise OSError(number, os.strerror(number))


def test_a_read_that_fails_names_the_file() -> None:
    with pytest.raises(RunError, match=r"^here: cannot be read \(Stale file handle"), reading(Path("here")):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_an_input_on_a_failing_disk_is_not_called_bad() -> None:
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "here")
    assert isinstance(read_error("here", stale, "get it again"), RunError)
    assert str(read_error("here", EOFError("too short"), "get it again")) == (
        "here: cannot be read (too short); get it again"
    )


def test_parts_are_written_as_they_come_and_replace_the_file_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def parts(ends: bool) -> Iterator[str]:
        yield "n\u00e9w\n"
        assert path.read_text() == "old"
        if not ends:
            raise ZeroDivisionError
        yield "line"

    with pytest.raises(ZeroDivisionError):
        write_atomically(path, parts(ends=False))
    assert path.read_text() == "old"
    write_atomically(path, parts(ends=True))
    assert path.read_text(encoding="utf-8") == "n\u00e9w\nline"


def test_without_room_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, "old")
    with largest_file(10), pytest.raises(InputError, match=r"new/file: cannot be written \(File too large"):
        write_atomically(path, "x" * 100)
    assert path.read_text() == "old"
