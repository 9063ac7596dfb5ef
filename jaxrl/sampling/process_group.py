"""A program and everything that it started, as one process group that never outlives this process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# ends a process group when this process is gone, however it went: its end of the pipe closes
REAPER = 'read _; kill -s KILL -- -"$0"'


@dataclasses.dataclass
class ProcessGroup:
    """A program and everything that it started: a process group of its own, which never outlives this process.

    Attributes:
      environment: what it gets beside this process's own.
    """

    arguments: list[str]
    environment: dict[str, str]
    log: Path | None = dataclasses.field(default=None, kw_only=True)
    stdin: int = dataclasses.field(default=subprocess.DEVNULL, kw_only=True)

    def start(self) -> None:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(self.log.open("a")) if self.log else None
            self.process = subprocess.Popen(
                self.arguments, stdout=out, stderr=subprocess.STDOUT if out else None, stdin=self.stdin,
                env=self._all_environment(), start_new_session=True,
            )  # fmt: skip
        self._reaper = subprocess.Popen(
            ["sh", "-c", REAPER, str(self.process.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def tell(self, number: int) -> None:
        """Sends a signal to the program alone, not to what it started."""
        self.process.send_signal(number)

    def kill(self) -> None:
        kill([self])

    def _all_environment(self) -> dict[str, str]:
        return os.environ | self.environment


def kill(groups: Sequence[ProcessGroup], seconds: float = 10.0) -> None:
    """Stops all of each: killing vLLM's API server alone leaves its engine alive for ever."""
    groups = [group for group in groups if hasattr(group, "process")]
    for group in groups:
        group._reaper.kill()
        group._reaper.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.process.pid, signal.SIGTERM)
            os.killpg(group.process.pid, signal.SIGCONT)  # one that was stopped could not end
    deadline = time.monotonic() + seconds
    for group in groups:
        with contextlib.suppress(subprocess.TimeoutExpired):
            group.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.process.pid, signal.SIGKILL)
        group.process.wait()
