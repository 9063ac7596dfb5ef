"""Compares two answers in a child process with limits on CPU time, wall time and memory.

LaTeX and algebra from a policy can run without end, take all memory or crash the interpreter. A child that reaches a
limit is ended, and replaced at the next question. They are plain children, not multiprocessing's: that would import the
caller's main module again (spawn) or copy a process in which JAX has threads (fork).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import resource
import select
import subprocess
import sys
from pathlib import Path

from jaxrl.errors import InputError, RunError
from jaxrl.rewards import latex_equality
from jaxrl.rewards.latex_equality import DEEPEST, LONGEST

CPU_SECONDS = 2  # for one comparison, and at most one more; nearly all take milliseconds
WALL_SECONDS = 30.0  # for one comparison: a busy machine may not give it the CPU time
START_SECONDS = 120.0
MEMORY_BYTES = 1 << 30
REMEMBERED = 1 << 14  # comparisons: the samples of a group repeat their answers

_idle: list[Worker] = []
os.register_at_fork(after_in_child=_idle.clear)  # two processes must not share one worker's pipes


def same_value(given: str, truth: str, wall_seconds: float = WALL_SECONDS) -> bool:
    """`latex_equality.same_value`, or False where that is too much work. Threads may ask in parallel."""
    if any(len(text) > LONGEST or _depth(text) > DEEPEST for text in (given, truth)):
        return False
    return _ask(given, truth, wall_seconds)


@functools.lru_cache(maxsize=REMEMBERED)
def _ask(given: str, truth: str, wall_seconds: float) -> bool:
    worker = _worker()
    answer = worker.ask(given, truth, wall_seconds)
    if answer is None:
        worker.close()
    else:
        _idle.append(worker)
    return bool(answer)


def _worker() -> Worker:
    """An idle worker that lives, or a new one."""
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.close()
    return Worker()


def forget() -> None:
    """Empties the cache of comparisons, for timing."""
    _ask.cache_clear()


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()


def _depth(text: str) -> int:
    deepest = depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


class Worker:
    """A child process that compares answers, one at a time."""

    def __init__(self) -> None:
        """Starts it, and waits until it is ready.

        Raises:
          InputError: if it ends, for want of a library.
          RunError: if it is not ready within START_SECONDS.
        """
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from jaxrl.rewards.sandbox import serve; serve()"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        # Without a check here every answer would be marked wrong, for no visible reason.
        if not self._read(START_SECONDS):
            raise self._failure()

    def _failure(self) -> InputError | RunError:
        """Ends a worker that did not become ready, and describes why."""
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.close()
            return RunError(f"{sys.executable} was not ready to grade after {START_SECONDS:.0f} s; try again")
        self.close()
        return InputError(
            f"{sys.executable} does not start with sympy and pylatexenc; install requirements.txt"
        )

    def ask(self, given: str, truth: str, wall_seconds: float) -> bool | None:
        """Whether the two have the same value; None where the worker did not answer, and is of no more use."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps([CPU_SECONDS, given, truth]).encode() + b"\n")
        except OSError:
            return None
        reply = self._read(wall_seconds)
        return reply == b"1" if reply else None

    def _read(self, seconds: float) -> bytes:
        assert self.process.stdout
        poll = select.poll()  # select() takes no descriptor above 1,023
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.read(1) if poll.poll(seconds * 1000) else b""

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    """The worker's side: reads one question per line; writes one character when ready, then one per answer."""
    # Imported here to be outside the limits.
    import pylatexenc.latex2text  # noqa: F401
    import sympy  # noqa: F401

    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not write an answer
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    replies.write(b"+")
    for line in sys.stdin.buffer:
        seconds, given, truth = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        replies.write(b"1" if latex_equality.same_value(given, truth) else b"0")


def _limit(which: int, value: int) -> None:
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
