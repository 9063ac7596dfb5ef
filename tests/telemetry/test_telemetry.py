"""What a run leaves on disk and shows on a terminal."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrl.errors import InputError
from jaxrl.telemetry.profile import resources
from jaxrl.telemetry.progress import Progress
from jaxrl.telemetry.rollouts import write_rollouts
from jaxrl.telemetry.timer import Timer, watchdog
from jaxrl.telemetry.trackers import MetricsWriter, read_metrics
from jaxrl.types import Prompt, Rollout


def test_metrics_survive_a_restart_without_the_steps_to_be_repeated(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, tensorboard=False) as writer:
        for step in range(4):
            writer.write(step, {"reward/mean": step / 10, "update/grad_norm": np.float32(np.nan)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "rewa')  # killed while writing
    with MetricsWriter(tmp_path, 2, tensorboard=False) as writer:
        writer.write(2, {"reward/mean": 7})
    rows = read_metrics(path)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.0), (1, 0.1), (2, 7.0)]
    assert rows[0]["update/grad_norm"] is None  # NaN is not JSON


def test_each_line_is_on_disk_when_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, tensorboard=False) as writer:
        writer.write(0, {"reward/mean": 1})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "reward/mean": 1.0}


def test_tensorboard_has_the_tags(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, tensorboard=True) as writer:
        writer.write(0, {"policy/entropy": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"policy/entropy" in events.read_bytes()


def test_no_metrics_is_said_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_rollouts_keep_everything_a_reader_needs(tmp_path: Path) -> None:
    prompt = Prompt("p7", np.array([1, 2], np.int32), "42")
    rollout = Rollout(prompt, np.array([3, 4], np.int32), np.array([-0.5, -1.5], np.float32), "stop", 9, -1.0)
    write_rollouts(tmp_path, 12, [[rollout, rollout]], lambda ids: "é".join(map(str, ids)))
    rows = [
        json.loads(line) for line in (tmp_path / "rollouts" / "step_000012.jsonl").read_text().splitlines()
    ]
    assert [row["sample"] for row in rows] == [0, 1]
    expected = {
        "step": 12,
        "prompt_id": "p7",
        "prompt": "1é2",
        "answer": "42",
        "completion": "3é4",
        "score": -1.0,
    }
    expected |= {
        "finish_reason": "stop",
        "tokens": 2,
        "version": 9,
        "logprob_mean": -1.0,
        "token_ids": [3, 4],
    }
    assert expected.items() <= rows[0].items() and rows[0]["logprobs"] == [-0.5, -1.5]


def test_the_vocabulary_has_every_token_of_every_file(tmp_path: Path) -> None:
    asked = []

    def decode(ids: np.ndarray) -> str:
        asked.append(ids.tolist())
        return "".join(chr(64 + i) for i in ids)

    for step, tokens in enumerate(([3, 4, 3], [4, 5])):
        prompt = Prompt("p", np.array([9], np.int32), "42")
        rollout = Rollout(
            prompt, np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), "stop", 0, 1.0
        )
        write_rollouts(tmp_path, step, [[rollout]], decode)
    known = json.loads((tmp_path / "rollouts" / "vocabulary.json").read_text())
    assert known == {"3": "C", "4": "D", "5": "E"}
    assert asked.count([4]) == 1  # a token is decoded once a run


def test_timer_adds_up_phases_that_come_twice() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("update"):
            time.sleep(0.02)
    assert 0.04 <= timer.seconds()["time/update"] < 5
    timer.reset()
    assert timer.seconds() == {}


def test_without_a_terminal_a_step_is_a_line(capsys: pytest.CaptureFixture) -> None:
    with Progress(10, 3, "run") as progress:
        progress.phase("sample", total=4)
        progress.advance(1, tokens=5)
        progress.step_done(3, {"reward/mean": 0.25, "time/step": 1.5})  # most metrics absent
    output = capsys.readouterr().out
    assert (
        output.startswith("step 4/10  reward 0.25  |  step 1.50s  |  ETA 0:00:0") and output.count("\n") == 1
    )
    assert "\x1b" not in output


LIVE = """
import time
from jaxrl.telemetry import Progress
with Progress(3, 0, "run") as progress:
    progress.phase("sample", total=8)
    progress.advance(3, tokens=100)
    progress.step_done(0, {"reward/mean": 0.125, "reward/accuracy": 0.5})
    time.sleep(0.6)
    raise RuntimeError("a failure")
"""


def test_on_a_terminal_it_is_live_and_leaves_it_sane_after_a_failure() -> None:
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE], stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(60) == 1
    shown = output.decode()
    assert (
        "sample" in shown
        and "3/8" in shown
        and "tokens/s" in shown
        and "1/3" in shown
        and "reward 0.125" in shown
    )
    assert (
        shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    )  # the cursor is hidden once and comes back
    assert "a failure" in shown


def test_the_watchdog_names_the_slow_phase_and_says_it_again_at_every_doubling() -> None:
    timer, said = Timer(), []
    with watchdog(timer, said.append, least=0.2):
        for _ in range(3):
            with timer("update"):
                time.sleep(0.02)
        assert not said
        with timer("publish"):
            time.sleep(1.5)
        time.sleep(0.5)  # no phase at all is no slow one
    assert all(line.startswith("publish has taken") and socket.gethostname() in line for line in said)
    assert 2 <= len(said) <= 3  # at 0.2, 0.4 and 0.8 s, if this machine is not too slow


def test_resources_follow_what_is_held() -> None:
    before = resources()
    held, files = np.ones(200_000_000, np.uint8), [os.open("/dev/null", os.O_RDONLY) for _ in range(7)]
    after = resources()
    assert 150e6 < after["perf/host_bytes"] - before["perf/host_bytes"] < 400e6
    assert after["perf/open_files"] - before["perf/open_files"] == 7
    del held
    for file in files:
        os.close(file)


def test_old_rollouts_go(tmp_path: Path) -> None:
    prompt = Prompt("a", np.zeros(1, np.int32), "1")
    rollout = Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0)
    for step in range(5):
        write_rollouts(tmp_path, step, [[rollout]], str, keep=2)
    kept = sorted(path.name for path in (tmp_path / "rollouts").glob("step_*"))
    assert kept == ["step_000003.jsonl", "step_000004.jsonl"]
