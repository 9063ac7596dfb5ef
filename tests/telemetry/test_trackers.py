"""metrics.jsonl and TensorBoard files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from faults import largest_file
from jaxrl.errors import InputError, RunError
from jaxrl.telemetry.trackers import TensorBoard, finite, open_trackers, read_metrics


def test_metrics_survive_a_restart_without_the_steps_to_be_repeated(tmp_path: Path) -> None:
    with open_trackers(tmp_path, 0, tensorboard=False) as (tracker,):
        for step in range(4):
            tracker.log(step, finite({"reward/mean": step / 10, "update/grad_norm": np.float32(np.nan)}))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "rewa')  # killed while writing
    with open_trackers(tmp_path, 2, tensorboard=False) as (tracker,):
        tracker.log(2, {"reward/mean": 7})
    rows = read_metrics(path)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.0), (1, 0.1), (2, 7.0)]
    assert rows[0]["update/grad_norm"] is None  # NaN is not JSON


def test_each_line_is_on_disk_when_written(tmp_path: Path) -> None:
    with open_trackers(tmp_path, 0, tensorboard=False) as (tracker,):
        tracker.log(0, {"reward/mean": 1.0})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "reward/mean": 1.0}


def test_tensorboard_has_the_tags(tmp_path: Path) -> None:
    with open_trackers(tmp_path, 0) as trackers:
        for tracker in trackers:
            tracker.log(0, {"policy/entropy": 0.5, "update/grad_norm": None})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"policy/entropy" in events.read_bytes()


@pytest.mark.parametrize("fault", ["full", "full at the start", "no folder", "clock"])
def test_tensorboard_that_fails_is_dropped_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    lines, metrics = list[str](), finite({f"a/{i}": 0.5 for i in range(60)})
    if fault == "no folder":
        (tmp_path / "tensorboard").touch()
    with largest_file({"full": 5_000, "full at the start": 10}.get(fault, 10**9)):
        tracker = TensorBoard(tmp_path / "tensorboard", 0, lines.append)
        for step in range(30):  # SummaryWriter's queue had room for ten events
            if fault == "clock" and step == 3:
                monkeypatch.setattr(time, "time", lambda: 1e9)
            tracker.log(step, metrics)
        tracker.close()
    assert len(lines) == (fault != "clock")
    assert all("tensorboard: cannot be written" in line and "goes on without it" in line for line in lines)


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    tracker = TensorBoard(tmp_path, 7, print)
    tracker.log(7, {"policy/entropy": 0.5, "update/grad_norm": None})
    tracker.close()
    (path,) = tmp_path.iterdir()
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [event.step for event in events] == [0, 7, 7]
    assert [(v.tag, v.simple_value) for v in events[2].summary.value] == [("policy/entropy", 0.5)]


def test_a_full_disk_under_the_metrics_ends_the_run(tmp_path: Path) -> None:
    full = pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(File")
    with open_trackers(tmp_path, 0, tensorboard=False) as (tracker,), largest_file(100), full:
        for step in range(30):
            tracker.log(step, {})
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and steps


def test_metrics_that_are_deleted_end_the_run_at_the_next_step(tmp_path: Path) -> None:
    with open_trackers(tmp_path / "run", 0, tensorboard=False) as (tracker,):
        tracker.log(0, {})
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written .it was deleted"):
            tracker.log(1, {})


def test_other_processes_have_no_trackers(tmp_path: Path) -> None:
    with open_trackers(tmp_path, 0, enabled=False) as trackers:
        assert trackers == [] and not any(tmp_path.iterdir())


def test_no_metrics_is_said_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe\n", b"{]\n", b"[1]\n", b'{"step": "x"}\n', b'{"step": 1, "a": []}\n', b"[" * 100_000 + b"\n"],
)
def test_a_damaged_line_costs_no_other_one(tmp_path: Path, damage: bytes) -> None:
    path, lines = tmp_path / "metrics.jsonl", list[str]()
    path.write_bytes(b'{"step": 0}\n' + damage + b'{"step": 1}\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    with open_trackers(tmp_path, 2, tensorboard=False, say=lines.append) as (tracker,):
        tracker.log(2, {})
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damage
    assert len(lines) == 1 and "metrics.damaged.jsonl" in lines[0]


def test_rows_that_are_missing_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 2}\n')
    lines = list[str]()
    with open_trackers(tmp_path, 4, tensorboard=False, say=lines.append):
        pass
    (line,) = lines
    assert "metrics.jsonl: 2 of the 4 steps before have no row" in line
