"""Seconds of the phases of a step, and a line when one takes unusually long."""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Literal, get_args

import jax

from jaxrl.types import Say

# In the order of a step. "score" chooses the groups that are trained on; "reference" is where there is one.
StepPhase = Literal["sample", "exchange", "score", "reference", "old_logprobs", "update", "publish"]
PHASES: tuple[StepPhase, ...] = get_args(StepPhase)
# Between steps: watched too, and no part of a step's time.
Phase = StepPhase | Literal["report", "checkpoint", "evaluation"]
HISTORY = 20  # times of a phase that say how long it usually takes
UNUSUAL = 5  # times its median makes a phase worth a line


class Timer:
    """Seconds spent in the phases of a step; a profile shows the phases under the same names.

    A phase within another one interrupts it: no second counts twice.

    Attributes:
      now: the phase under way and when it began (time.monotonic()).
      last: seconds of the last few times in each phase.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.now: tuple[Phase, float] | None = None
        self.last: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))

    @contextlib.contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        outer = self._end()
        self.now = phase, time.monotonic()
        try:
            with jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            self._end()
            self.now = (outer, time.monotonic()) if outer else None

    def _end(self) -> Phase | None:
        """Counts the seconds of the phase under way, and returns it."""
        if not self.now:
            return None
        phase, began = self.now
        took = time.monotonic() - began
        self.last[phase].append(took)
        self._seconds[phase] = self._seconds.get(phase, 0.0) + took
        return phase

    def reset(self) -> None:
        self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        """Seconds since the last reset, as the metrics time/PHASE."""
        return {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}


@contextlib.contextmanager
def watchdog(timer: Timer, say: Say, least: float = 120.0) -> Iterator[None]:
    """Reports a phase that takes several times longer than usual, and again whenever that time has doubled.

    Args:
      timer: of the steps.
      say: prints a line.
      least: seconds that are never called long.
    """
    done, reported = threading.Event(), {"": 0.0}

    def watch() -> None:
        while not done.wait(least / 20):
            if not (now := timer.now):
                continue
            (phase, began), took = now, time.monotonic() - now[1]
            before = timer.last[phase]
            usual = statistics.median(before) if before else 0.0
            if took > max(least, UNUSUAL * usual, 2 * reported.get(f"{phase} {began}", 0.0)):
                reported.clear()
                reported[f"{phase} {began}"] = took
                host = socket.gethostname()
                known = f"usually it takes {usual:.0f} s" if before else "it is the first"
                say(f"{phase} has taken {took:.0f} s on {host}; {known}")

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
