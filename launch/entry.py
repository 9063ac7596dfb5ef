#!/usr/bin/env python3
"""One host's part of a run: vLLM servers, trainers, or both. With --ssh, every host is made to run its part.

All hosts are given the same arguments, and each works out the rest: what it has to run, where the coordinator and the
servers are. Slurm, Kubernetes or ssh place this script; JAX and vLLM do the distributed work. It is Python, with
nothing but jaxrl's own modules, because the servers' options come from the recipe and from `servers.command`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrl import config  # noqa: E402
from jaxrl.errors import InputError  # noqa: E402
from jaxrl.sampling import (
    process_group,  # noqa: E402
    servers,  # noqa: E402
)
from jaxrl.sampling.client import KEY, api_key  # noqa: E402

TRY_AGAIN = 75  # jaxrl.distributed's, without waiting for JAX
NOTICE = 90.0  # seconds in which a trainer says which other one it has lost
LOOK = 5.0  # seconds from one look at the servers to the next
AT_ONCE = 20.0  # seconds that are left after the second signal
SENT = ("JAX_", "XLA_", "TF_", "NCCL_", "HF_", "OMP_", "PYTHONPATH")  # environment that goes to all hosts


OPTIONS: dict[str, tuple[int, str]] = {
    "--trainer-gpus": (0, "of each trainer host; 0: its CPU"),
    "--trainer-processes": (1, "on each trainer host, which share its GPUs"),
    "--devices": (1, "virtual devices of each trainer process, on CPUs"),
    "--sampler-gpus": (0, "of each sampler host, after those of trainers; 0: its CPU"),
    "--tensor-parallel": (1, "GPUs of one vLLM server"),
    "--samplers": (0, "vLLM servers on each sampler host; 0: as many as its GPUs allow, or one"),
    "--port": (8100, "of the coordinator; servers have those after it"),
    "--deadline": (900, "seconds for servers to get ready"),
    "--grace": (900, "seconds for a step to end and be saved"),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("entry.py", description=__doc__, allow_abbrev=False)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    host, add = os.environ.get("SLURMD_NODENAME") or socket.gethostname(), parser.add_argument
    add("--trainer-hosts", type=names, required=True, metavar="HOST,HOST", help="the first coordinates")
    add(
        "--sampler-hosts",
        type=names,
        default=[],
        metavar="HOST,HOST",
        help="none: trainers sample themselves",
    )
    add("--here", default=host, metavar="HOST", help="which of them this is (default: %(default)s)")
    for name, (default, text) in OPTIONS.items():
        add(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    add("--vllm-options", type=shlex.split, default=[], metavar="'...'", help="more, for every vllm serve")
    add(
        "--ssh",
        type=shlex.split,
        metavar="COMMAND",
        help="start all hosts' parts by COMMAND HOST 'command line'",
    )
    add("--dry-run", action="store_true", help="print what each host would run")
    add(
        "--remote", action="store_true", help=argparse.SUPPRESS
    )  # started by --ssh, which speaks through stdin
    add("recipe", nargs=argparse.REMAINDER, metavar="RECIPE [--section.key value ...]")
    args = parser.parse_args(argv)
    if not args.recipe or args.recipe[0].startswith("-"):
        parser.error(f"after the options comes a recipe, not {' '.join(args.recipe[:1]) or 'nothing'}")
    return args


@dataclasses.dataclass
class Part:
    """What one host runs."""

    samplers: list[servers.Server] = dataclasses.field(default_factory=list)
    trainers: list[process_group.ProcessGroup] = dataclasses.field(default_factory=list)


def plan(args: argparse.Namespace) -> dict[str, Part]:
    """Every host's part.

    Raises:
      InputError: if the recipe or the arguments are not possible.
    """
    tensor, processes = args.tensor_parallel, args.trainer_processes
    each = args.samplers or max(1, args.sampler_gpus // tensor)
    urls = [f"http://{host}:{args.port + 1 + i}" for host in args.sampler_hosts for i in range(each)]
    engine = ["--rollout.engine", "vllm", "--sampler.urls", *urls] if urls else []
    recipe = config.load(args.recipe[0], [*args.recipe[1:], *engine])
    check(args, recipe, each)

    parts = {host: Part() for host in (*args.trainer_hosts, *args.sampler_hosts)}
    command = [sys.executable, "-m", "jaxrl.cli", "train", *args.recipe]
    command += ["--samplers", ",".join(urls)] if urls else []
    for i, (host, k) in enumerate(itertools.product(args.trainer_hosts, range(processes))):
        where = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
        if args.trainer_gpus:
            where = {"CUDA_VISIBLE_DEVICES": gpus(k, args.trainer_gpus // processes)}
        who = {
            "JAXRL_COORDINATOR": f"{args.trainer_hosts[0]}:{args.port}",
            "JAXRL_PROCESSES": str(len(args.trainer_hosts) * processes), "JAXRL_PROCESS": str(i),
        }  # fmt: skip
        parts[host].trainers.append(process_group.ProcessGroup(command, who | where))
    for i, (host, k) in enumerate(itertools.product(args.sampler_hosts, range(each))):
        first = args.trainer_gpus if host in args.trainer_hosts else 0
        parts[host].samplers.append(servers.prepare(
            recipe.sampler.vllm, recipe.model.path, Path(recipe.run.directory) / "servers" / f"vllm_{i}.log",
            on_cpu=not args.sampler_gpus, host=host, port=args.port + 1 + k, dtype=recipe.model.dtype,
            backend={"files": "jaxrl_file", "nccl": "nccl"}[recipe.sampler.transport],
            max_tokens=recipe.max_tokens,
            environment={"CUDA_VISIBLE_DEVICES": gpus(k, tensor, first)} if args.sampler_gpus else {},
            options=[*(["--tensor-parallel-size", str(tensor)] if tensor > 1 else []),
                     *recipe.sampler.vllm_options, *args.vllm_options],
        ))  # fmt: skip
    return parts


def gpus(index: int, count: int, first: int = 0) -> str:
    """The index-th `count` of this host's GPUs from `first` on, by the names that Slurm may have given them."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    at = first + index * count
    return ",".join(names[at : at + count] if len(names) >= at + count else map(str, range(at, at + count)))


