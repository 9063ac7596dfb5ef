"""Reports that a run can do without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxrl.errors import first_line
from jaxrl.types import Say


class Expendable:
    """Does what only reports. Once that fails, a line names it, and from then on it is left out."""

    def __init__(self, where: Path | str, say: Say, problem: str = "cannot be written") -> None:
        """
        Args:
          where: the reports go.
          say: prints a line.
          problem: what the line says of `where`.
        """
        self._where, self._say, self._problem, self._failed = where, say, problem, False

    def __call__(self, report: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            report()
        except Exception as error:  # training goes on, whatever it is
            self._failed = True
            self._say(f"{self._where}: {self._problem} ({first_line(error)}); the run goes on without it")
