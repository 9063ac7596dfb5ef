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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from jaxrl.errors import InputError
from jaxrl.sampling.client import api_key
from jaxrl.sampling.process_group import ProcessGroup, kill

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


FULL_MEMORY = 0.9  # share of a GPU that serves alone
TRAINERS_MEMORY, SERVERS_MEMORY = 0.62, 0.3  # of one that trains too


class Server(ProcessGroup):
    """A `vllm serve`."""

    def __init__(self, url: str, log: Path, arguments: list[str], environment: dict[str, str]):
        super().__init__(arguments, environment, log=log)
        self.url = url

    def restart(self, unwell: float, limit: float = 300.0) -> bool:
        """Starts it again if it has ended, or has not been well for `limit` seconds; says whether it did."""
        if self.process.poll() is None and unwell < limit:
            return False
        self.kill()
        self.start()
        return True

    def well(self) -> bool:
        return well(self.url)

    def why(self) -> str:
        assert self.log
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return next(
            (line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output"
        )

    def _all_environment(self) -> dict[str, str]:
        environment = super()._all_environment() | {"VLLM_API_KEY": api_key()}
        environment.pop("PYTHONPATH", None)  # the trainer's; vLLM has an environment of its own
        return environment


def command(
    vllm: str,
    model: str,
    port: int,
    *,
    dtype: str,
    max_tokens: int,
    on_cpu: bool,
    host: str = "127.0.0.1",
    backend: str = "jaxrl_file",
    chat: bool = False,
    options: Sequence[str] = (),
) -> list[str]:
    """The `vllm serve` that VLLMSampler expects, or with `chat` one for people's requests, of weights that stay.

    `max_tokens`: of a prompt and its completion; 0 takes the model's own limit.
    """
    weights = {
        "--logprobs-mode": "processed_logprobs",  # at the sampling temperature
        "--weight-transfer-config": json.dumps({"backend": backend}),
    }
    always = {
        "--host": host, "--port": str(port), "--dtype": dtype,
        **({"--max-model-len": str(max_tokens)} if max_tokens else {}),
        "--generation-config": "vllm",  # sampling parameters are the request's
        **({} if chat else weights),
        "--middleware": "jaxrl.sampling.vllm_plugin.Guard",  # vLLM's own asks for the key on some routes only
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
        *([] if chat else ["--enable-scale-out", "--tokens-only"]),
        *(cpu if on_cpu else []),
        *options,
    ]


def prepare(
    vllm: str, model: str, log: Path, *, on_cpu: bool, host: str = "127.0.0.1", port: int = 0,
    environment: Mapping[str, str] | None = None, **options: Any,
) -> Server:  # fmt: skip
    """A server that is yet to be started; `options`: see `command`."""
    port = port or free_port(host)
    arguments = command(vllm, model, port, on_cpu=on_cpu, host=host, **options)
    environment = ENVIRONMENT | (ON_CPU if on_cpu else {}) | dict(environment or {})
    return Server(f"http://{host}:{port}", log, arguments, environment)


def start(vllm: str, model: str, log: Path, **options: Any) -> Server:
    """Starts a server, which is ready only after `wait`; `options`: see `prepare`.

    Raises:
      InputError: if there is no such program.
    """
    server = prepare(vllm, model, log, **options)
    begin(server)
    return server


def begin(server: Server) -> None:
    """Starts what was prepared, with an empty log.

    Raises:
      InputError: if there is no such program.
    """
    assert server.log
    if not shutil.which(server.arguments[0]):
        raise InputError(
            f"{server.arguments[0]}: no such program; run make vllm, or set sampler.vllm to where vllm is"
        )
    server.log.parent.mkdir(parents=True, exist_ok=True)
    server.log.unlink(missing_ok=True)
    server.start()


def wait(server: Server, limit: float) -> None:
    """Returns when the server answers.

    Raises:
      InputError: if it ends, or is not ready within `limit` seconds.
    """
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise InputError(f"{server.log}: the vLLM server stopped: {server.why()}")
        if server.well():
            return
        time.sleep(0.3)
    raise InputError(f"{server.log}: the vLLM server was not ready after {limit:.0f} s; see its log")


def gpus() -> list[str]:
    """The GPUs that this process may use, by names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(len([line for line in listed.splitlines() if line.startswith("GPU ")]))]


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where servers are to run: a GPU for each, or the CPU, and what vLLM has to be told."""

    gpus: Sequence[str] = ()
    options: Sequence[str] = ()


CPU = Devices()


def choose_devices(count: int, trains: bool) -> Devices:
    """The last GPUs of this machine for `count` servers; a process that trains keeps the others to itself.

    Where there are too few, several share one, and so does the trainer, whose memory is then limited. Call it before
    JAX has looked for GPUs.
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
    count: int, vllm: str, model: str, logs: Path, *, devices: Devices = CPU, limit: float = 600,
    say: Callable[[str], None] = print, options: Sequence[str] = (), **more: Any,
) -> Iterator[list[Server]]:  # fmt: skip
    """`count` servers that are ready, and are stopped on the way out, whatever the way; `more`: see `start`.

    Raises:
      InputError: see `start` and `wait`.
    """
    started: list[Server] = []
    try:
        for i in range(count):
            started.append(start(
                vllm, model, logs / f"vllm_{i}.log", on_cpu=not devices.gpus, options=[*devices.options, *options],
                environment={"CUDA_VISIBLE_DEVICES": devices.gpus[i]} if devices.gpus else {}, **more,
            ))  # fmt: skip
        say(f"starting {count} vLLM servers; logs in {logs}")
        for server in started:
            wait(server, limit)
        yield started
    finally:
        kill(started)


def well(url: str) -> bool:
    """Whether a server is there and can serve; the one thing that it says without a key."""
    try:  # without certificates, which take longer to load than the answer
        return httpx.get(f"{url}/health", timeout=5, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])
