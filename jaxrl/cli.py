"""The command line. A command is a module of the entry points "jaxrl.commands", imported when the program starts."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, TextIO

from jaxrl import __version__, background
from jaxrl.errors import NO_ROOM, InputError, RunError, file_error

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = "GRPO for reasoning models in JAX."
_EPILOG = """Any value of a recipe is an option: jaxrl train recipes/demo.toml --run.steps 10 --rollout.samples 4.
`jaxrl train RECIPE --help` lists them all."""
# of the help; others follow by name
_ORDER = (
    "train",
    "eval",
    "probe",
    "compare",
    "export",
    "check",
    "plan",
    "recipes",
    "report",
    "rollouts",
    "replay",
    "diagnose",
    "doctor",
    "completion",
)


class Command(Protocol):
    """A module with these is a command."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace, overrides: list[str]) -> None:
        """Runs it. `overrides` is what the parser did not know: `--section.key value`."""


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 2 on bad input, 75 on what may pass, and 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    _quieten_orbax()
    try:
        command, args, overrides = _parse(arguments)
        if argv is None and args.command == "train":
            sys.stdout = _unfailing(sys.stdout)
        command.run(args, overrides)
        _leave_if_busy(argv, 0)
    except BrokenPipeError:
        # whoever read, such as head, has enough; nothing may be written at the exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (InputError, RunError, OSError) as raised:
        error = _of_a_file(raised) if isinstance(raised, OSError) else raised
        print("\n".join(f"jaxrl: {line}" for line in str(error).splitlines()), file=sys.stderr)
        others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
        if argv is None and others:  # Orbax's wait ten minutes for a folder that could not be made
            sys.stdout.flush()
            os._exit(error.status)
        _leave_if_busy(argv, error.status)
        raise SystemExit(error.status) from None
    except SystemExit as stopped:
        if isinstance(stopped.code, int):
            _leave_if_busy(argv, stopped.code)
        raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not cut the exit short
        print("jaxrl: interrupted", file=sys.stderr)
        _leave_if_busy(argv, 130)
        raise SystemExit(130) from None


def _leave_if_busy(argv: list[str] | None, status: int) -> None:
    """Ends this process at once if XLA is compiling what nobody needs any more; its exit would wait for minutes.

    Not one of several processes, whose exits wait for each other.
    """
    if argv is None and background.busy() and "JAXRL_PROCESSES" not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Unfailing(io.FileIO):
    """A file that loses what cannot be written."""

    def write(self, data: object, /) -> int:
        assert isinstance(data, bytes | bytearray | memoryview)
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _unfailing(stream: TextIO) -> TextIO:
    """A standard stream that no full disk, closed pipe or locale without the letters makes fail: a run goes on."""
    file = io.BufferedWriter(_Unfailing(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)


def _of_a_file(error: OSError) -> InputError | RunError:
    """The error for a file that this user may not use, or a disk that fails. Raises any other one: it is a bug."""
    of_the_disk = error.filename or error.errno in {*NO_ROOM, errno.EIO, errno.ESTALE}
    if of_the_disk and error.strerror and not isinstance(error, FileNotFoundError):
        return file_error(error.filename or "a file", "used", error.errno, error.strerror)
    raise error


def _source(thing: object) -> str:
    """The file of a coroutine's code."""
    return getattr(getattr(thing, "cr_code", None), "co_filename", "")


def _quieten_orbax() -> None:
    """Leaves out what Orbax prints of a failed write or read: all that matters is raised as well."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    show = sys.unraisablehook

    def show_others(error: sys.UnraisableHookArgs) -> None:
        # its threads end after the loop that they wake, and coroutines of a failed read end when they are collected
        if str(error.exc_value) != "Event loop is closed" and "orbax" not in _source(error.object):
            show(error)

    sys.unraisablehook = show_others


def commands() -> dict[str, Command]:
    """The commands by name, in the order of the help.

    Raises:
      InputError: if this package is not installed, and so has no entry points.
    """
    found = {point.name: point.load() for point in entry_points(group="jaxrl.commands")}
    if not found:
        raise InputError("this installation of jaxrl has no commands; run pip install -e . in its folder")
    names = [*(name for name in _ORDER if name in found), *sorted(set(found) - set(_ORDER))]
    return {name: found[name] for name in names}


def make_parser(known: Mapping[str, Command]) -> tuple[argparse.ArgumentParser, Subparsers]:
    """The parser of the command line, and that of each command by name."""
    parser = argparse.ArgumentParser("jaxrl", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in known.items():
        own_help = getattr(command, "HELP_OF_ITS_OWN", False)
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, add_help=not own_help))
    return parser, subparsers


def _parse(argv: list[str]) -> tuple[Command, argparse.Namespace, list[str]]:
    known = commands()
    parser, _ = make_parser(known)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(known[args.command], "TAKES_OVERRIDES", False):
        parser.error(f"unknown option {rest[0]}")
    return known[args.command], args, rest


if __name__ == "__main__":
    main()
