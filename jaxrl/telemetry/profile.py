"""What a process uses: memory, open files, compilations; and a trace of some steps."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import jax

from jaxrl import background
from jaxrl.telemetry.expendable import Expendable
from jaxrl.types import Say


def resources() -> dict[str, float]:
    """This process's resident memory, open files and, where the backend reports it, its first device's peak memory."""
    held = {
        "perf/host_bytes": float(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        * resource.getpagesize(),
        "perf/open_files": float(len(list(Path("/proc/self/fd").iterdir()))),
    }
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return held | ({} if peak is None else {"perf/device_bytes_peak": float(peak)})


class Compilations:
    """Counts the programs that this process compiled, or took from the compilation cache, not ahead of their use.

    Attributes:
      seconds: that all have taken, also those in background threads.
    """

    def __init__(self) -> None:
        self._count, self._seen, self.seconds = 0, 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._count += threading.current_thread().name != background.NAME
            self.seconds += duration_secs

    def new(self) -> int:
        """The number since the last call."""
        new, self._seen = self._count - self._seen, self._count
        return new


class Profile:
    """Traces `steps` steps, from the second on: the first one compiles. Read it with XProf or TensorBoard."""

    def __init__(self, folder: Path, first: int, steps: int, say: Say = print) -> None:
        self._folder, self._first, self._last = folder, first + 1, first + steps
        self._running, self._attempt = False, Expendable(folder, say)

    def begin(self, step: int) -> None:
        if self._running and step > self._last:
            self.close()
        elif step == self._first <= self._last:
            self._running = True
            self._attempt(lambda: jax.profiler.start_trace(str(self._folder)))

    def close(self) -> None:
        if self._running:
            self._running = False
            self._attempt(jax.profiler.stop_trace)
