"""What is shown on a terminal, and without one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxrl.telemetry.progress import Progress
from jaxrl.types import Prompt, Rollout

ROLLOUT = Rollout(
    Prompt("", np.zeros(1, np.int32), ""), np.zeros(5, np.int32), np.zeros(5, np.float32), "stop", 0
)


def test_without_a_terminal_a_step_is_a_line(capsys: pytest.CaptureFixture) -> None:
    with Progress(10, 3, "run") as progress:
        progress.phase("sample", total=4)
        progress.advance(ROLLOUT)
        progress.step_done(3, {"reward/mean": 0.25, "time/step": 1.5})  # most metrics absent
    output = capsys.readouterr().out
    assert (
        output.startswith("step 4/10  reward 0.25  |  step 1.50s  |  ETA 0:00:0") and output.count("\n") == 1
    )
    assert "\x1b" not in output


def test_without_a_terminal_a_long_step_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxrl.telemetry.progress.EVERY", 0.4)
    with Progress(10, 3, "run") as progress:
        progress.phase("sample", total=4)
        progress.advance(ROLLOUT)
        time.sleep(1.5)
        progress.step_done(3, {})
        progress.phase("update")
        time.sleep(1.5)
    time.sleep(0.6)
    lines = capsys.readouterr().out.splitlines()
    first, *_ = [line for line in lines if "sample" in line]
    assert re.fullmatch(r"step 4/10  sample 1/4 for 0:00:0\d  \|  [\d,]+ tokens/s", first)
    assert re.fullmatch(r"step 5/10  update for 0:00:0\d", lines[-1])
    assert len(lines) <= 9 and "\x1b" not in "".join(lines)


def test_rollouts_of_a_later_step_are_counted_when_their_turn_comes() -> None:
    with Progress(10, 0, "run", quiet=True) as progress:
        progress.sampling(0, total=2)
        progress.sampled(0, ROLLOUT)
        for _ in range(3):
            progress.sampled(1, ROLLOUT)
        task = progress._bars.tasks[progress._phase]
        assert (task.completed, task.total) == (1, 2)
        progress.sampling(1, total=4)
        assert (task.completed, task.total) == (3, 4)
        progress.sampled(1, ROLLOUT)
        assert task.finished


def test_a_step_that_samples_again_says_why() -> None:
    with Progress(10, 0, "run", quiet=True) as progress:
        progress.sampling(0, total=2)
        progress.sampling_more(1, 8, "2 groups out")  # a later step's, ahead
        progress.sampling_more(0, 4, "1 groups out of 0.0 to 1.0")
        progress.sampled(0, ROLLOUT)
        task = progress._bars.tasks[progress._phase]
        assert (task.completed, task.total) == (1, 6)
        assert task.fields["note"].startswith("1 groups out of 0.0 to 1.0; ")
        progress.sampling(1, total=2)
        assert task.total == 10


LIVE = """
import time
import numpy as np
from jaxrl.telemetry.progress import Progress
from jaxrl.types import Prompt, Rollout
prompt = Prompt("", np.zeros(1, np.int32), "")
rollout = Rollout(prompt, np.zeros(33, np.int32), np.zeros(33, np.float32), "stop", 0)
with Progress(3, 0, "run") as progress:
    progress.phase("sample", total=8)
    for _ in range(3):
        progress.advance(rollout)
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
