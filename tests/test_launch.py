"""The launch scripts: what they would run where, and that nothing outlives them. vLLM and trainers are stand-ins."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import ClassVar, TypeVar

import pytest
import yaml

from jaxrl.errors import BAD_INPUT, TRY_AGAIN
from jaxrl.sampling.servers import free_port
from sampling.test_servers import alive, assert_gone, pids_in

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
RECIPE = """
[run]
directory = "{0}/run"
[model]
path = "base"
[sampler]
vllm = "{0}/vllm"
folder = "{0}/weights"
"""
VLLM = """#!{python}
import http.server, os, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
assert len(os.environ["VLLM_API_KEY"]) > 30 and "PYTHONPATH" not in os.environ
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(os.environ["JAXRL_SERVER"].encode())
    def log_message(self, *args): pass
if os.path.exists("{folder}/broken"): raise SystemExit("ValueError: it is broken")
server = http.server.HTTPServer((host, int(port)), Handler)
with open("{folder}/pids", "a") as file: file.write(f"{{os.getpid()}} {{child.pid}}\\n")
server.serve_forever()
"""
# in place of Python for what entry.py starts: the trainer, or itself on another host
PROGRAM = """#!{python}
import os, runpy, signal, subprocess, sys, time
if sys.argv[1] != "-m":
    sys.path.insert(0, "{folder}")
    sys.argv[:2] = ["driver"]
    runpy.run_path("{folder}/driver")
    sys.exit()
me, child = os.environ["JAXRL_PROCESS"], subprocess.Popen(["sleep", "600"])
def save(number, _):
    print("saving", flush=True)
    time.sleep(0.5)
    with open(f"{folder}/saved{{me}}", "w"): pass
    sys.exit(75 if number == signal.SIGTERM else 130)
signal.signal(signal.SIGTERM, save), signal.signal(signal.SIGINT, save)
assert len(os.environ["JAXRL_API_KEY"]) > 30 and sys.argv[4].endswith("recipe.toml")
with open("{folder}/trainer" + me, "w") as file: file.write(f"{{os.getpid()}} {{child.pid}}\\n")
while not os.path.exists("{folder}/exit" + me): time.sleep(0.05)
sys.exit(int(open("{folder}/exit" + me).read()))
"""
DRIVER = """
import sys
sys.path.insert(0, "{root}/launch")
import entry
entry.sys.executable, entry.NOTICE, entry.LOOK = "{folder}/python", 1, 0.2
sys.exit(entry.main(sys.argv[1:], entry.Stop()))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    names = {"python": sys.executable, "folder": tmp_path, "root": ROOT}
    # as with ssh, nothing but stdin ties the other end to this one
    ssh = '#!/bin/sh\nshift\nexec setsid -w sh -c "$1"\n'
    for name, text in {"vllm": VLLM, "python": PROGRAM, "driver": DRIVER, "ssh": ssh}.items():
        (tmp_path / name).write_text(text if name == "ssh" else text.format(**names))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(tmp_path))
    yield tmp_path
    for process in Run.started:
        process.kill()


def without_gpus() -> dict[str, str]:
    """This process's environment, less what it says about GPUs."""
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}


def dry_run(*command: object, **environment: str) -> list[str]:
    environment = {**without_gpus(), "PYTHON": sys.executable} | environment
    line = [str(part) for part in command]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.splitlines()


ALWAYS = "VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1"
ON_CPU = "VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind"
FLAGS = (
    "--dtype bfloat16 --max-model-len 16384 --generation-config vllm --logprobs-mode processed_logprobs "
    '--weight-transfer-config \'{"backend": "jaxrl_file"}\' --middleware jaxrl.sampling.vllm_plugin.Guard '
    "--enable-scale-out --tokens-only"
)
CPU_FLAGS = (
    "--enforce-eager --distributed-executor-backend uni --kv-cache-memory-bytes 268435456 "
    "--no-enable-chunked-prefill"
)


