#!/usr/bin/env python3
"""Runs one host's part of a run: vLLM servers, trainers, or both. With --ssh, has every host run its part.

All hosts get the same arguments, and each works out what it has to run and where the coordinator and the servers are.
Slurm, Kubernetes or ssh start this script; JAX and vLLM do the distributed work. It is Python and needs nothing but
jaxrl's own modules, because the servers' options come from the recipe and from `servers.command`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import ipaddress
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn


class Stop:
    """The signals that asked this process to end, and when they came. They end nothing by themselves."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, lambda number, _: self.asked.append((number, time.monotonic())))

    @property
    def status(self) -> int:
        return 130 if self.asked[0][0] == signal.SIGINT else TRY_AGAIN

    def limit(self, grace: float) -> float:
        """The time.monotonic() at which processes that were asked to end are killed."""
        times = [when for _, when in self.asked]
        return times[1] + AT_ONCE if times[1:] else times[0] + grace if times else float("inf")


if __name__ == "__main__":
    stopping = Stop()  # before the imports below, which take a second

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's jaxrl, also where it is not installed

from jaxrl import config  # noqa: E402
from jaxrl.commands.options import sampler_overrides  # noqa: E402
from jaxrl.errors import TRY_AGAIN, InputError, RunError  # noqa: E402
from jaxrl.sampling import process_group, servers  # noqa: E402
from jaxrl.sampling.client import KEY, api_key  # noqa: E402
from jaxrl.sampling.process_group import ProcessGroup  # noqa: E402

NOTICE = 90.0  # seconds in which the other trainers report which one they have lost
LOOK = 5.0  # seconds from one look at the servers to the next
AT_ONCE = 20.0  # seconds that are left after the second signal
KNOWN = 60.0  # seconds for this host's name to be known; those of pods that just started come late
LOST = 255  # ssh's status where it has no connection
VISIBLE = "CUDA_VISIBLE_DEVICES"
SENT = ("JAX_", "XLA_", "TF_", "NCCL_", "HF_", "OMP_", "PYTHONPATH")  # environment that goes to all hosts
HOST = re.compile(
    r"([\w.][\w.+\\-]*@)?(\w[\w.-]*|\[[\da-f:.]+\]|[\da-f.]*:[\da-f.]*:[\da-f:.]*)", re.ASCII | re.IGNORECASE
)
BACKENDS = {"files": "jaxrl_file", "nccl": "nccl"}  # vLLM's names of sampler.transport

