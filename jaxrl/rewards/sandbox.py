"""Asks whether two answers have the same value, and waits no longer than is good.

LaTeX and algebra from a policy can run for ever, take all memory or end the interpreter. So they run in
processes of their own, which limits on CPU time and memory end; one that has ended is replaced at the next
question. They are plain children, not multiprocessing's: that would import the caller's main
module again (spawn) or copy a process in which JAX has threads (fork).
"""

import functools
import json
import os
import resource
import select
import subprocess
import sys
from pathlib import Path

from jaxrl.rewards import equivalence

CPU_SECONDS = 2  # of one comparison; nearly all take a few milliseconds
WALL_SECONDS = 30.0  # on a machine so busy that the CPU time does not come
MEMORY_BYTES = 1 << 30

_idle: list["Worker"] = []
os.register_at_fork(after_in_child=_idle.clear)  # two processes must not share one worker's pipes


@functools.lru_cache(maxsize=1 << 14)  # a group's samples repeat their answers
def same_value(given: str, truth: str, wall_seconds: float = WALL_SECONDS) -> bool:
    """`equivalence.same_value`, or False where that is too much work. Threads ask in parallel."""
    if any(len(text) > equivalence.LONGEST or _depth(text) > equivalence.DEEPEST for text in (given, truth)):
        return False
    worker = _idle.pop() if _idle else Worker()
    answer = worker.ask(given, truth, wall_seconds)
    if answer is None:
        worker.close()
    else:
        _idle.append(worker)
    return bool(answer)


def _depth(text: str) -> int:
    deepest = depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


class Worker:
    def __init__(self) -> None:
        path = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from jaxrl.rewards.sandbox import serve; serve()"],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            bufsize=0, start_new_session=True,  # Ctrl-C is the parent's to handle
        )  # fmt: skip

    def ask(self, given: str, truth: str, wall_seconds: float) -> bool | None:
        """The answer, or None when there is none and the worker is of no more use."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        try:
            stdin.write(json.dumps([given, truth]).encode() + b"\n")
            poll = select.poll()  # select() knows no descriptor above 1,023
            poll.register(stdout, select.POLLIN)
            reply = stdout.read(1) if poll.poll(wall_seconds * 1000) else b""
        except OSError:
            reply = b""
        return reply == b"1" if reply else None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    """A worker's side: a question a line on stdin, a character each on stdout."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print must not answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        replies.write(b"01"[equivalence.same_value(*json.loads(line)) :][:1])
