"""What `jaxrl doctor` finds, with one thing amiss at a time."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import socket
import stat
from pathlib import Path

import jax
import pytest

from jaxrl import cli
from jaxrl.commands import doctor
from jaxrl.errors import BAD_INPUT


def found(folder: Path, vllm: str = "no-such-program", port: int = 0) -> dict[str, doctor.Finding]:
    return {each.name: each for each in doctor.findings(vllm, folder, port)}


def test_it_says_what_is_here(tmp_path: Path) -> None:
    seen = found(tmp_path)
    assert not any(each.fatal for each in seen.values())
    assert seen["jax"].value == jax.__version__ and "(cpu)" in seen["devices"].value
    assert seen["run folder"].value.endswith(f"free at {tmp_path}")
    assert seen["vllm"].remedy.startswith("make vllm")
    assert found(tmp_path / "not" / "yet")["run folder"].value.endswith(f"free at {tmp_path}")


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "no server can listen there" in found(tmp_path, port=port)["port"].value
        assert found(tmp_path, port=port)["port"].remedy


def test_few_open_files_are_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        assert "ulimit -n" in found(tmp_path)["open files"].remedy
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_vllm_is_named(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho 0.19.1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert found(tmp_path, str(program))["vllm"].remedy.startswith("runs need vLLM 0.32")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10**9))
    seen = found(tmp_path)
    assert "21 GB" in seen["run folder"].remedy and "--shm-size" in seen["shared memory"].remedy


def test_a_gpu_that_jax_does_not_see_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi is there, and JAX is the CPU's."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert found(tmp_path)["devices"].remedy.startswith("JAX does not see 1 GPUs")


@pytest.mark.parametrize("fault", ["package", "driver"])
def test_what_no_run_can_do_without_is_an_error(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    def none() -> list[jax.Device]:
        raise RuntimeError("CUDA driver version is insufficient\nand more")

    if fault == "package":
        monkeypatch.setattr("importlib.metadata.version", missing)
    else:
        monkeypatch.setattr("jax.devices", none)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--vllm", "no-such-program", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert stop.value.code == BAD_INPUT and "\x1b" not in shown
    assert (
        "x flax             missing" if fault == "package" else "x devices          none: CUDA driver"
    ) in shown