OPTIONS: dict[str, tuple[int, int, int, str]] = {  # default, least, most
    "--trainer-gpus": (0, 0, 1024, "of each trainer host; 0: its CPU"),
    "--trainer-processes": (1, 1, 1024, "on each trainer host, which share its GPUs"),
    "--devices": (1, 1, 1024, "virtual devices of each trainer process, on CPUs"),
    "--sampler-gpus": (0, 0, 1024, "of each sampler host, after those of trainers; 0: its CPU"),
    "--tensor-parallel": (1, 1, 1024, "GPUs of one vLLM server"),
    "--samplers": (0, 0, 1024, "vLLM servers on each sampler host; 0: as many as its GPUs allow, or one"),
    "--port": (8100, 1, servers.LAST_PORT, "of the coordinator; servers have those after it"),
    "--deadline": (900, 1, 10**6, "seconds for servers to get ready"),
    "--grace": (900, 1, 10**6, "seconds for a step to end and be saved"),
    "--add-to-failure": (0, 0, 200, "to statuses that want no other try: srun reports the highest one"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("entry.py", description=__doc__, allow_abbrev=False)
    add, some = parser.add_argument, "HOST,HOST"
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    add("--trainer-hosts", type=hosts, required=True, metavar=some, help="the first coordinates")
    without = "none: trainers sample themselves"
    add("--sampler-hosts", type=hosts, default=[], metavar=some, help=without)
    which = "which of them this is (default: %(default)s)"
    add("--here", type=login, default=here, metavar="HOST", help=which)
    for name, (default, least, most, text) in OPTIONS.items():
        kind = functools.partial(number_within, least, most)
        add(name, type=kind, default=default, metavar="N", help=f"{text} (default: {default})")
    add("--vllm-options", type=shlex.split, default=[], metavar="'...'", help="more, for every vllm serve")
    ssh = "start all hosts' parts by COMMAND HOST 'command line'"
    add("--ssh", type=shlex.split, metavar="COMMAND", help=ssh)
    add("--dry-run", action="store_true", help="print what each host would run")
    add("--remote", action="store_true", help=argparse.SUPPRESS)  # started by a Remote
    add("recipe", nargs=argparse.REMAINDER, metavar="RECIPE [--section.key value ...]")
    args = parser.parse_args(argv)
    if not args.recipe or args.recipe[0].startswith("-"):
        parser.error(f"after the options comes a recipe, not {' '.join(args.recipe[:1]) or 'nothing'}")
    logins = {*args.trainer_hosts, *args.sampler_hosts}
    args.logins = {address(name): name for name in logins}
    if len(args.logins) < len(logins):
        parser.error(f"one host, and two users: {', '.join(sorted(logins))}")
    args.trainer_hosts = list(map(address, args.trainer_hosts))
    args.sampler_hosts = list(map(address, args.sampler_hosts))
    args.here = address(args.here)
    return args


def number_within(least: int, most: int, text: str) -> int:
    """An argparse type."""
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text} is no number from {least} to {most}")
    return int(text)


def names(text: str) -> list[str]:
    return [name for name in map(str.strip, text.split(",")) if name]


def hosts(text: str) -> list[str]:
    """An argparse type: HOST,USER@HOST; addresses of IPv6 may be in brackets."""
    for name in names(text):
        if not HOST.fullmatch(name):
            raise argparse.ArgumentTypeError(f"{name} is no host; give a name or an address, without a port")
    return list(map(login, names(text)))


def login(name: str) -> str:
    """A host as ssh takes it: an address of IPv6 has no brackets, and only one spelling."""
    user, at, host = name.rpartition("@")
    with contextlib.suppress(ValueError):
        host = str(ipaddress.ip_address(host.strip("[]")))
    return f"{user}{at}{host}"


def address(name: str) -> str:
    """How other hosts reach it: without the user."""
    return name.rpartition("@")[2]


@dataclasses.dataclass
class Part:
    """The processes of one host."""

    samplers: list[servers.Server] = dataclasses.field(default_factory=list)
    trainers: list[ProcessGroup] = dataclasses.field(default_factory=list)


def assign(args: argparse.Namespace) -> dict[str, Part]:
    """Returns every host's part.

    Raises:
      InputError: if the recipe or the arguments are not possible.
    """
    per_host = args.samplers or max(1, args.sampler_gpus // args.tensor_parallel)
    require_possible(args, per_host)
    ports = range(args.port + 1, args.port + 1 + per_host)
    urls = [servers.url_of(host, port) for host in args.sampler_hosts for port in ports]
    recipe = config.load(args.recipe[0], [*args.recipe[1:], *sampler_overrides(",".join(urls))])
    require_readable_weights(args, recipe.sampler)
    parts = {host: Part() for host in (*args.trainer_hosts, *args.sampler_hosts)}
    for i, (host, k) in enumerate(itertools.product(args.trainer_hosts, range(args.trainer_processes))):
        parts[host].trainers.append(make_trainer(args, urls, i, k))
    for i, (host, k) in enumerate(itertools.product(args.sampler_hosts, range(per_host))):
        parts[host].samplers.append(make_sampler(args, recipe, host, i, k))
    return parts


def require_possible(args: argparse.Namespace, per_host: int) -> None:
    """Raises: InputError for what would fail only later, or on some hosts."""
    processes, gpus, tensor = args.trainer_processes, args.sampler_gpus, args.tensor_parallel
    if not args.trainer_hosts:
        raise InputError("--trainer-hosts names no host; a run has one trainer at least")
    for kind, given in (("trainer", args.trainer_hosts), ("sampler", args.sampler_hosts)):
        if twice := next((host for host in given if given.count(host) > 1), None):
            more = "--trainer-processes" if kind == "trainer" else "--samplers"
            raise InputError(f"{twice} is there twice as a {kind}; {more} starts several on each host")
    if args.trainer_gpus % processes:
        raise InputError(f"--trainer-processes {processes} cannot share {args.trainer_gpus} GPUs evenly")
    if args.sampler_hosts and (gpus or tensor > 1) and gpus < per_host * tensor:
        raise InputError(f"--samplers {per_host} of --tensor-parallel {tensor} need more than {gpus} GPUs")
    last = args.port + (per_host if args.sampler_hosts else 0)
    if last > servers.LAST_PORT:
        raise InputError(f"--port {args.port}: the last server would have port {last}; choose a lower one")
    if args.ssh is not None and not shutil.which(args.ssh[0] if args.ssh else ""):
        raise InputError(f"--ssh {shlex.join(args.ssh)}: no such program here")


def require_readable_weights(args: argparse.Namespace, section: config.Sampler) -> None:
    """Raises: InputError if servers on other hosts could not read what the first trainer publishes."""
    first = args.trainer_hosts[0]
    far = [host for host in args.sampler_hosts if host != first]
    if far and section.transport == "files" and section.folder.startswith("/dev/shm"):
        raise InputError(
            f"{far[0]} cannot read weights in {section.folder} of {first}; set sampler.folder to a folder that all "
            'hosts share, or sampler.transport to "nccl"'
        )


def make_trainer(args: argparse.Namespace, urls: list[str], i: int, k: int) -> ProcessGroup:
    """Trainer process i of the run, the k-th on its host."""
    command = [sys.executable, "-m", "jaxrl.cli", "train", *args.recipe]
    command += ["--samplers", ",".join(urls)] if urls else []
    environment = {
        "JAXRL_COORDINATOR": servers.url_of(args.trainer_hosts[0], args.port).removeprefix("http://"),
        "JAXRL_PROCESSES": str(len(args.trainer_hosts) * args.trainer_processes),
        "JAXRL_PROCESS": str(i),
    }
    if args.trainer_gpus:
        environment[VISIBLE] = pick_gpus(k, args.trainer_gpus // args.trainer_processes)
    else:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
    return ProcessGroup(command, environment)


def make_sampler(
    args: argparse.Namespace, recipe: config.Recipe, host: str, i: int, k: int
) -> servers.Server:
    """vLLM server i of the run, the k-th on its host."""
    section, tensor, environment = recipe.sampler, args.tensor_parallel, dict[str, str]()
    if args.sampler_gpus:
        first = args.trainer_gpus if host in args.trainer_hosts else 0
        environment[VISIBLE] = pick_gpus(k, tensor, first)
    parallel = ["--tensor-parallel-size", str(tensor)] if tensor > 1 else []
    settings = servers.Settings(
        section.vllm,
        recipe.model.path,
        recipe.model.dtype,
        config.longest(recipe),
        BACKENDS[section.transport],
        options=[*parallel, *section.vllm_options, *args.vllm_options],
    )
    log, on_cpu = Path(recipe.run.directory) / "servers" / f"vllm_{i}.log", not args.sampler_gpus
    port = args.port + 1 + k
    return servers.prepare(settings, log, on_cpu=on_cpu, host=host, port=port, environment=environment)


def pick_gpus(index: int, count: int, first: int = 0) -> str:
    """The index-th `count` GPUs of a host, from `first` on; see `name_gpus`."""
    return ",".join(map(str, range(first + index * count, first + (index + 1) * count)))


def name_gpus(part: Part, here: str) -> None:
    """Gives the GPUs of this host the names that it has for them.

    Raises:
      InputError: if fewer are visible than its part needs.
    """
    groups = [group for group in (*part.trainers, *part.samplers) if VISIBLE in group.environment]
    if not groups or (given := os.environ.get(VISIBLE)) is None:
        return
    visible = list(dict.fromkeys(names(given)))
    picked = [list(map(int, group.environment[VISIBLE].split(","))) for group in groups]
    if len(visible) <= (last := max(map(max, picked))):
        raise InputError(
            f"{VISIBLE}={given} shows {len(visible)} GPUs of {here}, and its part needs {last + 1}"
        )
    for group, numbers in zip(groups, picked, strict=True):
        group.environment[VISIBLE] = ",".join(visible[i] for i in numbers)


def run(part: Part, everywhere: list[servers.Server], args: argparse.Namespace, stop: Stop) -> int:
    """Runs this host's part to its end, and leaves nothing behind; returns the exit status.

    Raises:
      InputError: if a port is taken, or a server does not get ready.
    """
    try:
        coordinates = part.trainers and args.here == args.trainer_hosts[0]
        own = [server.url for server in part.samplers]
        for url in [servers.url_of(args.here, args.port), *own] if coordinates else own:
            servers.require_free(url)
        if stop.asked:
            return stop.status
        for server in part.samplers:
            servers.begin(server)
        wait_for(everywhere if part.trainers else part.samplers, part, args, stop)
        if stop.asked:
            return stop.status
        for trainer in part.trainers:
            trainer.start()
        return watch(part.trainers, tend_to(part.samplers, args.deadline), args, stop)
    finally:
        process_group.kill(part.trainers)  # first: they may have requests at the servers
        process_group.kill(part.samplers)


def wait_for(wanted: list[servers.Server], part: Part, args: argparse.Namespace, stop: Stop) -> None:
    """Returns when all servers are ready, or this process is asked to end.

    Raises:
      InputError: if a server of this host ends, or the deadline is over.
    """
    began, missing, next_line = time.monotonic(), wanted, 0.0
    while missing and not stop.asked:
        missing = [server for server in missing if not server.well()]
        seconds = time.monotonic() - began
        if args.here == args.trainer_hosts[0] and (seconds > next_line or not missing):
            say(f"{len(wanted) - len(missing)} of {len(wanted)} vLLM servers are ready, {seconds:.0f} s")
            next_line = seconds + 15
        if seconds > args.deadline:
            late = ", ".join(server.url for server in missing)
            raise InputError(
                f"not ready after {seconds:.0f} s: {late}; see servers/ in the run folder, or raise --deadline"
            )
        for server in part.samplers:
            if server.process.poll() is not None:
                raise InputError(f"{server.log}: the vLLM server stopped: {server.why()}")
        time.sleep(1 if missing else 0)


def tend_to(own: list[servers.Server], deadline: float) -> Callable[[], int | None]:
    """Returns a function that restarts servers which ended or hang, once they have been ready.

    It raises InputError for a server that ends before it is ready again.
    """
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
            elif server.restart(now - seen[url], limit=servers.UNWELL if url in ready else deadline):
                say(f"{url} had ended or did not answer; started again")
                seen[url] = now
                ready.discard(url)

    return tend


def watch(
    trainers: Sequence[ProcessGroup], tend: Callable[[], int | None], args: argparse.Namespace, stop: Stop
) -> int:
    """Waits until all trainers have ended, or one has failed and the others had NOTICE seconds to report it.

    Args:
      trainers: started; none on a host of samplers alone.
      tend: called every LOOK seconds; where it returns a status, the run ends.
      args: those of the command line.
      stop: signals that are passed on to the trainers.

    Returns:
      the exit status.
    """
    passed_on, lost, look, reported = 0, float("inf"), 0.0, set[str]()
    while True:
        codes = [trainer.process.poll() for trainer in trainers]
        running = [trainer for trainer, code in zip(trainers, codes, strict=True) if code is None]
        if trainers and not running:
            return status(codes, stop)
        report_killed(trainers, codes, args.here, reported)
        if any(codes):
            lost = min(lost, time.monotonic() + NOTICE)
        for number, _ in stop.asked[passed_on:]:
            passed_on += 1
            for trainer in running:
                trainer.send_signal(number)
        if stop.asked and not trainers:  # trainers on other hosts may need these servers to end their step
            at_once = len(stop.asked) > 1
            if at_once or not is_listening(args.trainer_hosts[0], args.port):
                return stop.status
        if time.monotonic() > min(lost, stop.limit(args.grace)):
            return status([*codes, TRY_AGAIN], stop)
        if time.monotonic() > look:
            if (code := tend()) is not None:
                return status([code or TRY_AGAIN], stop)
            look = time.monotonic() + LOOK
        time.sleep(0.2)


def report_killed(
    trainers: Sequence[ProcessGroup], codes: Sequence[int | None], here: str, reported: set[str]
) -> None:
    """Prints, once each, which trainers were killed: when process 0 dies, JAX kills the others without saying why."""
    for trainer, code in zip(trainers, codes, strict=True):
        process = trainer.environment.get("JAXRL_PROCESS", "")
        if process not in reported and process and code and code < 0:
            reported.add(process)
            say(f"process {process} on {here} was ended by {signal.Signals(-code).name}")


def status(codes: Sequence[int | None], stop: Stop) -> int:
    """The exit status of a run whose processes ended with `codes`.

    It is 0 if nothing failed and TRY_AGAIN if processes were only stopped or lost; any other one has to be looked at.
    """
    failed = [TRY_AGAIN if code < 0 or code == LOST else code for code in codes if code]
    if failed and stop.asked:
        return stop.status
    return next((code for code in failed if code != TRY_AGAIN), TRY_AGAIN if failed else 0)


def is_listening(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


class Remote(ProcessGroup):
    """This script on another host.

    It gets the environment and signals through its stdin: no command line shows the key, and it ends when this end is
    gone for whatever reason. See `follow_stdin`.
    """

    def __init__(self, host: str, args: argparse.Namespace, argv: Sequence[str]) -> None:
        script = [sys.executable, str(Path(__file__).resolve()), "--remote", "--here", host, *argv]
        line = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(script)}"
        super().__init__(
            [*args.ssh, args.logins[host], line], {}, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.host = host

    def start(self) -> None:
        super().start()
        self.follow = threading.Thread(target=self._follow, daemon=True)
        self.follow.start()
        self._write(json.dumps({k: v for k, v in os.environ.items() if k.startswith((*SENT, KEY))}))

    def send_signal(self, number: int) -> None:
        self._write(signal.Signals(number).name)

    def _follow(self) -> None:
        """Prints what ssh says; its last line is the reason where it ends because it has no connection."""
        assert self.process.stderr
        last = ""
        for line in self.process.stderr:
            if last:
                say(f"{self.host}: {last}")
            last = line.decode(errors="replace").rstrip()
        lost = "launch: " if self.process.wait() == LOST else ""
        if lost or last:
            say(f"{lost}{self.host}: {last or 'the connection is gone'}")

    def _write(self, line: str) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()


def run_remotely(hosts: dict[str, Part], args: argparse.Namespace, argv: Sequence[str], stop: Stop) -> int:
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
            remote.send_signal(signal.SIGTERM)
            remote.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 2 * AT_ONCE + 5
        while any(remote.process.poll() is None for remote in remotes) and time.monotonic() < deadline:
            time.sleep(0.2)
        process_group.kill(remotes)
        for remote in remotes:
            remote.follow.join(1)


def follow_stdin() -> None:
    """Takes from stdin what a Remote sends: the environment, then signals, and SIGTERM at its end."""
    os.environ |= json.loads(sys.stdin.readline() or "{}")

    def follow() -> None:
        for line in sys.stdin:
            os.kill(os.getpid(), signal.Signals[line.strip()])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def output_without_reader() -> Iterator[None]:
    """Passes the output of this process and its trainers through a thread, so that nothing fails when ssh is gone."""
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


def name_of_this_host(args: argparse.Namespace, hosts: dict[str, Part]) -> str:
    """The name that this host has among `hosts`; none if it is not one of them."""
    short = [host for host in hosts if args.here.split(".")[0] in (host, host.split(".")[0])]
    return args.here if args.here in hosts else short[0] if len(short) == 1 else ""


def require_reachable(here: str, stop: Stop) -> None:
    """Raises: InputError if other hosts do not find this one by its name, or could not use its servers."""
    deadline = time.monotonic() + KNOWN
    while True:
        try:
            found = str(socket.getaddrinfo(here, None)[0][4][0])
            break
        except OSError as error:
            if stop.asked:
                return
            if time.monotonic() > deadline:
                raise InputError(f"{here}: {error}; name hosts so that they find each other") from None
            time.sleep(1)
    if ipaddress.ip_address(found.partition("%")[0]).is_loopback and found != here:
        raise InputError(
            f"{here} is {found} here, which no other host can reach; name hosts by their addresses"
        )
    if not os.environ.get(KEY):
        raise InputError(f"set {KEY} to one secret on all hosts, which samplers will ask for")


def main(argv: Sequence[str], stop: Stop) -> int:
    """Returns the exit status: BAD_INPUT where the same command fails again, TRY_AGAIN where it may go on."""
    try:
        args = parse(argv)
    except InputError as error:
        return report(error, "launch")
    with output_without_reader() if args.remote else contextlib.nullcontext():
        try:
            if args.remote:
                follow_stdin()
            code = run_parts(assign(args), args, argv, stop)
        except (InputError, RunError) as error:
            code = report(error, f"launch: {args.here}")
    return code + (args.add_to_failure if 0 < code < 56 else 0)  # an exit status is a byte


def report(error: InputError | RunError, prefix: str) -> int:
    """Prints the error; returns the exit status."""
    say("\n".join(f"{prefix}: {line}" for line in str(error).splitlines()))
    return error.status


def run_parts(hosts: dict[str, Part], args: argparse.Namespace, argv: Sequence[str], stop: Stop) -> int:
    """Runs this host's part, or with --ssh those of all; with --dry-run, prints them."""
    by_ssh, here = args.ssh and not args.remote, name_of_this_host(args, hosts)
    if here and not by_ssh:
        name_gpus(hosts[here], here)
    if args.dry_run:
        show(hosts, args, argv)
        return 0
    if not here and not by_ssh:
        raise InputError(
            f"{args.here} is not one of {', '.join(hosts)}; say which of them this is with --here"
        )
    if len(hosts) > 1 and not by_ssh:
        require_reachable(here, stop)
    os.environ[KEY] = api_key()
    if by_ssh:
        return run_remotely(hosts, args, argv, stop)
    args.here = here
    return run(hosts[here], [server for part in hosts.values() for server in part.samplers], args, stop)


def show(hosts: dict[str, Part], args: argparse.Namespace, argv: Sequence[str]) -> None:
    for host, part in hosts.items():
        if args.ssh:
            print(f"{host}: {shlex.join(Remote(host, args, argv).arguments)}")
        for group in (*part.samplers, *part.trainers):
            variables = [f"{name}={shlex.quote(value)}" for name, value in group.environment.items()]
            print(f"{host}: {' '.join(variables)} {shlex.join(group.arguments)}")


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader may be gone
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], stopping))
