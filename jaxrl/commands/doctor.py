"""jaxrl doctor."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from jaxrl import __version__, config
from jaxrl.errors import BAD_INPUT, InputError, RunError, first_line
from jaxrl.files import at_home
from jaxrl.types import TrackerName

HELP = "what is installed here, and what a run would miss, each with a remedy"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "tokenizers")
DISK, SHARED, FILES = 25e9, 8e9, 4096  # bytes, bytes, open files: less is worth a line
PORT = 8100  # launch/ takes it and those after it


class Finding(NamedTuple):
    """One line: what was looked at, what it is, and what to do where that is not well."""

    name: str
    value: str
    remedy: str = ""
    fatal: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vllm", default="", metavar="PATH", help="vLLM's program, as sampler.vllm; default: found"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where runs are to be written (default: here)"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"the first that a run takes (default: {PORT})"
    )


def run(args: argparse.Namespace, _: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console, fatal = Console(), False
    for found in findings(args.vllm, args.folder, args.port):
        mark, style = ("x", "bold red") if found.fatal else ("!", "yellow") if found.remedy else (" ", "")
        console.print(Text(f"{mark} {found.name:<16} {found.value}", style), soft_wrap=True)
        if found.remedy:
            console.print(Text(f"{'':<19}{found.remedy}", "dim"), soft_wrap=True)
        fatal |= found.fatal
    if fatal:
        raise SystemExit(BAD_INPUT)


def findings(vllm: str, folder: Path, port: int) -> Iterator[Finding]:
    """All that there is to see, in the order in which it is shown."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield _vllm(vllm)
    yield _disk("run folder", folder)
    yield _disk("compiled programs", at_home(config.Run().compilation_cache))
    yield _shared_memory()
    yield _open_files()
    yield _port(port)


def _python() -> Finding:
    shown = f"{platform.python_version()} ({sys.executable}), {os.cpu_count()} processors"
    return Finding("python", shown)


def _packages() -> Iterator[Finding]:
    yield Finding("jaxrl", f"{__version__} ({Path(__file__).parents[2]})")
    for name in PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "pip install -e . in jaxrl's folder", fatal=True)
    for name in get_args(TrackerName):
        if importlib.util.find_spec(name):
            yield Finding(f"tracker {name}", "installed")


def _devices() -> Iterator[Finding]:
    """JAX's devices; a GPU that JAX does not see is the usual fault."""
    from jaxrl.sampling.servers import list_gpus

    seen = list_gpus()
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # of a plug-in or driver
        remedy = "pip install -e '.[cuda]' for CUDA 12 or '.[cuda13]', or JAX_PLATFORMS=cpu"
        yield Finding("devices", f"none: {first_line(error)}", remedy, fatal=True)
        return
    kinds = {device.device_kind for device in devices}
    remedy = ""
    if seen and devices[0].platform == "cpu":
        remedy = f"JAX does not see {len(seen)} GPUs; pip install -e '.[cuda]', and look at JAX_PLATFORMS"
    yield Finding("devices", f"{len(devices)} x {', '.join(sorted(kinds))} ({devices[0].platform})", remedy)
    memory = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if memory and "bytes_limit" in memory:
        yield Finding("device memory", f"{memory['bytes_limit'] / 1e9:.0f} GB that JAX may take")


def _vllm(program: str) -> Finding:
    from jaxrl.sampling.client import SUPPORTED
    from jaxrl.sampling.servers import require_program, vllm_version

    remedy = (
        'make vllm; without it, runs sample in process (rollout.engine = "local"), or by servers elsewhere'
    )
    try:
        where = require_program(program or config.Sampler().vllm)
        version = vllm_version(where)
    except (InputError, RunError) as error:
        return Finding("vllm", str(first_line(error)), remedy)
    if not version.startswith(f"{SUPPORTED}."):
        return Finding("vllm", f"{version} ({where})", f"runs need vLLM {SUPPORTED}: make vllm")
    return Finding("vllm", f"{version} ({where})")


def _disk(name: str, folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    shown = f"{free / 1e9:,.0f} GB free at {there}"
    if not os.access(there, os.W_OK):
        return Finding(name, shown, "this user may not write there; choose another run.directory")
    few = "a checkpoint of 1.5B parameters is 21 GB; choose another disk" if free < DISK else ""
    return Finding(name, shown, few)


def _shared_memory() -> Finding:
    path = Path(config.Sampler().folder)
    if not path.is_dir():
        return Finding(
            "shared memory", f"no {path}", 'set sampler.folder to a disk, or sampler.transport = "nccl"'
        )
    free = shutil.disk_usage(path).free
    few = (
        "weights pass through it (3.6 GB at 1.5B, twice); docker run --shm-size, or sampler.folder"
        if free < SHARED
        else ""
    )
    return Finding("shared memory", f"{free / 1e9:,.1f} GB free", few)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = "many servers and checkpoints need more: ulimit -n 65536" if soft < FILES else ""
    return Finding("open files", f"{soft:,} (at most {hard:,})", few)


def _port(port: int) -> Finding:
    from jaxrl.sampling.servers import require_free, url_of

    try:
        require_free(url_of("127.0.0.1", port))
    except (InputError, RunError) as error:
        return Finding("port", f"{port}: {first_line(error)}", "give launch/ another --port")
    return Finding("port", f"{port} is free")
