"""One owner of a folder at a time, on one host or several."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxrl.errors import InputError
from jaxrl.files import writing
from jaxrl.types import Say

BEAT = 10.0  # seconds between two beats of an owner
SILENCE = 35.0  # seconds without one after which an owner on another host counts as dead


@contextlib.contextmanager
def alone(folder: Path, what: str, say: Say = print) -> Iterator[None]:
    """Keeps others from the same work on a folder, while the context lasts.

    The system's lock ends with its process, however that ends. Where a shared file system does not take it to other
    hosts, the owner's beat in the file does: it is watched, so that the clocks of the hosts do not matter.

    Args:
      folder: made if missing; the file in it is named lock.
      what: of the work, for messages.
      say: prints a line.

    Raises:
      InputError: naming process and host, if another one is at work; or if the folder is none that can be written to.
      RunError: if the disk fails.
    """
    path, host = folder / "lock", socket.gethostname()
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+b")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(folder, what) from None
        except OSError:  # a file system without locks
            pass
        left = _read(path)
        if left and not left[0].endswith(f" on {host}"):
            say(
                f"{folder}: {left[0]} did not end its {what} there; watching for {SILENCE:.0f} s whether it lives"
            )
            deadline = time.monotonic() + SILENCE
            while time.monotonic() < deadline:
                time.sleep(min(1.0, BEAT / 4))
                if _read(path) != left:
                    raise _taken(folder, what)
        ended = threading.Event()

        def beat(number: int) -> None:
            with contextlib.suppress(OSError):  # a full disk is the work's to report
                _write(path, f"process {os.getpid()} on {host}\n{number}\n")

        def keep_beating() -> None:
            for number in itertools.count(1):
                if ended.wait(BEAT):
                    return
                beat(number)

        beat(0)
        thread = threading.Thread(target=keep_beating, name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                path.write_bytes(b"")


def _write(path: Path, text: str) -> None:
    """Writes over what is there: whoever reads meanwhile must not find an empty file, which has no owner."""
    path.touch()
    with path.open("r+b") as file:
        file.write(text.encode())
        file.truncate()


def _read(path: Path) -> list[str]:
    """The owner, and its beat; empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _taken(folder: Path, what: str) -> InputError:
    owner = next(iter(_read(folder / "lock")), f"another {what}")
    return InputError(f"{folder}: {owner} is at work there ({what}); wait for it, or give another folder")
