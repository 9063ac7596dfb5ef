"""vLLM servers on this machine: started, waited for, and never left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from jaxrl.errors import InputError

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the weight-update routes
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
ON_CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less
    "OMP_NUM_THREADS": "1",  # more threads steal from each other
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


# ends a process group when this process is gone, however it went: its end of the pipe closes
REAPER = 'read _; kill -s KILL -- -"$0"'


@dataclasses.dataclass
class Server:
    """A `vllm serve` and everything that it started: a process group of its own."""

    url: str
    log: Path
    arguments: list[str]
    environment: dict[str, str]

    def start(self) -> None:
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                self.arguments, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        self._reaper = subprocess.Popen(
            ["sh", "-c", REAPER, str(self.process.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def restart(self, unwell: float, limit: float = 300.0) -> bool:
        """Starts it again if it has ended, or has not been well for `limit` seconds; says whether it did."""
        if self.process.poll() is None and unwell < limit:
            return False
        self.kill()
        self.start()
        return True

    def kill(self) -> None:
        """Stops all of it: killing the API server alone leaves its engine alive for ever."""
        self._reaper.kill()
        self._reaper.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            os.killpg(self.process.pid, signal.SIGCONT)  # one that was stopped could not end
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def why(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return next(
            (line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output"
        )


def command(
    vllm: str,
    model: str,
    port: int,
    *,
    dtype: str,
    max_tokens: int,
    on_cpu: bool,
    backend: str = "jaxrl_file",
    options: tuple[str, ...] = (),
) -> list[str]:
    """The `vllm serve` that VLLMSampler expects. `max_tokens`: of a prompt and its completion."""
    always = {
        "--host": "127.0.0.1", "--port": str(port), "--dtype": dtype, "--max-model-len": str(max_tokens),
        "--generation-config": "vllm",  # sampling parameters are the request's
        "--logprobs-mode": "processed_logprobs",  # at the sampling temperature
        "--weight-transfer-config": json.dumps({"backend": backend}),
    }  # fmt: skip
    cpu = [
        "--enforce-eager",
        "--distributed-executor-backend",
        "uni",
        "--kv-cache-memory-bytes",
        str(256 << 20),
    ]
    cpu += ["--no-enable-chunked-prefill"]  # a seeded request whose prompt is cut kills the engine on a CPU
    flat = [part for pair in always.items() for part in pair]
    return [
        vllm,
        "serve",
        model,
        *flat,
        "--enable-scale-out",
        "--tokens-only",
        *(cpu if on_cpu else []),
        *options,
    ]


def start(vllm: str, model: str, log: Path, *, on_cpu: bool, port: int = 0, **options: Any) -> Server:
    """Starts a server, which is ready only after `wait`; `options`: see `command`.

    Raises:
      InputError: if there is no such program.
    """
    if not shutil.which(vllm):
        raise InputError(f"{vllm}: no such program; run make vllm, or set sampler.vllm to where vllm is")
    port = port or free_port()
    environment = os.environ | ENVIRONMENT | (ON_CPU if on_cpu else {})
    environment.pop("PYTHONPATH", None)  # the trainer's; vLLM has an environment of its own
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    arguments = command(vllm, model, port, on_cpu=on_cpu, **options)
    server = Server(f"http://127.0.0.1:{port}", log, arguments, dict(environment))
    server.start()
    return server


def wait(server: Server, limit: float) -> None:
    """Returns when the server answers.

    Raises:
      InputError: if it ends, or is not ready within `limit` seconds.
    """
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise InputError(f"{server.log}: the vLLM server stopped: {server.why()}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.3)
    raise InputError(f"{server.log}: the vLLM server was not ready after {limit:.0f} s; see its log")


@contextlib.contextmanager
def running(
    count: int, vllm: str, model: str, logs: Path, *, limit: float = 600, say: Callable[[str], None] = print,
    **options: Any,
) -> Iterator[list[Server]]:  # fmt: skip
    """`count` servers that are ready, and are stopped on the way out, whatever the way; `options`: see `start`.

    Raises:
      InputError: see `start` and `wait`.
    """
    started: list[Server] = []
    try:
        for i in range(count):
            started.append(start(vllm, model, logs / f"vllm_{i}.log", **options))
        say(f"starting {count} vLLM servers; logs in {logs}")
        for server in started:
            wait(server, limit)
        yield started
    finally:
        for server in started:
            server.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
