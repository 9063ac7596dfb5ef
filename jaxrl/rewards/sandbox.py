"""Compares two answers in a child process, with limits on work and memory.

LaTeX and algebra from a policy can run without end, take all memory or crash the interpreter. Work is counted in calls,
not in seconds: whether a comparison comes to an end must not depend on how fast or how busy the machine is. One that
does not is undecided, which is neither right nor wrong.

Workers are plain children, not multiprocessing's: that would import the caller's main module again (spawn) or copy a
process in which JAX has threads (fork).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from jaxrl.errors import InputError, RunError
from jaxrl.rewards import child
from jaxrl.rewards.latex_equality import DEEPEST, LONGEST
from jaxrl.types import Sandboxed

if TYPE_CHECKING:
    from sympy import Expr

BUDGET = 5_000_000  # calls and returns in one comparison: 2 s; of 6,775 real ones, the longest took 200,000
SHARE = 5  # a worker that has answered before gets BUDGET // SHARE
MOST_BITS = 1 << 14  # of an exact power of numbers: work on huge integers is a single call
MEMORY_BYTES = 1 << 30
# What the budget does not see is ended by time.
CPU_SECONDS = 60
WALL_SECONDS = 300.0
START_SECONDS = 120.0
REMEMBERED = 1 << 14  # comparisons: the samples of a group repeat their answers


class RuleSet(NamedTuple):
    """Rules by which two answers are equal."""

    function: str  # MODULE:NAME of `(given, truth) -> bool`, which only a worker loads
    longest: int = LONGEST  # characters of an answer; a longer one equals none
    deepest: int = DEEPEST  # brackets


RULES: dict[Sandboxed, RuleSet] = {
    "released": RuleSet("jaxrl.rewards.latex_equality:same_value"),
    "corrected": RuleSet("jaxrl.rewards.corrected:same"),
    "math_verify": RuleSet("jaxrl.rewards.math_verify:same", longest=2 * LONGEST),  # of a response's end
}

_idle: defaultdict[Sandboxed, list[Worker]] = defaultdict(list)
os.register_at_fork(after_in_child=_idle.clear)  # two processes must not share one worker's pipes
_asked = threading.local()


class Lost(Exception):
    """A worker ended without an answer, or was ended by time."""


def compare(rules: Sandboxed, given: str, truth: str) -> bool | None:
    """Whether two answers are equal by a set of rules; None where that is too much work to decide.

    Threads may ask in parallel. `undecided` counts the latter.
    """
    _, longest, deepest = RULES[rules]
    if any(len(text) > longest or _depth(text) > deepest for text in (given, truth)):
        return False
    try:
        verdict = _decide(rules, given, truth)
    except Lost:
        verdict = None
    if verdict is None:
        _asked.undecided = undecided() + 1
    return verdict


def undecided() -> int:
    """How many comparisons of this thread were left undecided so far."""
    return getattr(_asked, "undecided", 0)


@functools.lru_cache(maxsize=REMEMBERED)
def _decide(rules: Sandboxed, given: str, truth: str) -> bool | None:
    """Asks an idle worker, and where it comes to no answer, a new one with the whole budget.

    What a process has done before changes the count a little, so only a new one leaves a comparison undecided.

    Raises:
      Lost: if two workers do not answer. That may be the machine's fault, and is not remembered.
    """
    worker, lost = _idle_worker(rules), 0
    while lost < 2:
        budget = BUDGET // SHARE if worker else BUDGET
        worker = worker or Worker(rules)
        reply = worker.ask(given, truth, budget)
        if reply in (b"0", b"1"):
            _idle[rules].append(worker)
            return reply == b"1"
        worker.close()
        if reply and budget == BUDGET:
            return None
        worker, lost = None, lost + (not reply)
    raise Lost


def _idle_worker(rules: Sandboxed) -> Worker | None:
    """A worker that lives and has nothing to do, if there is one."""
    with contextlib.suppress(IndexError):  # another thread may take the last one
        while True:
            worker = _idle[rules].pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
    return None


def forget() -> None:
    """Empties the cache of comparisons, for timing."""
    _decide.cache_clear()


@atexit.register
def close_idle() -> None:
    """Ends the workers that have nothing to do."""
    for workers in _idle.values():
        while workers:
            workers.pop().close()


def _depth(text: str) -> int:
    deepest = depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


class Worker:
    """A child process that compares answers by a set of rules, one at a time."""

    def __init__(self, rules: Sandboxed) -> None:
        """Starts it, and waits until it is ready.

        Raises:
          InputError: if it ends, for want of a library.
          RunError: if it is not ready within START_SECONDS.
        """
        self.function = RULES[rules].function
        self.process = subprocess.Popen(
            child.command("sandbox", self.function),
            env=child.environment(
                PYTHONHASHSEED="0"
            ),  # the order of a set decides how much work some algebra is
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
            f"{sys.executable} does not load {self.function} with sympy, pylatexenc and math-verify; install "
            "requirements.txt"
        )

    def ask(self, given: str, truth: str, budget: int) -> bytes:
        """Asks whether two answers are equal.

        Returns:
          1 or 0; ? where the budget or the memory is too small; nothing where the worker ended or did not answer. After
          the latter two it is of no more use.
        """
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps([given, truth, budget, CPU_SECONDS]).encode() + b"\n")
        except OSError:
            return b""
        return self._read(WALL_SECONDS)

    def _read(self, seconds: float) -> bytes:
        assert self.process.stdout
        poll = select.poll()  # select() takes no descriptor above 1,023
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.read(1) if poll.poll(seconds * 1000) else b""

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(function: str) -> None:
    """The worker's side: reads one question per line; writes one character when ready, then one per answer."""
    # Imported here to be outside the limits.
    import pylatexenc.latex2text  # noqa: F401
    from sympy.core import cache, random

    module, _, name = function.partition(":")
    same = getattr(importlib.import_module(module), name)
    same("x(x+1)", "x^2+x")  # loads what they import when needed
    _bound_powers()
    replies = child.open_replies()  # a library that prints must not write an answer
    child.limit(resource.RLIMIT_AS, MEMORY_BYTES)
    child.limit(resource.RLIMIT_CORE, 0)
    replies.write(b"+")
    for line in sys.stdin.buffer:
        given, truth, budget, seconds = json.loads(line)
        cache.clear_cache()
        random.seed(0)  # sympy shuffles what it asks itself
        used = resource.getrusage(resource.RUSAGE_SELF)
        child.limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)
        verdict = within(budget, lambda: same(given, truth))  # noqa: B023  # called at once
        replies.write(b"?" if verdict is None else b"%d" % verdict)


class Spent(BaseException):
    """The budget is spent. Not an Exception, which sympy and its callers catch."""


def within(budget: int, decide: Callable[[], bool]) -> bool | None:
    """What `decide` returns; None if it takes more than `budget` calls and returns, or more memory than there is."""

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0 and argument is not sys.setprofile:  # which ends the count below
            raise Spent

    sys.setprofile(count)
    try:
        verdict = decide()
    except (Spent, MemoryError):
        return None
    finally:
        sys.setprofile(None)
    return None if budget < 0 else verdict  # a library may catch even a BaseException


def _bound_powers() -> None:
    """Makes sympy's powers of numbers raise `Spent` instead of computing one of more than MOST_BITS."""
    from sympy import Integer, Rational

    def bounded(power: Callable[[Rational, Expr], Expr | None]) -> Callable[[Rational, Expr], Expr | None]:
        def eval_power(base: Rational, exponent: Expr) -> Expr | None:
            bits = (max(abs(base.p), base.q) - 1).bit_length()
            if isinstance(exponent, Rational) and bits * abs(exponent.p) > MOST_BITS * exponent.q:
                raise Spent
            return power(base, exponent)

        return eval_power

    for number in (Integer, Rational):
        number._eval_power = bounded(number._eval_power)
