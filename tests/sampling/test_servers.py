"""Nothing that was started outlives the trainer. The program here is no vLLM, but leaves a child behind as it does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import tiny_run
from jaxrl import cli, config
from jaxrl.errors import InputError, RunError
from jaxrl.sampling import servers
from jaxrl.sampling.vllm_plugin import IDENTITY, OWNER
from jaxrl.types import silent
from json_server import JsonHandler, serving

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


# answers as vLLM with Guard does
SERVES = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from http.server import ThreadingHTTPServer
from json_server import JsonHandler
class Handler(JsonHandler):
    def do_GET(self):
        self.reply(200, {{"server": os.environ["{IDENTITY}"]}} if self.path == "{OWNER}" else {{}})
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
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


@pytest.mark.parametrize(
    "visible, count, trains, share",
    [
        ("0,1", 1, True, "0.92"),  # servers have the other one
        ("0,1", 0, True, "0.92"),
        ("0", 1, True, "0.62"),
        ("0", 1, False, None),
        ("", 1, True, None),
    ],
)
def test_the_trainers_share_of_memory_is_set_where_the_user_has_not(
    visible: str, count: int, trains: bool, share: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": visible})
    servers.choose_devices(count, trains)
    assert os.environ.get(old) == share
    for name in (old, new):
        monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": visible, name: "0.5"})
        servers.choose_devices(count, trains)
        assert {os.environ.get(old), os.environ.get(new)} == {"0.5", None}  # JAX refuses both


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


class Foreign(JsonHandler):
    """A server of another run, whose key may be the same."""

    status = 200

    def do_GET(self) -> None:
        self.reply(200 if self.path == "/health" else self.status, {"server": "another", "owner": ""})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "LET_GO", 0.2)


@pytest.fixture
def foreign() -> Iterator[ThreadingHTTPServer]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Foreign)) as server:
        yield server


def serve(folder: Path, port: int = 0, text: str = SERVES) -> servers.Server:
    program = folder / "vllm"
    program.write_text(text)
    program.chmod(0o755)
    settings = servers.Settings(str(program), str(folder / "model"), "float32", max_tokens=8)
    return servers.prepare(settings, folder / "servers" / "vllm_0.log", on_cpu=True, port=port)


def test_a_port_that_another_program_has_is_named_with_it(
    tmp_path: Path, foreign: ThreadingHTTPServer
) -> None:
    server = serve(tmp_path, foreign.server_port)
    named = (
        rf"http://127.0.0.1:{foreign.server_port}: no server can .*in use, process {os.getpid()} \(.*has it"
    )
    with pytest.raises(InputError, match=named):
        servers.begin(server)
    with pytest.raises(InputError, match=r"port 65536 of 127\.0\.0\.1: the last one is 65535"):
        serve(tmp_path, 65536)


def test_a_server_is_ready_when_it_answers_itself(tmp_path: Path) -> None:
    server = serve(tmp_path)
    assert not server.well()
    servers.begin(server)
    servers.wait(server, 60)
    assert server.restart(unwell=301)  # at the same port
    servers.wait(server, 60)
    same = serve(tmp_path, urlsplit(server.url).port or 0)  # as another host of the run has it
    assert same.well()
    server.kill()
    assert not server.well() and not same.well()


@pytest.mark.parametrize("status", [200, 401, 404])
def test_a_server_of_another_run_is_not_taken_for_the_own(
    status: int, tmp_path: Path, foreign: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Foreign, "status", status)
    server = serve(tmp_path, foreign.server_port)
    message = rf"127\.0\.0\.1:{foreign.server_port}: {{}} answers in place of a server of this run"
    with pytest.raises(InputError, match=message.format("another program")):  # as of another host
        server.well()
    server.arguments = ["sleep", "600"]  # and does not get the port
    monkeypatch.setattr(servers, "require_free", lambda _: None)
    servers.begin(server)
    with pytest.raises(InputError, match=message.format(rf"process {os.getpid()} \(.*\)")):
        servers.wait(server, 60)
    server.kill()


def test_a_port_that_is_lost_while_a_server_restarts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the program leaves a file
    server = serve(tmp_path, text=PROGRAM)  # it does not listen
    servers.begin(server)
    with (
        serving(ThreadingHTTPServer(("127.0.0.1", urlsplit(server.url).port or 0), Foreign)),
        pytest.raises(InputError, match=f"process {os.getpid()} .* has it"),
    ):
        server.restart(unwell=301)
    server.kill()


def check_startable(folder: Path, text: str, gpus: tuple[str, ...] = (), **section: object) -> None:
    program = folder / "vllm"
    if text:
        program.write_text(text)
        program.chmod(0o755)
    values = {"rollout": {"engine": "vllm"}, "sampler": {"servers": 1, "vllm": str(program)} | section}
    servers.require_startable(config.from_dict(values), servers.Devices(gpus))


CPU_BUILD, CUDA_BUILD = "#!/bin/sh\necho WARNING >&2; echo 0.32.0+cpu\n", "#!/bin/sh\necho 0.32.1\n"


@pytest.mark.parametrize(
    ("text", "gpus", "message"),
    [
        ("", (), "vllm: no such program; run make vllm"),
        ("#!/bin/sh\n", (), r"is no vLLM .*\(it prints nothing\)"),
        ("#!/bin/sh\necho ls 9.1\n", (), r"is no vLLM .*\(ls 9.1\)"),
        ("#!/no/such/python\n", (), "cannot be run .*No such file or directory: '/no/such/python'"),
        (f"#!{sys.executable}\n", (), r"is no vLLM .*No package metadata was found for vllm"),
        ("#!/bin/sh\necho 0.31.0+cpu\n", (), r"is vLLM 0.31.0\+cpu; jaxrl works with 0.32"),
        (CUDA_BUILD, (), "is vLLM 0.32.1, and no GPU is visible; run make vllm VLLM_FOR=cpu"),
        (CPU_BUILD, ("0",), "for CPUs, and this machine has GPUs; run make vllm VLLM_FOR=cuda"),
        (CUDA_BUILD, ("0", "2"), "CUDA_VISIBLE_DEVICES names GPU 2, and this machine has 2"),
        (CUDA_BUILD, ("GPU-3",), "CUDA_VISIBLE_DEVICES names GPU GPU-3, and this machine has 2"),
    ],
)
def test_servers_that_cannot_start_are_refused_at_once(
    text: str, gpus: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "list_gpus", lambda: ["GPU 0: (UUID: GPU-1)", "GPU 1: (UUID: GPU-2)"])
    with pytest.raises(InputError, match=message):
        check_startable(tmp_path, text, gpus)


def test_servers_that_can_start_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "list_gpus", lambda: ["GPU 0: (UUID: GPU-1)", "GPU 1: (UUID: GPU-2)"])
    check_startable(tmp_path, CPU_BUILD)
    check_startable(tmp_path, CUDA_BUILD, ("0", "1", "GPU-2"))
    with pytest.raises(
        InputError, match=r"has --tensor-parallel-size 2, and a server of sampler\.servers gets one"
    ):
        check_startable(tmp_path, CUDA_BUILD, ("0",), vllm_options=["--tensor-parallel-size", "2"])
    (tmp_path / "vllm").chmod(0o644)
    monkeypatch.setattr(shutil, "which", lambda _: None)  # root may run everything
    with pytest.raises(InputError, match="vllm: may not be run; run make vllm"):
        check_startable(tmp_path, "")


@pytest.mark.parametrize(
    ("visible", "count", "trains"), [("0", 1, True), ("0,1", 2, True), ("0,1", 1, False)]
)
def test_nccl_is_refused_where_a_server_would_share_this_process_gpu(
    visible: str, count: int, trains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "list_gpus", lambda: ["GPU 0", "GPU 1", "GPU 2"])

    def start(visible: str, transport: str) -> None:
        monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": visible, "PATH": os.environ["PATH"]})
        gpus = tuple(servers.choose_devices(count, trains).gpus)
        check_startable(tmp_path, CUDA_BUILD, gpus, servers=count, transport=transport)

    with pytest.raises(
        InputError, match=r'transport = "nccl" needs .* and GPU 0 would be for both; set it to "files"'
    ):
        start(visible, "nccl")
    start(visible, "files")
    if trains:
        start("0,1,2", "nccl")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_vllm_that_is_missing_is_said_before_anything_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is neither a model nor data."""
    recipe = tiny_run.write_recipe(tmp_path, tmp_path / "no" / "base")
    arguments = [str(recipe)] if command == "train" else [str(tmp_path / "no"), "--recipe", str(recipe)]
    sampler = ["--rollout.engine", "vllm", "--sampler.servers", "1", "--sampler.vllm", "no-such-vllm"]
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *arguments, *sampler])
    assert ended.value.code == 2 and "no-such-vllm: no such program" in capsys.readouterr().err
