"""A program and everything that it starts, as one process group that never outlives this process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# kills a process group when this process is gone, even by SIGKILL: then its end of the pipe closes
REAPER = 'read _; kill -s KILL -- -"$0"'
# becomes the program once it has its reaper, and ends if this process is gone before
GATE = 'read _ < "$0" && exec "$@"'


@dataclasses.dataclass
class ProcessGroup:
    """A program and everything that it starts: a process group of its own, which never outlives this process.

    Attributes:
      arguments: the program and its arguments.
      environment: variables set in addition to this process's own.
      log: file to which the output is appended; this process's own output where None.
      stdin: as `subprocess.Popen` takes it.
      stderr: as `subprocess.Popen` takes it; not where there is a log.
      process: the program, once started.
    """

    arguments: list[str]
    environment: dict[str, str]
    log: Path | None = dataclasses.field(default=None, kw_only=True)
    stdin: int = dataclasses.field(default=subprocess.DEVNULL, kw_only=True)
    stderr: int | None = dataclasses.field(default=None, kw_only=True)

    def start(self) -> None:
        gate, start = os.pipe()
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(self.log.open("a")) if self.log else None
            for end in (gate, start):
                stack.callback(os.close, end)
            self.process = subprocess.Popen(
                ["sh", "-c", GATE, f"/dev/fd/{gate}", *self.arguments],
                stdout=out,
                stderr=subprocess.STDOUT if out else self.stderr,
                stdin=self.stdin,
                env=self._all_environment(),
                pass_fds=[gate],
                start_new_session=True,
            )
            reaper, null = ["sh", "-c", REAPER, str(self.process.pid)], subprocess.DEVNULL
            self._reaper = subprocess.Popen(
                reaper, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
            )
            os.write(start, b"\n")

    def send_signal(self, number: int) -> None:
        """Sends a signal to the program alone, not to what it started."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends the whole group; see the function `kill`."""
        kill([self])

    def _all_environment(self) -> dict[str, str]:
        return os.environ | self.environment


def kill(groups: Sequence[ProcessGroup], seconds: float = 10.0) -> None:
    """Ends whole process groups: killing vLLM's API server alone would leave its engine running forever.

    Args:
      groups: those that were never started are skipped.
      seconds: from SIGTERM to SIGKILL.
    """
    groups = [group for group in groups if hasattr(group, "process")]
    for group in groups:
        group._reaper.kill()
        group._reaper.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.process.pid, signal.SIGTERM)
            os.killpg(group.process.pid, signal.SIGCONT)  # a stopped process does not handle SIGTERM
    deadline = time.monotonic() + seconds
    for group in groups:
        with contextlib.suppress(subprocess.TimeoutExpired):
            group.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.process.pid, signal.SIGKILL)
        group.process.wait()
