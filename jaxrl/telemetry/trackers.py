"""Where a step's metrics go: metrics.jsonl, and TensorBoard files beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from jaxrl.errors import InputError
from jaxrl.files import write_atomically
from jaxrl.types import Say

# A row of metrics.jsonl: the step, 0 for the first, and its metrics by name; None where a value is not finite.
MetricsRow = dict[str, float | None]


class Tracker(Protocol):
    """Anything that takes the metrics of one step after another."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of `step`, 0 for the first; None where a value is not finite."""

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl, an object a step. Rows from `start` on are dropped: those steps are about to be run again.

    Lines that are no rows are moved to metrics.damaged.jsonl, and reported.
    """

    def __init__(self, path: Path, start: int, say: Say) -> None:
        rows, damaged = read_rows(path)
        if damaged:
            aside = path.with_name("metrics.damaged.jsonl")
            with aside.open("ab") as file:
                file.write(b"".join(line.rstrip(b"\n") + b"\n" for line in damaged))
            say(
                f"{path}: {len(damaged)} lines were damaged and are now in {aside}; the other {len(rows)} are kept"
            )
        kept = [row for row in rows if row["step"] < start]  # type: ignore[operator]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files of TensorBoard; events from `start` on are purged."""

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=start)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


@contextmanager
def open_trackers(
    directory: Path, start: int, tensorboard: bool = True, enabled: bool = True, say: Say = print
) -> Iterator[list[Tracker]]:
    """The trackers of a run folder, from step `start` on; none where not enabled."""
    trackers: list[Tracker] = []
    with ExitStack() as stack:
        if enabled:
            trackers.append(JsonLines(directory / "metrics.jsonl", start, say))
            stack.callback(trackers[-1].close)
        if enabled and tensorboard:
            trackers.append(TensorBoard(directory / "tensorboard", start))
            stack.callback(trackers[-1].close)
        yield trackers


def finite(metrics: Mapping[str, float]) -> MetricsRow:
    """Metrics as trackers take them: None for what is not finite."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: Path) -> list[MetricsRow]:
    """Reads the rows of a metrics.jsonl.

    Raises:
      InputError: if there are none.
    """
    rows, _ = read_rows(path)
    if not rows:
        raise InputError(f"{path}: no metrics; give a run folder that has trained for a step")
    return rows


def read_rows(path: Path) -> tuple[list[MetricsRow], list[bytes]]:
    """The rows of a file, and the lines that are none; a last one without an end is neither, but a killed process's."""
    rows, damaged = list[MetricsRow](), list[bytes]()
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif line.strip() and line.endswith(b"\n"):
            damaged.append(line)
    return rows, damaged
