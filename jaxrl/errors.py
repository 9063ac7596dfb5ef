"""The two errors that people and schedulers act on; anything else that is raised is a bug."""

BAD_INPUT = 2  # exit status: the same command fails again
TRY_AGAIN = 75  # exit status: the same command goes on from the last checkpoint (EX_TEMPFAIL)


class InputError(ValueError):
    """Bad input: one line that names the field or file and the remedy. Exits with BAD_INPUT."""


class RunError(RuntimeError):
    """The world failed (a host, a server, a disk): one line that says what. Exits with TRY_AGAIN."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
