"""launch/ssh.sh by a real sshd: the whole life of a run on two hosts, which are addresses of this one."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny_run
from jaxrl.errors import TRY_AGAIN
from jaxrl.sampling.servers import free_port

ROOT = Path(__file__).parents[2]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
SERVER = """
Port {port}
ListenAddress 127.0.0.2
ListenAddress 127.0.0.3
ListenAddress ::1
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
"""
CLIENT = """
Host *
Port {port}
IdentityFile {folder}/key
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
BatchMode yes
LogLevel ERROR
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SSHD, reason="there is no sshd; Debian has it in openssh-server"),
]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The ssh command that reaches 127.0.0.2, 127.0.0.3 and ::1, and the sshd which listens there."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "key"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True)
    values = {"port": free_port(), "folder": folder}
    for name, text in {"server": SERVER, "client": CLIENT}.items():
        (folder / name).write_text(text.format(**values))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "server")])
    yield f"ssh -F {folder / 'client'}", server
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_base(tmp_path_factory.mktemp("model") / "base", head_dim=32, updates=0)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """jaxrl under a path that a shell has to be told exactly."""
    folder = tmp_path / """it's a "$HOME" & more"""
    for name in ("jaxrl", "evals", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def start(checkout: Path, recipe: Path, ssh: str, hosts: str, *more: str) -> subprocess.Popen[str]:
    (checkout / "ho sts").write_text(hosts)
    environment = {**os.environ, "PYTHON": sys.executable, "LAUNCH_SSH": ssh, "XLA_FLAGS": ""}
    environment |= {"PYTHONPATH": str(checkout), "HF_HOME": str(checkout), "OMP_NUM_THREADS": "1"}
    out, port = subprocess.PIPE, str(free_port())
    command = ["launch/ssh.sh", "ho sts", "--port", port, str(recipe), *more]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True
    )


def running(checkout: Path) -> list[str]:
    """The processes that have its path in their command line or environment, but for this test's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(checkout).encode() in line + environment and int(process.name) != os.getpid():
            found.append(f"{process.name}: {line.replace(bytes(1), b' ').decode()}")
    return found


def wait_until(done: Callable[[], object], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def steps(recipe: Path) -> int:
    metrics = recipe.parent / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def saved(recipe: Path) -> int:
    """The step of the newest checkpoint."""
    found = (recipe.parent / "run" / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in found if path.name.isdigit()), default=0)


def sessions(server: subprocess.Popen[bytes]) -> list[int]:
    """The processes of sshd that serve connections."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    first = {pid for pid, parent in parents.items() if parent == server.pid}
    return [*first, *(pid for pid, parent in parents.items() if parent in first and is_sshd(pid))]


def is_sshd(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sshd")


def test_the_life_of_a_run(ssh: tuple[str, subprocess.Popen[bytes]], base: Path, checkout: Path) -> None:
    """SIGTERM, the connection cut, the launcher killed: the step is saved, nothing is left, and the run goes on."""
    command, server = ssh
    recipe = tiny_run.write_recipe(checkout, base, **{"run.steps": 10**6, "checkpoint.every": 10**6})
    hosts = f"[::1] trainer\n{getpass.getuser()}@127.0.0.2 trainer\n"
    for how in ("kill -9", "cut", "SIGTERM"):
        before, first = saved(recipe), steps(recipe)
        run = start(checkout, recipe, command, hosts)
        while run.poll() is None and steps(recipe) < first + 2:
            time.sleep(0.2)
        if how == "cut":
            for pid in sessions(server):
                os.kill(pid, signal.SIGKILL)
        else:
            run.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        output, _ = run.communicate(timeout=600)
        assert run.returncode == (-signal.SIGKILL if how == "kill -9" else TRY_AGAIN), output
        assert "Traceback" not in output
        assert before == 0 or f"going on from step {before}" in output
        for host in ("::1", "127.0.0.2") if how == "cut" else ():
            assert f"launch: {host}: " in output
        wait_until(lambda: not running(checkout))
        assert saved(recipe) > before, (how, output)
    run = start(checkout, recipe, command, hosts, "--run.steps", str(saved(recipe) + 2))
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    wait_until(lambda: not running(checkout))


def test_a_host_that_is_not_there_is_named(
    ssh: tuple[str, subprocess.Popen[bytes]], base: Path, checkout: Path
) -> None:
    recipe = tiny_run.write_recipe(checkout, base)
    run = start(checkout, recipe, ssh[0], "127.0.0.9 trainer\n")
    output, _ = run.communicate(timeout=60)
    assert run.returncode == TRY_AGAIN
    assert output.startswith("launch: 127.0.0.9: ssh: connect to host 127.0.0.9 port ")
    assert output.endswith(": Connection refused\n") and output.count("\n") == 1


@pytest.mark.vllm
def test_servers_on_another_host(
    ssh: tuple[str, subprocess.Popen[bytes]], base: Path, checkout: Path
) -> None:
    """A trainer at ::1, which publishes weights to a real vLLM server at 127.0.0.3, to the end."""
    vllm = Path(os.environ.get("VLLM", ".venv-vllm/bin/vllm")).absolute()
    values = {"run.steps": 2, "sampler.vllm": str(vllm), "sampler.folder": str(checkout / "weights")}
    recipe = tiny_run.write_recipe(checkout, base, **values)
    run = start(checkout, recipe, ssh[0], "::1 trainer\n127.0.0.3 sampler\n")
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert "1 of 1 vLLM servers are ready" in output and steps(recipe) == 2
    wait_until(lambda: not running(checkout))
