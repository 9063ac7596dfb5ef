"""metrics.jsonl and TensorBoard files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.telemetry.trackers import finite, open_trackers, read_metrics


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


def test_other_processes_have_no_trackers(tmp_path: Path) -> None:
    with open_trackers(tmp_path, 0, enabled=False) as trackers:
        assert trackers == [] and not any(tmp_path.iterdir())


def test_no_metrics_is_said_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\n", b"{]\n", b"[1]\n", b'{"step": "x"}\n', b"[" * 100_000 + b"\n"]
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
