"""The two errors that people and schedulers act on; anything else that is raised is a bug."""

from __future__ import annotations

import errno
from pathlib import Path

BAD_INPUT = 2  # exit status: the same command fails again
TRY_AGAIN = 75  # exit status: the same command goes on from the last checkpoint (EX_TEMPFAIL)

# What fails again until somebody does something about it. Anything else may pass.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
# What disks and shared file systems have their moments with.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


class InputError(ValueError):
    """Bad input: one line that names the field or file and the remedy. Exits with BAD_INPUT."""

    status = BAD_INPUT


class RunError(RuntimeError):
    """The world failed (a host, a server, a disk): one line that says what. Exits with TRY_AGAIN."""

    status = TRY_AGAIN


def file_error(path: Path | str, use: str, number: int | None, why: str) -> InputError | RunError:
    """The error for a file that cannot be used.

    Args:
      path: of the file or folder.
      use: what fails: "read" or "written".
      number: of the system's error, where it is known.
      why: its text.
    """
    failed = f"{path}: cannot be {use} ({why})"
    if number in NO_ROOM:
        return InputError(f"{failed}; make room, also for new files, and give the same command again")
    if number in NOT_ALLOWED:
        return InputError(f"{failed}; put that right, and give the same command again")
    return RunError(f"{failed}; the same command tries again")


def read_error(path: Path | str, error: Exception, remedy: str) -> InputError | RunError:
    """The error for an input that cannot be read: it is bad, with a remedy, unless the disk fails."""
    if isinstance(error, OSError) and error.errno in PASSING:
        return file_error(path, "read", error.errno, error.strerror or "")
    return InputError(f"{path}: cannot be read ({first_line(error)}); {remedy}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
