"""Work that is done ahead in threads, each piece for whoever needs it first."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

NAME = "background"  # of the threads
T = TypeVar("T")
Job = tuple[Future[T], Callable[[], T]]


def start(jobs: Sequence[Job[T]], threads: int) -> None:
    """Works on jobs in their order, in threads.

    What XLA compiles cannot be stopped, and the interpreter aborts if it ends meanwhile. So its exit waits for the jobs
    under way; `os._exit` does not, see `busy`.

    Args:
      jobs: what is called, and the future that gets its result or error; canceled ones are left out.
      threads: jobs that are under way at a time.
    """
    waiting = iter(jobs)

    def work() -> None:
        for future, function in waiting:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # whatever it is, the one that waits must not wait forever
                    future.set_exception(error)

    for _ in range(threads):
        thread = threading.Thread(target=work, name=NAME, daemon=True)
        thread.start()
        atexit.register(thread.join)


@contextmanager
def working(jobs: Sequence[Job[T]], threads: int) -> Iterator[None]:
    """Works on jobs as `start` does; at the end of the context, those that have not begun are canceled."""
    start(jobs, threads)
    try:
        yield
    finally:
        for future, _ in jobs:
            future.cancel()


def busy() -> bool:
    """Whether a job is under way in this process."""
    return any(thread.name == NAME for thread in threading.enumerate())
