"""Ctrl-C, SIGTERM and SIGHUP: the step under way is finished and saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxrl.errors import TRY_AGAIN
from jaxrl.types import Say

PEER = signal.SIGRTMIN  # what a process sends itself when another process of the run was asked to stop


class Stop:
    """Whether the run is to end after this step, and with which exception.

    Attributes:
      armed: whether a step is under way that can be finished and saved; before, a signal stops at once.
      asked: whether a signal has come, to this process or to another one of the run.
      signaled: whether one has come to this process; the next one stops at once.
      reason: what to raise; SystemExit(TRY_AGAIN) has schedulers start the run again.
    """

    armed = asked = signaled = False
    reason: BaseException = SystemExit(TRY_AGAIN)

    def ask(self, reason: BaseException) -> None:
        """Ends the run after this step."""
        self.asked, self.reason = True, reason

    def arm(self) -> None:
        """Signals now wait for the end of a step. Raises `reason` if one came before and a library swallowed it."""
        self.armed = True
        self.raise_if_asked()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Signals stop at once what is done here, because it is made again on the restart."""
        self.armed = False
        try:
            self.raise_if_asked()
            yield
        finally:
            self.armed = True

    def raise_if_asked(self) -> None:
        """Raises `reason` if a signal has come: a library may have taken what it raised for a failure of its own."""
        if self.asked:
            raise self.reason


@contextmanager
def graceful_stop(say: Say) -> Iterator[Stop]:
    """Once armed, the first Ctrl-C, SIGTERM or SIGHUP lets the step finish and be saved; any other stops at once.

    Outside of the main thread, where Python takes no signals, they do what they did before.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
      SystemExit: with TRY_AGAIN, after SIGTERM or SIGHUP (which `nohup` keeps away).
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: FrameType | None) -> None:
        first, stop.asked = not stop.asked, True
        at_once = not stop.armed
        if number != PEER:
            at_once, stop.signaled = at_once or stop.signaled, True
        if number == signal.SIGINT:
            stop.reason = KeyboardInterrupt()
        if at_once:
            raise stop.reason
        if first:
            say("finishing this step and saving it; again to stop at once (the last checkpoint is kept)")

    def unraisable(error: sys.UnraisableHookArgs) -> None:
        if error.exc_value is not stop.reason:  # where it cannot be raised, `arm` raises it later
            hook(error)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    numbers = [signal.SIGINT, signal.SIGTERM, PEER]
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    before = {number: signal.signal(number, ask) for number in numbers}
    before[PEER] = signal.SIG_IGN  # one may be late
    try:
        yield stop
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
