"""Nothing that was started outlives the trainer. The program here is no vLLM, but leaves a child behind as it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxrl.sampling import servers

PROGRAM = """#!/bin/sh
sleep 600 &
echo $$ $! > "$2.pids"
wait
"""
TRAINER = """
import sys, time
from pathlib import Path
from jaxrl.sampling import servers
program, folder = sys.argv[1:]
servers.start(program, folder + "/server", Path(folder) / "log", on_cpu=True, dtype="float32", max_tokens=8)
time.sleep(600)
"""


def start_server(folder: Path) -> tuple[Path, Path]:
    program = folder / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return program, folder / "server.pids"


def pids_in(path: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().count("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_kill_9_of_the_trainer_ends_the_servers(tmp_path: Path) -> None:
    program, pids = start_server(tmp_path)
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(program), str(tmp_path)])
    server = pids_in(pids)
    assert all(map(alive, server))
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert_gone(server)


def test_one_that_ended_or_is_long_unwell_is_started_again(tmp_path: Path) -> None:
    program, path = start_server(tmp_path)
    options = {"on_cpu": True, "dtype": "float32", "max_tokens": 8}
    server = servers.start(str(program), str(tmp_path / "server"), tmp_path / "log", **options)
    first = pids_in(path)
    assert not server.restart(unwell=10, limit=300)
    os.kill(first[0], signal.SIGKILL)  # its child goes on, as vLLM's engine does
    server.process.wait()
    path.unlink()
    assert server.restart(unwell=0)
    assert_gone(first)
    second = pids_in(path)
    path.unlink()
    assert server.restart(unwell=301, limit=300)
    assert_gone(second)
    third = pids_in(path)
    server.kill()
    assert_gone(third)
