"""A run of two processes with two devices each, by the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import tiny_run
from jaxrl.errors import BAD_INPUT, TRY_AGAIN
from jaxrl.lock import alone
from jaxrl.parallel import processes
from jaxrl.sampling.servers import free_port
from jaxrl.telemetry.trackers import read_metrics
from jaxrl.types import Gather


def start(recipe: Path) -> list[subprocess.Popen[str]]:
    shared = {
        "JAXRL_COORDINATOR": f"127.0.0.1:{free_port()}",
        "JAXRL_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    return [tiny_run.jaxrl("train", recipe, JAXRL_PROCESS=str(i), **shared) for i in range(2)]


def outputs(processes: list[subprocess.Popen[str]], limit: float = 300) -> list[str]:
    try:
        return [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def complete(recipe: Path) -> str:
    processes = start(recipe)
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    return said[0]


def wait_for(path: Path, count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_weights(one: Path, two: Path, folder: Path) -> None:
    for a, b in zip(
        tiny_run.weights(one, folder / "one"), tiny_run.weights(two, folder / "two"), strict=True
    ):
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    complete(tiny_run.write_recipe(folder, base, **benchmark(folder)))
    return folder / "run"


def benchmark(folder: Path, samples: int = 8) -> dict[str, Any]:
    """What has a recipe evaluate on a benchmark at its beginning and end."""
    (folder / "mine.toml").write_text(f'[digits]\npath = "{folder}/problems.jsonl"\nsamples = {samples}\n')
    return {"eval.benchmarks": str(folder / "mine.toml"), "eval.every": 100}


@pytest.mark.slow
def test_two_processes_sample_and_train_as_one(undisturbed: Path, base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, **{"run.steps": 2} | benchmark(tmp_path))
    outputs([tiny_run.jaxrl("train", recipe, JAX_NUM_CPU_DEVICES="4")])
    one, two = tiny_run.metrics(tmp_path / "run"), tiny_run.metrics(undisturbed)
    assert len(two) == 6
    for name in ("reward/mean", "response/length_mean", "update/sequences"):  # the same rollouts
        assert one[0][name] == two[0][name]
    assert two[0]["update/grad_norm"] == pytest.approx(one[0]["update/grad_norm"], rel=1e-5)
    assert two[0]["policy/entropy"] == pytest.approx(one[0]["policy/entropy"], rel=1e-5)
    scores = [
        json.loads((run / "eval" / "benchmarks" / "step_000000.json").read_text()) | {"seconds": 0}
        for run in (tmp_path / "run", undisturbed)
    ]
    assert scores[0] == scores[1] and scores[0]["benchmarks"]["digits"]["samples"] == 8
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert [row["perf/compilations"] for row in rows[1:]] == [0] * 5
    assert {*tiny_run.evaluations(tmp_path / "run")} == {0, 2} and {*tiny_run.evaluations(undisturbed)} == {
        0,
        6,
    }


@pytest.mark.chaos
@pytest.mark.parametrize("killed", [0, 1])
def test_kill_9_of_a_process_is_noticed_and_changes_no_bit(
    killed: int, undisturbed: Path, base: Path, tmp_path: Path
) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    processes = start(recipe)
    wait_for(tmp_path / "run" / "metrics.jsonl", count=3)
    processes[killed].kill()
    began = time.monotonic()
    other = processes[1 - killed]
    said = outputs([other], limit=60)[0]
    assert time.monotonic() - began < 60, said
    if killed:
        assert other.returncode == TRY_AGAIN, said
        host = os.uname().nodename
        assert f"process {killed} on {host} has not been heard of for 20 s" in said and "same command" in said
    else:  # jax ends whoever loses the coordinator, and asks nobody
        assert other.returncode == -signal.SIGABRT and "the JAX distributed service detected fatal" in said
    outputs(processes)
    assert "going on from step" in complete(recipe)
    assert tiny_run.metrics(tmp_path / "run") == tiny_run.metrics(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed, tmp_path)


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_started_again(undisturbed: Path, base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, **{"checkpoint.every": 100})
    processes = start(recipe)
    wait_for(tmp_path / "run" / "metrics.jsonl", count=2)
    processes[1].send_signal(signal.SIGTERM)  # one is enough, wherever it arrives
    said = outputs(processes)
    assert [process.returncode for process in processes] == [TRY_AGAIN] * 2, said
    assert "stopped after step" in said[0]
    assert "going on from step" in complete(recipe)
    assert_same_weights(tmp_path / "run", undisturbed, tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_in_an_evaluation_ends_both_there(asked: int, base: Path, tmp_path: Path) -> None:
    more = {"eval.every": 1, "rollout.slots": 2, "checkpoint.every": 100, "run.steps": 100}
    recipe = tiny_run.write_recipe(tmp_path, base, **benchmark(tmp_path, samples=1500) | more)
    processes, run = start(recipe), tmp_path / "run"
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "1").exists():  # written before the evaluation
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    processes[asked].send_signal(signal.SIGTERM)
    said = outputs(processes, limit=25)
    assert [process.returncode for process in processes] == [TRY_AGAIN] * 2, said
    assert len(tiny_run.metrics(run)) == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("coordinator", "address", "bound"),
    [
        ("10.0.0.1:9000", "10.0.0.1", "10.0.0.1:9000"),
        ("node1:9000", "10.0.0.1", "node1:9000"),
        ("node1:9000", "127.0.1.1", None),
        ("localhost:9000", "127.0.0.1", "localhost:9000"),
        ("127.0.0.1:9000", "127.0.0.1", "127.0.0.1:9000"),
        ("[2001:db8::1]:9000", "2001:db8::1", "[2001:db8::1]:9000"),
        ("[::1]:9000", "::1", "[::1]:9000"),
    ],
)
def test_the_coordinator_listens_where_it_is_called(
    coordinator: str, address: str, bound: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {coordinator.rpartition(":")[0].strip("[]"): [(0, 0, 0, "", (address, 0))]}
    monkeypatch.setattr(processes.socket, "getaddrinfo", lambda host, port: known[host])
    assert processes._bind_address(coordinator) == bound


@pytest.mark.chaos
def test_a_run_folder_of_a_host_that_crashed_is_waited_for_by_both(
    undisturbed: Path, base: Path, tmp_path: Path
) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("process 1 on another host\n7\n")
    assert "process 1 on another host did not end its training there; watching" in complete(recipe)
    assert_same_weights(tmp_path / "run", undisturbed, tmp_path)


@pytest.mark.chaos
def test_a_run_folder_that_is_taken_ends_both(base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    with alone(tmp_path / "run", "training"):
        started = start(recipe)
        said = outputs(started)
    assert [process.returncode for process in started] == [BAD_INPUT] * 2
    assert all("is at work there" in each and "Traceback" not in each for each in said)


@pytest.mark.chaos
def test_an_error_of_one_in_a_step_ends_both(base: Path, tmp_path: Path) -> None:
    """The first one alone writes rollouts."""
    recipe = tiny_run.write_recipe(tmp_path, base)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts").touch()
    started = start(recipe)
    said = outputs(started)
    assert [process.returncode for process in started] == [BAD_INPUT] * 2, said
    assert all("run/rollouts" in each and "Traceback" not in each for each in said), said


def test_one_that_does_not_come(base: Path, tmp_path: Path) -> None:
    process = tiny_run.jaxrl(
        "train", tiny_run.write_recipe(tmp_path, base), JAXRL_COORDINATOR="here", JAXRL_PROCESS="0"
    )
    said = outputs([process])[0]
    assert process.returncode == 2 and "JAXRL_PROCESSES=''" in said and "give all three" in said


@pytest.mark.slow
@pytest.mark.parametrize("gather", get_args(Gather))
def test_a_checkpoint_is_resumed_on_every_mesh(base: Path, tmp_path: Path, gather: str) -> None:
    """Written by two processes of two devices and read by them, by one with 2 and with 1; and the other way.

    What is read is verified by fingerprints, which are the same on every mesh.
    """
    sections = {"mesh.gather": gather, "model.remat": "full", "optimizer.learning_rate": 1e-4}
    complete(tiny_run.write_recipe(tmp_path, base, **{"run.steps": 2} | sections))
    first, found = tmp_path / "run", list[dict[str, np.ndarray]]()
    for devices in (2, 1):
        again = tmp_path / str(devices)
        shutil.copytree(first, again)
        changed = {"run.steps": 3, "run.directory": str(again)} | sections
        process = tiny_run.jaxrl(
            "train", tiny_run.write_recipe(tmp_path, base, **changed), JAX_NUM_CPU_DEVICES=str(devices)
        )
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "going on from step 2" in output, output
        found.append(params(again, 3))
    assert "going on from step 2" in complete(
        tiny_run.write_recipe(tmp_path, base, **{"run.steps": 3} | sections)
    )
    for other in found:
        for name, array in params(first, 3).items():
            np.testing.assert_allclose(other[name], array, atol=1e-6, rtol=0, err_msg=name)
    more = {"run.steps": 4, "run.directory": str(tmp_path / "1")} | sections
    assert "going on from step 3" in complete(tiny_run.write_recipe(tmp_path, base, **more))


def params(run: Path, step: int) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, as Orbax reads them without a mesh."""
    folder, reader = run.absolute() / "checkpoints" / str(step) / "params", ocp.PyTreeCheckpointer()
    tree = reader.metadata(folder).item_metadata.tree
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    read = reader.restore(folder, restore_args=kinds)
    return {str(path): array for path, array in jax.tree_util.tree_leaves_with_path(read)}