def check(args: argparse.Namespace, recipe: config.Recipe, each: int) -> None:
    """Raises: InputError for what would fail only later, or on some hosts."""
    if args.trainer_gpus % args.trainer_processes:
        raise InputError(
            f"--trainer-processes {args.trainer_processes} cannot share {args.trainer_gpus} GPUs evenly"
        )
    if args.sampler_gpus and args.sampler_gpus < each * args.tensor_parallel:
        raise InputError(
            f"--samplers {each} of --tensor-parallel {args.tensor_parallel} need more than {args.sampler_gpus} GPUs"
        )
    far = [host for host in args.sampler_hosts if host != args.trainer_hosts[0]]
    if far and recipe.sampler.transport == "files" and recipe.sampler.folder.startswith("/dev/shm"):
        raise InputError(
            f"{far[0]} cannot read weights in {recipe.sampler.folder} of {args.trainer_hosts[0]}; set sampler.folder "
            'to a folder that all hosts share, or sampler.transport to "nccl"'
        )


class Stop:
    """The signals to end that came, and when. They end nothing by themselves."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, lambda number, _: self.asked.append((number, time.monotonic())))

    @property
    def status(self) -> int:
        return 130 if self.asked[0][0] == signal.SIGINT else TRY_AGAIN

    def limit(self, grace: float) -> float:
        """When patience with those who were told to end is over."""
        times = [when for _, when in self.asked]
        return times[1] + AT_ONCE if times[1:] else times[0] + grace if times else float("inf")


def run(part: Part, urls: list[str], args: argparse.Namespace, stop: Stop) -> int:
    """This host's part, to its end: returns the exit status, and leaves nothing behind.

    Raises:
      InputError: if a server does not get ready.
    """
    try:
        for server in part.samplers:
            servers.begin(server)
        wait_for(urls if part.trainers else [server.url for server in part.samplers], part, args, stop)
        if stop.asked:
            return stop.status
        for trainer in part.trainers:
            trainer.start()
        return watch(part.trainers, tending(part.samplers, args.deadline), args, stop)
    finally:
        process_group.kill(part.trainers)  # before what they may still be asking
        process_group.kill(part.samplers)


def wait_for(urls: list[str], part: Part, args: argparse.Namespace, stop: Stop) -> None:
    """Returns when all servers are ready, or this is to end.

    Raises:
      InputError: if an own one ends, or the deadline is over.
    """
    began = time.monotonic()
    missing, next_line = urls, 0.0
    while missing and not stop.asked:
        missing = [url for url in missing if not servers.well(url)]
        seconds = time.monotonic() - began
        if args.here == args.trainer_hosts[0] and (seconds > next_line or not missing):
            say(f"{len(urls) - len(missing)} of {len(urls)} vLLM servers are ready, {seconds:.0f} s")
            next_line = seconds + 15
        if seconds > args.deadline:
            raise InputError(
                f"not ready after {seconds:.0f} s: {', '.join(missing)}; see servers/ in the run folder, or raise "
                "--deadline"
            )
        for server in part.samplers:
            if server.process.poll() is not None:
                raise InputError(f"{server.log}: the vLLM server stopped: {server.why()}")
        time.sleep(1 if missing else 0)


def tending(own: list[servers.Server], deadline: float) -> Callable[[], int | None]:
    """What starts servers again that end or hang once they were ready."""
    seen = dict.fromkeys((server.url for server in own), time.monotonic())
    ready = set(seen)

    def tend() -> None:
        for server in own:
            now, url = time.monotonic(), server.url
            if server.well():
                seen[url] = now
                ready.add(url)
            elif server.process.poll() is not None and url not in ready:
                raise InputError(f"{server.log}: the vLLM server stopped again: {server.why()}")
            elif server.restart(now - seen[url], limit=300 if url in ready else deadline):
                say(f"{url} had ended or did not answer; started again")
                seen[url] = now
                ready.discard(url)

    return tend


def watch(
    trainers: Sequence[process_group.ProcessGroup], tend: Callable[[], int | None], args: argparse.Namespace, stop: Stop
) -> int:
    """Until all trainers have ended, or one has failed and the others had time to say so: the exit status."""
    told, lost, look, named = 0, float("inf"), 0.0, set[str]()
    while True:
        codes = [trainer.process.poll() for trainer in trainers]
        running = [trainer for trainer, code in zip(trainers, codes, strict=True) if code is None]
        if trainers and not running:
            return status(codes, stop)
        for trainer, code in zip(
            trainers, codes, strict=True
        ):  # jax ends who loses the first, and names nobody
            process = trainer.environment.get("JAXRL_PROCESS", "")
            if process not in named and process and code and code < 0:
                named.add(process)
                say(f"process {process} on {args.here} was ended by {signal.Signals(-code).name}")
        if any(codes):
            lost = min(lost, time.monotonic() + NOTICE)
        for number, _ in stop.asked[told:]:
            told += 1
            for trainer in running:
                trainer.tell(number)
        if stop.asked and not trainers:  # those on other hosts may need servers to end their step
            at_once = len(stop.asked) > 1
            if at_once or not listening(args.trainer_hosts[0], args.port):
                return stop.status
        if time.monotonic() > min(lost, stop.limit(args.grace)):
            return status([*codes, TRY_AGAIN], stop)
        if time.monotonic() > look:
            if (code := tend()) is not None:
                return status([code or TRY_AGAIN], stop)
            look = time.monotonic() + LOOK
        time.sleep(0.2)


def status(codes: Sequence[int | None], stop: Stop) -> int:
    """Of all: 0 if nothing failed, TRY_AGAIN if some were stopped or lost, anything else wants to be looked at."""
    failed = [TRY_AGAIN if code < 0 or code == 255 else code for code in codes if code]
    if failed and stop.asked:
        return stop.status
    return next((code for code in failed if code != TRY_AGAIN), TRY_AGAIN if failed else 0)


def listening(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


class Remote(process_group.ProcessGroup):
    """This script on another host. It is spoken to through stdin: no command line shows the key, and when this end is
    gone, however it went, that end sees it."""

    def __init__(self, host: str, args: argparse.Namespace, argv: Sequence[str]):
        script = [sys.executable, str(ROOT / "launch" / "entry.py"), "--remote", "--here", host, *argv]
        line = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(script)}"  # noqa: PTH109
        super().__init__([*args.ssh, host, line], {}, stdin=subprocess.PIPE)
        self.host = host

    def start(self) -> None:
        super().start()
        self._write(json.dumps({k: v for k, v in os.environ.items() if k.startswith((*SENT, KEY))}))

    def tell(self, number: int) -> None:
        self._write(signal.Signals(number).name)

    def _write(self, line: str) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()


def place(hosts: dict[str, Part], args: argparse.Namespace, argv: Sequence[str], stop: Stop) -> int:
    """Has every host run its part; returns the exit status of all when the trainers have ended."""
    remotes = [Remote(host, args, argv) for host in hosts]
    trainers = [remote for remote in remotes if hosts[remote.host].trainers]
    others = [remote for remote in remotes if not hosts[remote.host].trainers]

    def tend() -> int | None:
        return next((code for remote in others if (code := remote.process.poll()) is not None), None)

    try:
        for remote in remotes:
            remote.start()
        return watch(trainers, tend, args, stop)
    finally:
        for remote in remotes:
            remote.tell(signal.SIGTERM)
            remote.tell(signal.SIGTERM)
        deadline = time.monotonic() + 2 * AT_ONCE + 5
        while any(remote.process.poll() is None for remote in remotes) and time.monotonic() < deadline:
            time.sleep(0.2)
        process_group.kill(remotes)


def hear() -> None:
    """The other end of Remote."""
    os.environ |= json.loads(sys.stdin.readline() or "{}")

    def listen() -> None:
        for line in sys.stdin:
            os.kill(os.getpid(), signal.Signals[line.strip()])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()


@contextlib.contextmanager
def talking_to_nobody() -> Iterator[None]:
    """What is printed here and by trainers goes through a thread, which does not mind when nobody listens any more."""
    end, start = os.pipe()
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)

    def pump() -> None:
        while text := os.read(end, 65536):
            with contextlib.suppress(OSError):
                os.write(out, text)

    def print_to(file: int) -> None:
        sys.stdout.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)

    print_to(start)
    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield
    finally:
        print_to(nowhere)  # which ends the thread
        thread.join(5)


def find_here(args: argparse.Namespace, hosts: dict[str, Part]) -> str:
    """This host's name among the hosts.

    Raises:
      InputError: if it has none, or one that others cannot reach.
    """
    same = lambda host: args.here in (host, host.split(".")[0]) or args.here.split(".")[0] == host  # noqa: E731
    here = next(filter(same, hosts), None)
    if here is None:
        raise InputError(f"{args.here} is none of {', '.join(hosts)}; say which of them this is with --here")
    if len(hosts) > 1:
        try:
            address = socket.gethostbyname(here)
        except OSError as error:
            raise InputError(f"{here}: {error}; name hosts so that they find each other") from None
        if address.startswith("127.") and address != here:
            raise InputError(
                f"{here} is {address} here, which no other host can reach; name hosts by their addresses"
            )
        if not os.environ.get(KEY):
            raise InputError(f"set {KEY} to one secret on all hosts, which samplers will ask for")
    return here


def main(argv: Sequence[str]) -> int:
    args, stop = parse(argv), Stop()
    with talking_to_nobody() if args.remote else contextlib.nullcontext():
        try:
            if args.remote:
                hear()
            return begin(plan(args), args, argv, stop)
        except InputError as error:
            say("\n".join(f"launch: {args.here}: {line}" for line in str(error).splitlines()))
            return 2


def begin(hosts: dict[str, Part], args: argparse.Namespace, argv: Sequence[str], stop: Stop) -> int:
    if args.dry_run:
        show(hosts, args, argv)
        return 0
    if args.ssh and not args.remote:
        os.environ[KEY] = api_key()
        return place(hosts, args, argv, stop)
    args.here = find_here(args, hosts)
    os.environ[KEY] = api_key()
    urls = [server.url for part in hosts.values() for server in part.samplers]
    return run(hosts[args.here], urls, args, stop)


def show(hosts: dict[str, Part], args: argparse.Namespace, argv: Sequence[str]) -> None:
    for host, part in hosts.items():
        if args.ssh:
            print(f"{host}: {shlex.join(Remote(host, args, argv).arguments)}")
        for group in (*part.samplers, *part.trainers):
            variables = [f"{name}={shlex.quote(value)}" for name, value in group.environment.items()]
            print(f"{host}: {' '.join(variables)} {shlex.join(group.arguments)}")


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever listened may be gone
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
