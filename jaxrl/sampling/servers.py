"""vLLM servers on this machine: started, waited for, and never left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hmac
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.sampling.client import PROCESSED, SUPPORTED, api_key
from jaxrl.sampling.process_group import ProcessGroup, kill
from jaxrl.sampling.vllm_plugin import IDENTITY, OWNER
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
ALONE_MEMORY = 0.92  # of one that trains alone; JAX takes 0.75. The rest is CUDA's, its libraries' and NCCL's
TRAINERS_MEMORY, SERVERS_MEMORY = 0.62, 0.3  # of one that does both
POOL = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # JAX refuses both together
UNWELL = 300.0  # seconds without an answer after which a server is restarted
LET_GO = 3.0  # seconds that a program which was ended may take to let go of its port
LAST_PORT = 65535
# prints the versions that a vLLM's environment has, in a tenth of the time that `vllm --version` takes
VERSIONS = "import importlib.metadata as m; m.version('jaxrl'); print(m.version('vllm'))"


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

    def start(self) -> None:
        """Starts it.

        Raises:
          InputError: if another program has its port.
        """
        require_free(self.url)
        super().start()

    def well(self) -> bool:
        """Whether this very server, here or on the host of its URL, answers and can serve.

        Raises:
          InputError: if another server answers in its place.
        """
        if hasattr(self, "process") and self.process.poll() is not None:
            return False
        try:
            if self.identity not in _get(self.url + OWNER).text:
                who = listener(self.url) if hasattr(self, "process") else "another program"
                raise InputError(
                    f"{self.url}: {who} answers in place of a server of this run; end it, or if it is that server, "
                    "install this version of jaxrl with vLLM"
                )
            return _get(self.url + "/health").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def identity(self) -> str:
        """What it answers to be recognized; all hosts of a run compute the same."""
        assert self.log
        return hmac.new(
            api_key().encode(), f"{self.url} {self.log.absolute()}".encode(), "sha256"
        ).hexdigest()

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
        environment = super()._all_environment() | {"VLLM_API_KEY": api_key(), IDENTITY: self.identity}
        environment.pop("PYTHONPATH", None)  # the trainer's; vLLM has an environment of its own
        return environment


def command(settings: Settings, host: str, port: int, on_cpu: bool) -> list[str]:
    """The `vllm serve` that VLLMSampler expects, or with `chat` an ordinary chat server."""
    options = ["--host", host, "--port", str(port), "--dtype", settings.dtype]
    if settings.max_tokens:
        options += ["--max-model-len", str(settings.max_tokens)]
    options += ["--generation-config", "vllm"]  # sampling parameters are the request's
    if not settings.chat:
        options += ["--logprobs-mode", PROCESSED]
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

    Raises:
      InputError: for a port that cannot be.
    """
    if port > LAST_PORT:
        raise InputError(f"port {port} of {host}: the last one is {LAST_PORT}; begin with a lower one")
    port = port or free_port(host)
    variables = ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else {}) | dict(environment or {})
    if settings.beyond:  # vLLM would refuse, though its tables reach as far as the scaling does
        variables["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return Server(url_of(host, port), log, command(settings, host, port, on_cpu), variables)


def begin(server: Server) -> None:
    """Starts a prepared server with an empty log; it is ready only after `wait`.

    Raises:
      InputError: if there is no such program, or another one has the port.
    """
    assert server.log
    require_program(server.arguments[0])
    server.log.parent.mkdir(parents=True, exist_ok=True)
    server.log.unlink(missing_ok=True)
    server.start()


def wait(server: Server, limit: float) -> None:
    """Returns when the server answers.

    Raises:
      InputError: if it ends, which it does on options or a model that it cannot use; or if another one has its port.
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
    return [str(i) for i in range(len(list_gpus() or ()))]


def list_gpus() -> list[str] | None:
    """Each GPU of this machine, with the UUIDs of it and of its MIG instances; None where that is unknown."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, encoding="utf-8"
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None if Path("/dev/nvidiactl").exists() else []
    return re.findall(r"^GPU .*(?:\n +MIG .*)*", listed, re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where servers run."""

    gpus: Sequence[str] = ()  # one a server, by names that CUDA_VISIBLE_DEVICES takes; empty: on the CPU
    options: Sequence[str] = ()  # of `vllm serve`, that go with them


CPU = Devices()


def choose_devices(count: int, trains: bool) -> Devices:
    """Chooses the last GPUs of this machine for `count` servers; a process that trains keeps the others to itself.

    Where there are too few, servers share them, with the trainer too, whose memory is then limited. Call it before JAX
    looks for GPUs: it sets environment variables for that. JAX's share of the memory stays as the user has set it.
    """
    names = gpus()
    shares = len(names) <= count
    if trains and names and not any(name in os.environ for name in POOL):
        os.environ[POOL[0]] = str(TRAINERS_MEMORY if shares else ALONE_MEMORY)
    if not names or not count:
        return CPU
    if trains and not shares:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:-count])
        return Devices(names[-count:])
    share = SERVERS_MEMORY if trains else FULL_MEMORY
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


def require_startable(recipe: config.Recipe, devices: Devices) -> None:
    """Rejects what would fail only once data and model are loaded: servers of this recipe that cannot start here.

    Raises:
      InputError: for a program that is no vLLM that works with jaxrl, GPUs that are not there, or one GPU for both
        ends of NCCL.
    """
    section = recipe.sampler
    if recipe.rollout.engine == "local" or not section.servers:
        return
    if section.transport == "nccl" and (shared := set(devices.gpus) & set(gpus())):
        raise InputError(
            f'sampler.transport = "nccl" needs other GPUs for servers than this process has, and GPU {min(shared)} '
            'would be for both; set it to "files", or start servers on other GPUs and name them in sampler.urls'
        )
    version = vllm_version(section.vllm)
    if not version.startswith(f"{SUPPORTED}."):
        raise InputError(
            f"{section.vllm} is vLLM {version}; jaxrl works with {SUPPORTED}.*: make vllm installs it"
        )
    on_cpu, listed = version.endswith("+cpu"), list_gpus()
    if on_cpu and devices.gpus:
        raise InputError(
            f"{section.vllm} is vLLM {version}, for CPUs, and this machine has GPUs; run make vllm VLLM_FOR=cuda, or "
            'set CUDA_VISIBLE_DEVICES="" to sample on its CPU'
        )
    if not on_cpu and not devices.gpus:
        raise InputError(
            f"{section.vllm} is vLLM {version}, and no GPU is visible; run make vllm VLLM_FOR=cpu"
        )
    missing = [name for name in devices.gpus if listed is not None and not _is_listed(name, listed)]
    if missing:
        raise InputError(
            f"CUDA_VISIBLE_DEVICES names GPU {missing[0]}, and this machine has {len(listed or ())}"
        )
    options = " ".join(section.vllm_options)
    parallel = re.search(
        r"(?:--tensor-parallel-size|--pipeline-parallel-size|-tp|-pp)[ =]([2-9]|\d{2,})", options
    )
    if devices.gpus and parallel:
        raise InputError(
            f"sampler.vllm_options has {parallel[0]}, and a server of sampler.servers gets one GPU; use launch/ with "
            "--tensor-parallel, or start the servers yourself and name them in sampler.urls"
        )


def require_program(program: str) -> str:
    """The path of a program.

    Raises:
      InputError: if there is none, or it may not be run.
    """
    path = shutil.which(program)
    if not path:
        kind = "may not be run" if Path(program).is_file() else "no such program"
        raise InputError(f"{program}: {kind}; run make vllm, or set sampler.vllm to where vllm is")
    return path


def vllm_version(program: str) -> str:
    """The version of vLLM that a `vllm` program is.

    Raises:
      InputError: if it is none, or jaxrl is not installed with it.
    """
    path = require_program(program)
    with Path(path).open("rb") as file:
        first = file.readline(1024).decode(errors="replace")
    is_script = first.startswith("#!") and "python" in first
    command = [*shlex.split(first[2:]), "-c", VERSIONS] if is_script else [path, "--version"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        ran = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{program} cannot be run ({error}); run make vllm") from None
    said = (ran.stdout.strip() or ran.stderr.strip() or "it prints nothing").splitlines()[-1]
    if ran.returncode or not re.fullmatch(r"\d+\.\d+\S*", said):
        raise InputError(
            f"{program} is no vLLM with jaxrl beside it ({said}); run make vllm, or set sampler.vllm to one"
        )
    return said


def _is_listed(name: str, listed: Sequence[str]) -> bool:
    """Whether the driver lists a GPU that CUDA_VISIBLE_DEVICES names."""
    return int(name) < len(listed) if name.isdecimal() else any(name in line for line in listed)


def _get(url: str) -> httpx.Response:
    # without certificates, which take longer to load than the answer
    headers = {"Authorization": f"Bearer {api_key()}"}
    return httpx.get(url, headers=headers, timeout=5, trust_env=False, verify=False)


def url_of(host: str, port: int) -> str:
    """The URL of a host's port; an address of IPv6 is given without brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def free_port(host: str = LOCALHOST) -> int:
    with _listening(host, 0) as s:
        return int(s.getsockname()[1])


def require_free(url: str) -> None:
    """Raises: InputError: if a server cannot listen at this address of this machine, as when another one does."""
    parts, deadline = urlsplit(url), time.monotonic() + LET_GO
    while True:
        try:
            return _listening(parts.hostname or "", parts.port or 0).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                who = f", {listener(url)} has it" if error.errno == errno.EADDRINUSE else ""
                raise InputError(
                    f"{url}: no server can listen there ({error.strerror}{who}); end that, or take another port"
                ) from None
        time.sleep(0.1)


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    s = socket.socket(family, kind, protocol)
    try:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that have ended
        s.bind(address)
        s.listen()
    except OSError:
        s.close()
        raise
    return s


def listener(url: str) -> str:
    """The process of this machine that listens at the port of a URL, in words, as far as it can be seen."""
    port = urlsplit(url).port
    sockets = set[str]()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            rows = map(str.split, Path(f"/proc/net/{table}").read_text(encoding="utf-8").splitlines()[1:])
            sockets |= {
                f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1][-4:], 16) == port
            }
    for pid in filter(str.isdecimal, os.listdir("/proc") if sockets else ()):  # noqa: PTH208
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(str(file.readlink()) in sockets for file in Path(f"/proc/{pid}/fd").iterdir()):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {pid} ({line.strip()[:60]})"
    return "another program"
