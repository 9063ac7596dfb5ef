"""W&B, trackio and MLflow by their own packages, against what they have on disk."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import DecodeError

import tiny_run
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.telemetry import services
from jaxrl.telemetry.services import Row, Subject, makers, open_services, table
from jaxrl.telemetry.trackers import finite
from jaxrl.types import JsonObject, Prompt, Rollout

NAMES = ("wandb", "trackio", "mlflow")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def recipe(folder: Path, *names: str) -> config.Recipe:
    run = {"directory": str(folder / "run"), "trackers": list(names), "project": "sums"}
    (folder / "run").mkdir(exist_ok=True)
    return config.from_dict({"run": run, "loss": {"clip_high": 0.3}})


def report(of: config.Recipe, steps: Sequence[int], page: Path | None = None) -> list[str]:
    """One start of a run: these steps, each with a table; returns what was said."""
    lines = list[str]()
    with open_services(of, True, lines.append) as opened:
        for step in steps:
            for service in opened:
                service.answers(step, [{"prompt": "1+1", "response": str(step), "reward": 1.0}])
                service.log(
                    step, finite({"reward/mean": step / 10, "eval/x/pass@1": 0.5, "policy/entropy": np.nan})
                )
        for service in opened if page else ():
            service.file(page)
    return lines


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, a header of 7 bytes before each piece."""
    at, whole = 7, b""  # after the file's own header
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last piece
            yield whole
            whole = b""


def written(path: Path) -> list[bytes]:
    """The records of a run that has ended; wandb's own process may write the last ones after `finish` returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 30
    while True:
        try:
            records = list(log_records(path.read_bytes()))
            if any(Record.FromString(data).HasField("exit") for data in records):
                return records
        except DecodeError:  # the last one is not whole yet
            pass
        assert time.monotonic() < deadline, "it has no end"
        time.sleep(0.05)


def logged_to_wandb(run: Path) -> tuple[dict[int, list[JsonObject]], set[str], JsonObject]:
    """Rows by step, run ids and configuration, from the files of offline runs."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids, shown = dict[int, list[JsonObject]](), set[str](), dict[str, object]()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in written(path):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                shown |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows.setdefault(record.history.step.num, []).append(row)
    return rows, ids, shown


@pytest.mark.usefixtures("offline")
def test_wandb_has_one_run_and_each_step_once(tmp_path: Path) -> None:
    of, page = recipe(tmp_path, "wandb"), tmp_path / "report.html"
    page.write_text("<p>report</p>")
    assert report(of, [0, 1, 2]) == []
    time.sleep(1.1)  # wandb names its folders by the second
    assert report(of, [1, 2, 3], page) == []
    rows, ids, shown = logged_to_wandb(tmp_path / "run")
    assert len(ids) == 1 and shown["loss.clip_high"] == 0.3 and shown["jaxrl.version"]
    metrics = {
        step: [row["reward/mean"] for row in found if "reward/mean" in row] for step, found in rows.items()
    }
    assert metrics == {0: [0.0], 1: [0.1], 2: [0.2], 3: [0.3]}
    assert not any("policy/entropy" in row for found in rows.values() for row in found)
    assert all(sum("rollouts/sha256" in row for row in rows[step]) == 1 for step in metrics)
    tables = list((tmp_path / "run").rglob("*.table.json"))
    assert {json.loads(path.read_text())["data"][0][1] for path in tables} == {"0", "1", "2", "3"}


@pytest.mark.usefixtures("offline")
def test_mlflow_has_one_run_and_each_step_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    of, page = recipe(tmp_path, "mlflow"), tmp_path / "report.html"
    page.write_text("<p>report</p>")
    assert report(of, [0, 1, 2]) == [] == report(of, [1, 2, 3], page)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
    assert run.data.params["loss.clip_high"] == "0.3" and run.info.status == "FINISHED"
    for name, values in (("reward/mean", [0, 0.1, 0.2, 0.3]), ("eval/x/pass_at_1", [0.5] * 4)):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == list(enumerate(values))
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {"report.html", "rollouts"}
    assert len(client.list_artifacts(run.info.run_id, "rollouts")) == 4


