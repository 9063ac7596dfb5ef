"""Phases and the watchdog over them."""

from __future__ import annotations

import socket
import time

from jaxrl.telemetry.timer import Timer, watchdog


def test_timer_adds_up_phases_that_come_twice() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("update"):
            time.sleep(0.02)
    assert 0.04 <= timer.seconds()["time/update"] < 5
    timer.reset()
    assert timer.seconds() == {}


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
