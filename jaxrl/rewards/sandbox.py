"""Asks whether two answers have the same value, and waits no longer than is good.

LaTeX and algebra from a policy can run for ever, take all memory or end the interpreter. So they run in
processes of their own, which limits on CPU time and memory end; one that has ended is replaced at the next
question. They are plain children, not multiprocessing's: that would import the caller's main module again
(spawn) or copy a process in which JAX has threads (fork).
"""

import atexit
import functools
import json
import os
import resource
import select
import subprocess
import sys
from pathlib import Path

from jaxrl.rewards import latex_equality

CPU_SECONDS = 2  # of one comparison, and at most one more; nearly all take milliseconds
WALL_SECONDS = 30.0  # on a machine so busy that the CPU time does not come
START_SECONDS = 120.0
MEMORY_BYTES = 1 << 30

_idle: list["Worker"] = []
os.register_at_fork(after_in_child=_idle.clear)  # two processes must not share one worker's pipes


def same_value(given: str, truth: str, wall_seconds: float = WALL_SECONDS) -> bool:
    """`equivalence.same_value`, or False where that is too much work. Threads ask in parallel."""
    if any(len(text) > latex_equality.LONGEST or _depth(text) > latex_equality.DEEPEST for text in (given, truth)):
        return False
    return _ask(given, truth, wall_seconds)


@functools.lru_cache(maxsize=1 << 14)  # the samples of a group repeat their answers
def _ask(given: str, truth: str, wall_seconds: float) -> bool:
    worker = _worker()
    answer = worker.ask(given, truth, wall_seconds)
    if answer is None:
        worker.close()
    else:
        _idle.append(worker)
    return bool(answer)


def _worker() -> "Worker":
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.close()
    return Worker()


def forget() -> None:
    """Empties the memory of answers, for timing."""
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
    def __init__(self) -> None:
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from jaxrl.rewards.sandbox import serve; serve()"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            bufsize=0, start_new_session=True,  # Ctrl-C is the parent's to handle
        )  # fmt: skip
        if not self._read(START_SECONDS):  # else every answer would be wrong, and nobody would know why
            self.close()
            raise RuntimeError(f"{sys.executable} did not start with sympy and pylatexenc (requirements.txt)")

    def ask(self, given: str, truth: str, wall_seconds: float) -> bool | None:
        """The answer, or None when there is none and the worker is of no more use."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps([CPU_SECONDS, given, truth]).encode() + b"\n")
        except OSError:
            return None
        reply = self._read(wall_seconds)
        return reply == b"1" if reply else None

    def _read(self, seconds: float) -> bytes:
        assert self.process.stdout
        poll = select.poll()  # select() knows no descriptor above 1,023
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.read(1) if poll.poll(seconds * 1000) else b""

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    """A worker's side: a question a line on stdin; on stdout one character when ready, then one an answer."""
    import pylatexenc.latex2text  # noqa: F401  imported outside the limits
    import sympy  # noqa: F401

    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print must not answer
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
