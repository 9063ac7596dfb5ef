"""What a process uses."""

from __future__ import annotations

import os

import numpy as np

from jaxrl.telemetry.profile import resources


def test_resources_follow_what_is_held() -> None:
    before = resources()
    held, files = np.ones(200_000_000, np.uint8), [os.open("/dev/null", os.O_RDONLY) for _ in range(7)]
    after = resources()
    assert 150e6 < after["perf/host_bytes"] - before["perf/host_bytes"] < 400e6
    assert after["perf/open_files"] - before["perf/open_files"] == 7
    del held
    for file in files:
        os.close(file)