@pytest.mark.usefixtures("offline")
def test_trackio_has_one_run_and_each_step_once(tmp_path: Path) -> None:
    of = recipe(tmp_path, "trackio")
    assert report(of, [0, 1, 2]) == [] == report(of, [1, 2, 3])
    from trackio.utils import TRACKIO_DIR  # of the first import in this process

    (file,) = TRACKIO_DIR.glob("sums*.db")
    with sqlite3.connect(file) as db:
        rows = db.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    logged = [(step, json.loads(text)) for _, step, text in rows]
    values = [(step, row["reward/mean"]) for step, row in logged if "reward/mean" in row]
    assert sorted(values) == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]
    assert sum("rollouts" in row for _, row in logged) == 4


class Broken:
    """A service that fails, or never ends, in one of its calls."""

    where, ended = "", threading.Event()

    def __init__(self, subject: Subject) -> None:
        self._maybe("start")

    def _maybe(self, now: str) -> None:
        if now == self.where:
            raise RuntimeError("no network")
        if self.where == f"slow {now}":
            self.ended.wait(60)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._maybe("log")

    def answers(self, step: int, rows: Sequence[Row]) -> None:
        self._maybe("answers")

    def file(self, path: Path) -> None:
        self._maybe("file")

    def close(self) -> None:
        self._maybe("close")


@pytest.mark.parametrize("where", ["start", "log", "answers", "file", "close", "slow start", "slow log"])
def test_a_service_that_fails_or_hangs_stops_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("my_tracker")
    module.open = Broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_tracker", module)
    monkeypatch.setattr(services, "PATIENCE", 0.2 if "slow" in where else 60)
    Broken.where, Broken.ended = where, threading.Event()
    try:
        (line,) = report(recipe(tmp_path, "my_tracker:open"), range(5), tmp_path / "page")
    finally:
        Broken.ended.set()
    assert line.startswith("my_tracker:open: this tracker ")
    assert ("left behind" if "slow" in where else "(no network); the run goes on without it") in line


def test_a_service_that_is_not_installed_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="mlflow is not installed; pip install mlflow"):
        makers(["mlflow"])
    with pytest.raises(InputError, match="neither one of wandb, trackio, mlflow nor"):
        config.from_dict({"run": {"trackers": ["comet"]}})


def test_the_table_is_of_the_first_prompts() -> None:
    groups = [
        [
            Rollout(
                Prompt(str(p), np.array([1, 2]), "7"), np.array([p, g]), np.zeros(2), "stop", 3, reward=0.5
            )
            for g in range(10)
        ]
        for p in range(3)
    ]
    rows = table(groups, lambda ids: " ".join(map(str, ids)))
    assert len(rows) == 16 and rows[9]["response"] == "1 1" and rows[0]["prompt"] == "1 2"
    assert {row["answer"] for row in rows} == {"7"} and rows[0]["version"] == 3.0


@pytest.mark.slow
def test_a_run_is_followed_by_wandb_over_a_restart(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"run.steps": 2, "run.trackers": ["wandb"], "run.rollouts_every": 1}
    path, run = tiny_run.write_recipe(tmp_path, base, **changes), tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_run.finish("train", path)
    tiny_run.finish("train", path, "--run.steps", "3")
    rows, ids, shown = logged_to_wandb(run)
    assert len(ids) == 1 and shown["run.trackers"] == ["wandb"]
    for row in tiny_run.metrics(run):
        (there,) = (each for each in rows[row["step"]] if "reward/mean" in each)
        own = {name: value for name, value in row.items() if name != "step" and value is not None}
        assert {name: there[name] for name in own} == own
    assert (run / "report" / "report.html").exists()