def server(folder: Path, host: str, port: int, more: str = "", end: str = "") -> str:
    return f"{host}: {ALWAYS}{more} {folder}/vllm serve base --host {host} --port {port} {FLAGS}{end}"


def trainer(folder: Path, host: str, coordinator: str, process: str, devices: str, urls: list[str]) -> str:
    of, which = process.split()
    return (
        f"{host}: JAXRL_COORDINATOR={coordinator} JAXRL_PROCESSES={of} JAXRL_PROCESS={which} {devices} "
        f"{sys.executable} -m jaxrl.cli train {folder}/recipe.toml --run.steps 3 --samplers {','.join(urls)}"
    )


def test_one_host(folder: Path) -> None:
    recipe = (folder / "recipe.toml", "--run.steps", "3")
    urls = ["http://127.0.0.1:8101", "http://127.0.0.1:8102"]
    options = "--trainer-gpus 4 --sampler-gpus 4 --tensor-parallel 2 --dry-run"
    assert dry_run("launch/local.sh", *options.split(), *recipe) == [
        server(folder, "127.0.0.1", 8101, " CUDA_VISIBLE_DEVICES=4,5", " --tensor-parallel-size 2"),
        server(folder, "127.0.0.1", 8102, " CUDA_VISIBLE_DEVICES=6,7", " --tensor-parallel-size 2"),
        trainer(folder, "127.0.0.1", "127.0.0.1:8100", "1 0", "CUDA_VISIBLE_DEVICES=0,1,2,3", urls),
    ]
    options = "--trainer-processes 2 --devices 3 --samplers 2 --dry-run"
    cpu = "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=3"
    assert dry_run("launch/local.sh", *options.split(), *recipe) == [
        server(folder, "127.0.0.1", 8101, f" {ON_CPU}", f" {CPU_FLAGS}"),
        server(folder, "127.0.0.1", 8102, f" {ON_CPU}", f" {CPU_FLAGS}"),
        trainer(folder, "127.0.0.1", "127.0.0.1:8100", "2 0", cpu, urls),
        trainer(folder, "127.0.0.1", "127.0.0.1:8100", "2 1", cpu, urls),
    ]
    options = "--trainer-gpus 2 --trainer-processes 2 --sampler-gpus 1 --dry-run"
    lines = dry_run("launch/local.sh", *options.split(), *recipe, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b,GPU-c")
    given = ["CUDA_VISIBLE_DEVICES=GPU-c ", "CUDA_VISIBLE_DEVICES=GPU-a ", "CUDA_VISIBLE_DEVICES=GPU-b "]
    assert [name in line for name, line in zip(given, lines, strict=True)] == [True] * 3


def test_four_hosts_by_ssh(folder: Path) -> None:
    hosts = [f"10.0.0.{i}" for i in range(1, 5)]
    (folder / "hosts").write_text(
        "# two of each\n10.0.0.1 trainer\n10.0.0.3 sampler\n10.0.0.2 trainer\n\n10.0.0.4 sampler\n"
    )
    recipe = [f"{folder}/recipe.toml", "--run.steps", "3"]
    options = ["--trainer-gpus", "2", "--sampler-gpus", "2", "--port", "9000", "--dry-run", *recipe]
    lines = dry_run("launch/ssh.sh", folder / "hosts", *options, LAUNCH_SSH="ssh -p 2222")
    shared = ["--ssh", "ssh -p 2222"]
    shared += ["--trainer-hosts", "10.0.0.1,10.0.0.2", "--sampler-hosts", "10.0.0.3,10.0.0.4"]

    def placed(host: str) -> str:
        script = [sys.executable, f"{ROOT}/launch/entry.py", "--remote", "--here", host, *shared, *options]
        return f"{host}: {shlex.join(['ssh', '-p', '2222', host, f'cd {ROOT} && exec {shlex.join(script)}'])}"

    urls = [f"http://10.0.0.{host}:{port}" for host in (3, 4) for port in (9001, 9002)]
    assert lines == [
        placed(hosts[0]),
        trainer(folder, hosts[0], "10.0.0.1:9000", "2 0", "CUDA_VISIBLE_DEVICES=0,1", urls),
        placed(hosts[1]),
        trainer(folder, hosts[1], "10.0.0.1:9000", "2 1", "CUDA_VISIBLE_DEVICES=0,1", urls),
        placed(hosts[2]),
        server(folder, hosts[2], 9001, " CUDA_VISIBLE_DEVICES=0"),
        server(folder, hosts[2], 9002, " CUDA_VISIBLE_DEVICES=1"),
        placed(hosts[3]),
        server(folder, hosts[3], 9001, " CUDA_VISIBLE_DEVICES=0"),
        server(folder, hosts[3], 9002, " CUDA_VISIBLE_DEVICES=1"),
    ]


@pytest.fixture(scope="module")
def entry() -> types.ModuleType:
    """launch/entry.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("entry", ROOT / "launch" / "entry.py")
    assert spec and spec.loader
    module = sys.modules["entry"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(entry: types.ModuleType, *command: object) -> int:
    """Runs launch/entry.py in this process."""
    return entry.main(list(map(str, command)), types.SimpleNamespace(asked=[]))


ONE, TWO = ["--trainer-hosts", "127.0.0.1", "--sampler-hosts", "127.0.0.1"], ["--trainer-gpus", "2"]


@pytest.mark.parametrize(
    ("options", "visible", "why"),
    [
        ([*ONE, *TWO, "--sampler-gpus", "2"], "2,3", "=2,3 shows 2 GPUs of 127.0.0.1, and its part needs 4"),
        ([*ONE, *TWO, "--sampler-gpus", "2"], "2,3,2,3", "shows 2 GPUs"),
        ([*ONE, *TWO], "", "shows 0 GPUs"),
        *[
            ([*ONE, f"--{name}", value], None, f"argument --{name}: {value} is no number from")
            for name in (
                *[
                    "trainer-gpus",
                    "trainer-processes",
                    "devices",
                    "sampler-gpus",
                    "tensor-parallel",
                    "samplers",
                ],
                *["port", "deadline", "grace"],
            )
            for value in ("-1", "99999999", "1" * 5000, "1.5", "x", "")
        ],
        ([*ONE, "--trainer-processes", "0"], None, "0 is no number from 1"),
        ([*ONE, "--tensor-parallel", "0"], None, "0 is no number from 1"),
        ([*ONE, "--port", "0"], None, "0 is no number from 1"),
        ([*ONE, *TWO, "--trainer-processes", "4"], None, "--trainer-processes 4 cannot share 2 GPUs evenly"),
        ([*ONE, "--tensor-parallel", "4", "--sampler-gpus", "2"], None, "need more than 2 GPUs"),
        ([*ONE, "--tensor-parallel", "4"], None, "need more than 0 GPUs"),
        ([*ONE, "--port", "65535"], None, "--port 65535: the last server would have port 65536"),
        ([*ONE, "--port", "65533", "--samplers", "3"], None, "the last server would have port 65536"),
        (["--trainer-hosts", "a,b,a"], None, "a is there twice as a trainer"),
        (["--trainer-hosts", "::1,[0:0::1]"], None, "::1 is there twice as a trainer"),
        (["--trainer-hosts", "a", "--sampler-hosts", "b,b"], None, "b is there twice as a sampler"),
        (["--trainer-hosts", "u@a,a"], None, "one host, and two users: a, u@a"),
        (["--trainer-hosts", ""], None, "--trainer-hosts names no host"),
        ([], None, "required: --trainer-hosts"),
        *[
            (["--trainer-hosts", f"a,{name}"], None, f"{name} is no host")
            for name in ("b:80", "http://b", "-oX=y", "b c", "fe80::1%eth0", "u@", "10.0.0.1:80", "[::1]:80")
        ],
        (["--trainer-hosts", "a", "--ssh", "nothing here"], None, "--ssh nothing here: no such program"),
        (["--trainer-hosts", "a", "--ssh", "'"], None, "argument --ssh: invalid"),
        ([*ONE, "--here", "other"], None, "other is not one of 127.0.0.1; say which of them this is"),
        (["--trainer-hosts", "a.x,a.y", "--here", "a"], None, "a is not one of a.x, a.y"),
        ([*ONE, "--samplings", "3"], None, "unrecognized arguments: --samplings"),
    ],
)
def test_impossible_options_end_with_one_line(
    entry: types.ModuleType,
    folder: Path,
    options: list[str],
    visible: str | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = [] if "--here" in options else ["--here", "127.0.0.1"]
    assert launch(entry, *options, *here, folder / "recipe.toml") == BAD_INPUT
    output = capsys.readouterr()
    assert output.out.startswith("launch: ") and output.out.count("\n") == 1 and not output.err
    assert why in output.out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "hosts=': No such file or directory"),
        ("", "hosts=: no line names a trainer"),
        ("# 10.0.0.1 trainer\n\n10.0.0.2 sampler\r\n", "hosts=: no line names a trainer"),
        (
            "10.0.0.1 trainer\n10.0.0.2 sampeler\nb\n",
            "hosts=: not a host and 'trainer' or 'sampler': 10.0.0.2 sampeler",
        ),
        ("10.0.0.1 trainer\n10.0.0.1 trainer\n", "10.0.0.1 is there twice as a trainer"),
        ("10.0.0.1 trainer\n", "nothing.toml: cannot read the recipe"),
    ],
)
def test_host_files_that_name_no_run_end_with_one_line(folder: Path, text: str | None, why: str) -> None:
    if text is not None:
        (folder / "hosts=").write_text(text)
    command = ["launch/ssh.sh", folder / "hosts=", folder / "nothing.toml"]
    environment = {**without_gpus(), "PYTHON": sys.executable, "LAUNCH_SSH": f"{folder}/ssh"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (BAD_INPUT, 1, ""), done
    assert why in done.stdout


def test_hosts_have_users_and_addresses_of_ipv6(folder: Path) -> None:
    hosts = ["--trainer-hosts", "ann@2001:db8:0:0::1,b.c", "--sampler-hosts", "ann@[2001:db8::1],bob@[::2]"]
    recipe = [folder / "recipe.toml", "--run.steps", "3"]
    command = [sys.executable, "launch/entry.py", "--ssh", f"{folder}/ssh", "--dry-run", *hosts, *recipe]
    lines = dry_run(*command)
    urls = ["http://[2001:db8::1]:8101", "http://[::2]:8101"]
    cpu, cpus = f" {ON_CPU}", f" {CPU_FLAGS}"
    coordinator = "'[2001:db8::1]:8100'"
    devices = "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1"
    expected = [
        server(folder, "2001:db8::1", 8101, cpu, cpus),
        trainer(folder, "2001:db8::1", coordinator, "2 0", devices, urls),
        trainer(folder, "b.c", coordinator, "2 1", devices, urls),
        server(folder, "::2", 8101, cpu, cpus),
    ]
    started = [line for line in lines if "/ssh " in line]
    assert [
        line.replace("'http", "http").replace(":8101'", ":8101") for line in lines if line not in started
    ] == expected
    targets = [shlex.split(line.partition(": ")[2])[1] for line in started]
    assert targets == ["ann@2001:db8::1", "b.c", "bob@::2"]


def test_a_server_of_another_run_is_not_taken_for_ones_own(folder: Path) -> None:
    """It has the port before this run starts, or takes it while this run's own server loads."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for first in (port, port - 1):  # that of the coordinator, and of a server
            output = Run(folder, False, "--port", str(first)).end(BAD_INPUT)
            assert f"http://127.0.0.1:{port}: no server can listen there (Address already in use" in output
            assert output.count("\n") == 1
    assert not (folder / "pids").exists()


def test_kill_9_between_a_program_and_its_reaper_leaves_nothing(folder: Path) -> None:
    program = folder / "program"
    program.write_text(f"#!/bin/sh\ntouch {folder}/ran\nexec sleep 600\n")
    program.chmod(0o755)
    text = """
import os, signal, subprocess, sys
from jaxrl.sampling.process_group import ProcessGroup
popen = subprocess.Popen
def once(*args, **options):
    subprocess.Popen = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    process = popen(*args, **options)
    print(process.pid, flush=True)
    return process
subprocess.Popen = once
ProcessGroup([sys.argv[1]], {}).start()
"""
    done = subprocess.run([sys.executable, "-c", text, program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert_gone([int(done.stdout)])
    assert not (folder / "ran").exists()


def stub(folder: Path, **programs: str) -> str:
    """A PATH with these shell scripts first."""
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_ID_HET_GROUP_1": "1234568",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-8]",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "b[1-8]",
}
SCONTROL = 'case $1 in show) printf "${3%%[*}%s\\n" {1..8};; *) echo "$@" >> $(dirname $0)/../calls;; esac'


def test_sixteen_hosts_by_slurm(folder: Path) -> None:
    command = ("launch/slurm.sbatch", "--dry-run", folder / "recipe.toml", "--run.steps", "3")
    lines = dry_run(*command, PATH=stub(folder, scontrol=SCONTROL), TENSOR="2", **SLURM)
    port = 20000 + 1234567 % 390 * 32
    urls = [f"http://b{n}:{port + k}" for n in range(1, 9) for k in range(1, 5)]
    gpus, parallel = "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7", " --tensor-parallel-size 2"
    expected = [trainer(folder, f"a{n}", f"a1:{port}", f"8 {n - 1}", gpus, urls) for n in range(1, 9)]
    for n, k in itertools.product(range(1, 9), range(4)):
        pair = f" CUDA_VISIBLE_DEVICES={2 * k},{2 * k + 1}"
        expected.append(server(folder, f"b{n}", port + 1 + k, pair, parallel))
    assert lines == expected and len(lines) == 40


SRUN = """
echo "$@" >> {0}/calls
trap 'echo ${{5}} TERM >> {0}/calls; {2}' TERM
while read -r line; do [ $line != SIGTERM ] || kill $$; done <&0 &
case $5 in --het-group=0) {1};; *) {3};; esac
"""


@pytest.mark.parametrize(
    ("trainers", "on_signal", "samplers", "status", "again"),
    [
        ("exit 0", "", "sleep 30 & wait", 0, False),
        ("exit 75", "", "sleep 30 & wait", 75, True),
        ("exit 2", "", "sleep 30 & wait", 2, False),
        ("kill -9 $$", "", "sleep 30 & wait", 75, True),
        ("sleep 30 & wait; wait", "exit 75", "sleep 0.5; exit 2", 2, False),
        ("sleep 30 & wait; wait", "exit 75", "sleep 0.5; exit 75", 75, True),
        # one host of a component says 2
        ("exit 202", "", "sleep 30 & wait", 2, False),
        ("sleep 30 & wait; wait", "exit 75", "sleep 0.5; exit 202", 2, False),
        # preempted
        ("sleep 0.5; kill $PPID; sleep 30 & wait", "sleep 1; exit 75", "sleep 30 & wait", 75, True),
    ],
)
def test_slurm_starts_again_what_was_stopped(
    folder: Path, trainers: str, on_signal: str, samplers: str, status: int, again: bool
) -> None:
    """With stand-ins that run these lines; see tests/launch for a real Slurm."""
    srun = SRUN.format(folder, trainers, on_signal or "exit 75", samplers)
    path = stub(folder, scontrol=SCONTROL, srun=srun)
    environment = {**os.environ, "PATH": path, "SECONDS": "10", **SLURM}
    command = ["launch/slurm.sbatch", "r.toml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=20)
    calls = (folder / "calls").read_text()
    assert done.returncode == status
    assert ("requeue 1234567" in calls) == again
    assert "--het-group=0 .venv/bin/python launch/entry.py --trainer-hosts a1,a2" in calls
    assert "JAXRL_API_KEY" not in calls and "key" not in calls


def test_kubernetes(folder: Path) -> None:
    """The container's command is valid, it names the jobs' pods as hosts, and statuses mean what they should."""
    spec = yaml.safe_load((ROOT / "launch" / "k8s.yaml").read_text())
    name, spec = spec["metadata"]["name"], spec["spec"]
    pods = {}
    for job in spec["replicatedJobs"]:
        job_spec = job["template"]["spec"]
        pods[job["name"]] = [
            f"{name}-{job['name']}-0-{i}.{spec['network']['subdomain']}"
            for i in range(job_spec["completions"])
        ]
        rule = job_spec["podFailurePolicy"]["rules"][0]
        assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
        passing = rule["onExitCodes"]["values"]
        assert TRY_AGAIN in passing and BAD_INPUT not in passing
        container = job_spec["template"]["spec"]["containers"][0]
        assert container["command"] == [".venv/bin/python", "launch/entry.py"]
    args = [str(folder / "recipe.toml") if arg.endswith(".toml") else arg for arg in container["args"]]
    lines = dry_run(sys.executable, "launch/entry.py", "--dry-run", *args)
    assert [line.split(":")[0] for line in lines] == pods["trainers"] + [
        pod for pod in pods["samplers"] for _ in range(8)
    ]
    assert "JAXRL_COORDINATOR=jaxrl-trainers-0-0.jaxrl:8100 JAXRL_PROCESSES=2 JAXRL_PROCESS=1" in lines[1]


def unknown(value: object, schema: dict[str, object], path: str = "") -> list[str]:
    """What an API server refuses: fields that the schema does not have or wants, other types, other names."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [path]
    if not isinstance(value, kinds.get(schema["type"], object)) or value not in schema.get("enum", [value]):
        return [path]
    if isinstance(value, list):
        return flat([unknown(item, schema["items"], f"{path}[{i}]") for i, item in enumerate(value)])
    if not isinstance(value, dict) or not (fields := schema.get("properties", {})):
        return []
    found = [
        f"{path}.{name}"
        for name in (value.keys() - fields) | (set(schema.get("required", ())) - value.keys())
    ]
    return found + flat(
        [unknown(value[name], fields[name], f"{path}.{name}") for name in value.keys() & fields]
    )


@pytest.mark.skipif(
    "JOBSET_CRD" not in os.environ, reason="$JOBSET_CRD names no jobset.x-k8s.io_jobsets.yaml"
)
def test_kubernetes_takes_the_jobset() -> None:
    """By the schema of JobSet, which has those of a Job and its pods."""
    (version,) = yaml.safe_load(Path(os.environ["JOBSET_CRD"]).read_text())["spec"]["versions"]
    manifest = yaml.safe_load((ROOT / "launch" / "k8s.yaml").read_text())
    assert manifest["apiVersion"] == f"jobset.x-k8s.io/{version['name']}"
    schema = version["schema"]["openAPIV3Schema"]
    assert unknown(manifest, schema) == []
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    container |= {"imagee": "jaxrl", "args": "none"}
    del manifest["spec"]["failurePolicy"]["rules"][0]["action"]
    assert len(unknown(manifest, schema)) == 2 * 2 + 1  # both jobs have the one template


def flat(lists: list[list[T]]) -> list[T]:
    return list(itertools.chain(*lists))


class Run:
    """A run of two trainers and two servers, on one host or on two by way of ssh."""

    started: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, folder: Path, ssh: bool, *options: str) -> None:
        self.folder = folder
        hosts = ["--trainer-hosts", "127.0.0.1", "--sampler-hosts", "127.0.0.1", "--here", "127.0.0.1"]
        if ssh:
            hosts = ["--trainer-hosts", "127.0.0.2", "--sampler-hosts", "127.0.0.3", "--ssh", f"{folder}/ssh"]
        command = [f"{folder}/python", "entry.py", *hosts, "--trainer-processes", "2", "--samplers", "2"]
        command += ["--port", str(free_port()), *options, f"{folder}/recipe.toml"]
        environment, out = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
        )
        self.started.append(self.process)

    def running(self) -> list[list[int]]:
        """The process ids of each trainer, and of the servers, once all have started."""
        trainers = [pids_in(self.folder / f"trainer{i}") for i in range(2)]
        return [*trainers, pids_in(self.folder / "pids")]

    def end(self, status: int) -> str:
        """Waits for its end, with this exit status; returns its output."""
        output = self.process.communicate(timeout=60)[0]
        assert self.process.returncode == status, output
        return output


@pytest.mark.parametrize("ssh", [False, True], ids=["local", "ssh"])
def test_the_trainers_end_is_the_runs(folder: Path, ssh: bool) -> None:
    run = Run(folder, ssh)
    pids = flat(run.running())
    assert len(pids) == 8 and all(map(alive, pids))
    environment = Path(f"/proc/{pids[0]}/environ").read_bytes().split(b"\0")
    (key,) = (line.partition(b"=")[2] for line in environment if line.startswith(b"JAXRL_API_KEY="))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert key not in path.read_bytes()
    for i in range(2):
        (folder / f"exit{i}").write_text("0")
    assert "2 of 2 vLLM servers are ready" in run.end(0)
    assert_gone(pids)


@pytest.mark.parametrize(
    ("ssh", "number", "status"),
    [(False, signal.SIGINT, 130), (False, signal.SIGTERM, 75), (True, signal.SIGTERM, 75)],
)
def test_asked_to_stop_the_trainers_save_first(folder: Path, ssh: bool, number: int, status: int) -> None:
    run = Run(folder, ssh)
    pids = flat(run.running())
    run.process.send_signal(number)
    deadline = time.monotonic() + 60
    while not (folder / "saved0").exists() and time.monotonic() < deadline:
        assert all(map(alive, pids[4:]))  # a step that ends may need them
    run.end(status)
    assert (folder / "saved1").exists()
    assert_gone(pids)


@pytest.mark.parametrize("ssh", [False, True], ids=["local", "ssh"])
def test_kill_9_of_the_launcher_leaves_nothing(folder: Path, ssh: bool) -> None:
    run = Run(folder, ssh)
    pids = flat(run.running())
    assert run.process.stdout
    run.process.stdout.close()  # nobody reads what trainers print when they end
    run.process.kill()
    assert_gone(pids)
    assert [(folder / f"saved{i}").exists() for i in range(2)] == [ssh, ssh]


@pytest.mark.parametrize("ssh", [False, True], ids=["local", "ssh"])
def test_a_trainer_that_fails_ends_the_run(folder: Path, ssh: bool) -> None:
    run = Run(folder, ssh)
    pids = flat(run.running())
    (folder / "exit1").write_text("2")
    run.end(BAD_INPUT)
    assert_gone(pids)


def test_a_trainer_that_is_killed_wants_another_try(folder: Path) -> None:
    run = Run(folder, False)
    trainers = run.running()
    os.kill(trainers[0][0], signal.SIGKILL)
    assert run.end(TRY_AGAIN).count("process 0 on 127.0.0.1 was ended by SIGKILL") == 1
    assert_gone(flat(trainers))


def test_a_server_that_ends_is_started_again_unless_it_cannot(folder: Path) -> None:
    run = Run(folder, False)
    *trainers, server = run.running()
    (folder / "pids").unlink()
    os.kill(server[0], signal.SIGKILL)
    again = pids_in(folder / "pids")
    assert len(again) == 2 and all(map(alive, [*flat(trainers), *server[2:]]))
    assert_gone(server[:2])
    (folder / "broken").touch()
    os.kill(server[2], signal.SIGKILL)
    output = run.end(BAD_INPUT)
    assert output.count("started again") == 2
    assert "the vLLM server stopped again: ValueError: it is broken" in output
    assert_gone([*flat(trainers), *server, *again])


def test_a_host_that_ssh_does_not_reach_is_named(folder: Path) -> None:
    (folder / "ssh").write_text(
        '#!/bin/sh\necho "ssh: connect to host $1 port 22: No route to host" >&2\nexit 255\n'
    )
    output = Run(folder, True).end(TRY_AGAIN).splitlines()
    assert "launch: 127.0.0.2: ssh: connect to host 127.0.0.2 port 22: No route to host" in output
    assert all(line.startswith("launch: 127.0.0.") for line in output)


def test_what_cannot_work_is_reported_before_trainers_start(folder: Path) -> None:
    (folder / "broken").touch()
    output = Run(folder, True).end(BAD_INPUT)
    assert "127.0.0.3: " in output and "the vLLM server stopped: ValueError: it is broken" in output
    output = Run(folder, False, "--samplers", "3", "--sampler-gpus", "2").end(BAD_INPUT)
    assert "--samplers 3 of --tensor-parallel 1 need more than 2 GPUs" in output
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(folder / "weights"), "/dev/shm/jaxrl"))
    output = Run(folder, True).end(BAD_INPUT)
    assert "127.0.0.3 cannot read weights in /dev/shm/jaxrl of 127.0.0.2; set sampler.folder" in output
    assert not (folder / "trainer0").exists()


def keeps_signals(pid: int) -> bool:
    """Whether a process handles SIGHUP, which entry.py does from its first lines on."""
    (mask,) = (line.split()[1] for line in status_lines(pid) if line.startswith("SigCgt"))
    return bool(int(mask, 16) & 1 << signal.SIGHUP - 1)


def status_lines(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().splitlines()


def with_marker(marker: str) -> list[str]:
    """The processes that have `marker` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (process / "environ").read_bytes() and alive(int(process.name)):
                found.append(f"{process.name}: {(process / 'cmdline').read_bytes()!r}")
    return found


TRIES = 40


@pytest.mark.chaos
def test_signals_at_random_moments_leave_nothing(folder: Path) -> None:
    """Also in the first second, while servers get ready, and through ssh; SEED= chooses the moments."""
    random = Random(int(os.environ.get("SEED", "1")))
    # stand-ins for trainers only: entry.py runs as it is
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(f"import sys; sys.executable = '{folder}/trainer'\n")
    again = f"""    os.execv('{sys.executable}', ['{sys.executable}', *sys.argv[1:]])\n"""
    program = (folder / "python").read_text().replace('"-m":\n', f'"-m":\n{again}')
    (folder / "trainer").write_text(program)
    (folder / "trainer").chmod(0o755)
    one, ssh = (
        "127.0.0.1",
        ["--trainer-hosts", "127.0.0.2", "--sampler-hosts", "127.0.0.3", "--ssh", f"{folder}/ssh"],
    )
    local = ["--trainer-hosts", one, "--sampler-hosts", one, "--here", one]
    for i in range(TRIES):
        number = random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
        hosts, delay, marker = random.choice([local, ssh]), random.uniform(0, 8), f"MARKER={folder}/{i}"
        environment = {**without_gpus(), "PYTHONPATH": f"{folder}/site:{ROOT}", "JAX_MARKER": marker}
        command = [sys.executable, "launch/entry.py", *hosts, "--trainer-processes", "2", "--samplers", "2"]
        command += ["--port", str(free_port()), f"{folder}/recipe.toml"]
        out = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True
        )
        while process.poll() is None and not keeps_signals(process.pid):
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        what = f"try {i}: {number.name} after {delay:.2f} s, {'ssh' if hosts is ssh else 'local'}: {output}"
        expected = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}.get(number, TRY_AGAIN)
        assert process.returncode == expected and "Traceback" not in output, what
        deadline = time.monotonic() + 60
        while left := with_marker(marker):
            assert time.monotonic() < deadline, (what, left)
            time.sleep(0.2)
        print(what)
