"""Where a step's metrics go: metrics.jsonl, and TensorBoard files beside it."""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from jaxrl.errors import InputError
from jaxrl.telemetry.expendable import Expendable
from jaxrl.telemetry.lines import StepLines, read_lines
from jaxrl.types import Say

# A row of metrics.jsonl: the step, 0 for the first, and its metrics by name; None where a value is not finite.
MetricsRow = dict[str, float | None]


class Tracker(Protocol):
    """Anything that takes the metrics of one step after another."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of `step`, 0 for the first; None where a value is not finite."""

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl, an object a step; see `StepLines`."""

    def __init__(self, path: Path, start: int, say: Say) -> None:
        self._lines = StepLines(path, start, say, _row_of)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._lines.write({"step": step, **metrics})

    def close(self) -> None:
        self._lines.close()


class TensorBoard:
    """Event files of TensorBoard; events from `start` on are purged. After a failed write there are no more.

    tensorboardX's SummaryWriter is left out: its thread ends on a full disk and when the clock is set back, and then
    whoever logs waits for ever.
    """

    def __init__(self, folder: Path, start: int, say: Say) -> None:
        self._attempt = Expendable(folder, say)
        self._file: BinaryIO | None = None

        def begin() -> None:
            from tensorboardX.proto.event_pb2 import SessionLog

            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}").open("ab")
            self._write(file_version="brain.Event:2")
            self._write(step=start, session_log=SessionLog(status=SessionLog.START))

        self._attempt(begin)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        def write() -> None:
            from tensorboardX.proto.summary_pb2 import Summary

            shown = {name: value for name, value in metrics.items() if value is not None}
            values = [Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
            self._write(step=step, summary=Summary(value=values))

        self._attempt(write)

    def _write(self, **fields: object) -> None:
        """Appends an event as TensorFlow's record: length, data, and a checksum of each."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        assert self._file
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))
        self._file.flush()

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # `log` has flushed, or failed
                self._file.close()


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
            trackers.append(TensorBoard(directory / "tensorboard", start, say))
            stack.callback(trackers[-1].close)
        yield trackers


def finite(metrics: Mapping[str, float]) -> MetricsRow:
    """Metrics as trackers take them: None for what is not finite."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: Path, begun: bool = True) -> list[MetricsRow]:
    """Reads the rows of a metrics.jsonl; not the last evaluation's, which is of no step.

    Raises:
      InputError: if there are none, and the run has to have begun.
    """
    rows = [row for row in read_rows(path)[0] if not is_evaluation(row)]
    if begun and not rows:
        raise InputError(f"{path}: no metrics; give a run folder that has trained for a step")
    return rows


def is_evaluation(row: MetricsRow) -> bool:
    """Whether a row has the results of an evaluation, and nothing of a step."""
    return len(row) > 1 and all(name == "step" or name.startswith("eval/") for name in row)


def history(rows: Sequence[MetricsRow], name: str, start: int) -> list[float]:
    """A metric of the steps before `start`, where they have it."""
    values = [row.get(name) for row in rows if (row["step"] or 0) < start]
    return [value for value in values if isinstance(value, float)]


def read_rows(path: Path) -> tuple[list[MetricsRow], list[bytes]]:
    """The rows of a metrics.jsonl, and its damaged lines; see `read_lines`."""
    return read_lines(path, _row_of)


def _row_of(row: object) -> MetricsRow | None:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(value is None or isinstance(value, int | float) for value in row.values()) else None
