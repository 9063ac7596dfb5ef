"""Nothing that was started outlives the trainer. The program here is no vLLM, but leaves a child behind as it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl.errors import InputError, RunError
from jaxrl.sampling import servers
from jaxrl.types import silent

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
settings = servers.Settings(program, folder + "/server", "float32", max_tokens=8)
servers.begin(servers.prepare(settings, Path(folder) / "log", on_cpu=True))
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
    settings = servers.Settings(str(program), str(tmp_path / "server"), "float32", max_tokens=8)
    server = servers.prepare(settings, tmp_path / "log", on_cpu=True)
    servers.begin(server)
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


@pytest.mark.parametrize(
    "visible, count, trains, own, taken, options",
    [
        ("0,1,2,3,4,5,6,7", 6, True, "0,1", ["2", "3", "4", "5", "6", "7"], []),
        ("GPU-a,GPU-b", 1, True, "GPU-a", ["GPU-b"], []),
        ("0", 1, True, "0", ["0"], ["--gpu-memory-utilization", "0.3"]),
        ("0", 2, True, "0", ["0", "0"], ["--gpu-memory-utilization", "0.15"]),
        ("0,1", 3, False, "0,1", ["0", "1", "0"], ["--gpu-memory-utilization", "0.45"]),
        ("0,1", 0, True, "0,1", [], []),
        ("", 2, True, "", [], []),
    ],
)
def test_gpus_are_divided(
    visible: str,
    count: int,
    trains: bool,
    own: str,
    taken: list[str],
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # the user's own stays
    devices = servers.choose_devices(count, trains)
    assert (list(devices.gpus), list(devices.options)) == (taken, options)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.7"


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    listed = ["GPU 0: H100 (UUID: GPU-1)", "  MIG 1g", "GPU 1: H100 (UUID: GPU-2)"]
    driver.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
    driver.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert servers.gpus() == ["0", "1"]
    monkeypatch.setenv("PATH", "")
    assert servers.gpus() == []


def test_each_server_gets_its_gpu_and_options(tmp_path: Path) -> None:
    program = tmp_path / "program"
    # it ends soon, which is reported with what it printed
    program.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $@"\nsleep 0.5\n')
    program.chmod(0o755)
    devices = servers.Devices(["3", "5"], ["--gpu-memory-utilization", "0.3"])
    settings = servers.Settings(str(program), "model", "bfloat16", 0, chat=True, options=["--seed", "7"])
    running = servers.running(2, settings, tmp_path, devices=devices, say=silent)
    with pytest.raises(InputError, match=r"stopped: .* serve model "), running:
        raise AssertionError
    for i, gpu in enumerate(devices.gpus):
        log = (tmp_path / f"vllm_{i}.log").read_text()
        assert log.startswith(f"{gpu} serve model ") and "--gpu-memory-utilization 0.3 --seed 7" in log
        assert "--tokens-only" not in log and "--max-model-len" not in log and "--enforce-eager" not in log


def test_a_server_that_does_not_get_ready_may_the_next_time(tmp_path: Path) -> None:
    program, pids = start_server(tmp_path)
    settings = servers.Settings(str(program), str(tmp_path / "server"), "float32", max_tokens=8)
    with (
        pytest.raises(RunError, match=r"vllm_0\.log: the vLLM server was not ready after 1 s"),
        servers.running(1, settings, tmp_path, limit=1, say=silent),
    ):
        raise AssertionError
    assert_gone(pids_in(pids))
