"""vLLM servers on this machine: started, waited for, and never left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from jaxrl.errors import InputError, RunError
from jaxrl.sampling.client import api_key
from jaxrl.sampling.process_group import ProcessGroup, kill
from jaxrl.types import Say

LOCALHOST = "127.0.0.1"
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the weight-update routes
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": LOCALHOST,
}
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less
    "OMP_NUM_THREADS": "1",  # more threads steal from each other
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CPU_CACHE = 256 << 20  # bytes of keys and values; models that are served on CPUs are small
CPU_OPTIONS = [
    *["--enforce-eager", "--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", str(CPU_CACHE)],
    "--no-enable-chunked-prefill",  # a seeded request whose prompt is cut kills the engine on a CPU
]
FULL_MEMORY = 0.9  # share of a GPU that serves alone
TRAINERS_MEMORY, SERVERS_MEMORY = 0.62, 0.3  # of one that trains too
UNWELL = 300.0  # seconds without an answer after which a server is restarted


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a vLLM server serves and how, wherever it runs."""

    vllm: str  # the program
    model: str  # Hugging Face folder or Hub id
    dtype: str
    max_tokens: int  # of a prompt and its completion; 0 takes the model's own limit
    backend: str = "jaxrl_file"  # how it gets model weights; see `Transport.backend`
    chat: bool = False  # an ordinary chat server, whose weights never change
    options: Sequence[str] = ()  # more options of `vllm serve`
    beyond: bool = False  # `max_tokens` is above what config.json states, as YaRN allows


class Server(ProcessGroup):
    """A `vllm serve`."""

    def __init__(self, url: str, log: Path, arguments: list[str], environment: dict[str, str]) -> None:
        super().__init__(arguments, environment, log=log)
        self.url = url

    def restart(self, unwell: float, limit: float = UNWELL) -> bool:
        """Restarts it if it has ended, or has been unwell for `limit` seconds; returns whether it did."""
        if self.process.poll() is None and unwell < limit:
            return False
        self.kill()
        self.start()
        return True

    def well(self) -> bool:
        return well(self.url)

    def why(self) -> str:
        """The line of its log that best explains why it ended: the last one with an error, or the last one."""
        assert self.log
        lines = [
            line
            for line in self.log.read_text(errors="replace", encoding="utf-8").splitlines()
            if line.strip()
        ]
        last = lines[-1] if lines else "no output"
        return next((line for line in reversed(lines) if "Error" in line), last)

    def _all_environment(self) -> dict[str, str]:
        environment = super()._all_environment() | {"VLLM_API_KEY": api_key()}
        environment.pop("PYTHONPATH", None)  # the trainer's; vLLM has an environment of its own
        return environment


def command(settings: Settings, host: str, port: int, on_cpu: bool) -> list[str]:
    """The `vllm serve` that VLLMSampler expects, or with `chat` an ordinary chat server."""
    options = ["--host", host, "--port", str(port), "--dtype", settings.dtype]
    if settings.max_tokens:
        options += ["--max-model-len", str(settings.max_tokens)]
    options += ["--generation-config", "vllm"]  # sampling parameters are the request's
    if not settings.chat:
        options += ["--logprobs-mode", "processed_logprobs"]  # at the sampling temperature
        options += ["--weight-transfer-config", json.dumps({"backend": settings.backend})]
    # vLLM's own key guards only some routes
    options += ["--middleware", "jaxrl.sampling.vllm_plugin.Guard"]
    if not settings.chat:
        options += ["--enable-scale-out", "--tokens-only"]
    if on_cpu:
        options += CPU_OPTIONS
    return [settings.vllm, "serve", settings.model, *options, *settings.options]


