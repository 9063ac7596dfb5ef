"""Nothing that was started outlives the trainer. The program here is no vLLM, but leaves a child behind as it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    visible: str, count: int, trains: bool, own: str, taken: list[str], options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # the user's own stays
    place = servers.choose_devices(count, trains)
    assert (list(place.gpus), list(place.options)) == (taken, options)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.7"


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = tmp_path / "nvidia-smi"
    lists.write_text(
        "#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: H100 (UUID: GPU-2)'\n"
    )
    lists.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert servers.gpus() == ["0", "1"]
    monkeypatch.setenv("PATH", "")
    assert servers.gpus() == []


def test_each_server_gets_its_gpu_and_options(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(
        '#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $@"\n'
    )  # and ends, which is said with what it printed
    program.chmod(0o755)
    place = servers.Devices(["3", "5"], ["--gpu-memory-utilization", "0.3"])
    with pytest.raises(servers.InputError, match="stopped"), servers.running(
        2, str(program), "model", tmp_path, where=place, options=["--seed", "7"], dtype="bfloat16", max_tokens=0,
        chat=True, say=lambda _: None,
    ):  # fmt: skip
        raise AssertionError
    for i, gpu in enumerate(place.gpus):
        said = (tmp_path / f"vllm_{i}.log").read_text()
        assert said.startswith(f"{gpu} serve model ") and "--gpu-memory-utilization 0.3 --seed 7" in said
        assert "--tokens-only" not in said and "--max-model-len" not in said and "--enforce-eager" not in said