def prepare(
    settings: Settings,
    log: Path,
    *,
    on_cpu: bool,
    host: str = LOCALHOST,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Server:
    """A server that is yet to be started.

    Args:
      settings: what it serves and how.
      log: file for its output.
      on_cpu: without a GPU.
      host: the address at which it listens.
      port: 0 takes a free one.
      environment: variables for it alone.
    """
    port = port or free_port(host)
    variables = ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else {}) | dict(environment or {})
    if settings.beyond:  # vLLM would refuse, though its tables reach as far as the scaling does
        variables["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return Server(f"http://{host}:{port}", log, command(settings, host, port, on_cpu), variables)


def begin(server: Server) -> None:
    """Starts a prepared server with an empty log; it is ready only after `wait`.

    Raises:
      InputError: if there is no such program.
    """
    assert server.log
    program = server.arguments[0]
    if not shutil.which(program):
        raise InputError(f"{program}: no such program; run make vllm, or set sampler.vllm to where vllm is")
    server.log.parent.mkdir(parents=True, exist_ok=True)
    server.log.unlink(missing_ok=True)
    server.start()


def wait(server: Server, limit: float) -> None:
    """Returns when the server answers.

    Raises:
      InputError: if it ends, which it does on options or a model that it cannot use.
      RunError: if it is not ready within `limit` seconds.
    """
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise InputError(f"{server.log}: the vLLM server stopped: {server.why()}")
        if server.well():
            return
        time.sleep(0.3)
    raise RunError(f"{server.log}: the vLLM server was not ready after {limit:.0f} s; see its log")


def gpus() -> list[str]:
    """The GPUs that this process may use, by names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, encoding="utf-8"
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(len([line for line in listed.splitlines() if line.startswith("GPU ")]))]


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where servers run."""

    gpus: Sequence[str] = ()  # one a server, by names that CUDA_VISIBLE_DEVICES takes; empty: on the CPU
    options: Sequence[str] = ()  # of `vllm serve`, that go with them


CPU = Devices()


def choose_devices(count: int, trains: bool) -> Devices:
    """Chooses the last GPUs of this machine for `count` servers; a process that trains keeps the others to itself.

    Where there are too few, servers share them, with the trainer too, whose memory is then limited. Call it before JAX
    looks for GPUs: it sets environment variables for that.
    """
    names = gpus()
    if not names or not count:
        return CPU
    if trains and len(names) > count:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:-count])
        return Devices(names[-count:])
    share = SERVERS_MEMORY if trains else FULL_MEMORY
    if trains:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(TRAINERS_MEMORY))
    on_one = -(-count // len(names))
    chosen = [names[i % len(names)] for i in range(count)]
    return Devices(chosen, ["--gpu-memory-utilization", f"{share / on_one:.3g}"])


@contextlib.contextmanager
def running(
    count: int,
    settings: Settings,
    logs: Path,
    *,
    devices: Devices = CPU,
    host: str = LOCALHOST,
    limit: float = 600,
    say: Say = print,
) -> Iterator[list[Server]]:
    """Starts `count` servers and yields them once they are ready; they are killed on every way out.

    Args:
      count: of servers.
      settings: what they serve and how.
      logs: folder for their output.
      devices: where they run.
      host: the address at which they listen.
      limit: seconds for each to get ready.
      say: prints a line.

    Raises:
      InputError, RunError: see `begin` and `wait`.
    """
    settings = dataclasses.replace(settings, options=[*devices.options, *settings.options])
    started: list[Server] = []
    try:
        for i in range(count):
            gpu = {"CUDA_VISIBLE_DEVICES": devices.gpus[i]} if devices.gpus else {}
            log, on_cpu = logs / f"vllm_{i}.log", not devices.gpus
            server = prepare(settings, log, on_cpu=on_cpu, host=host, environment=gpu)
            begin(server)
            started.append(server)
        say(f"starting {count} vLLM servers; logs in {logs}")
        for server in started:
            wait(server, limit)
        yield started
    finally:
        kill(started)


def well(url: str) -> bool:
    """Whether a server answers and can serve; its route /health needs no key."""
    try:  # without certificates, which take longer to load than the answer
        return httpx.get(f"{url}/health", timeout=5, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def free_port(host: str = LOCALHOST) -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])
